"""Small networks with branches: of known use, with attention, with a stride, with two stacks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Residual(nn.Module):
    """``x + gain * f(x)``: the smaller the gain, the less it does."""

    def __init__(self, gain: float, width: int = 8) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.gain = gain

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gain * self.down(self.up(x).relu())


class Layer(nn.Module):
    """Attention with a hand-written softmax, and an MLP: a block with two branches."""

    def __init__(self, width: int = 8, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm2, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.norm(x)).chunk(3, -1))
        weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
        x = x + self.out((weights @ v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Convolved(nn.Module):
    """A residual block with batch norms, which writes in place and has a ReLU behind the sum."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, 1, 1, bias=False) for _ in range(2))
        self.bn1, self.bn2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += x
        return self.relu(out)


GAINS = (1.0, 0.01, 0.5, 0.001, 2.0)


def residuals(gains: tuple[float, ...] = GAINS) -> tuple[nn.Module, Tensor]:
    """Blocks of an MLP whose use is in the order of `gains`, and inputs for it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), *map(Residual, gains), nn.Linear(8, 3))
    with torch.no_grad():
        model[-1].weight *= 5
    return model.eval(), torch.randn(32, 4)


def transformer(layers: int = 3) -> tuple[nn.Module, Tensor]:
    """Pre-norm layers between an embedding and a head, and tokens for it."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(11, 8), *(Layer() for _ in range(layers)), nn.Linear(8, 11)).eval(), (
        torch.randint(0, 11, (4, 6))
    )


def convolutional(blocks: int = 4) -> tuple[nn.Module, Tensor]:
    """A small ResNet that was run in training mode, so that its norms have statistics, and images for it."""
    torch.manual_seed(0)
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    model = nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1), nn.ReLU(), *(Convolved() for _ in range(blocks)), *head)
    x = torch.randn(16, 3, 8, 8)
    with torch.no_grad():
        model.train()(x)
    return model.eval(), x


def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Of logits whose last dimension is the classes."""
    return F.cross_entropy(model(batch[0]).flatten(0, -2), batch[1].flatten())
