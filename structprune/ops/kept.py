"""How norms and reductions run over the channels that are kept, where the others are switched off but still there.

Each function runs one call as the smaller network would, and gives a result of the original's shape. `keep` tells, by
dimension of the first argument, the indices that are kept there; a layer norm of four channels, of which 1 and 3 are
off, has ``{-1 % x.dim(): tensor([0, 2])}``: it normalises two entries, and puts them at 0 and 2 of four.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from structprune.tracing.replay import ReplayedCall

Keep = Mapping[int, Tensor]
OverKept = Callable[[ReplayedCall, Keep, bool], Any]


def entries_kept(call: ReplayedCall, keep: Keep, same: bool) -> Any:
    """The call on the kept entries alone; the result stands in their places where it has the `same` dimensions."""
    x, rest, named = _taken(call)
    result = call.func(_selected(x, keep), *rest, **named)
    return _scattered(result, x, keep) if same else result


def shape_kept(call: ReplayedCall, keep: Keep, _: bool) -> Tensor:
    """A norm over the last dimensions, which is told their sizes, and has a scale and a shift of them."""
    x, rest, named = _taken(call)
    small = _selected(x, keep)
    first = x.dim() - len(rest[0])
    rest[0] = tuple(small.shape[first:])
    inner = {dim - first: index for dim, index in keep.items()}
    rest[1:3] = [_selected(t, inner) if isinstance(t, Tensor) else t for t in rest[1:3]]
    return _scattered(call.func(small, *rest, **named), x, keep)


def groups_kept(call: ReplayedCall, keep: Keep, _: bool) -> Tensor:
    """A norm over groups of channels: as many groups as any channel is left of."""
    x, rest, named = _taken(call)
    (index,) = keep.values()
    rest[0] = len(torch.unique(index // (x.shape[1] // int(rest[0]))))
    rest[1:3] = [t.index_select(0, index) if isinstance(t, Tensor) else t for t in rest[1:3]]
    return _scattered(call.func(_selected(x, keep), *rest, **named), x, keep)


def lengths_kept(call: ReplayedCall, keep: Keep, _: bool) -> Tensor:
    """``g * v / |v|``: `g` has size 1 where the norm runs over all."""
    v, rest, named = _taken(call)
    length: Tensor = rest[0]
    rest[0] = _selected(length, {dim: index for dim, index in keep.items() if length.shape[dim] != 1})
    return _scattered(call.func(_selected(v, keep), *rest, **named), v, keep)


def choices_kept(call: ReplayedCall, keep: Keep, _: bool) -> Any:
    """The largest entries; the choices are numbered as the original numbers them."""
    x, rest, named = _taken(call)
    values, numbers = call.func(_selected(x, keep), *rest, **named)
    (index,) = keep.values()
    return torch.return_types.topk((values, index[numbers]))


def _taken(call: ReplayedCall) -> tuple[Tensor, list[Any], dict[str, Any]]:
    """The tensor that a call runs over, its other positional arguments, and those by keyword."""
    named = {key: value for key, value in call.kwargs.items() if key != "input"}
    return call.args[0] if call.args else call.kwargs["input"], list(call.args[1:]), named


def _selected(x: Tensor, keep: Keep) -> Tensor:
    for dim, index in keep.items():
        x = x.index_select(dim, index)
    return x


def _scattered(small: Tensor, like: Tensor, keep: Keep) -> Tensor:
    for dim, index in keep.items():
        shape = list(small.shape)
        shape[dim] = like.shape[dim]
        small = small.new_zeros(shape).index_copy(dim, index, small)
    return small
