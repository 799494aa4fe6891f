"""Networks that several test files prune: a residual one, a transformer, and one to put into wrappers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import structprune
from support import oracle
from support.cases import normal

IMAGE = torch.randn(2, 3, 12, 12)


class Residual(nn.Module):
    """A stem, two residual blocks of convolutions, a head: one hidden width, two inner ones."""

    def __init__(self, width: int = 48, inner: int = 40, groups: int = 1) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3)
        self.layer1 = self._block(width, inner, groups)
        self.layer2 = self._block(width, inner, groups)
        self.head = nn.Linear(width, 10)

    def _block(self, width: int, inner: int, groups: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(width, inner, 1),
            nn.ReLU(),
            nn.Conv2d(inner, inner, 3, padding=1, groups=groups),
            nn.ReLU(),
            nn.Conv2d(inner, width, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.layer1(x)
        x = x + self.layer2(x)
        return self.head(x.mean((2, 3)))


class Transformer(nn.Module):
    """One pre-norm block with grouped-query attention: 8 query heads, 4 key and value heads of size 16."""

    def __init__(self, width: int = 64, heads: int = 8, kv_heads: int = 4, size: int = 16) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.size = heads, kv_heads, size
        self.embed = nn.Embedding(11, width)
        self.norm = nn.LayerNorm(width)
        self.q = nn.Linear(width, heads * size)
        self.k = nn.Linear(width, kv_heads * size)
        self.v = nn.Linear(width, kv_heads * size)
        self.o = nn.Linear(heads * size, width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)
        self.out = nn.Linear(width, 11)

    def forward(self, ids: Tensor) -> dict[str, Any]:
        x = self.embed(ids)
        h = self.norm(x)
        b, n = ids.shape
        q = self.q(h).view(b, n, self.heads, self.size).transpose(1, 2)
        k = self.k(h).view(b, n, self.kv_heads, self.size).transpose(1, 2)
        v = self.v(h).view(b, n, self.kv_heads, self.size).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        x = x + self.o(y.transpose(1, 2).reshape(b, n, -1))
        x = x + self.fc2(F.gelu(self.fc1(x)))
        return {"logits": self.out(x), "hidden": {"last": x}}


IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])


def exact(model: nn.Module, inputs: Any, plan: structprune.Plan) -> nn.Module:
    """The slim model, after checking it against the oracle."""
    model, inputs = oracle.jitter(model, seed=3), oracle.double(inputs)
    slim = plan.apply(model)
    oracle.check(model, slim, plan, inputs)
    return slim


def widths(model: nn.Module) -> dict[str, int]:
    return {name: tensor.shape[0] for name, tensor in model.named_parameters() if name.endswith("weight")}


PIXELS = normal(4, 3, 7, 7).double()


class Named(nn.Module):
    """Layers by name, so that names inside a wrapper can be told from those outside."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.head = nn.Conv2d(8, 12, 3), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.norm(self.conv1(x)))
        return self.head(F.adaptive_avg_pool2d(F.gelu(self.conv2(x)), 1).flatten(1))


def named_network() -> Named:
    model = oracle.jitter(Named(), seed=0)
    assert isinstance(model, Named)
    return model
