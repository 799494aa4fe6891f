"""What is known of the entries of a tensor: which do not depend on the inputs, and their value.

A tensor ``(batch, 8, height, width)`` whose second dimension holds channels has a state of shape ``(1, 8, 1, 1)``: a
channel is constant if all its entries, at every position, are the same number on every input.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from structprune.ops.arguments import arguments, positional
from structprune.ops.relations import Axes
from structprune.tracing.provenance import plain

# Sums of the same numbers in another order differ by rounding; relative to the sum of their magnitudes.
ROUNDING = 1e-12


@dataclass(frozen=True, slots=True, eq=False)
class State:
    """Constants of a tensor, with size 1 along each dimension that holds no channels.

    Attributes:
        value: float64; 0 where `known` is not set.
        known: whether the entries there are that constant.
    """

    value: Tensor
    known: Tensor

    @property
    def zero(self) -> Tensor:
        """Whether the entries are zero on every input."""
        return self.known & (self.value == 0)


def unknown(axes: Axes) -> State:
    """A tensor of which nothing is known."""
    shape = collapsed(axes)
    return State(torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.bool))


def collapsed(axes: Axes) -> list[int]:
    """The shape of a state."""
    return [axis.size if axis.free else 1 for axis in axes]


def collapse(value: Tensor, known: Tensor, axes: Axes) -> State:
    """The state of a tensor of which each entry is known or not."""
    dims = [dim for dim, axis in enumerate(axes) if not axis.free]
    if value.numel() == 0:
        return unknown(axes)
    if dims:
        low, high = value.amin(dims, keepdim=True), value.amax(dims, keepdim=True)
        known = known.to(torch.uint8).amin(dims, keepdim=True).bool() & (low == high)
        value = high
    return State(torch.where(known, value, 0.0), known)


def along(state: State, dim: int) -> Tensor:
    """Whether all entries are zero at each index of `dim`, shape ``(size,)``."""
    return state.zero.movedim(dim, 0).flatten(1).all(1) if state.zero.dim() > 1 else state.zero


def call(node: fx.Node, given: dict[fx.Node, Tensor], changed: dict[str, Any] | None = None) -> Any:
    """Run the operation of a node on other tensors, and with other arguments of the names in `changed`.

    The tensors are as they were, also where the operation writes into one.

    Raises:
        RuntimeError, TypeError, ValueError, NotImplementedError, IndexError: it does not run on such tensors.
    """
    args: Any = node.args
    kwargs: Any = node.kwargs
    if changed:
        args, kwargs = positional(node.meta["name"], node.target, node.args, node.kwargs)
        for place, name in enumerate(arguments(node)):
            if name in changed and place < len(args):
                args[place] = changed[name]
        args = tuple(args)
    written = node.meta.get("writes")
    args, kwargs = plain(
        fx.map_arg((args, kwargs), lambda source: given[source].clone() if source is written else given[source])
    )
    if node.op == "call_method":
        result = getattr(args[0], str(node.target))(*args[1:], **kwargs)
    else:
        function: Any = node.target
        result = function(*args, **kwargs)
    return result() if callable(result) and not isinstance(result, Tensor) else result


FAILURES = (RuntimeError, TypeError, ValueError, NotImplementedError, IndexError, AttributeError)
