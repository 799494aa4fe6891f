"""Networks with branches in the ways that people write them: a sum, a gain, parallel, in place, in a loop."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import structprune


class Residual(nn.Module):
    """``combine(x, f(x))``."""

    def __init__(self, combine: Callable[[Tensor, Tensor], Tensor], width: int = 6) -> None:
        super().__init__()
        self.norm, self.layer = nn.LayerNorm(width), nn.Linear(width, width)
        self.gain = nn.Parameter(torch.rand(width))
        self.combine = combine

    def forward(self, x: Tensor) -> Tensor:
        return self.combine(x, self.layer(self.norm(x)))


class Scaled(Residual):
    def forward(self, x: Tensor) -> Tensor:
        return x + F.dropout(self.gain * self.layer(self.norm(x)), 0.5, self.training)


class Parallel(nn.Module):
    """Attention-like and MLP-like branches of the same input, summed first."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + (self.left(x) + self.right(x).tanh())


class Convolved(nn.Module):
    """A residual block with the ReLU behind the sum, as in ResNets."""

    def __init__(self, channels: int = 4, stride: int = 1) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(channels, channels, 3, stride, 1), nn.BatchNorm2d(channels)
        self.shortcut = nn.Conv2d(channels, channels, 1, stride) if stride > 1 else None
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn(self.conv(x))
        out += x if self.shortcut is None else self.shortcut(x)
        return self.relu(out)


class Looped(nn.Module):
    """Layers in a list that the forward goes through, each of which knows its number."""

    def __init__(self, by_number: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Scaled(lambda x, f: x) for _ in range(3))
        for number, layer in enumerate(self.layers):
            layer.number = number
        self.by_number = by_number

    def forward(self, x: Tensor) -> Tensor:
        for i in range(3) if self.by_number else ():
            x = self.layers[i](x)
        for layer in () if self.by_number else self.layers:
            x = layer(x)
        return x


def stack_of(*blocks: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), *blocks, nn.Linear(6, 3)).double().eval()


def x_of(*shape: int) -> Tensor:
    return torch.randn(*(shape or (2, 6)), dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def names(model: nn.Module, inputs: Tensor) -> list[str]:
    return [branch.name for branch in structprune.branches(model, inputs)]


def build() -> nn.Module:
    return stack_of(Scaled(torch.add), Parallel(), Scaled(torch.add))


# Two branches of `build`.
CHOSEN = ["1", "2 (left)"]
