"""Shapes of speech recognition: a Conformer, and recurrent networks over features."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo_models.entry import Entry


class FeedForward(nn.Sequential):
    def __init__(self, width: int, hidden: int):
        super().__init__(nn.LayerNorm(width), nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, width))


class ConvModule(nn.Module):
    """Pointwise with GLU, depthwise, batch norm, pointwise."""

    def __init__(self, width: int, kernel: int = 7):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.pointwise1 = nn.Conv1d(width, 2 * width, 1)
        self.depthwise = nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=width)
        self.batch_norm = nn.BatchNorm1d(width)
        self.pointwise2 = nn.Conv1d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.glu(self.pointwise1(self.norm(x).transpose(1, 2)), dim=1)
        return self.pointwise2(F.silu(self.batch_norm(self.depthwise(x)))).transpose(1, 2)


class RelativeAttention(nn.Module):
    """Self-attention with Transformer-XL's relative positions, as Conformers have it."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, self.size = heads, width // heads
        self.norm = nn.LayerNorm(width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.pos = nn.Linear(width, width, bias=False)
        self.u = nn.Parameter(torch.randn(heads, self.size) * 0.1)
        self.w = nn.Parameter(torch.randn(heads, self.size) * 0.1)

    def _split(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], -1, self.heads, self.size)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        x = self.norm(x)
        q, k, v = self._split(self.q(x)), self._split(self.k(x)).transpose(1, 2), self._split(self.v(x)).transpose(1, 2)
        p = self._split(self.pos(positions)).transpose(1, 2)
        content = (q + self.u).transpose(1, 2) @ k.transpose(-2, -1)
        place = (q + self.w).transpose(1, 2) @ p.transpose(-2, -1)
        b, h, t, n = place.shape
        place = F.pad(place, (1, 0)).view(b, h, n + 1, t)[:, :, 1:].view(b, h, t, n)[..., :t]
        weight = ((content + place) / self.size**0.5).softmax(-1)
        return self.out((weight @ v).transpose(1, 2).reshape(b, t, self.heads * self.size))


class ConformerBlock(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.first = FeedForward(width, 4 * width)
        self.attention = RelativeAttention(width, heads)
        self.conv = ConvModule(width)
        self.second = FeedForward(width, 4 * width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        x = x + 0.5 * self.first(x)
        x = x + self.attention(x, positions)
        x = x + self.conv(x)
        return self.norm(x + 0.5 * self.second(x))


class Conformer(nn.Module):
    """Convolutional subsampling, two blocks, a layer of tokens."""

    def __init__(self, width: int = 32, mels: int = 16, length: int = 8):
        super().__init__()
        self.sub = nn.Sequential(nn.Conv2d(1, width, 3, 2, 1), nn.ReLU(), nn.Conv2d(width, width, 3, 2, 1), nn.ReLU())
        self.project = nn.Linear(width * (mels // 4), width)
        self.positions = nn.Parameter(torch.randn(1, 2 * length - 1, width))
        self.blocks = nn.ModuleList([ConformerBlock(width, 4) for _ in range(2)])
        self.tokens = nn.Linear(width, 30)

    def forward(self, mel: Tensor) -> Tensor:
        x = self.sub(mel[:, None])
        b, c, t, f = x.shape
        x = self.project(x.transpose(1, 2).contiguous().view(b, t, c * f))
        for block in self.blocks:
            x = block(x, self.positions)
        return self.tokens(x).log_softmax(-1)


class Recurrent(nn.Module):
    """Convolutions, a bidirectional GRU, an LSTM, a layer of tokens."""

    def __init__(self, width: int = 24, mels: int = 16):
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, (1, 2), 1)
        self.gru = nn.GRU(8 * (mels // 2), width, num_layers=2, bidirectional=True, batch_first=True)
        self.lstm = nn.LSTM(2 * width, width, batch_first=True)
        self.tokens = nn.Linear(width, 30)

    def forward(self, mel: Tensor) -> Tensor:
        x = F.relu(self.conv(mel[:, None]))
        x = x.permute(0, 2, 1, 3).flatten(2)
        return self.tokens(self.lstm(self.gru(x)[0])[0])


def entries() -> list[Entry]:
    """All of them."""
    models = {"conformer": Conformer, "conv-gru-lstm": Recurrent}
    return [Entry("speech", name, lambda make=make: (make(), torch.randn(2, 32, 16))) for name, make in models.items()]
