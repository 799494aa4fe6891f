"""What is solved in a pruned model: its layers, those that are left and why, and when each solver has its turn."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from structprune.coupling.graph import ChannelGraph
from structprune.coupling.solve import Mask
from structprune.distributed import gathered
from structprune.forwards.batches import samples_in
from structprune.forwards.parallel_forward import Event
from structprune.recovery.candidates import HeldOut
from structprune.recovery.layer_solver import LayerSolver
from structprune.recovery.layers import Consumer, changed_operations, consumers
from structprune.recovery.norms import names_of_statistics
from structprune.recovery.recurrent import RecurrentSolver
from structprune.recovery.recurrent_consumers import RecurrentLayers, recurrent_layers

# A layer is left whose result is so many times as large as its input, and takes so many bytes in both models.
WIDER, MOST_BYTES = 8, 1 << 28

Solver = LayerSolver | RecurrentSolver


@dataclass(frozen=True, slots=True)
class How:
    """How layers are solved, as `structprune.recover` was asked to.

    Attributes:
        rows: positions of all batches together to solve on.
        rounds: of solving a layer together with its producers.
        seed: of the draw of positions.
        weights: whether weights may change, or biases alone.
        offload: a folder for what batches hold between layers; None for memory.
    """

    rows: int
    rounds: int
    seed: int
    weights: bool
    offload: str | os.PathLike[str] | None


@dataclass(frozen=True, slots=True)
class Solving:
    """What solving the layers of a model needs.

    Attributes:
        graph: of the original.
        removed: mask of the removed components.
        unchanged_statistics: names of the statistics of batch norms that get what they get in the original.
        layers: what is to be solved.
        recurrent: recurrent layers that are to be solved.
        how: how they are solved.
        given: the tensors that the pruned model was given with, by name.
        left: layers whose result has changed but that are not solved, and why.
    """

    graph: ChannelGraph
    removed: Mask
    unchanged_statistics: frozenset[str]
    layers: list[Consumer]
    recurrent: list[RecurrentLayers]
    how: How
    given: dict[str, Tensor]
    left: dict[str, str]

    @classmethod
    def of(
        cls,
        graph: ChannelGraph,
        removed: Mask,
        batches: Sequence[Any],
        changes: tuple[Collection[fx.Node], Collection[fx.Node]],
        how: How,
        given: dict[str, Tensor],
    ) -> Solving:
        """What to solve once components are removed.

        Args:
            graph: of the original.
            removed: mask of the removed components.
            batches: what goes into the models.
            changes: operations that begin to differ, and those that are removed, as for `consumers`.
            how: layers are solved.
            given: the tensors of the pruned model by name.
        """
        layers, too_wide = _affordable(consumers(graph, removed, *changes), graph, batches)
        recurrent = recurrent_layers(graph, removed, *changes)
        stay = "" if how.weights else "its weights are to stay"
        left = {**too_wide, **{each.layer: each.refused or stay for each in recurrent if each.refused or stay}}
        recurrent = [each for each in recurrent if not each.refused and not stay]
        changed = changed_operations(graph, removed, changes[0])
        same = [node for node in graph.trace.nodes if node.meta["name"] == "batch_norm" and node not in changed]
        unchanged = frozenset(name for norm in same for name in names_of_statistics(norm))
        return cls(graph, removed, unchanged, layers, recurrent, how, given, left)

    @property
    def any(self) -> bool:
        """Whether there is anything to solve."""
        return bool(self.layers or self.recurrent)

    def solvers(self, held_out: HeldOut, rounds: int) -> list[Solver]:
        """A solver for each layer."""
        common = self.how.rows, self.how.seed, held_out
        linear = [
            LayerSolver(self.graph, self.removed, layer, *common, self.given, rounds, self.how.weights)
            for layer in self.layers
        ]
        return [*linear, *(RecurrentSolver(self.graph, self.removed, layer, *common) for layer in self.recurrent)]


def _affordable(
    layers: list[Consumer], graph: ChannelGraph, batches: Sequence[Any]
) -> tuple[list[Consumer], dict[str, str]]:
    """The layers to solve, and why others are left: the results of all batches of a rank are in memory at once.

    The rank with the most samples decides for all. For 8,192 tokens, the result of a language model's last layer, with
    32,000 tokens to choose from, takes 1 GB in each of both models, and its input of 1,536 channels 50 MB.
    """
    chosen: list[Consumer] = []
    left: dict[str, str] = {}
    batches_like_the_first = max(gathered(sum(map(samples_in, batches)))) / samples_in(batches[0])
    for layer in layers:
        node = graph.trace.nodes[layer.node]
        result, taken = (math.prod(n.meta["shape"]) for n in (node, _input_of(node)))
        size = 2 * 4 * result * batches_like_the_first
        if result > WIDER * taken and size > MOST_BYTES:
            left[layer.layer] = (
                f"on all samples its result takes {size / 1e9:.1f} GB in both models; with fewer samples it is solved"
            )
        else:
            chosen.append(layer)
    return chosen, left


def _input_of(node: fx.Node) -> fx.Node:
    """What goes into a layer: the largest tensor that it takes and the model does not hold."""
    taken = [n for n in node.all_input_nodes if n.meta["name"] != "parameter"]
    return max(taken or [node], key=lambda n: math.prod(n.meta["shape"]))


def schedule_of(solvers: Sequence[Solver]) -> dict[Event, list[Solver]]:
    """The events in the order of the forward, each with the solvers that observe it or have their target there.

    With ``conv1`` (1) and ``conv2`` (3), both observed before they run and solved behind, and ``conv1`` a producer of
    ``conv2``: before 1, both solvers; after 1, the first; before 3 and after 3, the second.
    """
    schedule: dict[Event, list[Solver]] = {}
    for solver in solvers:
        for event in (*solver.observed, solver.target):
            schedule.setdefault(event, []).append(solver)
    return dict(sorted(schedule.items()))
