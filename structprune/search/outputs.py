"""How far the output of a pruned network is from the whole one's, on samples that nothing was solved on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from structprune.checking import Check
from structprune.distributed import all_reduced
from structprune.errors import RecoveryError
from structprune.forwards.batches import compared, samples_in
from structprune.recovery.probes import Probes
from structprune.recovery.selection import divergence, squared_error
from structprune.tracing.state import copy_buffer, swapped_tensors
from structprune.tracing.trace import as_call, preserved_random_state

# From the whole network's output and the pruned one's: a sum over the samples.
Distance = Callable[[Tensor, Tensor], Tensor]
DISTANCES: dict[str, Distance] = {"kl": divergence, "squared_error": squared_error}
DISTANCE = Check(
    lambda value: (isinstance(value, str) and value in DISTANCES) or (callable(value) and not isinstance(value, type)),
    f"give {' or '.join(map(repr, DISTANCES))}, or a function of the whole network's output and the pruned one's",
)


def distance_of(given: str | Distance) -> Distance:
    """The distance of this name; a function is returned as it is."""
    return DISTANCES[given] if isinstance(given, str) else given


def name_of(given: str | Distance) -> str:
    """What a distance is called."""
    return (
        given
        if isinstance(given, str)
        else f"{given.__module__}.{getattr(given, '__qualname__', type(given).__name__)}"
    )


class Outputs:
    """The outputs of a whole network on some batches, to compare others with.

    Args:
        model: the whole network.
        probes: the batches.
        distance: summed over samples.
    """

    def __init__(self, model: nn.Module, probes: Probes, distance: Distance) -> None:
        self._probes, self._distance = probes, distance
        self._whole = [probes.unseen(_first(model, inputs)) for inputs in probes.batches]
        self.sizes = [samples_in(whole) for whole in self._whole]

    def __len__(self) -> int:
        return len(self._whole)

    def lost(self, slim: nn.Module, batches: int | None = None) -> float:
        """The distance for a sample, over the first batches of this rank (by default all), and those of the others."""
        many = len(self) if batches is None else batches
        pairs = zip(self._whole[:many], self._probes.batches[:many], strict=True)
        total = sum(float(self._distance(whole, self._probes.unseen(_first(slim, inputs)))) for whole, inputs in pairs)
        count = sum(self.sizes[:many])
        total, count = all_reduced(torch.tensor([total, count], dtype=torch.float64)).tolist()
        return total / max(1, count)


def _first(model: nn.Module, inputs: Any) -> Tensor:
    """What is compared of the model's result in eval mode; the model stays as it was."""
    args, kwargs = as_call(inputs)
    with preserved_random_state(), torch.no_grad(), swapped_tensors(model, copy_buffer, track=False):
        model.eval()
        first = compared(model(*args, **kwargs))
    if first is None:
        raise RecoveryError(f"{type(model).__name__} returns no tensor on a batch of data, so nothing can be compared.")
    return first
