"""Language models in small: embeddings, tied tables, rotary positions, grouped queries."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.cases import case, ids, tokens
from support.cases_norm import RmsNorm


@case(ids(), {"embed.weight": 1, "fc.weight": (0, 1), "head.weight": 1})
class EmbeddingMlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.pos = nn.Embedding(13, 16), nn.Embedding(11, 16)
        self.fc, self.head = nn.Linear(16, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) + self.pos(torch.arange(x.shape[1]))
        return self.head(F.relu(self.fc(x)))


@case(ids(), {"embed.weight": 1, "fc1.weight": (0, 1), "fc2.weight": (0, 1)})
class TiedEmbedding(nn.Module):
    """The table reads words in and out."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.fc1, self.fc2 = nn.Embedding(13, 16), nn.Linear(16, 24), nn.Linear(24, 16)
        self.head = nn.Linear(16, 13, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head(x + self.fc2(F.gelu(self.fc1(x))))


def rotate_half(x: Tensor) -> Tensor:
    """The usual pairing of index i with i + size / 2."""
    return torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), dim=-1)


class Rotary(nn.Module):
    """Sines and cosines of positions from a table of frequencies."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("inv_freq", 10000.0 ** -(torch.arange(0, size, 2) / size))

    def forward(self, length: int) -> tuple[Tensor, Tensor]:
        freqs = torch.outer(torch.arange(length).to(self.inv_freq.dtype), self.inv_freq)
        angles = torch.cat((freqs, freqs), dim=-1)
        return angles.cos(), angles.sin()


def repeat_kv(x: Tensor, times: int) -> Tensor:
    """Each key and value head serves ``times`` query heads."""
    b, h, n, d = x.shape
    return x[:, :, None].expand(b, h, times, n, d).reshape(b, h * times, n, d)


class GroupedQuery(nn.Module):
    """8 query heads on 4 key and value heads, rotary, normalised queries and keys."""

    how = "repeat_kv"

    def __init__(self) -> None:
        super().__init__()
        self.head_dim, self.groups = 4, 2
        self.embed, self.norm, self.head = nn.Embedding(13, 16), RmsNorm(16), nn.Linear(16, 4)
        self.q, self.o = nn.Linear(16, 32, bias=False), nn.Linear(32, 16, bias=False)
        self.k, self.v = nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)
        self.rotary = Rotary(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        y = self.norm(x)
        shape = (*y.shape[:-1], -1, self.head_dim)
        q, k, v = (p(y).view(shape).transpose(1, 2) for p in (self.q, self.k, self.v))
        cos, sin = self.rotary(y.shape[1])
        q, k = q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin
        y = self.attend(q, k, v).transpose(1, 2).reshape(*y.shape[:-1], -1)
        return self.head(x + self.o(y))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, repeat_kv(k, self.groups), repeat_kv(v, self.groups), is_causal=True)


GQA = {"embed.weight": 1, "q.weight": (0, 1), "k.weight": (0, 1), "v.weight": (0, 1), "o.weight": (0, 1)}


@case(ids(), GQA)
class GroupedQueryRepeatKv(GroupedQuery):
    pass


@case(ids(), GQA)
class GroupedQueryInterleave(GroupedQuery):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = k.repeat_interleave(self.groups, dim=1), torch.repeat_interleave(v, self.groups, 1)
        return (q @ k.mT * self.head_dim**-0.5).softmax(-1) @ v


@case(ids(), GQA)
class GroupedQueryEnabled(GroupedQuery):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


@case(ids(), GQA)
class GroupedQueryBroadcast(GroupedQuery):
    """No copy of the keys: queries get a dimension for their group instead."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q = q.unflatten(1, (-1, self.groups))
        attn = (torch.einsum("bkgid,bkjd->bkgij", q, k) * 0.5).softmax(-1)
        return torch.einsum("bkgij,bkjd->bkgid", attn, v).flatten(1, 2)


@case(ids(), {"embed.weight": 1, "q.weight": (0, 1), "k.weight": 1, "v.weight": 1, "o.weight": (0, 1)})
class MultiQuery(GroupedQuery):
    """One key and value head for all, by broadcast."""

    def __init__(self) -> None:
        super().__init__()
        self.k, self.v = nn.Linear(16, 4), nn.Linear(16, 4)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.softmax(q @ k.transpose(-1, -2), -1) @ v


@case(ids(), {"embed.weight": 1, "q.weight": (0, 1), "k.weight": (0, 1), "v.weight": 0})
class QueryKeyNorm(GroupedQuery):
    """Queries and keys are normalised over the size of a head, and not rotated."""

    def __init__(self) -> None:
        super().__init__()
        self.qn, self.kn = RmsNorm(4), nn.LayerNorm(4)
        self.rotary = None

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.embed(x))
        q, k, v = (p(y).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for p in (self.q, self.k, self.v))
        return self.head(self.o(self.attend(self.qn(q), self.kn(k), v).transpose(1, 2).flatten(2)))


@case(tokens(), {"proj.weight": 0, "q.weight": 0, "k.weight": 0, "head.weight": 1})
class InterleavedRotary(nn.Module):
    """Pairs of neighbours are rotated, as the first rotary models did, by a strided slice and a stack."""

    def __init__(self) -> None:
        super().__init__()
        self.proj, self.q, self.k, self.head = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(16, 8), nn.Linear(16, 4)
        self.register_buffer("inv_freq", 100.0 ** -(torch.arange(0, 8, 2) / 8))

    def turn(self, x: Tensor) -> Tensor:
        angles = torch.arange(x.shape[1])[:, None] * self.inv_freq
        even, odd = x[..., ::2], x[..., 1::2]
        cos, sin = angles.cos(), angles.sin()
        return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.proj(x))
        attn = (self.turn(self.q(x)) @ self.turn(self.k(x)).transpose(1, 2)).softmax(-1)
        return self.head(attn @ x)
