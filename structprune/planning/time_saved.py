"""Importance kept against time saved: in which order blocks of channels go so that time falls at the least loss.

Each move takes the block whose loss of importance is smallest for the time that it saves, at the widths that the others
have by then; a block is as many steps as it takes for the time to fall, since within a step of the hardware nothing is
saved. It is the greedy rule for the knapsack, with the items' weights measured anew after each choice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from structprune.coupling.graph import ChannelGraph
from structprune.coupling.groups import Group
from structprune.latency.predict import Moved, TimeModel
from structprune.latency.specs import Use
from structprune.latency.widths import Widths
from structprune.planning.scopes import AddedCurves, CoupledGroups, Curves, Scope, Steps, lost

Shares = list[float]
# A block that saves less than this share of the whole time saves nothing that could be measured.
LEAST = 1e-5


def losses_in_states(
    all_coupled: Sequence[CoupledGroups], scores: Mapping[Group, np.ndarray], scope: Scope, relative: bool
) -> list[np.ndarray]:
    """For each coupled groups, what is lost in each state but the whole, the largest first.

    Args:
        all_coupled: the groups that may lose channels, those that go together as one.
        scores: the scores of each group; not needed for curves.
        scope: curves, which say themselves what is lost, or anything else.
        relative: divide the scores of a group by their mean, and count losses the more, the less is left of it.
    """

    def loss(group: Group, counts: np.ndarray) -> np.ndarray:
        if isinstance(scope, Curves):
            return (scope.total if isinstance(scope, AddedCurves) else scope.depth)(group, counts[-2::-1])
        gone = np.cumsum(lost(scores[group], np.diff(counts)[::-1], relative))
        return log_loss(gone, group.channels) if relative else gone

    return [
        np.sum([loss(group, coupled.counts[:, i]) for i, group in enumerate(coupled.groups)], axis=0)
        for coupled in all_coupled
    ]


def steps_by_time(
    graph: ChannelGraph, all_coupled: Sequence[CoupledGroups], losses: Sequence[np.ndarray], time: TimeModel
) -> Steps:
    """The steps in the order that loses least importance for the time that it saves.

    Args:
        graph: the coupled channels.
        all_coupled: the groups that may lose channels, those that go together as one.
        losses: what each of them loses; see `losses_in_states`.
        time: predicts the time of the network.
    """
    groups = [group for coupled in all_coupled for group in coupled.groups]
    return Knapsack(all_coupled, losses, _pieces(time, Widths(graph, groups))).steps()


def log_loss(gone: np.ndarray, whole: int) -> np.ndarray:
    """Losses that count the more, the less of a group is left: ``-whole * log(share of the importance kept)``.

    Scores over their mean tell channels of a group apart, but not how bad it is to be left with few of them. Taken as
    they are, they would leave one channel to a layer of a few costly ones.

    Example:
        >>> log_loss(np.array([1.0, 4.0, 6.0]), 8).round(2).tolist()
        [1.07, 5.55, 11.09]
    """
    return -whole * np.log1p(-np.clip(gone / whole, 0, 1 - 1e-9))


def _pieces(time: TimeModel, widths: Widths) -> list[Piece]:
    """What takes time, each with the groups that it follows; what follows none is left out."""

    def piece(part: Use | Moved) -> Piece | None:
        axes = part.axes if isinstance(part, Moved) else [axis for held in part.channels.values() for axis in held]
        groups = widths.groups_of(axes)
        known: dict[tuple[float, ...], float] = {}

        def seconds(shares: list[float]) -> float:
            key = tuple(shares[group] for group in groups)
            if key not in known:
                known[key] = time.share(part, widths.counter(shares))
            return known[key]

        return Piece(groups, seconds) if groups else None

    return [follows for part in time.parts if (follows := piece(part)) is not None]


@dataclass(frozen=True)
class Piece:
    """Something that takes time.

    Attributes:
        groups: numbers of the groups on whose widths it depends, counted over all coupled groups.
        seconds: its time for the shares of their channels that all groups keep.
    """

    groups: frozenset[int]
    seconds: Callable[[Shares], float]


class Knapsack:
    """The greedy choice.

    Args:
        all_coupled: the groups that may lose channels, those that go together as one.
        lost: for each, the importance lost in each state but the whole, the largest first.
        pieces: what takes time.
    """

    def __init__(
        self, all_coupled: Sequence[CoupledGroups], lost: Sequence[np.ndarray], pieces: Sequence[Piece]
    ) -> None:
        self._all_coupled = all_coupled
        self._lost = [[0.0, *values.tolist()] for values in lost]
        self._states = [(coupled.counts[::-1] / coupled.counts[-1]).tolist() for coupled in all_coupled]
        self._first = np.cumsum([0, *(len(coupled.groups) for coupled in all_coupled)]).tolist()
        self._share: Shares = [1.0] * self._first[-1]
        self._owner_of = [number for number, coupled in enumerate(all_coupled) for _ in coupled.groups]
        self._pieces = pieces
        self._at = [0] * len(all_coupled)
        self._of: list[set[int]] = [set() for _ in all_coupled]
        for number, piece in enumerate(pieces):
            for group in piece.groups:
                self._of[self._owner_of[group]].add(number)
        self._now = [piece.seconds(self._share) for piece in pieces]
        self._least = LEAST * sum(self._now)

    def steps(self) -> Steps:
        """All steps in the order of the choice; those that save no time come last, the least important first."""
        owners: list[int] = []
        moves: list[int] = []
        move = 0
        best = [self._best(owner) for owner in range(len(self._all_coupled))]
        while (chosen := _least(best)) is not None:
            owner, state = chosen
            owners += [owner] * (state - self._at[owner])
            moves += [move] * (state - self._at[owner])
            move += 1
            self._go(owner, state)
            near = {self._owner_of[g] for number in self._of[owner] for g in self._pieces[number].groups}
            for other in near:
                best[other] = self._best(other)
        rest = [(self._loss(u, i, i + 1), u, i) for u, at in enumerate(self._at) for i in range(at, self._last(u))]
        for _, owner, _ in sorted(_rising(rest)):
            owners.append(owner)
            moves.append(move)
            move += 1
        return Steps(self._all_coupled, np.array(owners, dtype=np.int64), (np.array(moves) + 0.5) / max(1, move))

    def _last(self, owner: int) -> int:
        return len(self._states[owner]) - 1

    def _loss(self, owner: int, now: int, then: int) -> float:
        return max(0.0, self._lost[owner][then] - self._lost[owner][now])

    def _shares(self, owner: int, then: int) -> Shares:
        """The shares that all groups keep once coupled groups are in another state."""
        shares = list(self._share)
        shares[self._first[owner] : self._first[owner + 1]] = self._states[owner][then]
        return shares

    def _saved(self, owner: int, then: int) -> float:
        shares = self._shares(owner, then)
        return sum(self._now[n] - self._pieces[n].seconds(shares) for n in self._of[owner])

    def _best(self, owner: int) -> tuple[float, int] | None:
        """The block that loses least for the time it saves, and where it leads; None if no block saves time."""
        now = self._at[owner]
        best: tuple[float, int] | None = None
        for then in range(now + 1, self._last(owner) + 1):
            saved = self._saved(owner, then)
            if saved > self._least:
                ratio = self._loss(owner, now, then) / saved
                if best is None or ratio < best[0]:
                    best = ratio, then
        return best

    def _go(self, owner: int, then: int) -> None:
        self._at[owner] = then
        self._share = self._shares(owner, then)
        for number in self._of[owner]:
            self._now[number] = self._pieces[number].seconds(self._share)


def _least(best: Sequence[tuple[float, int] | None]) -> tuple[int, int] | None:
    """The coupled groups whose block has the smallest ratio, and where that leads."""
    ratios = [(block[0], owner, block[1]) for owner, block in enumerate(best) if block is not None]
    return min(ratios)[1:] if ratios else None


def _rising(rest: list[tuple[float, int, int]]) -> list[tuple[float, int, int]]:
    """Steps of the same groups stay in their order: none counts for less than the one before it."""
    rising: list[tuple[float, int, int]] = []
    highest: dict[int, float] = {}
    for loss, owner, number in rest:
        highest[owner] = max(loss, highest.get(owner, 0.0))
        rising.append((highest[owner], owner, number))
    return rising
