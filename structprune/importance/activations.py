"""What a criterion is shown of a run, and the sums that it keeps."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass

from torch import Tensor

from structprune.distributed import all_summed
from structprune.errors import PlanError
from structprune.tracing.replay import ReplayedCall


class Sums:
    """Named sums over data. Those of other data are added by `merge`, those of other ranks by `reduce`.

    Example:
        >>> import torch
        >>> here, there = Sums(), Sums()
        >>> here.add("count", torch.tensor(2.0)); there.add("count", torch.tensor(3.0))
        >>> here.merge(there)["count"]
        tensor(5., dtype=torch.float64)
    """

    def __init__(self) -> None:
        self.tensors: dict[Hashable, Tensor] = {}

    def add(self, name: Hashable, value: Tensor) -> None:
        """Add `value` to the sum of this name, in float64 where the device has it."""
        value = value.detach()
        value = value.double() if value.device.type != "mps" else value.float()
        known = self.tensors.get(name)
        if known is None:
            self.tensors[name] = value.clone()
        else:
            known += value

    def merge(self, other: Sums) -> Sums:
        """Add all sums of `other`; returns itself."""
        for name, value in other.tensors.items():
            self.add(name, value)
        return self

    def reduce(self) -> None:
        """Add the sums of all ranks, where ``torch.distributed`` is in use; every rank has to call it."""
        self.tensors = all_summed(self.tensors)

    def __getitem__(self, name: Hashable) -> Tensor:
        return self.tensors[name]

    def __contains__(self, name: Hashable) -> bool:
        return name in self.tensors


@dataclass(frozen=True, slots=True)
class Activation:
    """An observed tensor in a real run.

    Attributes:
        number: which site.
        x: the tensor.
        dim: the dimension with the channels, counted from the end.
        weight: the tensor that sums the channels away, if there is one.
        weight_dim: the dimension of it that does.
        samples: size of the batch that the model was called on.
        operation: what takes it or made it.
        where: operation, module and source line, for messages.
    """

    number: int
    x: Tensor
    dim: int
    weight: Tensor | None
    weight_dim: int
    samples: int
    operation: ReplayedCall
    where: str

    def rows(self) -> Tensor:
        """`x` as a matrix: one row for each position of each sample, one column for each channel."""
        return self.x.movedim(self.dim, -1).reshape(-1, self.x.shape[self.dim])

    def by_sample(self) -> Tensor:
        """`x` in the shape (samples, channels, positions of each).

        Raises:
            PlanError: no dimension of it counts the samples.
        """
        view, _ = self._split(self.x)
        return view.reshape(*view.shape[:2], -1)

    def maps(self) -> Tensor:
        """`x` in the shape (samples, channels, *positions), with as many dimensions of positions as it has."""
        return self._split(self.x)[0]

    def gated(self, gate: Tensor) -> Tensor:
        """`x` times a gate of shape (samples, channels)."""
        view, restore = self._split(self.x)
        return restore(view * gate.reshape(*gate.shape, *[1] * (view.dim() - 2)).to(view.dtype))

    def _split(self, x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """`x` as (samples, channels, ...), and the way back."""
        channels = x.dim() + self.dim
        others = [dim for dim in range(x.dim()) if dim != channels]
        lead = next((dim for dim in others[:1] if x.shape[dim] % self.samples == 0), None)
        lead = next((dim for dim in others if x.shape[dim] == self.samples), None) if lead is None else lead
        if lead is None and self.samples > 1:
            raise PlanError(
                f"A tensor of shape {list(x.shape)} in {self.where} has no dimension that counts the {self.samples} "
                "samples of a batch, so that they cannot be told apart. Give batches of one sample."
            )
        if lead is None:
            moved = x.movedim(channels, 0).unsqueeze(0)
            return moved, lambda y: y.squeeze(0).movedim(0, channels)
        moved = x.movedim((lead, channels), (0, 1))
        # Windows of an image, or the tokens of a sequence, may be merged into the batch; samples come first in it.
        inner = moved.shape[0] // self.samples
        view = moved.unflatten(0, (self.samples, inner)).movedim(1, 2) if inner > 1 else moved

        def restore(y: Tensor) -> Tensor:
            y = y.movedim(2, 1).flatten(0, 1) if inner > 1 else y
            return y.movedim((0, 1), (lead, channels))

        return view, restore
