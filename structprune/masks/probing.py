"""What an operation does to entries and channels, shown by running it.

Whether a ``view``, a ``cat`` or a ``chunk`` moved an entry is seen on tensors that hold the number of each entry;
whether a pooling or a mean lets constants through, and keeps channels apart, on constants and on random numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor, fx

from structprune.masks.states import FAILURES, State, call, collapse
from structprune.ops import op_of
from structprune.ops.arguments import tensors
from structprune.ops.relations import Axes
from structprune.ops.zeros import moved, moved_first

_TWO = (1.5, -2.25)


def may_move(node: fx.Node) -> bool:
    """Whether the record of an operation lets it be a movement; `moved_states` finds out whether a call is one.

    An operation that moves its first argument may compute with a second one: ``grid_sample`` reads there where to look,
    and all entries of a grid that holds 1, 2, 3, ... lie outside of the image, where it finds zeros.
    """
    known = op_of(node.meta["name"])
    if known is None:
        return False
    alone = len(set(tensors(node))) == 1
    return known.moves or known.views or known.zeros is moved or (known.zeros is moved_first and alone)


def moved_states(node: fx.Node, states: dict[fx.Node, State], axes: list[Axes | None]) -> list[State] | None:
    """The states of the results of a movement; None if the operation computes with what it is given.

    The operation runs twice, on entries that are numbered in two orders. If entry 7 of a result holds the number of
    the same entry of an argument both times, it was moved there; if it holds the same number, it is a constant.
    """
    sources = list(dict.fromkeys(tensors(node)))
    if not _all_floating(sources):
        return None
    total = sum(torch.Size(source.meta["shape"]).numel() for source in sources)
    if not total or not axes:
        return None
    order = torch.randperm(total, generator=torch.Generator().manual_seed(total))
    results = [_on_numbers(node, sources, numbers) for numbers in (torch.arange(total), order)]
    if any(len(result) != len(axes) for result in results):
        return None
    entries = [(states[source], source.meta["shape"]) for source in sources]
    value = torch.cat([state.value.expand(shape).reshape(-1) for state, shape in entries])
    known = torch.cat([state.known.expand(shape).reshape(-1) for state, shape in entries])
    moved_to: list[State] = []
    for first, second, dims in zip(*results, axes, strict=True):
        if dims is None or not _is_double(first):
            return None
        place, moved_here = _places(first, second, order)
        constant = ~moved_here & (first == second)
        if not bool((moved_here | constant).all()):
            return None
        moved_to.append(collapse(torch.where(moved_here, value[place], first), constant | known[place], dims))
    return moved_to


def _all_floating(nodes: Sequence[fx.Node]) -> bool:
    return all(node.meta["dtype"].is_floating_point for node in nodes)


def _is_double(value: object) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and value.dtype == torch.float64


def _on_numbers(node: fx.Node, sources: Sequence[fx.Node], numbers: Tensor) -> list[Any]:
    """The results of an operation on tensors whose entries hold `numbers`, counted from 1; none if it does not run."""
    parts = (numbers + 1).double().split([torch.Size(source.meta["shape"]).numel() for source in sources])
    given = {s: part.reshape(s.meta["shape"]) for s, part in zip(sources, parts, strict=True)}
    try:
        outputs = call(node, given)
    except FAILURES:
        return []
    return list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]


def _places(first: Tensor, second: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """For each entry of a result the place of the argument's entry that it may be, and whether it is that entry.

    Args:
        first: the result on entries that hold 1, 2, 3, ...
        second: the result on entries that hold ``order + 1``.
        order: a permutation. With [2, 0, 1], an entry moved from place 1 is 2 in `first` and ``order[1] + 1`` = 1 in
            `second`.
    """
    total = len(order)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(total)
    a, b = first.round().long() - 1, second.round().long() - 1
    inside = (first == a + 1) & (second == b + 1) & (a >= 0) & (a < total) & (b >= 0) & (b < total)
    place = a.clamp(0, total - 1)
    return place, inside & (inverse[b.clamp(0, total - 1)] == place)


def _keys(axes: Axes) -> list[object]:
    """What tells the free axes apart; None for the others."""
    return [axis.key if axis.free else None for axis in axes]


def passes(node: fx.Node, source: Axes, result: Axes) -> list[int] | None:
    """For each dimension of the result, that of its only tensor argument whose channels it holds; -1 where none.

    None if the operation mixes channels, or does not let a constant through as it is whatever the size of the image.
    Two channels along each dimension are enough to see both.
    """
    keys, free = _keys(source), [axis.key for axis in result if axis.free]
    if len(set(free)) != len(free) or set(free) - set(keys) or len(free) != len(keys) - keys.count(None):
        return None
    (x,) = set(tensors(node))
    shape = [int(size) for size in x.meta["shape"]]
    for stretch in (False, True):
        sizes = [2 if axis.free else _stretched(n, stretch) for axis, n in zip(source, shape, strict=True)]
        if not _lets_through(node, x, _two_values(sizes, source), source, result):
            return None
    return [keys.index(axis.key) if axis.free else -1 for axis in result]


def _two_values(sizes: Sequence[int], axes: Axes) -> Tensor:
    """A tensor whose two channels along each free axis differ, and that is constant along all others."""
    given = torch.ones([*sizes], dtype=torch.float64)
    for dim, axis in enumerate(axes):
        if axis.free:
            shape = [-1 if d == dim else 1 for d in range(len(sizes))]
            given = given * torch.tensor(_TWO, dtype=torch.float64).view(shape)
    return given


def _lets_through(node: fx.Node, x: fx.Node, given: Tensor, source: Axes, result: Axes) -> bool:
    """Whether the operation, run on `given`, gives the same constants along the axes of the result."""
    try:
        made = call(node, {x: given})
    except FAILURES:
        return False
    if not isinstance(made, Tensor) or made.dim() != len(result) or made.dtype != given.dtype:
        return False
    if any(made.shape[d] != 2 for d, axis in enumerate(result) if axis.free):
        return False
    keys = _keys(source)
    wanted = given.amax([d for d, axis in enumerate(source) if not axis.free], keepdim=True)
    return torch.allclose(made, _arranged(wanted, keys, result).expand_as(made), rtol=1e-14, atol=0)


def _stretched(size: int, stretch: bool) -> int:
    return min(2 * size + 3, size + 16) if stretch and size > 0 else size


def _arranged(x: Tensor, keys: list[object], result: Axes) -> Tensor:
    """A state of the argument with the dimensions of the result."""
    order = [keys.index(axis.key) for axis in result if axis.free]
    rest = [dim for dim in range(x.dim()) if dim not in order]
    return x.permute([*order, *rest]).reshape([x.shape[keys.index(axis.key)] if axis.free else 1 for axis in result])


def passed_state(state: State, source: Axes, result: Axes) -> State:
    """The state of a result that `passes` says to hold the constants of the argument."""
    keys = _keys(source)
    return State(_arranged(state.value, keys, result), _arranged(state.known, keys, result))
