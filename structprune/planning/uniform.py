"""One width for each axis over all layers, in steps that the model's configuration can describe.

Groups that play the same part in every layer are *alike* and keep equally many channels, each its own choice. Where a
class is built from a configuration, numbers of it may tie more than that: the width of GPT-2's residual stream is its
number of heads times a fixed size. Which sets of groups a configuration can describe together is tried, by asking for
the configuration of a model in which they have about half of their channels.

For example, of two layers of GPT-2 with a width of 64, 4 heads and an inner width of 256::

    alike        {hidden}, {heads of layer 0, heads of layer 1}, {inner width of layer 0, that of layer 1}
    alone        the inner widths
    together     hidden and heads: 64 and 4 channels keep (16, 1), (32, 2), (48, 3) or (64, 4)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from heapq import heappop, heappush
from itertools import islice
from math import gcd

import numpy as np

from structprune.coupling.graph import ChannelGraph
from structprune.coupling.groups import Group
from structprune.errors import PlanError
from structprune.planning.build import Description, describe
from structprune.planning.built_from_config import Chain, accepts
from structprune.planning.scopes import CoupledGroups

Feasible = Mapping[Group, np.ndarray]
Numbers = tuple[int, ...]  # of groups
# How many steps each width may move from where it was decided, and how many states of all widths are looked at.
NEAR = 4
STATES = 512


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


@dataclass(frozen=True)
class DescribableWidths:
    """Widths that a configuration can describe one by one, and its numbers that follow each of them.

    Attributes:
        graph: the coupled channels.
        widths: the groups of each width.
        numbers: for each set of groups, the numbers of the configuration that shrink in proportion, by their chains.
        complete: whether a configuration can describe all of the widths.
    """

    graph: ChannelGraph
    widths: UniformWidths
    numbers: Mapping[Numbers, Mapping[Chain, int]]
    complete: bool = True

    def nearest(
        self, kept: Mapping[Group, int], feasible: Feasible, meets: Callable[[dict[Group, int]], bool]
    ) -> Iterator[dict[Group, int]]:
        """Numbers of channels near `kept` that the configuration accepts, the nearest first.

        Args:
            kept: how many channels each group is to keep.
            feasible: the numbers of channels that each group may keep.
            meets: whether so few are left as they have to.
        """
        if not self.complete:
            return
        coupled = coupled_by(self.widths, self.graph, kept.keys(), feasible)
        groups = self.graph.groups()
        sets = [n for n in self.widths.sets if kept.keys() >= {groups[number] for number in n}]
        near: list[list[tuple[float, int]]] = []
        for one in coupled:
            at = int(np.argmin(np.abs(one.counts[:, 0] - kept[one.groups[0]])))
            lines = range(max(0, at - NEAR), min(len(one.counts), at + NEAR + 1))
            sizes = one.counts[:, 0] / one.counts[-1, 0]
            near.append(sorted((abs(float(sizes[line] - sizes[at])), line) for line in lines))
        for state in islice(_cheapest(near), STATES):
            near_kept = dict(kept)
            shares = list[Fraction]()
            for one, line in zip(coupled, state, strict=True):
                counts = one.counts[line].tolist()
                near_kept.update(zip(one.groups, counts, strict=True))
                shares.append(Fraction(counts[0], one.groups[0].channels))
            if self._accepted(dict(zip(sets, shares, strict=True))) and meets(near_kept):
                yield near_kept

    def _accepted(self, shares: Mapping[Numbers, Fraction]) -> bool:
        """Whether the configuration can be read back with its numbers at these shares."""
        values: dict[Chain, Fraction] = {}
        for numbers, share in shares.items():
            for chain, old in self.numbers.get(numbers, {}).items():
                values[chain] = values.get(chain, Fraction(old)) * share
        if any(value.denominator != 1 for value in values.values()):
            return False
        return accepts(self.graph.model, {chain: int(value) for chain, value in values.items()})


def _cheapest(options: Sequence[Sequence[tuple[float, int]]]) -> Iterator[list[int]]:
    """One of each of `options`, which are pairs of a cost and a value, the cheapest first; those of least sum first.

    Example:
        >>> list(_cheapest([[(0, 5), (2, 6)], [(0, 7), (1, 8)]]))
        [[5, 7], [5, 8], [6, 7], [6, 8]]
    """
    start: tuple[int, ...] = (0,) * len(options)
    waiting: list[tuple[float, tuple[int, ...]]] = [(sum(one[0][0] for one in options), start)]
    seen: set[tuple[int, ...]] = {start}
    while waiting:
        _, places = heappop(waiting)
        yield [one[place][1] for one, place in zip(options, places, strict=True)]
        for i in range(len(options)):
            following = (*places[:i], places[i] + 1, *places[i + 1 :])
            if following[i] < len(options[i]) and following not in seen:
                seen.add(following)
                cost = sum(one[place][0] for one, place in zip(options, following, strict=True))
                heappush(waiting, (cost, following))


def describable(
    graph: ChannelGraph, widths: UniformWidths, feasible: Feasible, *, wanted: Collection[Group], all_wanted: bool
) -> DescribableWidths:
    """The same widths, tied further until the configuration can describe each of them.

    Args:
        graph: the coupled channels of a model that is built from a configuration.
        widths: groups that are alike.
        feasible: the numbers of channels that each group may keep.
        wanted: the groups that may lose channels.
        all_wanted: whether sets that no configuration can describe lose channels nevertheless; else they stay whole.
    """
    search = _Search(graph)
    groups = graph.groups()
    open_sets = [numbers for numbers in widths.sets if {groups[number] for number in numbers} <= set(wanted)]
    possible, never = search.divided(open_sets)
    known = {numbers: search.numbers(numbers) for numbers in possible}
    if all_wanted or not known:
        return DescribableWidths(graph, UniformWidths((*possible, *never)), known, complete=not never)
    reasons = {number: search.reason(numbers) or "" for numbers in never for number in numbers}
    return DescribableWidths(graph, UniformWidths(tuple(possible), reasons), known)


class _Search:
    """Asks which sets of groups a configuration can describe when they keep about half of their channels."""

    def __init__(self, graph: ChannelGraph) -> None:
        self._graph = graph
        self._known: dict[frozenset[int], tuple[Description, Fraction]] = {}

    def divided(self, sets: Sequence[Numbers]) -> tuple[list[Numbers], list[Numbers]]:
        """Sets that a configuration can describe, alone or joined with others, and those that it cannot."""
        alone = [numbers for numbers in sets if self.reason(numbers) is None]
        rest = [numbers for numbers in sets if numbers not in alone]
        together = self.largest(rest)
        return [*alone, *self.parts(together)], [numbers for numbers in rest if numbers not in together]

    def reason(self, numbers: Iterable[int]) -> str | None:
        """Why no configuration can describe these groups at about half of their channels; None if one can."""
        return self._asked(numbers)[0].reason

    def numbers(self, numbers: Iterable[int]) -> dict[Chain, int]:
        """The numbers of the configuration that then shrink by the same share, by their chains from the model."""
        trial, share = self._asked(numbers)
        return {
            edit.chain: edit.old
            for edit in trial.edits
            if not edit.module and edit.chain[0] == "config" and type(edit.old) is int and edit.old * share == edit.new
        }

    def _asked(self, numbers: Iterable[int]) -> tuple[Description, Fraction]:
        key = frozenset(numbers)
        if key not in self._known:
            self._known[key] = self._ask(sorted(key))
        return self._known[key]

    def _ask(self, numbers: Sequence[int]) -> tuple[Description, Fraction]:
        groups = [self._graph.groups()[number] for number in numbers]
        counts = shares(groups)[:-1]
        least = [max(self._graph.bounds(group)[0], 1) for group in groups]
        steps = [self._graph.bounds(group)[1] for group in groups]
        counts = counts[(counts >= least).all(axis=1) & (counts % steps == 0).all(axis=1)]
        if not len(counts):
            return Description(reason="its widths have no common step"), Fraction(1)
        kept = counts[np.argmin(np.abs(counts[:, 0] - groups[0].channels / 2))]
        chosen = [group.components[count:] for group, count in zip(groups, kept.tolist(), strict=True)]
        share = Fraction(int(kept[0]), groups[0].channels)
        try:
            return describe(self._graph, np.concatenate(chosen)), share
        except PlanError as error:
            return Description(reason=str(error)), share

    def largest(self, sets: Sequence[Numbers]) -> list[Numbers]:
        """The sets that can be described together: all of them, or what is left as one after the other is given up."""
        left = list(sets)
        while left and self._together(left) is not None:
            if len(left) == 1:
                return []
            without = [[other for other in left if other is not one] for one in left]
            left = next((rest for rest in without if self._together(rest) is None), without[-1])
        return left

    def _together(self, sets: Iterable[Numbers]) -> str | None:
        return self.reason(number for numbers in sets for number in numbers)

    def parts(self, sets: Sequence[Numbers]) -> list[Numbers]:
        """Sets that can be described together, in the smallest parts that can."""
        left, parts = list(sets), list[Numbers]()
        while left:
            part = left
            for one in left[1:]:
                rest = [other for other in part if other is not one]
                if self._together(rest) is None:
                    part = rest
            parts.append(tuple(sorted(number for numbers in part for number in numbers)))
            left = [numbers for numbers in left if numbers not in part]
        return parts
