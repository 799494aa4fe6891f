"""Forwards that begin in the middle: what the operations before gave is at hand from another forward.

Measuring what a change of one layer does to the output takes a forward for each change, and all of them are alike up to
that layer. A `KeepingLane` goes through the model once and holds on to what is still needed; a `restarted` forward of
the same batch gets that, and stand-ins without memory for all the rest, and computes from the layer on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from structprune.recovery.lockstep import Event, Lane
from structprune.tracing.replay import FoundCall, Hook
from structprune.tracing.trace import Trace, map_tensors

_HELD = ("input", "parameter", "constant")


class KeepingLane(Lane):
    """A lane that holds on to the results that later operations need.

    Attributes:
        results: what each operation so far gave, by its number; stand-ins where nobody needs it any more.
    """

    def __init__(self, model: nn.Module, inputs: Any, trace: Trace, stops: set[Event]) -> None:
        self.results: dict[int, Any] = {}
        self._ends = _ends([trace.nodes[number] for number in trace.keys])
        super().__init__(model, inputs, trace, stops)

    def _hooks(self, trace: Trace, stops: set[int]) -> dict[int, Hook]:
        return dict.fromkeys(trace.keys, self._stopping)

    def _result(self, operation: FoundCall) -> Any:
        assert operation.node is not None
        number = operation.node.meta["index"]
        result = self.results[number] = operation()
        for over in self._ends.get(number, ()):
            if over in self.results:  # else it was not made by an operation
                self.results[over] = map_tensors(_blank, self.results[over])
        return result


def restarted(trace: Trace, start: int, results: dict[int, Any]) -> dict[int, Hook]:
    """Hooks for a forward that computes from operation `start` on: those before it give what they gave."""

    def given(operation: FoundCall) -> Any:
        assert operation.node is not None
        result = results[operation.node.meta["index"]]
        # What is written over has what was last written already.
        return operation.args[0] if "writes" in operation.node.meta and isinstance(result, Tensor) else result

    return dict.fromkeys((number for number in trace.keys if number < start), given)


def restartable(trace: Trace) -> bool:
    """Whether nothing that the model was given or holds is written over, which a forward that is cut short leaves."""
    return all(_root(node).meta["name"] not in _HELD for node in trace.nodes if "writes" in node.meta)


def handed_over(trace: Trace, start: int, results: dict[int, Any]) -> dict[int, Any]:
    """Results for a restarted forward: copies, with memory shared as before, if anything is written over later on."""
    if not any("writes" in node.meta and node.meta["index"] >= start for node in trace.nodes):
        return dict(results)
    copies: dict[int, torch.UntypedStorage] = {}

    def copied(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        own = copies.setdefault(storage.data_ptr(), storage.clone()) if storage.nbytes() else storage
        return tensor.new_empty(0).set_(own, tensor.storage_offset(), tensor.size(), tensor.stride())

    return {number: map_tensors(copied, result) for number, result in results.items()}


def _root(node: fx.Node) -> fx.Node:
    """The operation that made the tensor which `node` returns: an operation in place returns one that was there."""
    while "writes" in node.meta or node.meta["name"] == "part":
        source: Any = node.meta["writes"] if "writes" in node.meta else node.args[0]
        node = source
    return node


def _ends(nodes: Sequence[fx.Node]) -> dict[int, list[int]]:
    """For the number of each operation, the operations whose results nobody needs any more once it is over."""
    last: dict[int, float] = {}
    for node in nodes:
        root = _root(node).meta["index"]
        used = [float("inf") if user.op == "output" else user.meta["index"] for user in _users(node)]
        last[root] = max(last.get(root, 0), node.meta["index"], *used)
    found: dict[int, list[int]] = {}
    for number, end in last.items():
        if end != float("inf"):
            found.setdefault(int(end), []).append(number)
    return found


def _users(node: fx.Node) -> list[fx.Node]:
    """What uses a result, or a part of it."""
    found: list[fx.Node] = []
    for user in node.users:
        found += user.users if user.meta.get("name") == "part" else [user]
    return found


def _blank(tensor: Tensor) -> Tensor:
    """A tensor of the same shape without memory of its own."""
    if not tensor.numel():
        return tensor
    return tensor.new_empty(1).as_strided(tensor.shape, (0,) * tensor.dim())
