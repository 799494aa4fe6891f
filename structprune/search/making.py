"""How a library is made: which widths there are, which groups fit into one pass over the data, what each loses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import track
from torch import Tensor, nn

from structprune.api import coupled_channels
from structprune.coupling.graph import ChannelGraph
from structprune.coupling.groups import Group
from structprune.distributed import gathered
from structprune.errors import PlanError
from structprune.importance.weight import LnNorm
from structprune.planning.build import plan_removal
from structprune.planning.decide import Deciding, Ranking
from structprune.planning.options import PlanOptions
from structprune.search.entries import Entry, Shelf, key_of
from structprune.search.outputs import Distance, Outputs
from structprune.search.solving import Solution, Solver, Stream, changed
from structprune.tracing.trace import ExampleInputs


@dataclass(frozen=True, kw_only=True)
class Measuring:
    """How the entries of a library are measured; see `structprune.library`."""

    distance: Distance
    probes: int
    rows: int
    memory: int
    seed: int
    progress: bool


class Making:
    """What there is to solve and to measure.

    Args:
        model: the model.
        example_inputs: what it runs on.
        options: what may go.
        levels: shares of the channels to remove, ascending.
    """

    def __init__(
        self, model: nn.Module, example_inputs: ExampleInputs, options: PlanOptions, levels: Sequence[float]
    ) -> None:
        self._graph = coupled_channels(model, example_inputs, options)
        while True:  # what the forward computes from its sizes may show that more has to stay
            with torch.no_grad():
                deciding = Deciding(self._graph, options, Ranking(self._graph, LnNorm(2.0)), None)
            self._units = [unit for unit in _units(self._graph) if set(unit) <= set(deciding.chosen)]
            self._kept = self._counts(deciding.feasible, levels)
            least = {group: counts[-1] for group, counts in self._kept.items() if counts}
            gone = [group.components[: group.channels - count] for group, count in least.items()]
            removed = np.concatenate([np.zeros(0, dtype=np.int64), *gone])
            if self._graph.settle(self._graph.components.removed(removed)):
                break
        if not least:
            raise PlanError("No group of channels has a width to choose: nothing may go, or round_to is too coarse.")

    def _counts(self, feasible: Mapping[Group, NDArray[Any]], levels: Sequence[float]) -> dict[Group, list[int]]:
        """For each group how many channels it keeps at each level, descending; groups of one unit go together."""
        kept: dict[Group, list[int]] = {}
        for unit in self._units:
            lines = _lines(self._graph, unit, feasible)
            wanted = [
                min(lines, key=lambda line, level=level: abs(1 - level - line[0] / unit[0].channels))
                for level in levels
            ]
            chosen = sorted({line for line in wanted if line[0] < unit[0].channels}, reverse=True)
            kept |= {group: [line[place] for line in chosen] for place, group in enumerate(unit)}
        return kept

    def missing(self, shelf: Shelf) -> list[Group]:
        """The groups that are not in the library yet."""
        return [group for group, counts in self._kept.items() if counts and key_of(group) not in shelf]

    def fill(self, shelf: Shelf, stream: Stream, how: Measuring) -> None:
        """Solve and measure what is missing."""
        probes = stream.probes(how.probes)
        solver = Solver(self._graph, stream, probes, how.rows, how.seed)
        outputs = Outputs(self._graph.model, probes, how.distance)
        # Ranks whose folders are not the same make together what any of them lacks.
        lacking = {key for keys in gathered([key_of(group) for group in self.missing(shelf)]) for key in keys}
        missing = {group for group in self._kept if key_of(group) in lacking}
        units = [unit for unit in self._units if missing.intersection(unit)]
        bar = track(list(self._passes(units, solver, how.memory)), "solving", disable=not how.progress, transient=True)
        for some in bar:
            groups = [group for unit in some for group in unit]
            solved = dict(solver.solve(groups, self._kept))
            for unit in some:
                for group, entry in self._measured(unit, solved, outputs):
                    shelf.add(key_of(group), entry, solved[group].changes)

    @staticmethod
    def _passes(units: Sequence[tuple[Group, ...]], solver: Solver, memory: int) -> Iterator[list[tuple[Group, ...]]]:
        """The units that are solved in one pass over the data: as many as fit, at least one."""
        some: list[tuple[Group, ...]] = []
        taken = 0
        for unit in units:
            size = sum(map(solver.memory, unit))
            if some and taken + size > memory:
                yield some
                some, taken = [], 0
            some.append(unit)
            taken += size
        if some:
            yield some

    def _measured(
        self, unit: tuple[Group, ...], solved: Mapping[Group, Solution], outputs: Outputs
    ) -> Iterator[tuple[Group, Entry]]:
        """The entries of groups that go together, which share what they lose."""
        losses: list[float] = []
        for counts in zip(*(self._kept[group] for group in unit), strict=True):
            gone = [solved[g].order[: g.channels - count] for g, count in zip(unit, counts, strict=True)]
            chosen = np.concatenate([g.components[which] for g, which in zip(unit, gone, strict=True)])
            plan = plan_removal(self._graph, chosen, config=False)
            changes: dict[str, Tensor] = {}
            for group, count in zip(unit, counts, strict=True):
                for name, change in solved[group].changes[count].items():
                    changes[name] = changes.get(name, 0) + change
            slim = changed(plan.apply(self._graph.model), plan, changes)
            losses.append(outputs.lost(slim) / len(unit))
        for group in unit:
            kept, loss = np.array(self._kept[group]), np.array(losses)
            yield (
                group,
                Entry(group.name, group.axis, solved[group].order, solved[group].error, kept, loss, self._saved(group)),
            )

    def _saved(self, group: Group) -> float:
        """Multiply-accumulates that one channel of a group saves."""
        graph = self._graph
        full, less = (
            graph.costs.at(graph.counter(graph.components.removed(gone))).macs
            for gone in (group.components[:0], group.components[:1])
        )
        return max(1.0, float(full - less))


def _units(graph: ChannelGraph) -> list[tuple[Group, ...]]:
    """The groups one by one, and those together whose numbers of channels depend on each other."""
    known = graph.groups()
    together = [tuple(known[number] for number in balanced.groups) for balanced in graph.balanced()]
    bound = {group for unit in together for group in unit}
    return [(group,) for group in known if group not in bound] + together


def _lines(
    graph: ChannelGraph, unit: tuple[Group, ...], feasible: Mapping[Group, NDArray[Any]]
) -> list[tuple[int, ...]]:
    """How many channels the groups of a unit may keep together."""
    if len(unit) == 1:
        return [(int(count),) for count in feasible[unit[0]]]
    known = graph.groups()
    (balanced,) = (b for b in graph.balanced() if tuple(known[number] for number in b.groups) == unit)
    return [
        tuple(line)
        for line in balanced.counts.tolist()
        if all(c in feasible[g] for g, c in zip(unit, line, strict=True))
    ]
