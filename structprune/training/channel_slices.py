"""What goes with channels while a model trains: parameters found by name, and sums over them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from structprune.checking import Check, instance, real
from structprune.coupling.graph import ChannelGraph
from structprune.coupling.groups import Group
from structprune.errors import PlanError
from structprune.wrapping import unwrapped

Sizes = dict[str, tuple[int, ...]]


def trainable(tensor: Tensor) -> bool:
    """Whether a penalty can pull at it."""
    return isinstance(tensor, nn.Parameter) and tensor.is_floating_point()


def parameters_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """All parameters by name, tied ones under each of theirs."""
    return dict(unwrapped(model).named_parameters(remove_duplicate=False))


def checked(model: nn.Module, shapes: Mapping[str, tuple[int, ...]], made_from: str) -> dict[str, Tensor]:
    """The parameters of these names, in float32 if they are narrower.

    Raises:
        PlanError: one is gone, or has another shape: the model was pruned since.
    """
    parameters = parameters_of(model)
    found: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        if name not in parameters:
            raise PlanError(f"{type(model).__name__} has no parameter {name!r}. Give the model of the {made_from}.")
        if tuple(parameters[name].shape) != shape:
            raise PlanError(
                f"{name!r} had the shape {list(shape)} when this penalty was built and has "
                f"{list(parameters[name].shape)} now: the model was pruned since. Build the penalty again, from a new "
                f"{made_from}."
            )
        narrow = parameters[name].dtype in (torch.float16, torch.bfloat16)
        found[name] = parameters[name].float() if narrow else parameters[name]
    return found


class ChannelSlices:
    """The entries that go with each channel, over all groups: sums over them without a loop over channels.

    Args:
        graph: the coupled channels.
        groups: those that count.
        names: the parameters that count; None for all of floating point.
    """

    def __init__(
        self, graph: ChannelGraph, groups: Iterable[Group] | None, names: frozenset[str] | None = None
    ) -> None:
        parameters = parameters_of(graph.model)
        parts_of: dict[tuple[str, int], list[tuple[np.ndarray, np.ndarray]]] = {}
        self.channels = 0
        for group in graph.groups() if groups is None else groups:
            for member in group.members:
                counts = names is None or member.tensor in names
                if counts and member.tensor in parameters and trainable(parameters[member.tensor]):
                    entry = (member.positions, member.channels + self.channels)
                    parts_of.setdefault((member.tensor, member.dim), []).append(entry)
            self.channels += group.channels
        if not parts_of:
            raise PlanError("No parameter goes with any of the channels, so there is nothing to penalise.")
        self._index = {
            key: tuple(torch.from_numpy(np.concatenate(side)) for side in zip(*parts, strict=True))
            for key, parts in parts_of.items()
        }
        self.shapes: Sizes = {name: tuple(parameters[name].shape) for name, _ in parts_of}
        self._sizes = self._summed({name: torch.ones(shape) for name, shape in self.shapes.items()})

    def sums(self, entries: Mapping[str, Tensor]) -> Tensor:
        """The sum of the entries that go with each channel; shape ``(channels,)``.

        An entry that belongs to several dimensions of a channel counts once for each, as in `structprune.LnNorm`.
        """
        return self._summed(entries)

    def sizes(self, device: torch.device) -> Tensor:
        """How many entries go with each channel."""
        self._sizes = self._sizes.to(device)
        return self._sizes

    def _summed(self, entries: Mapping[str, Tensor]) -> Tensor:
        total: Tensor | None = None
        for (name, dim), index in self._index.items():
            values = entries[name]
            if index[0].device != values.device:
                index = self._index[name, dim] = tuple(part.to(values.device) for part in index)
            along = values.movedim(dim, 0).flatten(1).sum(1) if values.dim() > 1 else values
            if total is None:
                total = torch.zeros(self.channels, dtype=values.dtype, device=values.device)
            part = torch.zeros(self.channels, dtype=values.dtype, device=values.device)
            total = total + part.index_add(0, index[1], along[index[0]]).to(total.device, total.dtype)
        assert total is not None
        return total


GRAPH = instance(ChannelGraph, "give the structprune.DependencyGraph of the model")
STRENGTH = real(least=0)
GROUPS = Check(
    lambda value: (
        value is None
        or (isinstance(value, (tuple, list)) and bool(value) and all(isinstance(group, Group) for group in value))
    ),
    "give a list of groups of the graph, or None for all",
)


NAMES = Check(
    lambda value: (
        isinstance(value, Collection) and not isinstance(value, str) and all(isinstance(v, str) for v in value)
    ),
    "give the names of parameters, or None for all",
)
