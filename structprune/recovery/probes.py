"""Samples on which `Reconstruction` measures, apart from those that it solves layers on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from structprune.recovery.batches import samples_in

SOLVED_SHARE = 0.75  # of each batch, where there are no other batches to solve on than those to measure on
FEWEST = 4  # with fewer samples in a batch all are measured on


@dataclass(frozen=True, slots=True)
class Probes:
    """What distances are measured on: samples that the consumers are not solved on.

    A layer with 1280 features that is solved on 192 positions fits them without any error, whichever channels remain:
    on those it would seem that hardly any are needed.

    Attributes:
        batches: the first ones of the data.
        solved: the share of each, from its beginning, that consumers are solved on nevertheless; 0 where other batches
            hold at least as many samples.
    """

    batches: list[Any]
    solved: float

    @classmethod
    def among(cls, data: Sequence[Any], samples: int) -> Probes:
        """The first batches that together hold so many samples."""
        chosen: list[Any] = []
        sizes = [samples_in(batch) for batch in data]
        for batch, size in zip(data, sizes, strict=True):
            chosen.append(batch)
            samples -= size
            if samples <= 0:
                break
        enough = sum(sizes[len(chosen) :]) >= sum(sizes[: len(chosen)])
        return cls(chosen, 0.0 if enough else SOLVED_SHARE)

    def seen(self, number: int, total: float) -> float:
        """How many of `total` positions of a batch consumers are solved on: the first ones."""
        return total * self.solved if number < len(self.batches) else total

    def unseen(self, output: Tensor) -> Tensor:
        """The samples of an output that no consumer is solved on; all of it where there are too few to be divided."""
        first = int(output.shape[0] * self.solved) if output.dim() else 0
        return output[first:] if output.dim() and output.shape[0] >= FEWEST else output
