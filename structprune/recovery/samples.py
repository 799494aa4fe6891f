"""What a chain of layers is solved on: samples of one batch, or of several joined."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Samples:
    """Samples that a chain is solved on.

    Attributes:
        inputs: of each producer.
        rest: what is added to the consumer's result: its bias, and the other part of a residual sum.
        goal: what the sum has to be.
        place: of their batch among those of all ranks; of joined ones, that of one of them.
        sections: how many samples there are of each batch, if they are joined from several.
    """

    inputs: tuple[Tensor, ...]
    rest: Tensor
    goal: Tensor
    place: int = 0
    sections: tuple[int, ...] = ()

    def part(self, which: slice) -> Samples:
        """Some of them; none of them where a rank has nothing to add to the sums of the others."""
        inputs = tuple(x[which] for x in self.inputs)
        return Samples(inputs, self.rest[which], self.goal[which], self.place)


def joined(parts: Sequence[Samples], entries: int, classes: int) -> list[Samples]:
    """Samples of several batches in one, as operations on few samples are slow; sums over them stay the same.

    Joined are those of equal shapes whose places among the batches have the same rest when divided by `classes`: of the
    places 0 to 7 with 4 classes, 0 and 4, 1 and 5, 2 and 6, 3 and 7.

    Args:
        parts: of each batch.
        entries: what is joined has no more entries in its largest tensor.
        classes: how many.
    """
    alike: dict[Any, list[list[Samples]]] = {}
    for samples in parts:
        tensors = (*samples.inputs, samples.rest, samples.goal)
        largest = max(tensor.numel() for tensor in tensors)
        groups = alike.setdefault((samples.place % classes, *(tensor.shape[1:] for tensor in tensors)), [[]])
        count = sum(len(other.goal) for other in groups[-1]) + len(samples.goal)
        if groups[-1] and largest // max(1, len(samples.goal)) * count > entries:
            groups.append([])
        groups[-1].append(samples)
    return [_one(group) for groups in alike.values() for group in groups]


def _one(parts: Sequence[Samples]) -> Samples:
    """The samples of several batches behind one another."""
    if len(parts) == 1:
        return parts[0]
    inputs = tuple(map(torch.cat, zip(*(part.inputs for part in parts), strict=True)))
    rest, goal = torch.cat([part.rest for part in parts]), torch.cat([part.goal for part in parts])
    return Samples(inputs, rest, goal, parts[0].place, tuple(len(part.goal) for part in parts))
