"""One direction of one recurrent layer, solved by least squares on the steps of all batches.

In front of its activation a gate is linear in the input of the step and in the state of the step before. With hidden or
input channels removed, each kept gate is solved to be, on what is left of both, what it is in the original. At first
the states before are the original's (teacher forcing): the kept part of them is what the smaller network would have if
all were well. Then it runs by itself, and is solved on the states that it runs into as well: on its own ones alone it
would be right where it no longer comes, and swing from pass to pass. Of what it was and of all solutions the one is
kept whose states, run by itself over sequences that it was not solved on, are nearest to the original's.

Williams and Zipser, A Learning Algorithm for Continually Running Fully Recurrent Neural Networks, 1989 (teacher
forcing); Ross, Gordon and Bagnell, A Reduction of Imitation Learning and Structured Prediction to No-Regret Online
Learning, 2011 (the states of all passes together).

The new part of a GRU's state is made of its input and, behind a gate, of the state before: each is solved by itself. A
projection is solved on the hidden channels that the solved gates give.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from structprune.distributed import all_reduced
from structprune.equations.least_squares import NormalEquations, best_ridge
from structprune.equations.linear_maps import with_intercept
from structprune.recovery.layer_solver import CHUNK
from structprune.recovery.recurrent_calls import Cell, Layout

PASSES = 5  # at most: on the original's states, then on its own
MIN_GAIN = 0.01  # of the squared error: a pass that lowers it by a smaller share is the last


@dataclass(frozen=True, slots=True)
class CellBatch:
    """One direction of one layer on one batch of data, in the pruned network and in the original.

    Rows are turned for the direction that runs backwards, so that each follows from those before it.

    Attributes:
        layout: of the rows.
        x, first: input and first states in the pruned network.
        before: the original's states before each row, kept channels alone, ``(rows, kept)``.
        states: its states, kept channels alone, ``(rows, kept)``.
        chosen: the rows that are looked at: those to solve on, then those to choose by.
        train: how many of them are solved on.
        goal: what the original's gates are at the rows `chosen`, in front of their activations, of the kept channels:
            the part that its input makes, and the part that its state makes; ``(len(chosen), gates * kept)`` each.
    """

    layout: Layout
    x: Tensor
    first: list[Tensor]
    before: Tensor
    states: Tensor
    chosen: Tensor
    train: int
    goal: tuple[Tensor, Tensor]

    def error(self, states: Tensor) -> Tensor:
        """Squared error of states on the rows to choose by, shape ``()``."""
        rows = self.chosen[self.train :]
        return (states[rows] - self.states[rows]).double().square().sum()


@dataclass(frozen=True, slots=True)
class _Equations:
    """Gates that are solved together, rows ``start`` to ``stop``: what the input makes of them, the state, or both."""

    start: int
    stop: int
    by_input: bool
    by_state: bool


def _equations(cell: Cell) -> list[_Equations]:
    """What is solved together: of a GRU, the new part of the state (the last gate) is two sums."""
    end = cell.gates * cell.hidden
    if cell.name != "gru":
        return [_Equations(0, end, by_input=True, by_state=True)]
    new = 2 * cell.hidden
    return [
        _Equations(0, new, by_input=True, by_state=True),
        _Equations(new, end, by_input=True, by_state=False),
        _Equations(new, end, by_input=False, by_state=True),
    ]


def solve_cell(start: Cell, batches: list[CellBatch], ridges: list[float]) -> Cell:
    """The best of a cell as it is, solved on the original's states, and solved again on its own.

    Args:
        start: the cell as it is.
        batches: what it is solved on.
        ridges: those that are chosen are appended.
    """
    best, least = start, _state_error(start, batches)
    cell, seen = start, list[tuple[NormalEquations, NormalEquations]]()
    for number in range(PASSES):
        before = [
            b.layout.shifted(cell.run(b.x, b.first, b.layout), b.first[0]) if number else b.before for b in batches
        ]
        cell = _with_gates(start, batches, before, seen, ridges)
        if cell.projection is not None:
            cell = _with_projection(cell, batches, before, ridges)
        error = _state_error(cell, batches)
        enough = number > 0 and not error < (1 - MIN_GAIN) * least
        if error < least:
            best, least = cell, error
        if enough:
            break
    return best


def _state_error(cell: Cell, batches: list[CellBatch]) -> float:
    """Squared error of the states on the rows that are not solved on, when the cell runs by itself."""
    total = torch.zeros(1, dtype=torch.float64)
    for batch in batches:
        total += batch.error(cell.run(batch.x, batch.first, batch.layout)).cpu()
    return float(all_reduced(total))


def _with_gates(
    start: Cell,
    batches: list[CellBatch],
    before: list[Tensor],
    seen: list[tuple[NormalEquations, NormalEquations]],
    ridges: list[float],
) -> Cell:
    """The cell whose gates are solved on these states before each row, and on those of the passes before.

    Args:
        start: the cell as it was.
        batches: what it is solved on.
        before: the states before each row, of each batch.
        seen: the sums of the passes before for each of `_equations`, empty at first; those of this pass are added.
        ridges: those that are chosen are appended.
    """
    into, again, biases = start.into.clone(), start.again.clone(), [bias.clone() for bias in start.biases]
    sums: list[tuple[NormalEquations, NormalEquations]] = []
    for number, equations in enumerate(_equations(start)):
        some = slice(equations.start, equations.stop)
        chosen = [part for part, used in enumerate((equations.by_input, equations.by_state)) if used]
        rows: list[tuple[Tensor, Tensor, int]] = []
        for batch, states in zip(batches, before, strict=True):
            x = batch.x[batch.chosen], states[batch.chosen]
            ours = start.from_input(x[0]), start.from_state(x[1])
            missing = sum((batch.goal[part][:, some] - ours[part][:, some] for part in chosen), torch.zeros(()))
            rows.append((torch.cat([x[part] for part in chosen], 1), missing, batch.train))
        mine = _sums(rows, bool(biases))
        sums.append((mine[0].plus(seen[number][0]), mine[1].plus(seen[number][1])) if seen else mine)
        solution, ridge = _solution(*sums[-1], bool(biases))
        ridges.append(ridge)
        if biases:
            solution, shift = solution[:-1], solution[-1]
            biases[chosen[0]][some] += shift.to(into.dtype)
        widths = [(into, again)[part].shape[1] for part in chosen]
        for part, change in zip(chosen, solution.split(widths), strict=True):
            (into, again)[part][some] += change.T.to(into.dtype)
    seen[:] = sums
    return replace(start, into=into, again=again, biases=tuple(biases))


def _with_projection(cell: Cell, batches: list[CellBatch], before: list[Tensor], ridges: list[float]) -> Cell:
    """The cell whose projection is solved, with these states before each row."""
    assert cell.projection is not None
    rows: list[tuple[Tensor, Tensor, int]] = []
    for batch, states in zip(batches, before, strict=True):
        gates = cell.from_input(batch.x) + cell.from_state(states)
        hidden = cell.before_projection(gates, batch.first[1], batch.layout)[batch.chosen]
        rows.append((hidden, batch.states[batch.chosen] - hidden @ cell.projection.T, batch.train))
    solution, ridge = _solution(*_sums(rows, free=False), free=False)
    ridges.append(ridge)
    return replace(cell, projection=cell.projection + solution.T.to(cell.projection.dtype))


def _sums(rows: list[tuple[Tensor, Tensor, int]], free: bool) -> tuple[NormalEquations, NormalEquations]:
    """The sums over the rows to solve on, and over those to choose the ridge by, of all ranks.

    Args:
        rows: features, what the results lack, and how many of the rows are solved on: the first ones.
        free: whether an intercept, the last feature, is solved for.
    """
    features, outputs = rows[0][0].shape[1] + free, rows[0][1].shape[1]
    train, held_out = (NormalEquations.zeros(1, features, outputs, rows[0][0].device) for _ in range(2))
    for x, missing, count in rows:
        for sums, part in ((train, slice(count)), (held_out, slice(count, None))):
            for some, lacks in zip(
                *(t[part].split(CHUNK // (features + outputs) + 1) for t in (x, missing)), strict=True
            ):
                each = some.double()[None]
                sums.add(with_intercept(each) if free else each, lacks.double()[None])
    train.reduce()
    held_out.reduce()
    return train, held_out


def _solution(train: NormalEquations, held_out: NormalEquations, free: bool) -> tuple[Tensor, float]:
    """What to add to a matrix ``(features, outputs)``, and the ridge; zeros if that helps at none."""
    ridge, _ = best_ridge(train, held_out, int(free))
    solution = train.solve(ridge, int(free)) if ridge else None
    return (torch.zeros_like(train.xy) if solution is None else solution)[0], ridge
