"""How many channels each group keeps so that least importance is lost within all limits: an exact choice.

The greedy choice takes channels in one order and stops once the limits are met. Here the widths of all groups are
chosen at once, by a mixed-integer programme (`programme`) over what each of them costs beside the others
(`cost_tables`). Where the widths to choose from are too many for one programme, it is solved on some of them first,
evenly spaced, and then on finer ones around the solution, until all that are near are among them. The greedy choice is
always one to choose from, so that the result loses no more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from time import perf_counter
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from structprune.coupling.graph import ChannelGraph
from structprune.coupling.groups import Group
from structprune.coupling.random_removals import Counter
from structprune.latency.predict import TimeModel
from structprune.planning.cost_tables import MOST_OWNERS, CostTables
from structprune.planning.programme import Limit, solved
from structprune.planning.scopes import CoupledGroups
from structprune.planning.targets import Amounts, Kept, Target

Allocation = Literal["exact", "greedy", "auto"]
ALLOCATIONS: tuple[Allocation, ...] = ("exact", "greedy", "auto")

# Seconds for all programmes together, and how many entries the tables over several groups may have in the first
# programme, then in the next ones: small ones are solved quickly, large ones may not end in time.
SECONDS = {"exact": 9.0, "auto": 2.0}
ENTRIES = {"exact": (1_000, 4_000, 16_000), "auto": (1_000, 4_000)}
# A programme on states from the whole range takes at most this share of the time that is left.
WIDE = 0.6
# Finer programmes see this many states on each side of the last solution, or as few as it takes to fit.
REACH = 6
# How often limits are corrected where the counted amounts exceed what the tables say, and at least by which share.
CORRECTIONS = 4
CORRECTED = 3e-7


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What is to be chosen, and within which limits.

    Attributes:
        graph: the coupled channels.
        all_coupled: the groups whose widths are chosen, those that go together as one.
        losses: for each of these, what is lost in each of its states, the smallest first, none being lost in the last.
        target: the limits.
        measure: the amounts that there are when groups keep so many channels.
        counter: counts the channels of axes when groups keep so many.
        time: predicts the time of the network, for a target of latency.
    """

    graph: ChannelGraph
    all_coupled: Sequence[CoupledGroups]
    losses: Sequence[NDArray[np.float64]]
    target: Target
    measure: Callable[[Kept], Amounts]
    counter: Callable[[Kept], Counter]
    time: TimeModel | None = None

    def lost(self, states: Sequence[int]) -> float:
        """What is lost in these states."""
        return float(sum(loss[state] for loss, state in zip(self.losses, states, strict=True)))

    def kept(self, states: Sequence[int]) -> Kept:
        """How many channels each group keeps in these states."""
        return {
            group: int(count)
            for coupled, state in zip(self.all_coupled, states, strict=True)
            for group, count in zip(coupled.groups, coupled.counts[state], strict=True)
        }

    def states(self, kept: Mapping[Group, int]) -> tuple[int, ...]:
        """The states in which groups keep so many channels."""
        return tuple(
            int(np.flatnonzero((c.counts == [kept[group] for group in c.groups]).all(axis=1))[0])
            for c in self.all_coupled
        )


def allocate(problem: Problem, greedy: Kept, *, seconds: float, entries: Sequence[int]) -> Kept:
    """How many channels each group keeps so that least is lost within all limits.

    Args:
        problem: what is to be chosen.
        greedy: a choice within the limits, than which none worse is returned.
        seconds: for all programmes together.
        entries: how many entries the tables over several groups may have: one round of programmes for each.
    """
    until = perf_counter() + seconds
    best = problem.states(greedy)
    limits = _Limits(problem, best)
    for most in entries:
        best, done = _round(problem, limits, best, most, until)
        if done:
            break
    return problem.kept(best)


def _round(
    problem: Problem, limits: _Limits, best: tuple[int, ...], entries: int, until: float
) -> tuple[tuple[int, ...], bool]:
    """The best choice by a programme on states of the whole range, then finer ones near it; whether it saw all."""
    counts = [len(coupled.counts) for coupled in problem.all_coupled]
    spaces = _spaces(counts, limits.owners, entries)
    states = [_spread(count, space, at) for count, space, at in zip(counts, spaces, best, strict=True)]
    best = _best_of(problem, limits, states, best, WIDE * (until - perf_counter()))
    if all(len(each) == count for each, count in zip(states, counts, strict=True)):
        return best, True
    while (left := until - perf_counter()) > 0:
        finest = max(spaces) == 1
        spaces = [max(1, space // 2) for space in spaces]
        finer = _best_of(problem, limits, _near(counts, spaces, best, limits.owners, entries), best, left)
        if finest and finer == best:
            break
        best = finer
    return best, False


def _best_of(
    problem: Problem, limits: _Limits, states: list[NDArray[np.int64]], best: tuple[int, ...], seconds: float
) -> tuple[int, ...]:
    """The best choice among `states` within the limits, as they are counted; `best` if none is better."""
    until = perf_counter() + seconds
    losses = [loss[mine] for loss, mine in zip(problem.losses, states, strict=True)]
    for _ in range(CORRECTIONS):
        left = until - perf_counter()
        solution = solved(losses, limits.tables(states, best), left) if left > 0 else None
        if solution is None:
            break
        chosen = tuple(int(mine[state]) for mine, state in zip(states, solution.states, strict=True))
        if problem.lost(chosen) >= problem.lost(best):
            break
        if limits.hold(chosen):
            return chosen
    return best


# -- which states to choose from --------------------------------------------------------------------------------------


def _spaces(counts: Sequence[int], owners: Iterable[tuple[int, ...]], entries: int) -> list[int]:
    """For each coupled groups, how far apart the states are, so that the tables have no more entries."""
    spaces = [1] * len(counts)
    together = [each for each in owners if 1 < len(each) <= MOST_OWNERS]
    while True:
        sizes = [1 + (count - 1 + space - 1) // space for count, space in zip(counts, spaces, strict=True)]
        if _entries(together, sizes) <= entries or max(sizes) <= 2:
            return spaces
        most = max(sizes[owner] for each in together for owner in each)
        spaces = [
            space * 2 if size > 2 and 2 * size > most else space for space, size in zip(spaces, sizes, strict=True)
        ]


def _entries(owners: Iterable[tuple[int, ...]], sizes: Sequence[int]) -> int:
    """Entries of all tables over these owners, each of which has so many states."""
    return sum(prod(sizes[owner] for owner in each) for each in owners)


def _spread(count: int, space: int, at: int) -> NDArray[np.int64]:
    """States `space` apart from the last one down, with the first and that at which the search begins.

    Example:
        >>> _spread(9, 3, 4).tolist()
        [0, 2, 4, 5, 8]
    """
    return np.unique([0, at, *range(count - 1, -1, -space)]).astype(np.int64)


def _near(
    counts: Sequence[int], spaces: Sequence[int], best: Sequence[int], owners: Iterable[tuple[int, ...]], entries: int
) -> list[NDArray[np.int64]]:
    """States around the best ones, on each side as many as fit."""
    together = [each for each in owners if 1 < len(each) <= MOST_OWNERS]
    states: list[NDArray[np.int64]] = []
    for reach in range(REACH, 0, -1):
        steps = np.arange(-reach, reach + 1)
        wanted = [at + space * steps for space, at in zip(spaces, best, strict=True)]
        states = [near[(near >= 0) & (near < count)] for near, count in zip(wanted, counts, strict=True)]
        if _entries(together, [len(near) for near in states]) <= entries:
            break
    return states


class _Limits:
    """The limits of a problem as tables, and as they are counted.

    Memory is limited at the moments of the forward at which most was held so far; more of them come up as choices are
    counted.
    """

    def __init__(self, problem: Problem, best: Sequence[int]) -> None:
        self._problem = problem
        self._costs = CostTables(problem.graph, problem.all_coupled, problem.time)
        self._parts = [(name, self._costs.of(name)) for name in problem.target.limits if name != "memory"]
        self._peaks: set[tuple[int, ...]] = set()
        self._most = dict(problem.target.limits)
        if "memory" in self._most:
            for states in ([len(coupled.counts) - 1 for coupled in problem.all_coupled], best):
                self._add_peak(states)

    @property
    def owners(self) -> set[tuple[int, ...]]:
        """The coupled groups of each part."""
        return {part.owners for _, held in self._parts for part in held.parts}

    def tables(self, states: Sequence[NDArray[np.int64]], at: Sequence[int]) -> list[Limit]:
        """The limits over the states to choose from, as seen from those in which all are."""
        return [
            Limit([table for part in held.parts for table in part.tables(states, at)], held.constant, self._most[name])
            for name, held in self._parts
        ]

    def hold(self, states: Sequence[int]) -> bool:
        """Whether all limits hold as they are counted; those that do not are corrected."""
        problem = self._problem
        counted = problem.measure(problem.kept(states))
        for name, limit in problem.target.limits.items():
            if counted[name] > limit and not (name == "memory" and self._add_peak(states)):
                self._most[name] -= max(counted[name] - limit, CORRECTED * limit)
        return problem.target.misses(counted) <= 0

    def _add_peak(self, states: Sequence[int]) -> bool:
        """Limit memory at the moment at which most is held in these states too; whether that is new."""
        problem = self._problem
        held = problem.graph.costs.held_at_peak(problem.counter(problem.kept(states)))
        if held in self._peaks:
            return False
        self._peaks.add(held)
        self._parts.append(("memory", self._costs.memory(held)))
        return True
