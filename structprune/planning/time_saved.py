"""Importance kept against time saved: in which order blocks of channels go so that time falls at the least loss.

Each move takes the block whose loss of importance is smallest for the time that it saves, at the widths that the others
have by then; a block is as many steps as it takes for the time to fall, since within a step of the hardware nothing is
saved. It is the greedy rule for the knapsack, with the items' weights measured anew after each choice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from structprune.planning.scopes import Steps, Unit

Shares = list[float]
# A block that saves less than this share of the whole time saves nothing that could be measured.
LEAST = 1e-5


@dataclass(frozen=True)
class Piece:
    """Something that takes time.

    Attributes:
        groups: numbers of the groups on whose widths it depends, counted over the groups of all units.
        seconds: its time for the shares of their channels that all groups keep.
    """

    groups: frozenset[int]
    seconds: Callable[[Shares], float]


class Knapsack:
    """The greedy choice.

    Args:
        units: groups that may be thinned, one by one or together.
        lost: for each, the importance lost in each state but the whole, the largest first.
        pieces: what takes time.
    """

    def __init__(self, units: Sequence[Unit], lost: Sequence[np.ndarray], pieces: Sequence[Piece]) -> None:
        self._units = units
        self._lost = [[0.0, *values.tolist()] for values in lost]
        self._states = [(unit.counts[::-1] / unit.counts[-1]).tolist() for unit in units]
        self._first = np.cumsum([0, *(len(unit.groups) for unit in units)]).tolist()
        self._share: Shares = [1.0] * self._first[-1]
        self._unit_of = [number for number, unit in enumerate(units) for _ in unit.groups]
        self._pieces = pieces
        self._at = [0] * len(units)
        self._of: list[set[int]] = [set() for _ in units]
        for number, piece in enumerate(pieces):
            for group in piece.groups:
                self._of[self._unit_of[group]].add(number)
        self._now = [piece.seconds(self._share) for piece in pieces]
        self._least = LEAST * sum(self._now)

    def steps(self) -> Steps:
        """All steps in the order of the choice; those that save no time come last, the least important first."""
        owner: list[int] = []
        moves: list[int] = []
        move = 0
        best = [self._best(unit) for unit in range(len(self._units))]
        while (chosen := _least(best)) is not None:
            unit, state = chosen
            owner += [unit] * (state - self._at[unit])
            moves += [move] * (state - self._at[unit])
            move += 1
            self._go(unit, state)
            near = {self._unit_of[g] for number in self._of[unit] for g in self._pieces[number].groups}
            for other in near:
                best[other] = self._best(other)
        rest = [(self._loss(u, i, i + 1), u, i) for u, at in enumerate(self._at) for i in range(at, self._last(u))]
        for _, unit, _ in sorted(_rising(rest)):
            owner.append(unit)
            moves.append(move)
            move += 1
        return Steps(self._units, np.array(owner, dtype=np.int64), (np.array(moves) + 0.5) / max(1, move))

    def _last(self, unit: int) -> int:
        return len(self._states[unit]) - 1

    def _loss(self, unit: int, now: int, then: int) -> float:
        return max(0.0, self._lost[unit][then] - self._lost[unit][now])

    def _shares(self, unit: int, then: int) -> Shares:
        """The shares that all groups keep once a unit is in another state."""
        shares = list(self._share)
        shares[self._first[unit] : self._first[unit + 1]] = self._states[unit][then]
        return shares

    def _saved(self, unit: int, then: int) -> float:
        shares = self._shares(unit, then)
        return sum(self._now[n] - self._pieces[n].seconds(shares) for n in self._of[unit])

    def _best(self, unit: int) -> tuple[float, int] | None:
        """The block of a unit that loses least for the time it saves, and where it leads; None if none saves time."""
        now = self._at[unit]
        found: tuple[float, int] | None = None
        for then in range(now + 1, self._last(unit) + 1):
            saved = self._saved(unit, then)
            if saved > self._least:
                ratio = self._loss(unit, now, then) / saved
                if found is None or ratio < found[0]:
                    found = ratio, then
        return found

    def _go(self, unit: int, then: int) -> None:
        self._at[unit] = then
        self._share = self._shares(unit, then)
        for number in self._of[unit]:
            self._now[number] = self._pieces[number].seconds(self._share)


def _least(best: Sequence[tuple[float, int] | None]) -> tuple[int, int] | None:
    """The unit whose block has the smallest ratio, and where that leads."""
    found = [(block[0], unit, block[1]) for unit, block in enumerate(best) if block is not None]
    return min(found)[1:] if found else None


def _rising(rest: list[tuple[float, int, int]]) -> list[tuple[float, int, int]]:
    """Steps of a unit stay in their order: none counts for less than the one before it."""
    found: list[tuple[float, int, int]] = []
    highest: dict[int, float] = {}
    for loss, unit, number in rest:
        highest[unit] = max(loss, highest.get(unit, 0.0))
        found.append((highest[unit], unit, number))
    return found
