"""Which groups lose channels, and how many: those of the axes asked for, in numbers that hardware runs fast."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from math import gcd, lcm
from typing import Literal

import numpy as np
import torch

from structprune.coupling.factored import FactoredAxis
from structprune.coupling.graph import ChannelGraph
from structprune.coupling.groups import Group, Member, group_numbers
from structprune.coupling.roles import Roles
from structprune.hardware import step_of
from structprune.latency.table import BELOW

RoundTo = int | Literal["auto"]

# "auto" moves no width by more than about an eighth of what it was: a group has at least as many steps. A finer step
# would not pay: blocked convolutions take as long for 40 channels as for 48.
FINEST = 4
# With fewer heads than this, channels inside the heads go rather than whole heads.
FEW = 4
# What is cut into equal parts where several devices share a layer.
_SHARED = ("hidden", "mlp", "channels", "heads")


@dataclass(frozen=True, slots=True)
class Rounding:
    """The numbers of channels that a group may keep.

    Args:
        round_to: every width that changes becomes a multiple of this; ``"auto"`` takes a power of two that suits the
            device and type, smaller for narrow layers.
        device: where the model is; a CPU if not given.
        dtype: the type of its weights.
        min_channels: a group keeps at least as many channels.
        max_ratio: no group loses a greater share of its channels.
    """

    round_to: RoundTo = "auto"
    device: torch.device | None = None
    dtype: torch.dtype = torch.float32
    min_channels: int = 1
    max_ratio: float = 1.0

    def feasible(
        self,
        group: Group,
        roles: Roles,
        bounds: tuple[int, int] = (1, 1),
        measured: int | None = None,
        divisor: int = 1,
    ) -> np.ndarray:
        """The numbers of channels that `group` may keep, ascending; all of them is always one.

        `bounds` are the least number that the forward allows, and what it must be a multiple of. `measured` is the step
        of the layers' widths in which their time falls, if that was measured; it takes the place of ``"auto"``, and
        below one step parts of it are feasible: layers that read so few channels save by each. Numbers that are not all
        of them are multiples of `divisor`.
        """
        size = group.channels
        multiple = lcm(bounds[1], divisor)
        step = lcm(self.step(group, roles, measured), multiple)
        part = step if measured is None else lcm(self.step(group, roles, max(1, measured // BELOW)), multiple)
        least = max(bounds[0], self.min_channels, int(np.ceil(size * (1 - self.max_ratio) - 1e-9)))
        counts = np.append(np.arange(part, min(step, size), part), np.arange(step, size, step))
        return np.append(counts[counts >= least], size)

    def step(self, group: Group, roles: Roles, measured: int | None = None) -> int:
        """How many channels of `group` must go at a time; see `feasible`."""
        repeats = [_repeat(member, group.channels) for member in _widths(group, roles)]
        if group.axis == "head_size":
            repeats.append(1)  # the size itself is what attention sums over
        if self.round_to == "auto" and measured is not None:
            multiple = measured
        elif self.round_to == "auto":
            width = group.channels * min(repeats, default=1)
            multiple = min(step_of(self.device, self.dtype), 1 << max(0, (width // FINEST).bit_length() - 1))
        else:
            multiple = self.round_to
        step = _step(multiple, repeats)
        # Maps of 7 x 7 take 49 rows of a linear layer along: for a multiple of 16, all of 16 maps would have to go.
        most = max(1, group.channels // FINEST) if measured is None else max(multiple, group.channels - 1)
        while self.round_to == "auto" and multiple > 1 and step > most:
            multiple //= 2
            step = _step(multiple, repeats)
        return step


def _step(multiple: int, repeats: list[int]) -> int:
    """The fewest channels whose repeats are all multiples of `multiple`."""
    return lcm(*(multiple // gcd(multiple, repeat) for repeat in repeats))


def nearest(feasible: np.ndarray, wanted: float) -> int:
    """The feasible number nearest to `wanted`; the greater of two as near."""
    return int(feasible[::-1][np.argmin(np.abs(feasible[::-1] - wanted))])


def _widths(group: Group, roles: Roles) -> list[Member]:
    """The members that show how wide the layers are: outputs of layers, else sides of their weights, else any."""
    for dims in (roles.producers, roles.weights):
        members = [m for m in group.members if (m.tensor, m.dim) in dims]
        if members:
            return members
    return list(group.members)


def _repeat(member: Member, channels: int) -> int:
    """How many indices of the member's dimension each channel takes along."""
    counts = np.bincount(member.channels, minlength=channels)
    return max(1, int(np.gcd.reduce(counts[counts > 0])))


def divisors(graph: ChannelGraph, devices: int) -> dict[Group, int]:
    """What the numbers of channels must be multiples of, so that `devices` share each layer: every group's own number.

    Of key-value heads that each serve several query heads it is enough that one number is a multiple: 8 key-value heads
    on 4 devices are 4 or 8, with as many query heads each as may be. 2 key-value heads stay whole on 4 devices, with an
    even number of query heads each.
    """
    groups = graph.groups()
    required = {group: devices if group.axis in _SHARED else 1 for group in groups}
    numbers = group_numbers(graph.components, groups)
    for factored in graph.components.factored_axes:
        inside = [n for factor in _factors(graph, numbers, factored) for n in factor if groups[n].axis == "heads"]
        for number in inside[1:]:
            first, other = groups[inside[0]], groups[number]
            if first.channels % devices:
                required[first] = first.channels
                required[other] = devices // gcd(first.channels, devices)
            else:
                required[other] = 1
    return required


# -- which groups lose channels --------------------------------------------------------------------------------------


def prunable_groups(
    graph: ChannelGraph,
    ratio: Callable[[Group], float],
    feasible: Mapping[Group, np.ndarray],
    axes: Collection[str] | None,
    *,
    heads_first: bool = False,
) -> Sequence[Group]:
    """The groups that lose channels; of a product (heads x head size, groups x channels in a group) one factor only.

    The factor is chosen whose nearest feasible number of channels misses the ratio least; whole heads or groups before
    positions inside them where both come as near, if there are at least four of them. A factor of which nothing is to
    be removed is chosen last. Where `axes` names the axes of both factors, both lose channels.

    With `heads_first`, whole heads go before positions inside them, however many there are.

    Of 12 heads of 64 channels at a ratio of 0.5, with multiples of 16 for the size: 6 heads miss nothing, and so do 32
    channels of each head, so the heads are chosen. At 0.3, of 8.4 heads 8 may be kept (missed by 3%) and of 44.8
    channels 48 (by 5%): heads again.
    """
    groups = graph.groups()
    wanted = [group for group in groups if axes is None or group.axis in axes]
    numbers = group_numbers(graph.components, wanted)
    factors_of = [_factors(graph, numbers, factored) for factored in graph.components.factored_axes]
    choice = _FactorChoice(wanted, ratio, feasible, axes is not None, heads_first)
    for factors in factors_of:
        choice.decide(factors)
    return [group for number, group in enumerate(wanted) if number not in choice.whole]


def _factors(graph: ChannelGraph, numbers: np.ndarray, factored: FactoredAxis) -> list[list[int]]:
    """The groups in each factor of a product, by number."""
    inside = (np.unique(numbers[np.unique(graph.roots.of(part)[1])]) for part in factored.factors)
    return [numbers_in[numbers_in >= 0].tolist() for numbers_in in inside]


class _FactorChoice:
    """Which groups lose channels, product by product.

    Args:
        groups: those that may.
        ratio: the share that each is to lose.
        feasible: the numbers of channels that each may keep.
        named: whether the user named axes, so that factors on different ones both lose channels.
        heads_first: whole heads go before positions inside them.

    Attributes:
        whole: the groups that stay whole, by number, as another factor of their product loses channels.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        ratio: Callable[[Group], float],
        feasible: Mapping[Group, np.ndarray],
        named: bool,
        heads_first: bool,
    ) -> None:
        self._groups, self._ratio, self._feasible, self._named = groups, ratio, feasible, named
        self._heads_first = heads_first
        self._chosen: set[int] = set()
        self.whole: set[int] = set()

    def decide(self, factors: list[list[int]]) -> None:
        """Choose a factor of one product; one that was chosen for another product is chosen again."""
        candidates = [number for factor in factors for number in factor if number not in self.whole]
        if not candidates:
            return
        chosen = [number for number in candidates if number in self._chosen]
        best = min(chosen, key=self._keeps_all) if chosen else min(candidates, key=self._miss)
        self._chosen.add(best)
        self.whole |= {i for i in candidates if i != best and not self._both(i, best, factors)}

    def _both(self, a: int, b: int, factors: list[list[int]]) -> bool:
        """Whether both groups lose channels: they are parts of one factor, side by side, or on axes that were named."""
        if self._named and self._groups[a].axis != self._groups[b].axis:
            return True
        return all((a in factor) == (b in factor) for factor in factors)

    def _keeps_all(self, number: int) -> bool:
        return self._ratio(self._groups[number]) <= 0

    def _miss(self, number: int) -> tuple[bool, bool, float, bool, bool, int]:
        """How badly a group suits as the factor that loses channels; the smallest is the best."""
        group = self._groups[number]
        wanted = group.channels * (1 - self._ratio(group))
        missed = abs(wanted - nearest(self._feasible[group], wanted)) / group.channels
        inside = group.axis == "head_size"
        return self._keeps_all(number), self._heads_first and inside, missed, group.channels < FEW, inside, number
