"""Parameters, multiply-accumulates and memory, counted on the trace.

Counting on the trace sees ``F.conv2d``, attention and bare matrix products as well as layers. Counts follow the axes of
the channel algebra, so the cost of a plan is known without building the smaller model.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import asdict, dataclass
from math import prod
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from structprune.checking import INPUTS, require
from structprune.coupling.polynomials import Evaluator, Polynomial, total
from structprune.coupling.propagate import Channels, propagate
from structprune.html import html_table
from structprune.ops import op_of
from structprune.ops.arguments import arguments, tensors
from structprune.ops.relations import Axis
from structprune.tracing.state import held_tensors
from structprune.tracing.trace import ExampleInputs, Trace, trace
from structprune.wrapping import prunable

Count = Callable[[Axis], int]


@dataclass(frozen=True, slots=True)
class Cost:
    """What one forward on the example inputs takes. See `structprune.cost` for an example.

    Attributes:
        params: entries of all parameters, each tied one once.
        macs: multiply-accumulates of convolutions, linear layers, matrix products, attention and recurrences.
        weight_bytes: bytes of all parameters and buffers.
        peak_activation_bytes: bytes of the inputs and results that are in memory at once, at the worst moment, if each
            is freed after its last use and views take no memory.
    """

    params: int
    macs: int
    weight_bytes: int
    peak_activation_bytes: int

    def _repr_html_(self) -> str:
        """The same for notebooks."""
        return html_table(["", ""], [[name.replace("_", " "), f"{value:,}"] for name, value in asdict(self).items()])

    def __str__(self) -> str:
        return (
            f"{self.params:,} parameters, {self.macs:,} MACs, {self.weight_bytes:,} bytes of weights, "
            f"{self.peak_activation_bytes:,} bytes of activations at most"
        )

    def to_json(self) -> str:
        """The four numbers as a JSON object."""
        return json.dumps(asdict(self))


@dataclass(frozen=True, slots=True)
class LayerCost:
    """What a module takes by itself, without the modules inside it.

    Attributes:
        params: entries of the parameters that it holds, each tied one where it is held first.
        macs: multiply-accumulates of the operations that its own forward runs.
    """

    params: int
    macs: int


def _axes(channels: Channels, node: Any) -> tuple[Axis, ...]:
    return channels.axes[node.meta["index"]]


def _volume(axes: tuple[Axis, ...], count: Count) -> int:
    plain, others = 1, []
    for axis in axes:
        if axis.free:
            others.append(count(axis))
        else:
            plain *= axis.size
    return prod(others[1:], start=others[0] * plain if plain != 1 else others[0]) if others else plain


def node_macs(node: fx.Node, channels: Channels, count: Count) -> int:
    """Multiply-accumulates of one operation when `count` gives the number of kept channels of each axis."""
    known = op_of(node.meta["name"])
    if known is None or known.macs is None:
        return 0
    return known.macs(node, lambda source: _axes(channels, source), count)


def is_view(node: fx.Node) -> bool:
    """Whether a result lies in the memory of the operation's first argument, which it leaves as it was."""
    known = op_of(node.meta["name"])
    return node.meta["name"] == "part" or (known is not None and known.views)


def _lifetimes(recorded: Trace, channels: Channels, count: Count) -> Iterator[tuple[int, int, int]]:
    """Bytes of each result that has memory of its own, the operation that makes it, and the last one to use it.

    Bytes are what `count` makes of them; operations are places in ``recorded.nodes``.
    """
    owner: dict[fx.Node, fx.Node] = {}
    last: dict[fx.Node, int] = {}
    size: dict[fx.Node, tuple[int, int]] = {}
    for index, node in enumerate(recorded.nodes):
        if node.meta["name"] in ("parameter", "constant"):
            continue
        inputs = [owner[n] for n in node.all_input_nodes if n in owner]
        shares = inputs and (is_view(node) or "writes" in node.meta)
        owner[node] = inputs[0] if shares else node
        for root in (*inputs, owner[node]):
            last[root] = index
        if not shares and isinstance(node.meta.get("shape"), tuple):
            size[node] = _volume(_axes(channels, node), count) * node.meta["dtype"].itemsize, index
    for node in recorded.outputs.values():
        if node in owner:
            last[owner[node]] = len(recorded.nodes) - 1
    return ((number, made, last[node]) for node, (number, made) in size.items())


def _sizes(model: nn.Module, recorded: Trace, channels: Channels, count: Count) -> Iterator[tuple[str, Tensor, int]]:
    """Name, tensor and number of kept entries of all that the model holds, each tied tensor once."""
    axes_of = {
        str(node.target): _axes(channels, node) for node in recorded.all_nodes if node.meta["name"] == "parameter"
    }
    seen: set[int] = set()
    for name, held in held_tensors(model).items():
        if id(held.tensor) not in seen:
            seen.add(id(held.tensor))
            yield name, held.tensor, _volume(axes_of[name], count) if name in axes_of else held.tensor.numel()


def count_layers(model: nn.Module, recorded: Trace, channels: Channels, count: Count) -> dict[str, LayerCost]:
    """Cost of each module by its path, in the order of the model; modules that take nothing are left out.

    An operation belongs to the innermost module whose forward runs it, ``""`` being the model itself. The sums over all
    modules are the parameters and the multiply-accumulates of `count_cost`.
    """
    params: dict[str, int] = {}
    macs: dict[str, int] = {}
    for name, tensor, numel in _sizes(model, recorded, channels, count):
        if isinstance(tensor, nn.Parameter):
            path = name.rpartition(".")[0]
            params[path] = params.get(path, 0) + numel
    for node in recorded.nodes:
        if node_count := node_macs(node, channels, count):
            call = node.meta["call"]
            path = recorded.calls[call].path if call >= 0 else ""
            macs[path] = macs.get(path, 0) + node_count
    order = [path for path, _ in model.named_modules(remove_duplicate=False) if path in params or path in macs]
    return {path: LayerCost(params.get(path, 0), macs.get(path, 0)) for path in order}


class CostModel:
    """The cost of a traced model as a function of its widths: counted once, then evaluated by arrays.

    Args:
        model: the traced model.
        recorded: its trace.
        channels: the axes of the trace.
        identity: equal for axes that always have equally many kept channels; by default axes of the same ids.

    Attributes:
        axes: the axes whose numbers of kept channels are the unknowns of the polynomials.
        totals: ``"params"``, ``"macs"`` and ``"weight_bytes"`` as polynomials.
        results: bytes of each result that has memory of its own.
    """

    def __init__(
        self,
        model: nn.Module,
        recorded: Trace,
        channels: Channels,
        identity: Callable[[Axis], Hashable] = lambda axis: axis.key,
    ) -> None:
        self.axes: list[Axis] = []
        self._identity = identity
        self._known: dict[object, Polynomial] = {}
        self._by_key: dict[object, Polynomial] = {}
        # A polynomial does for counting what an int does; see `Polynomial`.
        count = cast("Count", self._unknown)
        held = [(tensor, numel) for _, tensor, numel in _sizes(model, recorded, channels, count)]
        results = list(_lifetimes(recorded, channels, count))
        params = total(numel for tensor, numel in held if isinstance(tensor, nn.Parameter))
        weight_bytes = total(numel * tensor.element_size() for tensor, numel in held)
        macs = total(node_macs(node, channels, count) for node in recorded.nodes)
        self.totals = {"params": params, "macs": macs, "weight_bytes": weight_bytes}
        # Polynomials where the sizes follow axes that may lose channels; see above.
        self.results = cast("list[int | Polynomial]", [number for number, _, _ in results])
        self._totals = Evaluator(list(self.totals.values()), len(self.axes))
        self._results = Evaluator(self.results, len(self.axes))
        self._made = np.array([made for _, made, _ in results], dtype=np.int64)
        self._last = np.array([last for _, _, last in results], dtype=np.int64)
        self._steps = len(recorded.nodes)

    def _unknown(self, axis: Axis) -> int | Polynomial:
        if not axis.free:
            return axis.size
        unknown = self._by_key.get(axis.key)
        if unknown is None:
            same = self._identity(axis)
            unknown = self._known.get(same)
            if unknown is None:
                unknown = self._known[same] = Polynomial({(len(self.axes),): 1}, axis.size)
                self.axes.append(axis)
            self._by_key[axis.key] = unknown
        return unknown

    def at(self, count: Count) -> Cost:
        """The cost when `count` gives the number of kept channels of each axis."""
        numbers = [count(axis) for axis in self.axes]
        params, macs, weight_bytes = self._totals(numbers).tolist()
        return Cost(params, macs, weight_bytes, int(self._in_memory(numbers).max(initial=0)))

    def _in_memory(self, numbers: Sequence[int]) -> NDArray[np.int64]:
        """Bytes of the results that are in memory at each operation: made by then, and not used up before it."""
        sizes = self._results(numbers)
        made, gone = np.zeros(self._steps, dtype=sizes.dtype), np.zeros(self._steps + 1, dtype=sizes.dtype)
        np.add.at(made, self._made, sizes)
        np.add.at(gone, self._last + 1, sizes)
        return np.cumsum(made - gone[:-1])

    def held_at_peak(self, count: Count) -> tuple[int, ...]:
        """The numbers of the results that are in memory at the worst moment, when `count` gives the kept channels."""
        sizes = self._in_memory([count(axis) for axis in self.axes])
        if not len(sizes):
            return ()
        worst = int(np.argmax(sizes))
        return tuple(np.flatnonzero((self._made <= worst) & (self._last >= worst)).tolist())


def count_cost(model: nn.Module, recorded: Trace, channels: Channels, count: Count) -> Cost:
    """Cost of the traced model when `count` gives the number of kept channels of each axis."""
    return CostModel(model, recorded, channels).at(count)


def cost(model: nn.Module, example_inputs: ExampleInputs) -> Cost:
    """Count what one forward of `model` on `example_inputs` takes; nothing is computed.

    Args:
        model: any ``nn.Module`` whose forward can be traced.
        example_inputs: a tensor, a tuple (positional) or a dict (keyword).

    Raises:
        TraceError: the forward cannot be recorded.

    Example:
        >>> import torch, structprune
        >>> structprune.cost(torch.nn.Linear(8, 4), torch.randn(1, 8)).macs
        32
    """
    require(locals(), example_inputs=INPUTS)
    model = prunable(model)
    recorded = trace(model, example_inputs, operations=op_of)
    return count_cost(model, recorded, propagate(recorded), lambda axis: axis.size)


# -- bytes of keys and values that a language model keeps for each token, read off the attention in its trace --------

_WEIGHTS = ("parameter", "constant")


class KeyValueCache:
    """What attention keeps for each token as a function of the kept channels.

    Keys and values are the operands of ``scaled_dot_product_attention``, or those of two products of activations with a
    softmax between them. Where heads are repeated for several queries, they count once, as a cache holds them.

    Args:
        recorded: a trace of the model.
        channels: its axes.

    Attributes:
        kept: the tensors that a cache would hold.
    """

    def __init__(self, recorded: Trace, channels: Channels) -> None:
        self.kept = tuple(dict.fromkeys(_stored(pair) for node in recorded.nodes for pair in _keys_and_values(node)))
        self._channels = channels
        given = next((n for n in recorded.nodes if n.meta["name"] == "input" and n.meta.get("shape")), None)
        self._samples = 1 if given is None else int(given.meta["shape"][0])

    def bytes(self, count: Count) -> float:
        """Bytes for one token, when `count` gives the kept channels of each axis."""
        return sum(number * prod(count(axis) for axis in axes) for number, axes in self.products())

    def products(self) -> Iterator[tuple[float, tuple[Axis, ...]]]:
        """For each tensor, the axes whose channels multiply, and what one of the products takes for one token."""
        for node, tokens in self.kept:
            axes = self._channels.axes[node.meta["index"]]
            yield node.meta["dtype"].itemsize / (tokens * self._samples), axes


def _keys_and_values(node: fx.Node) -> list[tuple[fx.Node, int]]:
    """The keys and the values that an operation attends to, each with its number of positions."""
    given = arguments(node) if node.op.startswith("call_") else {}
    if node.meta["name"] == "scaled_dot_product_attention":
        key, value = given["key"], given["value"]
        return [(key, key.meta["shape"][-2]), (value, value.meta["shape"][-2])]
    if not _is_softmax(node):
        return []
    scores = _product_before(node)
    values = _values_behind(node)
    if scores is None or values is None:
        return []
    positions = node.meta["shape"][-1]
    return [(tensors(scores)[1], positions), (values, positions)]


def _is_softmax(node: fx.Node) -> bool:
    return node.meta["name"].removeprefix("python.").removeprefix("_") in ("softmax", "safe_softmax")


def _is_product(node: fx.Node) -> bool:
    """Whether an operation multiplies two tensors of activations."""
    known = op_of(node.meta["name"])
    held = tensors(node) if node.op.startswith("call_") else []
    product = known is not None and known.contraction is not None and len(held) == 2
    return product and all(tensor.meta["name"] not in _WEIGHTS for tensor in held)


def _passes(node: fx.Node) -> bool:
    """Whether an operation treats each entry alone, or moves them."""
    known = op_of(node.meta["name"])
    return known is not None and (known.elementwise or known.views or known.moves)


def _product_before(node: fx.Node) -> fx.Node | None:
    """The product of queries and keys that a softmax is taken of, scaled and masked in between."""
    while node.op.startswith("call_") and (held := tensors(node)):
        node = held[0]
        if _is_product(node):
            return node
        if not _passes(node):
            return None
    return None


def _values_behind(node: fx.Node) -> fx.Node | None:
    """The values that the result of a softmax is multiplied with."""
    pending, seen = list(node.users), set[fx.Node]()
    while pending:
        user = pending.pop(0)
        if user in seen:
            continue
        seen.add(user)
        if _is_product(user):
            return tensors(user)[1]
        if user.op.startswith("call_") and _passes(user):
            pending += list(user.users)
    return None


def _stored(pair: tuple[fx.Node, int]) -> tuple[fx.Node, int]:
    """The smallest tensor that keys or values are a repetition or another view of."""
    node, tokens = pair
    best = node
    while node.op.startswith("call_") and (held := tensors(node)):
        known = op_of(node.meta["name"])
        if known is None or not (known.views or known.moves) or len(held) != 1:
            break
        node = held[0]
        if not isinstance(node.meta.get("shape"), tuple):
            break
        if prod(node.meta["shape"]) <= prod(best.meta["shape"]):
            best = node
    return best, tokens
