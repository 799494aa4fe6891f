"""Is what was made of a model what was meant? The two traces are compared, operation by operation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from structprune.depth.cut import Cut
from structprune.errors import SurgeryError
from structprune.ops.arguments import tensors
from structprune.tracing.provenance import plain
from structprune.tracing.trace import describe, part_of


def zeros_of(cut_trace: Any, paths: frozenset[str]) -> list[int]:
    """The numbers of the operations by which modules at `paths` give zeros in place of a branch."""
    nodes = [node for path in paths for node in cut_trace.own.get(path, ())]
    return [node.meta["index"] for node in nodes if node.meta["name"] in ("zeros_like", "new_zeros")]


class Comparison:
    """Compares what a cut leaves of a trace with the trace of the model that was made from it.

    Args:
        wanted: what is to be left.
        made: the trace of the smaller model.
        names: the new name of each tensor that the model held before.
    """

    def __init__(self, wanted: Cut, made: Cut, names: Mapping[str, str | None]) -> None:
        self._wanted, self._made = wanted, made
        self._aliases = {name: group for group in wanted.trace.tensors.values() for name in group}
        self._names = names
        self._pairs: dict[fx.Node, fx.Node] = dict(zip(wanted.trace.inputs, made.trace.inputs, strict=True))

    def run(self) -> None:
        """Compare them.

        Raises:
            SurgeryError: they differ; the message says where.
        """
        wanted, made = _operations(self._wanted), _operations(self._made)
        for one, other in zip(wanted, made, strict=False):
            if one.meta["name"] != other.meta["name"] or not self._same_call(one, other):
                raise SurgeryError(
                    f"it runs {describe(other, self._made.trace)} where {describe(one, self._wanted.trace)} was meant"
                )
            self._pairs[one] = other
        if missing := wanted[len(made) :]:
            raise SurgeryError(f"it lacks {describe(missing[0], self._wanted.trace)}")
        if more := made[len(wanted) :]:
            raise SurgeryError(f"it still runs {describe(more[0], self._made.trace)}")
        ours, theirs = self._wanted.trace.outputs, self._made.trace.outputs
        if list(ours) != list(theirs):
            raise SurgeryError(f"its outputs are {list(theirs)}, not {list(ours)}")
        for name, node in ours.items():
            if not self._same(self._wanted.value[node], self._made.value[theirs[name]]):
                raise SurgeryError(f"its output {name!r} is another")

    def _same_call(self, one: fx.Node, other: fx.Node) -> bool:
        left, right = self._wanted.operands(one), self._made.operands(other)
        if len(left) != len(right) or not all(self._same(a, b) for a, b in zip(left, right, strict=True)):
            return False
        return one.meta["name"] == "stack" or _rest(one) == _rest(other)

    def _same(self, one: fx.Node | None, other: fx.Node | None) -> bool:
        if one is None or other is None:
            return one is other
        if one in self._pairs:
            return self._pairs[one] is other
        if one.meta["name"] != other.meta["name"] or one.meta.get("shape") != other.meta.get("shape"):
            return False
        if one.meta["name"] == "part":
            (parent, position), (theirs, place) = part_of(one), part_of(other)
            return position == place and self._same(self._wanted.value[parent], self._made.value[theirs])
        if one.meta["name"] == "parameter":
            names = {self._names.get(name, name) for name in self._aliases[str(one.target)]}
            alike = not names.isdisjoint(self._made.trace.tensors[str(other.target)])
        else:
            alike = one.meta["name"] == "constant" and one.meta["dtype"] == other.meta["dtype"]
        if alike:
            self._pairs[one] = other
        return alike


def _operations(cut: Cut) -> list[fx.Node]:
    """What is run, in order."""
    return [
        n for n in cut.trace.nodes if n in cut.needed and n.op.startswith("call_") and n.meta["name"] != "part"
    ]  # fmt: skip


def _rest(node: fx.Node) -> str:
    """The arguments of an operation besides its tensors, as text."""
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda _: "tensor")
    return str(_without_devices(plain((args, kwargs)))) if tensors(node) else str(_without_devices(plain(args)))


def _without_devices(value: Any) -> Any:
    """A rewritten forward makes tensors where its argument is."""
    if isinstance(value, torch.device):
        return "device"
    if isinstance(value, dict):
        return {key: _without_devices(item) for key, item in value.items() if key != "device"}
    if isinstance(value, (tuple, list)):
        return [_without_devices(item) for item in value]
    return value
