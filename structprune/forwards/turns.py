"""The batches of all ranks of ``torch.distributed`` in turns: the first of each rank, then the second of each.

That is the order in which a single process would be given them. What depends on the number of a batch (which samples
are held out, which positions are drawn, which are measured on) is decided by its place in that order, so that the ranks
together do what a single process does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from structprune.distributed import all_reduced, gathered, rank_and_count

T = TypeVar("T")


def in_turns(mine: Sequence[T]) -> list[T]:
    """What all ranks have, in turns; they are pickled and sent.

    Example:
        >>> in_turns(["a", "b"])  # a single process
        ['a', 'b']
    """
    of_all = gathered(list(mine))
    order = sorted((number, rank) for rank, here in enumerate(of_all) for number in range(len(here)))
    return [of_all[rank][number] for number, rank in order]


@dataclass(frozen=True, slots=True)
class Turns:
    """Where the batches of this rank stand.

    Attributes:
        sizes: samples of each batch of all ranks.
        places: of the batches of this rank among them, ascending.

    Example:
        >>> Turns.of([8, 8, 4])  # a single process
        Turns(sizes=(8, 8, 4), places=(0, 1, 2))
    """

    sizes: tuple[int, ...]
    places: tuple[int, ...]

    @classmethod
    def of(cls, sizes: Sequence[int]) -> Turns:
        """The turns for the samples of each batch of this rank.

        With 8 and 8 samples here and 6 on the other rank the sizes are 8, 6 and 8, and the places 0 and 2.
        """
        mine = rank_and_count()[0]
        turns = in_turns([(mine, size) for size in sizes])
        places = tuple(place for place, (rank, _) in enumerate(turns) if rank == mine)
        return cls(tuple(size for _, size in turns), places)

    @property
    def count(self) -> int:
        """Batches of all ranks."""
        return len(self.sizes)

    def drawn(self, totals: Sequence[int], quota: int, generator: torch.Generator) -> list[Tensor]:
        """For each batch of this rank `quota` of its positions, drawn with repetition; all where there are no more.

        The generator draws for the batches of all ranks, one after the other, as it would in a single process.

        Args:
            totals: positions of each batch of this rank.
            quota: how many to draw of each batch.
            generator: the same on all ranks.

        Example:
            >>> turns = Turns.of([2, 2])
            >>> [len(positions) for positions in turns.drawn([100, 20], 50, torch.Generator())]
            [50, 20]
        """
        of_all = torch.zeros(self.count, dtype=torch.int64)
        of_all[list(self.places)] = torch.tensor(totals, dtype=torch.int64)
        mine = set(self.places)
        drawn: list[Tensor] = []
        for place, total in enumerate(all_reduced(of_all).tolist()):
            positions = torch.randint(total, (quota,), generator=generator) if quota < total else None
            if place in mine:
                drawn.append(torch.arange(total) if positions is None else positions.sort().values)
        return drawn
