"""Random networks: a tree of units, drawn by hypothesis, on images of 2 x channels x 5 x 5.

A specification is a nest of tuples, so that a failing example prints as something to paste. Each unit is a module that
takes and gives an image; what it does with the channels inside is its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

Spec = tuple[Any, ...]
SIZE = 5
UNITS: dict[str, Callable[..., nn.Module]] = {}


def unit(network: type[nn.Module]) -> type[nn.Module]:
    """Register a unit: a module class with the channels that come in as its first argument, and `width` out."""
    UNITS[network.__name__] = network
    return network


class Unit(nn.Module):
    """As many channels out as in, unless a unit says otherwise."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.width = channels


@unit
class Conv(Unit):
    def __init__(self, channels: int, width: int, kernel: int, bias: bool) -> None:
        super().__init__(width)
        self.conv = nn.Conv2d(channels, width, kernel, padding=kernel // 2, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


@unit
class Grouped(Unit):
    def __init__(self, channels: int, each: int, transposed: bool) -> None:
        groups = 4 if channels % 4 == 0 else 2
        super().__init__(groups * each)
        build = nn.ConvTranspose2d if transposed else nn.Conv2d
        self.conv = build(channels, self.width, 3, padding=1, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


@unit
class Depthwise(Unit):
    def __init__(self, channels: int, multiplier: int) -> None:
        super().__init__(channels * multiplier)
        self.conv = nn.Conv2d(channels, self.width, 3, padding=1, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


@unit
class Norm(Unit):
    def __init__(self, channels: int, kind: str) -> None:
        super().__init__(channels)
        groups = 2 if kind == "group" else 1
        self.last = kind in ("layer", "rms")
        self.norm = {
            "batch": lambda: nn.BatchNorm2d(channels),
            "group": lambda: nn.GroupNorm(groups, channels),
            "one": lambda: nn.GroupNorm(1, channels),
            "instance": lambda: nn.InstanceNorm2d(channels, affine=True),
            "layer": lambda: nn.LayerNorm(channels),
            "rms": lambda: nn.RMSNorm(channels, eps=1e-6),
        }[kind]()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) if self.last else self.norm(x)


@unit
class Activation(Unit):
    def __init__(self, channels: int, name: str) -> None:
        super().__init__(channels)
        self.function = {"relu": nn.ReLU(inplace=True), "prelu": nn.PReLU(channels)}.get(name) or getattr(F, name)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@unit
class Residual(Unit):
    """Adds, or multiplies by, what a chain makes of the input."""

    def __init__(self, channels: int, chain: Sequence[Spec], multiply: bool) -> None:
        super().__init__(channels)
        self.body, width = build_chain(channels, chain)
        self.back = nn.Conv2d(width, channels, 1)
        self.multiply = multiply

    def forward(self, x: Tensor) -> Tensor:
        y = self.back(self.body(x))
        return x * torch.tanh(y) if self.multiply else x + y


@unit
class Branches(Unit):
    """Chains side by side, and the input with them if asked."""

    def __init__(self, channels: int, chains: Sequence[Sequence[Spec]], keep: bool) -> None:
        built = [build_chain(channels, chain) for chain in chains]
        super().__init__(sum(width for _, width in built) + (channels if keep else 0))
        self.branches = nn.ModuleList(chain for chain, _ in built)
        self.keep = keep

    def forward(self, x: Tensor) -> Tensor:
        parts = [branch(x) for branch in self.branches]
        return torch.cat([x, *parts] if self.keep else parts, dim=1)


@unit
class Split(Unit):
    """Halves that go different ways: concatenated, added, or one the gate of the other."""

    def __init__(self, channels: int, chain: Sequence[Spec], how: str) -> None:
        self_width = channels // 2
        body, width = build_chain(self_width, chain)
        super().__init__(self_width + width if how == "cat" else self_width)
        self.how, self.body = how, body
        self.back = nn.Identity() if how == "cat" else nn.Conv2d(width, self_width, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=1)
        b = self.back(self.body(b))
        if self.how == "cat":
            return torch.cat((a, b), 1)
        return a + b if self.how == "add" else a * torch.sigmoid(b)


@unit
class Shared(Unit):
    """One convolution at two places."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.elu(self.conv(x)))


@unit
class SqueezeExcite(Unit):
    def __init__(self, channels: int, width: int) -> None:
        super().__init__(channels)
        self.down, self.up = nn.Linear(channels, width), nn.Linear(width, channels)

    def forward(self, x: Tensor) -> Tensor:
        gate = torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3))))))
        return x * gate[:, :, None, None]


@unit
class Shuffle(Unit):
    def __init__(self, channels: int) -> None:
        super().__init__(channels)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


@unit
class Affine(Unit):
    """A bare parameter and a bare buffer."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.scale = nn.Parameter(torch.ones(channels))
        self.register_buffer("shift", torch.zeros(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale.view(-1, 1, 1) + self.shift


@unit
class Attention(Unit):
    """Over the pixels, the heads from one packed projection."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__(channels)
        self.heads = heads
        self.qkv, self.proj = nn.Linear(channels, 3 * 4 * heads), nn.Linear(4 * heads, channels)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        y = x.flatten(2).transpose(1, 2)
        q, k, v = self.qkv(y).reshape(n, h * w, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x + self.proj(y).transpose(1, 2).reshape(n, c, h, w)


@unit
class Reorder(Unit):
    """Flips the channels, or swaps their halves in two ways."""

    def __init__(self, channels: int, how: str) -> None:
        super().__init__(channels)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "flip":
            return x.flip(1)
        if self.how == "swap":
            return torch.cat(x.chunk(2, dim=1)[::-1], dim=1)
        return x.unflatten(1, (2, -1)).flip(1).flatten(1, 2)


class RandomNetwork(nn.Module):
    """A chain with a head that reads its channels one by one, pixel by pixel, or as maps."""

    def __init__(self, chain: Sequence[Spec], head: str, stem: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, stem, 3, padding=1)
        self.body, width = build_chain(stem, chain)
        self.how = head
        self.head = (
            nn.Conv2d(width, 3, 1) if head == "conv" else nn.Linear(width * (SIZE**2 if head == "flat" else 1), 3)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(self.stem(x))
        if self.how == "conv":
            return self.head(x)
        return self.head(torch.flatten(x, 1) if self.how == "flat" else x.mean((2, 3)))


def build_chain(channels: int, chain: Sequence[Spec]) -> tuple[nn.Module, int]:
    """The units of a chain one after another, and the channels that come out.

    A unit may halve its input or group it, so one that is odd, or very thin or wide, gets a convolution first.
    """
    units: list[nn.Module] = []
    for name, *arguments in chain:
        if channels % 2 or not 4 <= channels <= 32:
            units.append(Conv(channels, 8, 1, True))
            channels = 8
        units.append(UNITS[name](channels, *arguments))
        channels = units[-1].width
    return nn.Sequential(*units), channels


def _leaf_units() -> st.SearchStrategy[Spec]:
    width = st.sampled_from((4, 6, 8))
    kinds = st.sampled_from(("batch", "group", "one", "instance", "layer", "rms"))
    return st.one_of(
        st.tuples(st.just("Conv"), width, st.sampled_from((1, 3)), st.booleans()),
        st.tuples(st.just("Grouped"), st.sampled_from((2, 3)), st.booleans()),
        st.tuples(st.just("Depthwise"), st.sampled_from((1, 2))),
        st.tuples(st.just("Norm"), kinds),
        st.tuples(st.just("Activation"), st.sampled_from(("relu", "prelu", "gelu", "sigmoid", "tanh", "hardswish"))),
        st.tuples(st.just("Shared")),
        st.tuples(st.just("SqueezeExcite"), st.sampled_from((2, 4))),
        st.tuples(st.just("Shuffle")),
        st.tuples(st.just("Affine")),
        st.tuples(st.just("Attention"), st.sampled_from((1, 2))),
        st.tuples(st.just("Reorder"), st.sampled_from(("flip", "swap", "grid"))),
    )


def _branching(units: st.SearchStrategy[Spec]) -> st.SearchStrategy[Spec]:
    chain = st.lists(units, min_size=1, max_size=3).map(tuple)
    return st.one_of(
        st.tuples(st.just("Residual"), chain, st.booleans()),
        st.tuples(st.just("Branches"), st.lists(chain, min_size=1, max_size=3).map(tuple), st.booleans()),
        st.tuples(st.just("Split"), chain, st.sampled_from(("cat", "add", "gate"))),
    )


def chains() -> st.SearchStrategy[tuple[Spec, ...]]:
    """Chains of one to five units, some of them branching, up to three deep."""
    units = st.recursive(_leaf_units(), lambda inner: st.one_of(_leaf_units(), _branching(inner)), max_leaves=6)
    return st.lists(st.one_of(units, _branching(units)), min_size=1, max_size=4).map(tuple)


def heads() -> st.SearchStrategy[str]:
    """How the last layer reads the image."""
    return st.sampled_from(("conv", "flat", "mean"))
