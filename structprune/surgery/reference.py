"""Running the original with the removed channels switched off."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from structprune.channels.propagate import has_rule
from structprune.channels.solver import Mask
from structprune.tracing.recorder import Recorder
from structprune.tracing.trace import Trace
from structprune.tracing.vocabulary import Call

_WITH_SHAPE = frozenset({"layer_norm", "rms_norm"})
_SAME_SHAPE = _WITH_SHAPE | {"_weight_norm", "batch_norm", "instance_norm", "softmax", "_softmax", "python.softmax"}
# What these give does not change with channels that are zero.
_PLAIN = frozenset({"sum", "nansum", "norm", "linalg_vector_norm", "frobenius_norm"})

Site = tuple[str, int, int, str]


class _Sites:
    """Where an operation stands, in a way that loops of a length that data decide do not shift.

    That is: the module, which of its calls, which operation of that call, and the operation's name.
    """

    def __init__(self) -> None:
        self._calls: dict[str, int] = {}
        self._number: dict[int, int] = {}
        self._done: dict[int, int] = {}

    def of(self, call: int, path: str, name: str) -> Site:
        """The site of the next operation, called `name`, of call number `call`, of the module at `path`."""
        if call not in self._number:
            self._number[call] = self._calls[path] = self._calls.get(path, -1) + 1
        return path, self._number[call], self._done.get(call, 0), name

    def passed(self, call: int) -> None:
        """That operation was recorded."""
        self._done[call] = self._done.get(call, 0) + 1


def sites_of(trace: Trace) -> dict[int, Site]:
    """The site of each operation of a trace, by its number."""
    sites = _Sites()
    found: dict[int, Site] = {}
    for node in trace.nodes:
        if node.op.startswith("call_") and node.meta["name"] != "part":
            call = node.meta["call"]
            found[node.meta["index"]] = sites.of(call, trace.calls[call].path if call >= 0 else "", node.meta["name"])
            sites.passed(call)
    return found


class Reference(Recorder):
    """Runs the original, with norms over thinned axes taken over the survivors.

    It counts operations and keeps nothing else of them: no tensor lives longer than the forward needs it.

    Args:
        survivors: for the site of each such norm, the dimensions that it runs over and which of their channels live.
    """

    def __init__(self, survivors: Mapping[Site, tuple[tuple[int, ...], list[Mask]]]) -> None:
        super().__init__({}, has_rule, meta=False)
        self._survivors = {site: found for site, found in survivors.items() if site[-1] not in _PLAIN}
        self._sites = _Sites()

    def remember(self, tensor: Tensor, node: fx.Node) -> None:
        """Does nothing."""

    def _known_only(self, value: Any) -> Any:
        return None

    def _node(self, op: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> fx.Node:
        if op.startswith("call_") and name != "part":
            self._sites.passed(self._stack[-1] if self._stack else -1)
        return super()._node(op, target, args, kwargs, name)

    def _execute(self, call: Call, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        number = self._stack[-1] if self._stack else -1
        path = self.recording.calls[number].path if number >= 0 else ""
        found = self._survivors.get(self._sites.of(number, path, call.name))
        if found is None:
            result = super()._execute(call, func, args, kwargs)
            return _off_over_off(result, *args) if call.name == "div" and not call.inplace else result
        dims, masks = found
        x: Tensor = args[0] if args else kwargs["input"]
        keep = [torch.from_numpy(np.flatnonzero(mask)).to(x.device) for mask in masks]
        rest: list[Any] = list(args[1:])
        if call.name == "group_norm":
            return self._group_norm(func, x, rest, kwargs, keep[0])
        small = _selected(x, dims, keep)
        if call.name in _WITH_SHAPE:
            first = x.dim() - len(rest[0])
            rest[0] = tuple(small.shape[first:])
            inner = [dim - first for dim in dims]
            rest[1:3] = [_selected(t, inner, keep) if isinstance(t, Tensor) else t for t in rest[1:3]]
        if call.name == "_weight_norm":
            length: Tensor = args[1]
            rest[0] = _selected(length, *_present(length, dims, keep))
        result = func(small, *rest, **{key: value for key, value in kwargs.items() if key != "input"})
        if call.name == "topk":  # the choices are numbered as the original numbers them
            return torch.return_types.topk((result[0], keep[0][result[1]]))
        same = isinstance(result, Tensor) and result.dim() == x.dim() and call.name in _SAME_SHAPE
        return _scattered(result, x, dims, keep) if same else result

    def _group_norm(self, func: Any, x: Tensor, rest: list[Any], kwargs: dict[str, Any], keep: Tensor) -> Tensor:
        size = x.shape[1] // int(rest[0])
        rest[0] = len(torch.unique(keep // size))
        rest[1:3] = [t.index_select(0, keep) if isinstance(t, Tensor) else t for t in rest[1:3]]
        return _scattered(func(x.index_select(1, keep), *rest, **kwargs), x, (1,), [keep])


def _off_over_off(result: Any, *operands: Any) -> Any:
    """A quotient in which nothing over nothing is nothing: both belong to a channel that is off."""
    if len(operands) < 2 or not all(isinstance(operand, Tensor) for operand in operands[:2]):
        return result
    return torch.where((operands[0] == 0) & (operands[1] == 0), 0, result)


def _present(x: Tensor, dims: Sequence[int], keep: list[Tensor]) -> tuple[list[int], list[Tensor]]:
    """Those of `dims` in which `x` is not broadcast."""
    pairs = [(dim, index) for dim, index in zip(dims, keep, strict=True) if x.shape[dim] != 1]
    return [dim for dim, _ in pairs], [index for _, index in pairs]


def _selected(x: Tensor, dims: Sequence[int], keep: list[Tensor]) -> Tensor:
    for dim, index in zip(dims, keep, strict=True):
        x = x.index_select(dim, index)
    return x


def _scattered(small: Tensor, like: Tensor, dims: Sequence[int], keep: list[Tensor]) -> Tensor:
    for dim, index in zip(dims, keep, strict=True):
        shape = list(small.shape)
        shape[dim] = like.shape[dim]
        small = small.new_zeros(shape).index_copy(dim, index, small)
    return small
