"""One width for each axis over all layers.

Groups that play the same part in every layer are *alike* and keep equally many channels, each its own choice.
`structprune.planning.describable` ties them further where a configuration says more.

For example, of two layers of GPT-2 with a width of 64, 4 heads and an inner width of 256::

    alike        {hidden}, {heads of layer 0, heads of layer 1}, {inner width of layer 0, that of layer 1}
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from math import gcd

import numpy as np

from structprune.coupling.graph import ChannelGraph
from structprune.coupling.groups import Group
from structprune.planning.allocation import Problem
from structprune.planning.scopes import CoupledGroups
from structprune.planning.targets import Kept

Feasible = Mapping[Group, np.ndarray]


@dataclass(frozen=True)
class UniformWidths:
    """Which groups keep the same share of their channels.

    Attributes:
        sets: the groups of each width, by number in `ChannelGraph.groups`.
        whole: why groups lose nothing, by number: no configuration could describe it.
    """

    sets: tuple[tuple[int, ...], ...]
    whole: Mapping[int, str] = field(default_factory=dict[int, str])


def alike(graph: ChannelGraph) -> UniformWidths:
    """Groups of the same kind and size that play the same part in every layer: names that differ in numbers alone.

    Balanced groups are left out: the forward itself says how many channels each of them keeps.
    """
    balanced = {number for together in graph.balanced() for number in together.groups}
    sets: dict[Hashable, list[int]] = {}
    for number, group in enumerate(graph.groups()):
        if number not in balanced:
            dims = frozenset((re.sub(r"\d+", "#", member.tensor), member.dim) for member in group.members)
            key = group.axis, group.channels, re.sub(r"\d+", "#", group.name), dims
            sets.setdefault(key, []).append(number)
    return UniformWidths(tuple(map(tuple, sets.values())))


def coupled_by(
    widths: UniformWidths, graph: ChannelGraph, chosen: Collection[Group], feasible: Feasible
) -> list[CoupledGroups]:
    """The groups of each set as one; sets of which not all groups are `chosen` stay whole."""
    groups, wanted = graph.groups(), set(chosen)
    coupled: list[CoupledGroups] = []
    for numbers in widths.sets:
        members = tuple(groups[number] for number in numbers)
        if wanted.issuperset(members) and widths.whole.keys().isdisjoint(numbers):
            counts = shares(members)
            allowed = np.all([np.isin(counts[:, i], feasible[group]) for i, group in enumerate(members)], axis=0)
            coupled.append(CoupledGroups(members, counts[allowed]))
    return coupled


def shares(groups: Sequence[Group]) -> np.ndarray:
    """The numbers of channels by which all groups keep the same share, ascending; shape ``(steps, groups)``.

    Groups of 64 and 4 channels keep (16, 1), (32, 2), (48, 3) or (64, 4).
    """
    sizes = np.array([group.channels for group in groups])
    steps = gcd(*sizes.tolist())
    return np.arange(1, steps + 1)[:, None] * (sizes // steps)


def together(
    graph: ChannelGraph,
    groups: Collection[Group],
    feasible: Mapping[Group, np.ndarray],
    widths: UniformWidths | None,
) -> list[CoupledGroups]:
    """The groups one by one or by their widths; balanced ones together, and none of those unless all of them."""
    known, chosen = graph.groups(), set(groups)
    coupled: list[CoupledGroups] = []
    as_one: set[Group] = set()
    for balanced in graph.balanced():
        members = tuple(known[number] for number in balanced.groups)
        as_one.update(members)
        if chosen.issuperset(members):
            allowed = [np.isin(balanced.counts[:, i], feasible[group]) for i, group in enumerate(members)]
            coupled.append(CoupledGroups(members, _nested(balanced.counts, np.all(allowed, axis=0))))
    if widths is not None:
        return coupled_by(widths, graph, groups, feasible) + coupled
    alone = [CoupledGroups((group,), feasible[group][:, None]) for group in groups if group not in as_one]
    return alone + coupled


def _nested(counts: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """The allowed lines, of which none keeps more of any group than the next; the last one always."""
    lines = [counts[-1]]
    for line in counts[:-1][allowed[:-1]][::-1]:
        if (line <= lines[-1]).all():
            lines.append(line)
    return np.stack(lines[::-1])


def lost_by(problem: Problem, relative: bool) -> Callable[[Kept], float]:
    """How much importance is lost when groups keep so many channels, to compare choices of widths of different axes.

    Args:
        problem: what is to be chosen.
        relative: scores say nothing of one group against another. A width then loses a share of its importance, which
            counts as much as the parameters that hang on it: a head has many more of them than a channel of an MLP.
    """
    whole = problem.measure({})["params"]
    weights = [1.0] * len(problem.all_coupled)
    if relative:
        for number, coupled in enumerate(problem.all_coupled):
            least = coupled.counts[0]
            rest = problem.measure(dict(zip(coupled.groups, least.tolist(), strict=True)))["params"]
            gone = int((coupled.counts[-1] - least).sum())
            weights[number] = (whole - rest) / (whole * gone) if gone else 0.0

    def lost(kept: Kept) -> float:
        states = zip(problem.losses, problem.states(kept), weights, strict=True)
        return float(sum(loss[state] * weight for loss, state, weight in states))

    return lost
