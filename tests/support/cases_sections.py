"""Sections of equal size that keep channels of their own choice, and sections that cannot."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.cases import case, features, image, normal, tokens
from support.cases_conv import conv


def shuffled(x: Tensor, groups: int) -> Tensor:
    """Interleave `groups` sections."""
    n, c, h, w = x.shape
    return x.view(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)


@case(image(), {"stem.weight": 0, "a.weight": 1, "b.weight": 1, "head.weight": 1})
class HalvesApart(nn.Module):
    """Each half has a layer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.head = conv(3, 16), conv(8, 6), conv(8, 10), conv(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        left, right = F.relu(self.stem(x)).chunk(2, dim=1)
        return self.head(torch.cat([self.a(left), self.b(right)], 1))


class _Unit(nn.Module):
    """Half of the channels pass, half go through a layer; then both are shuffled."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.narrow, self.norm, self.wide = conv(width, 12), nn.BatchNorm2d(12), conv(12, width)

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, dim=1)
        return shuffled(torch.cat((left, self.wide(F.relu(self.norm(self.narrow(right))))), dim=1), 2)


class _Shuffling(nn.Module):
    def __init__(self, width: int, units: int) -> None:
        super().__init__()
        self.left, self.right, self.head = conv(3, width), conv(3, width), conv(2 * width, 4)
        self.units = nn.Sequential(*(_Unit(width) for _ in range(units)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.units(shuffled(torch.cat((self.left(x), self.right(x)), dim=1), 2)))


@case(image(), {"left.weight": 0, "right.weight": 0, "units.0.wide.weight": 0, "units.2.wide.weight": 0,
                "units.2.narrow.weight": (0, 1), "head.weight": 1})  # fmt: skip
class ShuffledUnits(_Shuffling):
    """What passes untouched is paired with other channels than before, so weights behind it change their order."""

    def __init__(self) -> None:
        super().__init__(16, 3)


@case(image(), {"left.weight": 0, "right.weight": 0, "units.1.wide.weight": 0, "head.weight": 1})
class OddShuffledUnits(_Shuffling):
    """Half of the halves is no whole number."""

    def __init__(self) -> None:
        super().__init__(14, 2)


@case(image(), {"stem.weight": 0, "norm.weight": 0, "depth.weight": 0, "point.weight": (0, 1), "head.weight": 1})
class ShuffledIntoDepthwise(nn.Module):
    """Behind the shuffle stand layers that have an entry a channel, and an addition."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.unit, self.norm = conv(3, 16), _Unit(8), nn.BatchNorm2d(16)
        self.depth, self.point, self.head = conv(16, 16, groups=16), conv(16, 16), conv(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depth(F.relu(self.norm(self.unit(self.stem(x)))))
        return self.head(x + self.point(x))


@case(image(), {"stem.weight": 0, "m.weight": (0, 1), "join.weight": 1})
class CrossStage(nn.Module):
    """Both halves and what is made of one of them, joined."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.m, self.join = conv(3, 16), conv(8, 8), conv(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = list(self.stem(x).chunk(2, 1))
        y.append(y[-1] + F.relu(self.m(y[-1])))
        return self.join(torch.cat(y, 1))


@case(tokens(), {"qkv.weight": 0, "proj.weight": 1})
class SectionsOfHeads(nn.Module):
    """Query, key and value are sections that are grids of heads."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.qkv, self.proj = 4, nn.Linear(8, 48), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@case(image(), {"stem.weight": 0, "a.weight": 1, "head.weight": 1})
class HalvesCutAgain(nn.Module):
    """One half is cut by number."""

    def __init__(self) -> None:
        super().__init__()
        self.width = 4
        self.stem, self.a, self.head = conv(3, 16), conv(4, 8), conv(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.stem(x).chunk(2, dim=1)
        return self.head(
            torch.cat([self.a(left[:, : self.width]), right[:, self.width :] * 2, right[:, :4]], 1)[:, :12]
        )


@case(image(), {"stem.weight": 0, "a.weight": (0, 1), "head.weight": 1})
class SplitByQuotient(nn.Module):
    """The size of a section is the quotient of two attributes, of which one must follow."""

    def __init__(self) -> None:
        super().__init__()
        self.channels, self.paths = 16, 2
        self.stem, self.a, self.head = conv(3, 16), conv(8, 8), conv(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        left, right = torch.split(self.stem(x), self.channels // self.paths, 1)
        return self.head(self.a(left) + right)


@case(tokens(), {"embed.weight": 0, "mix.weight": 0, "head.weight": 1})
class MixedAlongPositions(nn.Module):
    """A convolution of kernel 1 sees the features as positions, each by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.out = nn.Linear(8, 16), nn.Conv1d(5, 6, 1), nn.Conv1d(6, 1, 1)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.out(F.relu(self.mix(self.embed(x)))).squeeze(1))


@case(image(), {"stem.weight": 0, "b.weight": 1, "units.0.wide.weight": 0, "head.weight": 1})
class ShuffledAndJoinedTwice(nn.Module):
    """What is in another order stands twice in what is joined, once after another shuffle."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.b, self.units, self.head = conv(3, 16), conv(16, 16), nn.Sequential(_Unit(8)), conv(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.units(self.stem(x))
        return self.head(torch.cat([x, self.b(x), F.relu(x), shuffled(x, 2)], 1))


@case(features(), {"fc.weight": 0}, pinned={"table": "may build it anew"})
class RebuiltTable(nn.Module):
    """A tensor that the forward makes anew for inputs of another size."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.place, self.head = nn.Linear(6, 8), nn.Linear(2, 8), nn.Linear(8, 4)
        self.register_buffer("table", normal(3, 2), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.table.shape[0] != x.shape[0]:
            self.table = normal(x.shape[0], 2).to(x)
        return self.head(F.relu(self.fc(x)) + self.place(self.table))
