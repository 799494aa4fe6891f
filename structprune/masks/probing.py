"""What an operation does to entries and channels, found by running it.

Whether a ``view``, a ``cat`` or a ``chunk`` moved an entry is seen on tensors that hold the number of each entry;
whether a pooling or a mean lets constants through, and keeps channels apart, on constants and on random numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from structprune.masks.states import FAILURES, State, call, collapse
from structprune.ops import op_of
from structprune.ops.arguments import tensors
from structprune.ops.relations import Axes
from structprune.ops.zeros import moved, moved_first

_TWO = (1.5, -2.25)


def may_move(node: fx.Node) -> bool:
    """Whether the record of an operation lets it be a movement; `moved_states` finds out whether a call is one."""
    known = op_of(node.meta["name"])
    return known is not None and (known.moves or known.views or known.zeros in (moved, moved_first))


def moved_states(node: fx.Node, states: dict[fx.Node, State], axes: list[Axes | None]) -> list[State] | None:
    """The states of the results of a movement; None if the operation computes with what it is given.

    The operation runs twice, on entries that are numbered in two orders. If entry 7 of a result holds the number of
    the same entry of an argument both times, it was moved there; if it holds the same number, it is a constant.
    """
    sources = list(dict.fromkeys(tensors(node)))
    if any(not source.meta["dtype"].is_floating_point for source in sources):
        return None
    sizes = [int(torch.Size(source.meta["shape"]).numel()) for source in sources]
    total = sum(sizes)
    if not total:
        return None
    order = torch.randperm(total, generator=torch.Generator().manual_seed(total))
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(total)
    results: list[list[Tensor]] = []
    for numbers in (torch.arange(total), order):
        parts = (numbers + 1).double().split(sizes)
        given = {s: part.reshape(s.meta["shape"]) for s, part in zip(sources, parts, strict=True)}
        try:
            found = call(node, given)
        except FAILURES:
            return None
        results.append(list(found) if isinstance(found, (tuple, list)) else [found])
    if len(results[0]) != len(axes):
        return None
    value = torch.cat([states[s].value.expand(s.meta["shape"]).reshape(-1) for s in sources])
    known = torch.cat([states[s].known.expand(s.meta["shape"]).reshape(-1) for s in sources])
    moved_to: list[State] = []
    for first, second, dims in zip(*results, axes, strict=True):
        if dims is None or not isinstance(first, Tensor) or first.dtype != torch.float64:
            return None
        a, b = first.round().long() - 1, second.round().long() - 1
        inside = (first == a + 1) & (second == b + 1) & (a >= 0) & (a < total) & (b >= 0) & (b < total)
        place = a.clamp(0, total - 1)
        entry = inside & (inverse[b.clamp(0, total - 1)] == place)
        constant = ~entry & (first == second)
        if not bool((entry | constant).all()):
            return None
        moved_to.append(collapse(torch.where(entry, value[place], first), constant | known[place], dims))
    return moved_to


def passes(node: fx.Node, source: Axes, result: Axes) -> list[int] | None:
    """For each dimension of the result, that of its only tensor argument whose channels it holds; -1 where none.

    None if the operation mixes channels, or does not let a constant through as it is whatever the size of the image.
    Two channels along each dimension are enough to see both.
    """
    keys = [axis.key if axis.free else None for axis in source]
    free = [axis.key for axis in result if axis.free]
    if len(set(free)) != len(free) or set(free) - set(keys) or len(free) != sum(key is not None for key in keys):
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
        found = call(node, {x: given})
    except FAILURES:
        return False
    if not isinstance(found, Tensor) or found.dim() != len(result):
        return False
    if any(found.shape[d] != 2 for d, axis in enumerate(result) if axis.free):
        return False
    keys: list[object] = [axis.key if axis.free else None for axis in source]
    wanted = given.amax([d for d, axis in enumerate(source) if not axis.free], keepdim=True)
    return torch.allclose(found, _arranged(wanted, keys, result).expand_as(found), rtol=1e-14, atol=0)


def _stretched(size: int, stretch: bool) -> int:
    return min(2 * size + 3, size + 16) if stretch and size > 0 else size


def _arranged(x: Tensor, keys: list[object], result: Axes) -> Tensor:
    """A state of the argument with the dimensions of the result."""
    order = [keys.index(axis.key) for axis in result if axis.free]
    rest = [dim for dim in range(x.dim()) if dim not in order]
    return x.permute([*order, *rest]).reshape([x.shape[keys.index(axis.key)] if axis.free else 1 for axis in result])


def passed_state(state: State, source: Axes, result: Axes) -> State:
    """The state of a result that `passes` found to hold the constants of the argument."""
    keys: list[object] = [axis.key if axis.free else None for axis in source]
    return State(_arranged(state.value, keys, result), _arranged(state.known, keys, result))
