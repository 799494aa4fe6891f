"""Uniform widths in steps that the model's configuration can describe.

Where a class is built from a configuration, numbers of it may tie more than layers that are alike: the width of GPT-2's
residual stream is its number of heads times a fixed size. Which sets of groups a configuration can describe together is
tried, by asking for the configuration of a model in which they have about half of their channels. Each width may be
possible and their combination not: `structprune.planning.neighbourhood` looks for others near it.

For example, of two layers of GPT-2 with a width of 64, 4 heads and an inner width of 256::

    alone        the inner widths
    together     hidden and heads: 64 and 4 channels keep (16, 1), (32, 2), (48, 3) or (64, 4)
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from structprune.coupling.graph import ChannelGraph
from structprune.coupling.groups import Group
from structprune.errors import PlanError
from structprune.planning.build import Description, describe
from structprune.planning.built_from_config import Chain, accepts
from structprune.planning.neighbourhood import Neighbourhood
from structprune.planning.uniform import Feasible, UniformWidths, coupled_by, shares

Numbers = tuple[int, ...]  # of groups


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

    def near(self, kept: Mapping[Group, int], feasible: Feasible) -> Neighbourhood | None:
        """The states around those in which groups keep so many channels; None where no configuration describes any.

        Args:
            kept: how many channels each group is to keep.
            feasible: the numbers of channels that each group may keep.
        """
        if not self.complete:
            return None
        groups = self.graph.groups()
        sets = [n for n in self.widths.sets if kept.keys() >= {groups[number] for number in n}]

        def accepted(shares: Sequence[Fraction]) -> bool:
            return self._accepted(dict(zip(sets, shares, strict=True)))

        return Neighbourhood(coupled_by(self.widths, self.graph, kept.keys(), feasible), kept, accepted)

    def _accepted(self, shares: Mapping[Numbers, Fraction]) -> bool:
        """Whether the configuration can be read back with its numbers at these shares."""
        values: dict[Chain, Fraction] = {}
        for numbers, share in shares.items():
            for chain, old in self.numbers.get(numbers, {}).items():
                values[chain] = values.get(chain, Fraction(old)) * share
        if any(value.denominator != 1 for value in values.values()):
            return False
        return accepts(self.graph.model, {chain: int(value) for chain, value in values.items()})


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
