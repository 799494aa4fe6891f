"""Numbers that a class computes from its configuration, and the weights that make up for them.

Gemma multiplies embeddings by the square root of its width, MPT the products of queries and keys by one over that of
a head's size. A class built from a smaller width multiplies by another number, and what was pruned has to go on with
the old one. So the forward of both is traced: where they differ in such factors alone, weights take up the ratio.

    pruned    embedding(ids) * 8.0       the width was 64
    built     embedding(ids) * 5.66      the width is 32: the table is multiplied by 1.41
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

from structprune.coupling.compensation import Masks, NotCompensableError, Place, scaled_together, scaling_of
from structprune.coupling.compensation_ahead import SearchAhead
from structprune.coupling.graph import ChannelGraph
from structprune.ops.arguments import arguments, tensors
from structprune.ops.op import Scaling
from structprune.planning.built_from_config import UnknownError
from structprune.surgery.edits import Rescale, ShiftedRescale
from structprune.tracing.provenance import plain
from structprune.tracing.state import held_tensors
from structprune.tracing.trace import Trace

# Tensors of at most so many entries get values while a class is built for these.
SMALL = 2**14
# Factors are those of sizes: nothing that comes close to the end of a type's range.
LEAST, MOST = 1e-4, 1e4
# Of an operation with a factor, by its name: the argument that it multiplies, and the name of the factor.
_FACTORS = {
    "scaled_dot_product_attention": ("query", "scale"),
    "baddbmm": ("batch1", "alpha"),
    "addbmm": ("batch1", "alpha"),
    "addmm": ("mat1", "alpha"),
}
Values = dict[str, Tensor]


class _SmallForReal(TorchFunctionMode):
    """What a constructor makes is real where it is small, and on the ``meta`` device where it is large."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in _device_constructors() or kwargs.get("device") is not None:
            return func(*args, **kwargs)
        made = func(*args, **{**kwargs, "device": "meta"})
        small = isinstance(made, Tensor) and made.numel() <= SMALL
        return func(*args, **{**kwargs, "device": "cpu"}) if small else made


def same_operations(one: Trace, other: Trace) -> bool:
    """Whether two forwards run the same operations, on the same tensors and numbers, in the same order."""
    return _listed(one) == _listed(other)


def _listed(recorded: Trace) -> list[tuple[Any, ...]]:
    number = {node: position for position, node in enumerate(recorded.all_nodes)}
    return [
        (
            node.meta["name"],
            node.meta.get("shape"),
            str(node.target) if node.op == "get_attr" else "",
            str(plain(fx.map_arg((node.args, _telling(node)), lambda n: f"%{number.get(n, -1)}"))),
        )
        for node in recorded.all_nodes
    ]


def _telling(node: fx.Node) -> dict[str, Any]:
    """The keyword arguments that make a difference: keys are repeated only if they have fewer heads than queries."""
    equal = node.meta["name"] == "scaled_dot_product_attention" and not _repeats(node)
    return {name: value for name, value in node.kwargs.items() if not (equal and name == "enable_gqa")}


def unsaved_values(kind: Callable[[Any], nn.Module], config: Any) -> Values:
    """The small tensors that a class computes when it is built, and that a state dict lacks, by name.

    Empty where the class cannot be built with some tensors real and others not.
    """
    try:
        with _SmallForReal(), torch.no_grad():
            built = kind(config).eval()
    except Exception:  # a constructor may raise anything on tensors of several devices
        return {}
    return {
        name: held.tensor.detach()
        for name, held in held_tensors(built).items()
        if held.temporary and not held.tensor.is_meta
    }


def changed_values(before: Values, after: Values) -> dict[str, tuple[float, float]]:
    """Single numbers among unsaved tensors that differ, by name, before and after.

    Raises:
        UnknownError: a tensor of more numbers differs.
    """
    changed: dict[str, tuple[float, float]] = {}
    for name in before.keys() & after.keys():
        one, other = before[name], after[name]
        if one.shape != other.shape or torch.equal(one, other):
            continue
        if one.numel() != 1 or not one.is_floating_point():
            raise UnknownError(f"{name!r} is not saved but computed from it, and would hold other numbers")
        changed[name] = float(one), float(other)
    return changed


class Folding:
    """Finds the factors in which two forwards differ, and the weights that take them up.

    Args:
        graph: of the original, whose operations both forwards run.
        doubt: the message of the error where they cannot be folded.
    """

    def __init__(self, graph: ChannelGraph, doubt: str) -> None:
        self._trace = graph.trace
        self._doubt = doubt

    def run(self, pruned: Trace, built: Trace, unsaved: Mapping[str, tuple[float, float]]) -> tuple[Rescale, ...]:
        """The rescales that make the forward of the built class that of the pruned one.

        Args:
            pruned: the trace of the pruned class.
            built: that of the class built anew.
            unsaved: single numbers in tensors that differ: before and after.

        Raises:
            UnknownError: the forwards differ in something else, or nothing can take a factor up.
        """
        places: dict[float, list[Place]] = {}
        ours, theirs, nodes = pruned.all_nodes, built.all_nodes, self._trace.all_nodes
        if not len(ours) == len(theirs) == len(nodes):
            raise UnknownError(self._doubt)
        for one, other, node in zip(ours, theirs, nodes, strict=True):
            if one.meta["name"] != node.meta["name"] or not self._same(one, other):
                raise UnknownError(self._doubt)
            ratio = self._ratio(one, other)
            if ratio is not None:
                argument, factor = ratio
                places.setdefault(self._sound(factor), []).append((node, self._argument(node, argument)))
        for name, (before, after) in unsaved.items():
            for place, power in self._readers(name):
                places.setdefault(self._sound((before / after) ** power if after else 0.0), []).append(place)
        rescales = [rescale for factor, found in places.items() for rescale in self._taken_up(found, factor)]
        if len({rescale.tensor for rescale in rescales}) < len(rescales):
            raise UnknownError(self._doubt)
        changes = [Rescale(name, 0, None, after / before) for name, (before, after) in unsaved.items()]
        return (*rescales, *changes)

    def _sound(self, factor: float) -> float:
        if not LEAST < factor < MOST:
            raise UnknownError(self._doubt)
        return round(factor, 12)

    # -- where the forwards differ -------------------------------------------------------------------------------

    def _same(self, one: fx.Node, other: fx.Node) -> bool:
        """Whether two operations are the same on tensors of the same shapes; their numbers may differ."""
        held = one.op == "get_attr"
        same = one.meta["name"] == other.meta["name"] and one.meta.get("shape") == other.meta.get("shape")
        return same and (not held or one.target == other.target)

    def _ratio(self, one: fx.Node, other: fx.Node) -> tuple[str, float] | None:
        """The argument of an operation that has to be multiplied, by its name, and by how much; None if none."""
        ours, theirs = _numbers(one), _numbers(other)
        if ours == theirs:
            return None
        different = [name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)]
        scaled, factor = _scaled_by(one)
        before, after = ours.get(factor), theirs.get(factor)
        numbers = all(isinstance(value, (int, float)) and value for value in (before, after))
        if different != [factor] or not numbers:
            raise UnknownError(self._doubt)
        assert before is not None
        assert after is not None
        return scaled, after / before if one.meta["name"] == "div" else before / after

    def _argument(self, node: fx.Node, name: str) -> fx.Node:
        found = arguments(node).get(name)
        if not isinstance(found, fx.Node):
            raise UnknownError(self._doubt)
        return found

    def _readers(self, name: str) -> Iterator[tuple[Place, int]]:
        """Products and quotients by a tensor of one number, and whether that divides (-1) or multiplies (1)."""
        reached = [node for node in self._trace.all_nodes if node.op == "get_attr" and node.target == name]
        for node in reached:
            for user in node.users:
                given = [] if user.op == "output" else tensors(user)
                if given == [node] and scaling_of(user) is Scaling.HOMOGENEOUS and user.meta["name"] != "relu":
                    reached.append(user)
                else:
                    yield self._read(user, node, given)

    def _read(self, user: fx.Node, node: fx.Node, given: list[fx.Node]) -> tuple[Place, int]:
        other = next((tensor for tensor in given if tensor is not node), None)
        name = user.meta["name"] if other is not None and len(given) == 2 else ""
        if other is None or name not in ("mul", "div") or (name == "div" and given[1] is not node):
            raise UnknownError(self._doubt)
        return (user, other), -1 if name == "div" else 1

    # -- what takes it up ----------------------------------------------------------------------------------------

    def _taken_up(self, places: list[Place], factor: float) -> Iterator[Rescale]:
        masks = Masks()
        try:
            found = list(scaled_together(self._trace, places, masks))
        except NotCompensableError:
            if any(node.meta["name"] not in ("mul", "div") for node, _ in places):  # the result is no multiple of it
                raise UnknownError(self._doubt) from None
            try:
                found = [each for node, _ in places for each in SearchAhead(self._trace, masks).run(node)]
            except NotCompensableError:
                raise UnknownError(self._doubt) from None
        for each in dict.fromkeys(found):
            by = 1 / factor if each.inverse else factor
            if each.offset:
                yield ShiftedRescale(each.tensor, each.dim, each.positions, by, each.offset)
            else:
                yield Rescale(each.tensor, each.dim, each.positions, by)


def _scaled_by(node: fx.Node) -> tuple[str, str]:
    """The argument that an operation multiplies by a number, and that of the number; empty where there is none."""
    name = node.meta["name"]
    if name == "div":
        return "self", "other"
    if name == "mul":
        return ("self", "other") if isinstance(arguments(node).get("self"), fx.Node) else ("other", "self")
    return _FACTORS.get(name, ("", ""))


def _numbers(node: fx.Node) -> dict[str, Any]:
    """The arguments of an operation that are no tensors, by name where it is known."""
    try:
        given: Mapping[str, Any] = arguments(node)
    except (KeyError, TypeError):  # an operation without a signature
        given = {**{str(at): value for at, value in enumerate(node.args)}, **node.kwargs}
    if node.meta["name"] == "scaled_dot_product_attention" and not _repeats(node):
        given = {name: value for name, value in given.items() if name != "enable_gqa"}
    return {name: plain(fx.map_arg(value, lambda held: f"%{held.meta['index']}")) for name, value in given.items()}


def _repeats(node: fx.Node) -> bool:
    """Whether it makes a difference that keys are repeated: they have fewer heads than queries."""
    return len({n.meta["shape"][-3] for n in tensors(node)[:2] if len(n.meta["shape"]) > 2}) != 1
