"""What `recover` may return, compared by the output on samples that no layer was solved on; the best one is found.

A layer that is solved on few positions may get better on those and worse on all others, and the layers behind it then
correct what is an accident of the sample. So a sixteenth of the samples is kept out of all solving. On these the
outputs of the model as given, of the model whose norms are recalibrated and of what was solved are compared with the
original's. Only these samples go through the models, those of many batches together.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from structprune.coupling.graph import ChannelGraph
from structprune.coupling.solve import Mask
from structprune.distributed import all_reduced
from structprune.forwards.batches import compared, samples_in
from structprune.forwards.parallel_forward import BatchRun, parallel_runs
from structprune.forwards.turns import Turns
from structprune.ops.relations import Axis
from structprune.recovery.layers import KeptParts, kept_indices
from structprune.recovery.report import Candidate
from structprune.tracing.state import copy_buffer, held_tensors, swapped_tensors
from structprune.tracing.trace import Trace, distinct_tensors, map_tensors, tensors_in

EVERY = 16  # of so many samples one is held out
A_FIFTH = 5  # of the positions of each batch that are solved on, one of so many is held out to choose the ridge by
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


def drawn_positions(
    totals: list[int], rows: int, held_out: HeldOut, random: torch.Generator
) -> list[tuple[Tensor, Tensor]]:
    """For each batch some of its positions: those to solve on, and those to choose by, which are of the last fifth.

    Args:
        totals: positions of each batch of this rank.
        rows: how many are drawn of the batches of all ranks together.
        held_out: where the batches stand among those of all ranks.
        random: the same on all ranks.
    """
    turns = held_out.turns
    parts: list[tuple[Tensor, Tensor]] = []
    for total, drawn in zip(totals, turns.drawn(totals, max(1, rows // turns.count), random), strict=True):
        split = total - total // A_FIFTH if total >= 2 * A_FIFTH else total - 1
        parts.append((drawn[drawn < split], drawn[drawn >= split]))
    return parts


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
        held = held_out.held if held_out.count else held_out.samples
        self._pieces = pieces_of(batches, held_out.samples, held)
        self.samples = held_out.count
        self.tried: list[Candidate] = []
        self.kept = ""
        self._best = float("inf")
        self._given = given
        self._changed: dict[str, Tensor] = {}
        self._goal = [self._kept_part(part) for part in self._results(original)]

    def offer(self, name: str, model: nn.Module) -> bool:
        """Compare what a model computes with its tensors as they are now; whether it is the best so far."""
        error = self._error(self._results(model))
        self.tried.append(Candidate(name, error))
        # The first stands even where nothing can be compared.
        if self.kept and not error < self._best:
            return False
        self.kept, self._best = name, error
        return True

    def remember(self, changed: Mapping[str, Tensor]) -> None:
        """From now on `restore` gives these tensors, by name, and all others as given."""
        self._changed = dict(changed)

    def restore(self, model: nn.Module, as_given: Collection[str] = ()) -> None:
        """Give a model the tensors as given, but for those that were remembered and are not among `as_given`."""
        for name, held in held_tensors(model).items():
            remembered = None if name in as_given else self._changed.get(name)
            held.tensor.data.copy_(self._given[name] if remembered is None else remembered)

    def _results(self, model: nn.Module) -> list[Tensor | None]:
        """What is compared of the model's result for each piece, one after the other: that of the samples held out."""
        inputs = [piece.inputs for piece in self._pieces]
        parts: list[Tensor | None] = []
        for piece, result in zip(self._pieces, outputs(model, inputs, self._graph.trace), strict=True):
            part = compared(result)
            if part is not None and piece.held < piece.samples:
                part = piece.part(part) if part.dim() else None
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
        kept = [
            kept_indices(self._graph, self._removed, axis) if isinstance(axis, Axis) else None
            for axis in (axes if isinstance(axes, tuple) else ())
        ]
        return KeptParts([result], kept)[0]

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


@dataclass(frozen=True, slots=True)
class Piece:
    """What goes into the models at once when they are compared: as many samples as a batch of data has.

    Attributes:
        inputs: as the model takes them.
        samples: how many there are.
        held: how many of them, the last ones, are compared.
    """

    inputs: Any
    samples: int
    held: int

    def part(self, result: Tensor) -> Tensor:
        """What a result holds of them, if its first dimension counts samples: 6 rows of 48, for 2 of 16 samples."""
        return result[result.shape[0] - -(-result.shape[0] * self.held // self.samples) :]


def pieces_of(batches: Sequence[Any], counts: Sequence[int], held_out: Sequence[int]) -> list[Piece]:
    """The samples held out, with those of like batches in one.

    Of 16 batches of 128 images, 8 of each held out, there is one piece of 128 images, in place of 2048 images. A batch
    stays whole where it does not consist of tensors with a row for each sample, or all its samples are held out. One of
    which none is held out is left out.

    Args:
        batches: of data.
        counts: of their samples.
        held_out: how many of them, the last ones of each batch.
    """
    pieces: list[Piece] = []
    alike: dict[Any, list[tuple[Any, int]]] = {}
    for batch, samples, held in zip(batches, counts, held_out, strict=True):
        form = _form(batch, samples) if held < samples else None
        if held and form is None:
            pieces.append(Piece(batch, samples, held))
        elif held:
            alike.setdefault((samples, form, _sharing(batch)), []).append((batch, held))
    for (samples, *_), members in alike.items():
        pieces += _joined(members, samples)
    return pieces


def _form(batch: Any, samples: int) -> Any:
    """What is equal for batches that can be joined; None if the batch cannot be divided into its samples.

    A tensor (128, 3, 32, 32) may be joined with one (40, 3, 32, 32), but not with one of another size or type.
    """
    if isinstance(batch, Tensor):
        divisible = batch.dim() > 0 and batch.shape[0] == samples
        return (tuple(batch.shape[1:]), batch.dtype, batch.device) if divisible else None
    if isinstance(batch, Mapping):
        parts = [(key, _form(value, samples)) for key, value in batch.items()]
        return None if any(part is None for _, part in parts) else tuple(parts)
    if isinstance(batch, (tuple, list)):
        parts = [_form(value, samples) for value in batch]
        return None if any(part is None for part in parts) else (type(batch), *parts)
    plain = batch is None or isinstance(batch, (bool, int, float, str))
    return (type(batch), batch) if plain else None


def _sharing(batch: Any) -> tuple[int, ...]:
    """Which tensors of a batch are the same, each by the place of its first: (0, 0, 2) where query and key are one."""
    ids = [id(tensor) for tensor in tensors_in(batch)]
    return tuple(map(ids.index, ids))


def _joined(members: list[tuple[Any, int]], samples: int) -> Iterator[Piece]:
    """The held-out samples of batches that are alike, behind as many others as fill a batch.

    Forwards may look at the number of samples. With 2 of 5 samples held out in each of 2 batches there is one piece:
    the first sample of the first batch, and the four.

    Args:
        members: batches of so many samples, each with how many of them are held out.
        samples: of each batch.
    """
    first, total = members[0][0], sum(held for _, held in members)
    columns: list[tuple[Tensor, Tensor | None]] = []
    for column in zip(*(distinct_tensors(batch) for batch, _ in members), strict=True):
        rows = [x[samples - held :] for x, (_, held) in zip(column, members, strict=True)]
        same = all(torch.equal(x, column[0]) for x in column[1:])  # a table, or the only batch
        columns.append((column[0], None if same else torch.cat(rows)))
    for start in range(0, total, samples):
        held = min(samples, total - start)
        parts = iter(
            x if rows is None else torch.cat([x[: samples - held], rows[start : start + held]]) for x, rows in columns
        )
        yield Piece(map_tensors(lambda _, parts=parts: next(parts), first), samples, held)


def outputs(model: nn.Module, batches: Sequence[Any], trace: Trace) -> Iterator[Any]:
    """What a model returns in eval mode on each batch, one after the other; it stays as it was."""
    with (
        swapped_tensors(model, copy_buffer, track=False),
        parallel_runs(BatchRun, model.eval(), batches, trace, set()) as runs,
    ):
        for run in runs:
            yield run.finish()
