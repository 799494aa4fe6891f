"""Real values beside the stand-ins: what a forward computes from its inputs alone, with no weight in it.

A forward on the ``meta`` device has no numbers, yet some branch on them: on whether a mask is all ones, on how many
image tokens there are. Where such a number comes from the example inputs and constants, it is computed by running the
few operations that lead to it once more, for real; nothing is computed until a number is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from structprune.tracing.opaque import opaque_call, scripted_call
from structprune.tracing.provenance import plain
from structprune.tracing.vocabulary import Lookup

# Larger results are not worth it: a number that decides a branch comes from masks, positions and counts.
LARGEST = 2**24


class Values:
    """The values of the nodes of a recording that depend on example inputs and constants only.

    Args:
        nodes: the nodes recorded so far; it grows.
        buffer: the real tensor of a ``get_attr`` node whose values may be used, or None.
        operations: what is known of the operation of a name.
    """

    def __init__(self, nodes: list[fx.Node], buffer: Callable[[str], Tensor | None], operations: Lookup) -> None:
        self._nodes = nodes
        self._buffer = buffer
        self._operations = operations
        self._known: dict[fx.Node, Any] = {}
        self._done = 0
        self._device = torch.device("cpu")

    def give(self, node: fx.Node, value: Tensor) -> None:
        """An example input or a constant: `node` has this value."""
        if not value.is_meta:
            self._known[node] = value.detach().clone()
            self._device = value.device if node.meta["name"] == "input" else self._device

    def of(self, node: fx.Node) -> Tensor | None:
        """The value of `node`; None where it depends on weights or on chance."""
        self._catch_up()
        value = self._known.get(node)
        return value if isinstance(value, Tensor) else None

    def _catch_up(self) -> None:
        for node in self._nodes[self._done :]:
            self._run(node)
        self._done = len(self._nodes)

    def _run(self, node: fx.Node) -> None:
        if node in self._known or node.op == "placeholder":
            return
        if node.op == "get_attr":
            held = self._buffer(str(node.target))
            if held is not None:
                self._known[node] = held.detach().clone()
            return
        if any(source not in self._known for source in node.all_input_nodes) or not self._repeatable(node):
            self._forget(node)
            return
        written = node.meta.get("writes")
        result = self.compute(node.op, node.target, node.args, node.kwargs)
        self._known[node] = self._known[written] if result is None and written is not None else result

    def _forget(self, node: fx.Node) -> None:
        """A write of something unknown makes unknown all that shares the memory."""
        target: fx.Node | None = node.meta.get("writes")
        written = None if target is None else self._known.get(target)
        if isinstance(written, Tensor):
            memory = written.untyped_storage().data_ptr()
            for other, value in list(self._known.items()):
                if isinstance(value, Tensor) and value.untyped_storage().data_ptr() == memory:
                    del self._known[other]

    def compute(self, op: str, target: Any, args: Any, kwargs: Any) -> Any:
        """The result of one operation on the values of its arguments, which must all be known."""
        args, kwargs = self._filled(args), self._filled(kwargs)
        with torch.no_grad():
            if op == "call_method":
                return getattr(args[0], target)(*args[1:], **kwargs)
            result = target(*args, **kwargs)
            return result() if target is getattr and callable(result) else result  # ``x.data`` is ``x.detach()``

    def _filled(self, value: Any) -> Any:
        """Arguments with each node replaced by its value."""
        if isinstance(value, fx.Node):
            return self._known[value]
        if isinstance(value, (tuple, list)):
            items = [self._filled(item) for item in value]
            return items if isinstance(value, list) else tuple(items)
        if isinstance(value, dict):
            return {key: self._filled(item) for key, item in value.items()}
        if isinstance(value, slice):
            return slice(self._filled(value.start), self._filled(value.stop), self._filled(value.step))
        return self._device if isinstance(value, torch.device) else plain(value)

    def _repeatable(self, node: fx.Node) -> bool:
        """Whether the operation gives the same again, and not too much of it."""
        shape = node.meta.get("shape", ())
        shapes = [part for part in shape if part is not None] if isinstance(shape, list) else [shape]
        known = self._operations(node.meta["name"])
        drawn = known is not None and known.random
        return (
            not drawn
            and node.target not in (opaque_call, scripted_call)
            and all(prod(part) <= LARGEST for part in shapes)
        )
