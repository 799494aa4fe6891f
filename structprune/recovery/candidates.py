"""What `recover` may return, compared by the output on samples that no layer was solved on; the best one is found.

A layer that is solved on few positions may get better on those and worse on all others, and the layers behind it then
correct what is an accident of the sample. So a sixteenth of the samples is kept out of all solving. On these the
outputs of the model as given, of the model whose norms are recalibrated and of what was solved are compared with the
original's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from structprune.coupling.graph import ChannelGraph
from structprune.coupling.solve import Mask
from structprune.distributed import all_reduced
from structprune.ops.relations import Axis
from structprune.recovery.batches import compared, samples_in
from structprune.recovery.layers import kept_indices
from structprune.recovery.parallel_forward import BatchRun, parallel_runs
from structprune.recovery.report import Candidate
from structprune.recovery.turns import Turns
from structprune.tracing.state import copy_buffer, held_tensors, swapped_tensors
from structprune.tracing.trace import Trace

EVERY = 16  # of so many samples one is held out
FEWEST = 5  # with fewer samples none is held out
PIECE = 1 << 22  # entries of outputs that are compared at a time, in float64


@dataclass(frozen=True, slots=True)
class HeldOut:
    """The samples that no layer is solved on: the last ones of each batch.

    Attributes:
        samples: of each batch, counted by the first dimension of its first tensor.
        held: how many of them are held out.
        turns: the place of each batch among those of all ranks.
        count: samples held out, of all ranks.
    """

    samples: tuple[int, ...]
    held: tuple[int, ...]
    turns: Turns
    count: int

    @classmethod
    def of(cls, batches: Sequence[Any]) -> HeldOut:
        """One of 16 samples of each batch, and at least one; fewer where a batch holds fewer than 5.

        Of a batch of 128 samples 8 are held out, of one of 24 or of 6 one. Batches of 4, 4, 4 and 4 samples are counted
        through, and the sixteenth sample is held out, the last one of the last batch; with two of them it is the
        eighth. With less than five samples in all none is.
        """
        samples = tuple(map(samples_in, batches))
        turns = Turns.of(samples)
        total, before, held = sum(turns.sizes), 0, list[int]()
        every = min(EVERY, total)
        for count in turns.sizes:
            if count >= FEWEST:
                held.append(max(1, count // EVERY))
            else:
                held.append((before + count) // every - before // every if total >= FEWEST else 0)
            before += count
        return cls(samples, tuple(held[place] for place in turns.places), turns, sum(held))

    def solved_on(self, number: int, size: int) -> int:
        """How many of `size` entries of a batch may be solved on, where they are in the order of its samples.

        Of 24 samples with 10 positions each, one of which is held out, the first 230 positions.
        """
        count, held = self.samples[number], self.held[number]
        return size - -(-size * held // count)


class Candidates:
    """Candidates are offered one after the other, and the model can be put back to the best that is not yet solved.

    What was solved is offered last, so that no copy of it is needed; of what came before, only what differs from the
    model as given is remembered. In half a billion weights a copy would take a gigabyte.

    The error of one is that of the first tensor that the model returns, but for a loss: the root of the mean squared
    difference from the original's over the root mean square of the original's, on the samples held out, or on all where
    there are none.

    Args:
        graph: of the original.
        removed: mask of the removed components.
        original: the model to meet.
        batches: what goes into the models.
        held_out: the samples to compare on.
        given: the tensors as given, by name; nothing else changes them.

    Attributes:
        tried: those offered so far.
        kept: name of the best.
    """

    def __init__(
        self,
        graph: ChannelGraph,
        removed: Mask,
        original: nn.Module,
        batches: Sequence[Any],
        held_out: HeldOut,
        given: Mapping[str, Tensor],
    ) -> None:
        self._graph, self._removed = graph, removed
        self._batches = batches
        self._held_out = held_out
        self._any_held = held_out.count > 0
        self.samples = held_out.count
        self.tried: list[Candidate] = []
        self.kept = ""
        self._best = float("inf")
        self._given = given
        self._changed: dict[str, Tensor] = {}
        self._goal = [self._kept_part(part) for part in self.parts(outputs(original, batches, graph.trace))]

    def offer(self, name: str, model: nn.Module, parts: list[Tensor | None] | None = None) -> bool:
        """Compare what a model computes; whether it is the best so far.

        Args:
            name: of the candidate.
            model: with its tensors as they are now.
            parts: what `parts` makes of its results, if they are known.
        """
        parts = self.parts(outputs(model, self._batches, self._graph.trace)) if parts is None else parts
        error = self._error(parts)
        self.tried.append(Candidate(name, error))
        # The first stands even where nothing can be compared.
        if self.kept and not error < self._best:
            return False
        self.kept, self._best = name, error
        return True

    def remember(self, changed: Mapping[str, Tensor]) -> None:
        """From now on `restore` gives these tensors, by name, and all others as given."""
        self._changed = dict(changed)

    def restore(self, model: nn.Module) -> None:
        """Give a model the tensors as given, but for those that were remembered."""
        for name, held in held_tensors(model).items():
            held.tensor.data.copy_(self._changed.get(name, self._given[name]))

    def parts(self, results: Iterable[Any]) -> list[Tensor | None]:
        """Of what is compared of the result for each batch, one after the other, the samples held out."""
        parts: list[Tensor | None] = []
        for number, result in enumerate(results):
            part = compared(result)
            if part is not None and self._any_held:
                part = part[self._held_out.solved_on(number, part.shape[0]) :] if part.dim() else None
            parts.append(None if part is None or not part.is_floating_point() else part.clone())
            del result, part  # before the next one is computed
        return parts

    def _kept_part(self, result: Tensor | None) -> Tensor | None:
        """The original's result without the channels that were removed from the output of the model."""
        if result is None:
            return None
        nodes = list(self._graph.trace.outputs.values())
        node = next((node for node in nodes if node.meta["shape"]), nodes[0])
        axes = self._graph.channels.axes[node.meta["index"]]
        for dim, axis in enumerate(axes if isinstance(axes, tuple) else ()):
            index = kept_indices(self._graph, self._removed, axis) if isinstance(axis, Axis) else None
            if index is not None:
                result = result.index_select(dim, torch.from_numpy(index).to(result.device))
        return result

    def _error(self, results: list[Tensor | None]) -> float:
        """The relative error; infinite where the outputs are no numbers, or have other shapes than the original's."""
        sums = torch.zeros(2, dtype=torch.float64)
        for ours, goal in zip(results, self._goal, strict=True):
            if ours is None or goal is None:
                continue
            if ours.shape != goal.shape:
                sums[0] += torch.inf
                continue
            for a, b in zip(ours.flatten().split(PIECE), goal.flatten().split(PIECE), strict=True):
                sums += torch.stack([(a.double() - b.double()).square().sum(), b.double().square().sum()]).cpu()
        difference, power = all_reduced(sums).tolist()
        error = (difference / max(power, torch.finfo(torch.float64).tiny)) ** 0.5
        return error if error == error else float("inf")


def outputs(model: nn.Module, batches: Sequence[Any], trace: Trace) -> Iterable[Any]:
    """What a model returns in eval mode on each batch, one after the other; it stays as it was."""
    with (
        swapped_tensors(model, copy_buffer, track=False),
        parallel_runs(BatchRun, model.eval(), batches, trace, set()) as runs,
    ):
        for run in runs:
            yield run.finish()
