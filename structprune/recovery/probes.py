"""Samples on which `Reconstruction` measures, apart from those that it solves layers on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from math import prod
from typing import Any

from torch import Tensor

from structprune.forwards.turns import Turns
from structprune.recovery.candidates import Piece, pieces_of
from structprune.tracing.trace import Trace

SOLVED_SHARE = 0.75  # of each batch, where there are no other batches to solve on than those to measure on
FEWEST = 4  # with fewer samples in a batch all are measured on
FORWARDS = 1.0  # of all samples: what measuring may cost
LEAST_ROWS, MOST = 256, 256  # rows of the output to measure on at least, and samples at most


@dataclass(frozen=True, slots=True)
class Probes:
    """What distances are measured on: samples that the consumers are not solved on.

    A layer with 1280 features that is solved on 192 positions fits them without any error, whichever channels remain:
    on those it would seem that hardly any are needed.

    Attributes:
        batches: those of this rank among the first ones of the data of all ranks.
        solved: the share of each, from its beginning, that consumers are solved on nevertheless; 0 where other batches
            hold at least as many samples.
        turns: the place of each batch of this rank among those of all.
        measured: how many batches are measured on, of all ranks.
    """

    batches: list[Any]
    solved: float
    turns: Turns
    measured: int

    @classmethod
    def among(cls, data: Iterable[Any], sizes: Sequence[int], samples: int) -> Probes:
        """The first batches, of all ranks in turns, that together hold so many samples.

        Args:
            data: batches of this rank.
            sizes: samples of each.
            samples: to measure on at least.
        """
        turns = Turns.of(sizes)
        measured = next((n for n, held in enumerate(accumulate(turns.sizes), 1) if held >= samples), len(turns.sizes))
        enough = sum(turns.sizes[measured:]) >= sum(turns.sizes[:measured])
        mine = sum(place < measured for place in turns.places)
        return cls(list(islice(data, mine)), 0.0 if enough else SOLVED_SHARE, turns, measured)

    @property
    def solved_batches(self) -> int:
        """How many batches of all ranks consumers are solved on."""
        return self.turns.count - (0 if self.solved else self.measured)

    def share(self, place: int) -> float:
        """The share of a batch, by its place among those of all ranks, that consumers are solved on."""
        return self.solved if place < self.measured else 1.0

    def seen(self, number: int, total: float) -> float:
        """How many of `total` positions of a batch of this rank consumers are solved on: the first ones."""
        return total * self.share(self.turns.places[number])

    def pieces(self) -> list[Piece]:
        """The same samples as `unseen` has of the batches, those of like batches in one: a fourth of the samples."""
        counts = [self.turns.sizes[self.turns.places[number]] for number in range(len(self.batches))]
        held = [count - int(count * self.solved) if count >= FEWEST else count for count in counts]
        return pieces_of(self.batches, counts, held)

    def unseen(self, output: Tensor) -> Tensor:
        """The samples of an output that no consumer is solved on; all of it where there are too few to be divided."""
        first = int(output.shape[0] * self.solved) if output.dim() else 0
        return output[first:] if output.dim() and output.shape[0] >= FEWEST else output


def affordable(trace: Trace, starts: Sequence[int], levels: int, samples: int) -> int:
    """How many samples to measure on, so that it costs about `FORWARDS` forwards of all.

    Each level of each group takes a forward from its first consumer on. With 8 groups, spread over the network, and 4
    levels that is 16 forwards: 64 of 1024 samples. There are more where they have less than `LEAST_ROWS` rows of the
    output: images of a classifier, tokens of a language model.

    Args:
        trace: of the model.
        starts: the number of the first consumer of each group.
        levels: of each group.
        samples: in all.
    """
    forwards = levels * sum(1 - start / len(trace.nodes) for start in starts)
    shapes = [node.meta["shape"] for node in trace.outputs.values()]
    rows = max((prod(shape[1:-1]) for shape in shapes if len(shape) > 1), default=1)
    least = -(-LEAST_ROWS // max(1, rows))
    return min(MOST, max(least, int(FORWARDS * samples / max(1.0, forwards))))
