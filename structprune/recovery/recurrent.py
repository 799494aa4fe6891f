"""Recurrent layers solved again: the gates of the kept channels as the linear layers that they are.

A stack is solved layer by layer, each direction on what the layers before give by then (`recurrent_cells`). The results
of the call are brought to what the new weights give, so that the layers behind are solved on these.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from structprune.coupling.graph import ChannelGraph
from structprune.coupling.solve import Mask
from structprune.distributed import agreed, all_reduced
from structprune.forwards.parallel_forward import Event, Pause, Side
from structprune.ops.arguments import bind
from structprune.ops.relations import Axis
from structprune.recovery.candidates import HeldOut, drawn_positions
from structprune.recovery.layers import kept_indices
from structprune.recovery.recurrent_calls import Cell, RecurrentCall
from structprune.recovery.recurrent_cells import CellBatch, solve_cell
from structprune.recovery.recurrent_consumers import RecurrentLayers
from structprune.recovery.report import LayerRecovery

ALONE = "it is recurrent: its states depend on each other step by step"
NOISE = 64  # times the precision: a relative error that is rounding over many steps


@dataclass(frozen=True, slots=True)
class _Run:
    """The call on one batch.

    Attributes:
        ours, goal: in the pruned network and in the original.
        states: the original's result as rows, kept channels alone.
        chosen: the rows that are looked at: those to solve on, then those to choose by.
        train: how many of them are solved on.
    """

    ours: RecurrentCall
    goal: RecurrentCall
    states: Tensor
    chosen: Tensor
    train: int


class RecurrentSolver:
    """Solves the recurrent layers of one call, once they have run.

    Args:
        graph: of the original.
        removed: mask of the removed components.
        consumer: the layers.
        rows: steps of all sequences together to solve on.
        seed: of the draw of steps.
        held_out: samples that are not solved on.

    Attributes:
        consumer: the layers.
        refused: why they could not be solved; empty if they could.
    """

    def __init__(
        self, graph: ChannelGraph, removed: Mask, consumer: RecurrentLayers, rows: int, seed: int, held_out: HeldOut
    ) -> None:
        self.consumer = consumer
        self.refused = consumer.refused
        self._rows, self._held_out = rows, held_out
        self._random = torch.Generator().manual_seed(seed + consumer.node)
        self._orders: list[Tensor] = []
        self._name: str = graph.trace.nodes[consumer.node].meta["name"]
        results = graph.channels.axes[consumer.node]
        # The first state, and the last result: the cells of an LSTM, whose projection has other channels.
        wide = [results[1][-1], results[-1][-1]] if isinstance(results, list) and not self.refused else []
        kept = [kept_indices(graph, removed, axis) for axis in wide if isinstance(axis, Axis)]
        self._state, self._hidden = kept if len(kept) == 2 else (None, None)

    @property
    def target(self) -> Event:
        """Where it is solved."""
        return self.consumer.node, Side.AFTER

    @property
    def observed(self) -> list[Event]:
        """Where the batches have to pause before the target."""
        return [] if self.consumer.sorted_by is None else [(self.consumer.sorted_by, Side.BEFORE)]

    def observe(self, _: Event, pauses: list[Pause]) -> None:
        """Store how samples are sorted."""
        given = [bind("index_select", None, pause.args, pause.kwargs) for pause in pauses]
        self._orders = [each["index"].cpu() for each in given if each is not None]

    def solve(self, ours: list[Pause], goal: list[Pause], tensors: Mapping[str, Tensor]) -> LayerRecovery | None:
        """Solve the layers, change their parameters and correct the results at hand.

        Args:
            ours: the call in the pruned network, one for each batch; its results are corrected in place.
            goal: the original's.
            tensors: the tensors of the pruned model by name.

        Returns:
            The report; None if they could not be solved, and `refused` says why.
        """
        runs = [] if self.refused else self._runs(ours, goal)
        if any(self._differs(run) for run in runs):
            self.refused = "its sequences, or its hidden channels, are not those that are left of the original's"
        self.refused = agreed(self.refused)
        if self.refused:
            return None
        before, power = self._error(runs, [pause.result[0] for pause in ours])
        size, eps = max(power, torch.finfo(torch.float64).tiny), torch.finfo(runs[0].ours.x.dtype).eps
        after, ridge = before, 0.0
        if before > size * (NOISE * eps) ** 2:
            cells, ridge = self._solved(runs)
            after = self._try([p for cell in cells for p in cell.parameters], ours, runs, before, tensors)
        errors = (before / size) ** 0.5, (after / size) ** 0.5
        return LayerRecovery(self.consumer.layer, self._name, self._name, *errors, after < before, ridge, alone=ALONE)

    def _runs(self, ours: list[Pause], goal: list[Pause]) -> list[_Run]:
        """The calls on all batches in both models."""
        calls = [RecurrentCall.of(self._name, pause.args) for pause in ours]
        solved = [self._solved_on(number, call) for number, call in enumerate(calls)]
        drawn = drawn_positions([len(rows) for rows in solved], self._rows, self._held_out, self._random)
        parts = [(rows[train], rows[held_out]) for rows, (train, held_out) in zip(solved, drawn, strict=True)]
        return [self._run(*each) for each in zip(calls, goal, parts, strict=True)]

    def _run(self, call: RecurrentCall, goal: Pause, parts: tuple[Tensor, Tensor]) -> _Run:
        """The call on one batch in both models; `parts` are rows to solve on, and rows to choose by."""
        of = RecurrentCall.of(self._name, goal.args)
        states = of.as_rows(goal.result[0]).unflatten(1, (of.directions, -1))
        states = states[..., _kept(self._state, states.shape[-1]).to(states.device)].flatten(1)
        return _Run(call, of, states, torch.cat(parts).to(states.device), len(parts[0]))

    def _differs(self, run: _Run) -> bool:
        """Whether the sequences, or the number of channels, are not those that are expected."""
        hidden = len(_kept(self._hidden, run.goal.cells[0].hidden))
        return not torch.equal(run.ours.layout.sizes, run.goal.layout.sizes) or run.ours.cells[0].hidden != hidden

    def _error(self, runs: list[_Run], results: list[Tensor]) -> tuple[float, float]:
        """Squared error of results on the rows that are not solved on, and the squared size of the original's there."""
        sums = torch.zeros(2, dtype=torch.float64)
        for run, result in zip(runs, results, strict=True):
            mine, states = (t[run.chosen[run.train :]].double() for t in (run.ours.as_rows(result), run.states))
            sums += torch.stack([(mine - states).square().sum(), states.square().sum()]).cpu()
        error, power = all_reduced(sums).tolist()
        return error, power

    def _try(
        self,
        parameters: list[Tensor],
        ours: list[Pause],
        runs: list[_Run],
        before: float,
        tensors: Mapping[str, Tensor],
    ) -> float:
        """Give the model new parameters and correct the results at hand, if that lowers the error; what it is then."""
        names = self.consumer.parameters
        old = [tensors[name].detach().clone() for name in names]
        for name, new in zip(names, parameters, strict=True):
            tensors[name].data.copy_(new)
        results: list[tuple[Tensor, ...]] = [getattr(torch, self._name)(*pause.args) for pause in ours]
        after, _ = self._error(runs, [result[0] for result in results])
        if not after < before:
            for name, tensor in zip(names, old, strict=True):
                tensors[name].data.copy_(tensor)
            return before
        for pause, result in zip(ours, results, strict=True):
            for at_hand, new in zip(pause.result, result, strict=True):
                at_hand.copy_(new)
        return after

    def _solved_on(self, number: int, call: RecurrentCall) -> Tensor:
        """Rows of a batch that may be solved on, such that sequences stay whole, but for a single one.

        They are in the order of the model's samples, of which the last ones are held out from all solving.
        """
        layout, samples = call.layout, self._held_out.samples[number]
        sample, count = layout.sequence, int(layout.sizes[0])
        steps = len(layout.sizes)
        if self._orders:
            sample = self._orders[number][sample]
        elif count == 1 or (count % samples and steps % samples == 0):
            sample, count = layout.step, steps  # the first dimension of the data is that of the steps
        order = torch.sort(sample, stable=True).indices
        return order[sample[order] < self._held_out.solved_on(number, count)]

    # -- layer by layer --------------------------------------------------------------------------------------------

    def _solved(self, runs: list[_Run]) -> tuple[list[Cell], float]:
        """The new cells in order, and the largest ridge that was chosen."""
        cells, ridges = list[Cell](), [0.0]
        inputs = [(run.ours.x, run.goal.x) for run in runs]
        directions = runs[0].ours.directions
        for layer in range(len(runs[0].ours.cells) // directions):
            results: list[list[tuple[Tensor, Tensor]]] = [[] for _ in runs]  # of each batch, by direction
            for at in range(layer * directions, (layer + 1) * directions):
                backwards = at % directions == 1
                batches = [self._batch(at, backwards, run, *given) for run, given in zip(runs, inputs, strict=True)]
                cell = solve_cell(runs[0].ours.cells[at], [batch for batch, _ in batches], ridges)
                cells.append(cell)
                for (batch, goal), of_batch in zip(batches, results, strict=True):
                    mine = cell.run(batch.x, batch.first, batch.layout)
                    of_batch.append((batch.layout.reversed(mine) if backwards else mine, goal))
            inputs = [tuple(torch.cat(both, 1) for both in zip(*of_batch, strict=True)) for of_batch in results]
        return cells, max(ridges)

    def _batch(self, at: int, backwards: bool, run: _Run, x: Tensor, dense: Tensor) -> tuple[CellBatch, Tensor]:
        """What cell `at` is solved on of one batch, and the original's states in the order of the call.

        Args:
            at: number of the cell.
            backwards: whether it runs from the ends of the sequences.
            run: the batch.
            x: what goes into the layer in the pruned network.
            dense: the same in the original.
        """
        layout, cell, first = run.ours.layout, run.goal.cells[at], run.goal.first(at)
        chosen = run.chosen
        if backwards:
            # Turned twice, a row is itself.
            x, dense, chosen = layout.reversed(x), layout.reversed(dense), layout.reversal.to(x.device)[chosen]
        states = cell.run(dense, first, layout)
        before = layout.shifted(states, first[0])
        hidden = _kept(self._hidden, cell.hidden).to(x.device)
        state = _kept(self._state, states.shape[1]).to(x.device)
        by_input, by_state = (
            part.unflatten(1, (cell.gates, -1))[..., hidden].flatten(1)
            for part in (cell.from_input(dense[chosen]), cell.from_state(before[chosen]))
        )
        batch = CellBatch(
            layout=layout,
            x=x,
            first=run.ours.first(at),
            before=before[:, state],
            states=states[:, state],
            chosen=chosen,
            train=run.train,
            goal=(by_input, by_state),
        )
        return batch, layout.reversed(states) if backwards else states


def _kept(index: np.ndarray | None, size: int) -> Tensor:
    """Kept indices as a tensor; all of `size` if none is removed."""
    return torch.arange(size) if index is None else torch.from_numpy(index)
