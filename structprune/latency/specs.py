"""The operations of a trace that take the time: what each is, and which channels its sizes follow.

Convolutions (plain, grouped, depthwise, transposed), matrix products and attention are operations of their own in the
table. Operations that are alike are one entry, however many layers they stand for.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import fx

from structprune.coupling.propagate import Channels
from structprune.ops import kind_of, op_of
from structprune.ops.arguments import arguments, tensors
from structprune.ops.op import Contraction
from structprune.ops.relations import Axis
from structprune.tracing.provenance import plain
from structprune.tracing.trace import Trace

Count = Callable[[Axis], int]
Axes = tuple[Axis, ...]
# A table has two axes at most; what else changes counts in proportion.
MOST_AXES = 2


@dataclass(frozen=True)
class OpSpec:
    """One operation at its full size.

    Attributes:
        kind: ``"conv2d"`` and its like, ``"matmul"`` or ``"attention"``.
        sizes: name and length of each of its dimensions. Convolutions: ``n``, ``in`` and ``out`` (channels of a
            group), ``groups``, ``x0``, ``x1``, ... (the image) and ``k0``, ... (the kernel). Products: ``batch``,
            ``rows``, ``in``, ``out``. Attention: ``batch``, ``heads``, ``query``, ``key``, ``size``, ``value``.
        axes: the dimensions that pruning can change and that the table runs over.
        options: other arguments, such as the stride; ``weight`` is true for a product with a parameter.
        dtype: type of its tensors, such as ``"float32"``.
    """

    kind: str
    sizes: tuple[tuple[str, int], ...]
    axes: tuple[str, ...]
    options: tuple[tuple[str, Any], ...] = ()
    dtype: str = "float32"

    @cached_property
    def full(self) -> dict[str, int]:
        """The sizes as a mapping."""
        return dict(self.sizes)

    @property
    def transposed(self) -> bool:
        """Whether it is a transposed convolution."""
        return self.kind.startswith("conv_transpose")

    @property
    def widths(self) -> tuple[int, ...]:
        """The full length of each axis."""
        return tuple(self.full[axis] for axis in self.axes)

    def at(self, widths: tuple[int, ...]) -> dict[str, int]:
        """The sizes when the axes have these lengths."""
        return self.full | dict(zip(self.axes, widths, strict=True))

    def option(self, name: str, default: Any = None) -> Any:
        """One of the other arguments."""
        return dict(self.options).get(name, default)

    @property
    def key(self) -> str:
        """A text that is equal for equal operations; keys of the table's file."""
        return json.dumps([self.kind, dict(self.sizes), list(self.axes), dict(self.options), self.dtype])


@dataclass(frozen=True, eq=False)
class Use:
    """An operation of the trace.

    Attributes:
        node: the node of the trace.
        spec: what it is at full size.
        channels: for each dimension of the specification that channels may leave, the axes whose counts it multiplies.
    """

    node: fx.Node
    spec: OpSpec
    channels: Mapping[str, Axes]

    def sizes(self, count: Count) -> dict[str, int]:
        """Lengths of its dimensions when `count` gives the kept channels of each axis."""
        return self.spec.full | {name: prod(count(axis) for axis in axes) for name, axes in self.channels.items()}

    def point(self, count: Count) -> tuple[tuple[int, ...], float]:
        """The place in the table, and by what the time there is to be multiplied."""
        full, now = self.spec.full, self.sizes(count)
        scale = 1.0
        for name in now:
            if name not in self.spec.axes:
                scale *= now[name] / full[name]
        return tuple(now[axis] for axis in self.spec.axes), scale


@dataclass(frozen=True, eq=False)
class Grouped(Use):
    """A convolution in groups of several channels, of which some may go from every group alike, or whole groups.

    Attributes:
        side: the side of which the weight's second dimension holds a group's channels: ``"out"`` if transposed.
        each: that dimension.
    """

    side: str
    each: Axis

    def sizes(self, count: Count) -> dict[str, int]:
        """As of any use; there are as many groups as a group's channels go into those of that side."""
        sizes = Use.sizes(self, count)
        groups = max(1, sizes[self.side] // max(1, count(self.each)))
        return sizes | {"groups": groups, "in": sizes["in"] // groups, "out": sizes["out"] // groups}


def _contraction(node: fx.Node) -> Contraction:
    known = op_of(node.meta["name"])
    assert known is not None
    assert known.contraction is not None
    return known.contraction


def _axes_of(channels: Channels, node: fx.Node) -> Axes:
    return channels.axes[node.meta["index"]]


def _lengths(axes: Axes) -> int:
    return prod(axis.size for axis in axes)


def _tuple(value: Any, dims: int) -> Any:
    """An option of a convolution as a tuple of one int a spatial dimension; names of paddings as they are."""
    if isinstance(value, str):
        return value
    items = [int(plain(v)) for v in value] if isinstance(value, (tuple, list)) else [int(plain(value))]
    return tuple(items * dims if len(items) == 1 else items)


def _use(kind: str, by_dim: Mapping[str, Axes], wanted: tuple[str, ...], node: fx.Node, **more: Any) -> Use:
    """A use whose axes are the first of `wanted` that channels can leave."""
    free = {name: held for name, held in by_dim.items() if any(axis.free for axis in held)}
    axes = tuple(name for name in wanted if name in free)[:MOST_AXES]
    sizes = {name: _lengths(held) for name, held in by_dim.items()} | more.pop("sizes", {})
    dtype = str(node.meta.get("dtype", torch.float32)).removeprefix("torch.")
    return Use(node, OpSpec(kind, tuple(sizes.items()), axes, tuple(more.items()), dtype), free)


def _convolution(node: fx.Node, channels: Channels) -> Use:
    kind, given = node.meta["name"], arguments(node)
    x, weight, out = (_axes_of(channels, n) for n in (given["input"], given["weight"], node))
    dims = len(weight) - 2
    transposed = kind_of(node.meta["name"]) == "transposed"
    options = {
        "stride": _tuple(given["stride"], dims),
        "padding": _tuple(given["padding"], dims),
        "dilation": _tuple(given["dilation"], dims),
    }
    if transposed:
        options["output_padding"] = _tuple(given["output_padding"], dims)
    inputs, outputs = x[-dims - 1], out[-dims - 1]
    groups = int(plain(given["groups"]))
    by_dim: dict[str, Axes] = {"n": x[:1] if len(x) == dims + 2 else (), "in": (inputs,), "out": (outputs,)}
    sizes = {"groups": groups, "in": inputs.size // groups, "out": outputs.size // groups}
    sizes |= {f"x{i}": axis.size for i, axis in enumerate(x[-dims:])}
    sizes |= {f"k{i}": axis.size for i, axis in enumerate(weight[2:])}
    if groups > 1 and groups == inputs.size:  # depthwise: channels are groups, and come and go with them
        by_dim = {"n": by_dim["n"], "groups": (inputs,)}
    use = _use(kind, by_dim, ("groups",) if "groups" in by_dim else ("out", "in"), node, sizes=sizes, **options)
    if groups == 1 or "groups" in by_dim:
        return use
    return Grouped(node, use.spec, use.channels, "out" if transposed else "in", weight[1])


def _product(node: fx.Node, channels: Channels) -> Use | None:
    inputs = tensors(node)
    pair = next(iter(_contraction(node).pairs(node)))
    left, right = inputs[pair.operand], inputs[pair.weight]
    x, out = _axes_of(channels, left), _axes_of(channels, node)
    if len(x) < 2 or len(_axes_of(channels, right)) < 2:
        return None
    weight = right.meta["name"] == "parameter" or node.meta["name"] in ("linear", "addmm", "mm")
    if weight:
        by_dim: dict[str, Axes] = {"rows": x[:-1], "in": x[-1:], "out": out[-1:]}
    else:
        by_dim = {"batch": out[:-2], "rows": out[-2:-1], "in": x[-1:], "out": out[-1:]}
    return _use("matmul", by_dim, ("out", "in", "batch", "rows"), node, weight=weight)


def _attention(node: fx.Node, channels: Channels) -> Use:
    query, key, value = (_axes_of(channels, n) for n in tensors(node)[:3])
    by_dim: dict[str, Axes] = {
        "batch": query[:1] if len(query) > 3 else (),
        "heads": query[1:-2] if len(query) > 3 else query[:-2],
        "query": query[-2:-1],
        "key": key[-2:-1],
        "size": query[-1:],
        "value": value[-1:],
    }
    causal = bool(arguments(node)["is_causal"])
    return _use("attention", by_dim, ("heads", "size"), node, causal=causal)


def uses(recorded: Trace, channels: Channels) -> list[Use]:
    """The operations of a trace that the table holds, in order."""
    operations: list[Use] = []
    for node in recorded.nodes:
        use = _USES.get(kind_of(node.meta["name"]))
        made = None if use is None else use(node, channels)
        if made is not None:
            operations.append(made)
    return operations


_USES: dict[str, Callable[[fx.Node, Channels], Use | None]] = {
    "convolution": _convolution,
    "transposed": _convolution,
    "linear": _product,
    "product": _product,
    "attention": _attention,
}
