"""The walk over a trace: each operation's rule is asked once how it relates channels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from structprune.errors import RuleError, StructpruneError
from structprune.ops import Context, Op, Operand, op_of
from structprune.ops.arguments import positional
from structprune.ops.context import call_watched, operands_in
from structprune.ops.relations import Axis, Relations
from structprune.tracing.opaque import opaque_call
from structprune.tracing.provenance import Attribute, Expression, Literal, SizeInt
from structprune.tracing.trace import OutputName, Trace, chosen_names, describe, part_of


@dataclass(frozen=True, slots=True)
class Invariant:
    """A number that must keep its value, since what it does to the result is unknown."""

    expression: Expression
    where: str


@dataclass(frozen=True, slots=True)
class Channels:
    """Axes of every node of a trace, and all that relates them; `held` are the numbers of the model's own tensors.

    `unforeseen` are the operations whose record does not foresee the form of their call; their channels are pinned.
    `factors` are numbers that a parameter makes up for, whatever they become but nothing.
    """

    axes: list[Any]
    relations: Relations
    invariants: list[Invariant]
    held: tuple[int, ...]
    unforeseen: frozenset[int] = frozenset()
    factors: list[Invariant] = field(default_factory=list)

    def every_axis(self) -> Iterator[Axis]:
        """The axes of all tensors."""
        for axes in self.axes:
            for part in axes if isinstance(axes, list) else [axes]:
                yield from part or ()


def propagate(trace: Trace, outputs: Iterable[OutputName] | None = None) -> Channels:
    """Axes for every node of `trace`: one pass, no arithmetic on tensors.

    Args:
        trace: the recorded forward.
        outputs: names of the outputs that keep their shape; None for all.
    """
    context = Context(Relations())
    axes = context.axes
    invariants: list[Invariant] = []
    for node in trace.all_nodes:
        name = node.meta["name"]
        if name == "input":
            axes.append(context.fresh(node.meta["shape"], "it is a dimension of the model's inputs"))
        elif name == "parameter":
            axes.append(tuple(context.new_axis(size) for size in node.meta["shape"]))
        elif name == "constant":
            axes.append(context.fresh(node.meta["shape"], "it belongs to a constant that no module holds"))
        elif name == "part":
            parent, position = part_of(node)
            axes.append(axes[parent.meta["index"]][position])
        else:
            axes.append(_apply(context, node, trace))
            for number in node.meta.get("tracked", ()):
                # What an opaque module holds as a number is set by surgery where the module reads it.
                held = node.target is opaque_call and isinstance(number.expression, Attribute)
                if id(number) not in context.claimed and not held:
                    invariants.append(Invariant(number.expression, node.meta["where"]))
    _pin_outputs(context, trace, outputs)
    _pin_compared(context, trace)
    held = tuple(node.meta["index"] for node in trace.all_nodes if node.meta["name"] == "parameter")
    return Channels(axes, context.relations, invariants, held, frozenset(context.unforeseen))


def _pin_outputs(context: Context, trace: Trace, outputs: Iterable[OutputName] | None) -> None:
    """What the model returns keeps its shape and its values."""
    axes = context.axes
    for name in chosen_names(trace.outputs, outputs):
        output = trace.outputs[name]
        for axis in axes[output.meta["index"]]:
            context.pin(axis, f"it is a dimension of the model's output{f' {name!r}' if name else ''}")
        numbered = context.numbered(Operand(output, axes[output.meta["index"]]))
        if numbered is not None:
            context.pin(numbered, "the model returns the numbers of its channels")
    for output in trace.training_outputs:
        for axis in axes[output.meta["index"]]:
            context.pin(axis, "it is a dimension of what the model returns in training mode")


def _pin_compared(context: Context, trace: Trace) -> None:
    """Tensors that Python compares with one another as a whole keep their shape and their values."""
    for node in trace.all_nodes:
        if "compared" in node.meta:
            for axis in context.axes[node.meta["index"]]:
                context.pin(axis, f"it is compared as a whole by {node.meta['compared']}")


def _apply(context: Context, node: fx.Node, trace: Trace) -> Any:
    axes = context.axes

    number = node.meta["index"]

    def operand(value: Any, place: tuple[int | str, ...]) -> Any:
        if isinstance(value, fx.Node):
            return Operand(value, axes[value.meta["index"]])
        if type(value) is int:
            return SizeInt(value, Literal(value, number, place))
        if isinstance(value, (tuple, list)):
            return type(value)(operand(item, (*place, i)) for i, item in enumerate(value))
        if isinstance(value, dict):
            return {key: operand(item, (*place, str(key))) for key, item in value.items()}
        if isinstance(value, slice):
            return slice(*(operand(v, (*place, i)) for i, v in enumerate((value.start, value.stop, value.step))))
        return value

    context.node, context.shape = node, node.meta.get("shape", ())
    context.claimed.clear()  # the same int may be a size in one call and a number in the next
    args = [operand(value, (i,)) for i, value in enumerate(node.args)]
    kwargs = {key: operand(value, (key,)) for key, value in node.kwargs.items()}
    if node.target is getattr:
        args = args[:1]
    if node.target is not opaque_call and "::" not in node.meta["name"]:
        args, kwargs = positional(node.meta["name"], node.target, args, kwargs)
    result = _ask(context, args, kwargs, node, trace)
    context.settle_numbers(list(operands_in(args, kwargs)))
    return result


def _ask(context: Context, args: list[Any], kwargs: dict[str, Any], node: fx.Node, trace: Trace) -> Any:
    """What the rule of `node` says; errors tell where."""
    name = node.meta["name"]
    known = op_of(name)
    if known is None:
        operands = list(operands_in(args, kwargs))
        return context.pin_all(operands, f"there is no rule for the operation {describe(node, trace)}")
    try:
        if "::" in name:  # a custom operation
            result = call_watched(context, known.coupling, tuple(args), kwargs, name)
        else:
            result = known.coupling(context, *args, **kwargs)
        _check(result, context.shape, node)
    except (StructpruneError, TypeError, ValueError, IndexError, AttributeError, KeyError) as error:
        if not known.own:
            raise _blamed(error, known, args, describe(node, trace)) from error
        # The library's own record does not foresee a call of this form: nothing may be removed there.
        context.unforeseen.add(node.meta["index"])
        operands = list(operands_in(args, kwargs))
        return context.pin_all(operands, f"no rule foresees this form of {describe(node, trace)} ({error})")
    return result


def _blamed(error: Exception, known: Op, args: list[Any], where: str) -> RuleError:
    """The error of a user's rule, with where it happened and on what."""
    inputs = f"whose inputs are {_shapes(args)}"
    if isinstance(error, StructpruneError):
        return RuleError(f"{error}, in {where}, {inputs}")
    rule = f"{known.coupling.__module__}.{known.coupling.__qualname__}"
    return RuleError(f"The rule {rule} failed on {where}, {inputs}: {type(error).__name__}: {error}")


def _shapes(args: list[Any]) -> str:
    return ", ".join(str(list(value.shape)) for value in operands_in(args)) or "no tensors"


def _check(result: Any, shape: Any, node: fx.Node) -> None:
    """A rule must give one axis of the right size for each dimension."""
    if "shape" not in node.meta:
        return  # a write: no tensor of its own comes out
    pairs = zip(result, shape, strict=True) if isinstance(shape, list) else [(result, shape)]
    for axes, sizes in pairs:
        if sizes is not None and tuple(axis.size for axis in axes) != tuple(sizes):
            raise RuleError(
                f"The rule gives axes of sizes {[axis.size for axis in axes]} for a tensor of shape {list(sizes)}"
            )
