"""Configurations: what `model.config` must say, so that the class, built from it, has the shapes of the pruned model.

Some models are built from one object of settings (``model.config``, which can be written out with ``to_dict``), and are
saved and loaded through it. After pruning that object should tell the truth; which of its numbers are which width is
found out, not assumed:

1. The class is built from the configuration on the ``meta`` device while every int in it remembers where it came from.
   Attributes of modules then carry formulas (``head_dim = hidden_size // num_attention_heads``).
2. Attributes whose value after pruning is known are equations for the numbers of the configuration. What they leave
   open is tried: the old number, or the number of channels left of a dimension that had so many.
3. The class is built from the new configuration, and must have the very shapes of the pruned model and every number
   that its forward reads. Only then is the configuration changed, with attributes that the forward does not read.
"""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import islice, product
from typing import Any

import torch
from torch import nn

from structprune.coupling.graph import ChannelGraph
from structprune.coupling.random_removals import Counter
from structprune.errors import PlanError, StructpruneError
from structprune.ops.relations import Axis
from structprune.surgery.apply import apply
from structprune.surgery.edits import AttributeEdit, Edits
from structprune.tracing.provenance import (
    Arithmetic,
    Attribute,
    Expression,
    SizeFloat,
    SizeInt,
    evaluate,
    expression_of,
    leaves,
    plain,
)
from structprune.tracing.state import INTERNAL, is_config, tracked_object
from structprune.tracing.trace import preserved_random_state

Chain = tuple[str | int, ...]
Place = tuple[str, Chain]
Numbers = dict[Place, Any]
Assignment = dict[Attribute, int]
# Classes are built for the last check; more candidates than these would not be a question of which number is which.
CANDIDATES = 8
COMBINATIONS = 4096


class _UnknownError(Exception):
    """The configuration cannot say what the pruned model is; the message says why."""


def is_built_from_config(model: nn.Module) -> bool:
    """Whether a model holds settings that it can be built from."""
    config = getattr(model, "config", None)
    return is_config(config) and callable(getattr(config, "to_dict", None))


def not_rebuilt(model: nn.Module) -> str | None:
    """Why the class of `model`, built from its configuration, is not this model; None if it is."""
    try:
        with preserved_random_state():
            same = _shapes(_built(type(model), copy.deepcopy(model.config))) == _shapes(model)
    except _UnknownError as reason:
        return str(reason)
    return None if same else "the class built from it has other tensors than this model"


def config_edits(
    graph: ChannelGraph, edits: Edits, count: Counter, numbers: Mapping[Chain, int] | None = None
) -> tuple[tuple[AttributeEdit, ...], str | None]:
    """What to set in ``model.config``, and in attributes that follow from it, so that they describe the pruned model.

    Args:
        graph: the graph of the model.
        edits: what the plan changes otherwise.
        count: counts the channels that are left.
        numbers: what it is to say, by chains from the model; None to find that out.

    Returns:
        The edits of attributes, and, where the configuration has to stay as it is, the reason.
    """
    if not edits.slices or not is_built_from_config(graph.model):
        return (), None
    try:
        with preserved_random_state():
            return _Search(graph, edits, count).run(numbers), None
    except _UnknownError as reason:
        return (), str(reason)


class _ShapesError(_UnknownError):
    """The class built from it has other shapes, which says little: another choice may have the right ones."""


class _Search:
    """One search for the configuration of a pruned model."""

    def __init__(self, graph: ChannelGraph, edits: Edits, count: Counter) -> None:
        self._model = graph.model
        self._config: Any = graph.model.config
        self._graph = graph
        self._edits = edits
        self._count = count
        self._read = _read_in(graph)

    def run(self, numbers: Mapping[Chain, int] | None) -> tuple[AttributeEdit, ...]:
        if self._edits.literal_edits:
            raise _UnknownError("a size is written as a number in a forward, which the class has from its source")
        self._compare_with_pruned()
        if numbers is not None:
            return self._checked({Attribute("", chain): value for chain, value in numbers.items()})
        fixed = self._fixed()
        reasons: list[_UnknownError] = []
        for assignment in islice(self._assignments(fixed), CANDIDATES):
            try:
                return self._checked(assignment)
            except _UnknownError as error:
                reasons.append(error)
        reasons.sort(key=lambda error: isinstance(error, _ShapesError))  # those that say more first
        if reasons:
            raise reasons[0]
        raise _UnknownError("no numbers in it give the widths of all layers; name axes so that they are pruned alike")

    # -- the class as it is, with formulas -----------------------------------------------------------------------

    def _compare_with_pruned(self) -> None:
        """Build the class from the configuration as it is, for its formulas; then apply the edits, as a model."""
        config = copy.deepcopy(self._config)
        with ExitStack() as stack:
            tracked_object("", ("config",), config, stack)
            stack.enter_context(_tracking_int(self._model))
            base = _built(type(self._model), config)
            if _shapes(base) != _shapes(self._model):
                raise _UnknownError("the class built from it has other tensors than this model")
            self._formulas = _numbers(base)
            self._before = {place: plain(value) for place, value in self._formulas.items()}
            try:
                apply(base, replace(self._edits, caches=()), inplace=True)
            except StructpruneError as error:
                raise _UnknownError(f"the class built from it is another than this model ({error})") from error
            after = _numbers(base)
        self._shapes = _shapes(base)
        self._known = {place for place, value in after.items() if value is not self._formulas.get(place)}
        self._after = {place: plain(value) for place, value in after.items()}

    # -- equations -----------------------------------------------------------------------------------------------

    def _equations(self) -> list[tuple[Expression, Any]]:
        """Formulas of attributes with the values that they must have afterwards."""
        found: dict[tuple[Expression, Any], None] = {}
        for place, value in self._formulas.items():
            if isinstance(value, (SizeInt, SizeFloat)) and (place in self._known or place in self._read):
                found[value.expression, self._after[place]] = None
        return list(found)

    def _fixed(self) -> Assignment:
        """Numbers of the configuration that are the width of something themselves."""
        fixed: Assignment = {}
        for expression, value in self._equations():
            if isinstance(expression, Attribute) and fixed.setdefault(expression, value) != value:
                raise _UnknownError(
                    f"{expression} would have to be {fixed[expression]} for {self._place_of(expression, fixed)} and "
                    f"{value} for {self._place_of(expression, {expression: value})}; name axes or outputs so that all "
                    "that it counts is pruned alike"
                )
        return fixed

    def _place_of(self, expression: Attribute, values: Assignment) -> str:
        """The first attribute with this formula that has this value."""
        for (module, chain), value in self._formulas.items():
            known = (module, chain) in self._known or (module, chain) in self._read
            if known and expression_of(value) == expression and self._after[module, chain] == values[expression]:
                return ".".join([module or "model", *map(str, chain)])
        return "another"

    def _assignments(self, fixed: Assignment) -> Iterator[Assignment]:
        """Choices for the numbers that are not fixed, for which all equations hold; those that change least first."""
        formulas = [v.expression for v in self._formulas.values() if isinstance(v, (SizeInt, SizeFloat))]
        used = {leaf for e in formulas for leaf in leaves(e) if isinstance(leaf, Attribute)}
        left = self._channels_left()
        options: dict[Attribute, list[int]] = {}
        for leaf in sorted(used - fixed.keys(), key=str):
            old = self._value(leaf)
            others = sorted(left.get(old, set()) - {old}, reverse=True)
            if others:
                options[leaf] = [old, *others]
        equations = self._equations()
        choices = islice(product(*options.values()), COMBINATIONS)
        ranked = sorted((dict(zip(options, choice, strict=True)) for choice in choices), key=self._changes)
        for choice in ranked:
            assignment = {**fixed, **choice}
            if all(self._holds(e, value, assignment) for e, value in equations):
                yield assignment

    def _changes(self, assignment: Assignment) -> int:
        return sum(self._value(leaf) != value for leaf, value in assignment.items())

    def _holds(self, expression: Expression, value: Any, assignment: Assignment) -> bool:
        try:
            return evaluate(expression, lambda leaf: self._assigned(leaf, assignment)) == value
        except ZeroDivisionError:
            return False

    def _assigned(self, leaf: Any, assignment: Assignment) -> int:
        return assignment[leaf] if leaf in assignment else self._value(leaf)

    def _value(self, leaf: Attribute) -> int:
        """The number in the configuration as it is."""
        return plain(number_at(self._config, leaf.chain[1:]))

    def _channels_left(self) -> dict[int, set[int]]:
        """How many channels are left of dimensions of each size."""
        found: dict[int, set[int]] = {}
        for axes in self._graph.channels.axes:
            for axis in axes if isinstance(axes, tuple) else ():
                if isinstance(axis, Axis) and axis.free:
                    found.setdefault(axis.size, set()).add(self._count(axis))
        return found

    # -- the check -----------------------------------------------------------------------------------------------

    def _checked(self, assignment: Assignment) -> tuple[AttributeEdit, ...]:
        """The edits of attributes for this assignment, if the class built from it is the pruned model."""
        config = copy.deepcopy(self._config)
        for leaf, value in assignment.items():
            if value != self._value(leaf):
                _assign(config, leaf.chain[1:], value)
        _read_back(config)
        built = _built(type(self._model), config)
        self._check_shapes(_shapes(built))
        self._check_buffers()
        attribute_edits: list[AttributeEdit] = []
        for place, new in _numbers(built).items():
            attribute_edits += self._compared(place, plain(new))
        return tuple(sorted(attribute_edits, key=lambda edit: (edit.module, str(edit.chain))))

    def _check_shapes(self, found: dict[str, tuple[int, ...]]) -> None:
        for name, shape in self._shapes.items():
            if found.get(name) != shape:
                used = any(node.op == "get_attr" and node.target == name for node in self._graph.trace.all_nodes)
                unused = "" if used else ", which the forward does not use on the example inputs"
                raise _ShapesError(
                    f"it cannot give {name!r}{unused}, the shape {list(shape)} together with all others; a model built "
                    f"from it has {list(found.get(name, ()))} there"
                )

    def _compared(self, place: Place, new: Any) -> list[AttributeEdit]:
        """One number of the class built anew, against what the pruned model has."""
        before, after = self._before.get(place), self._after.get(place)
        if new == after or (new == before and place not in self._known):
            return []
        name = ".".join([place[0] or "model", *map(str, place[1])])
        if place in self._read or place in self._known or type(new) is not int or not isinstance(after, int | None):
            raise _UnknownError(f"{name} is {after} in the pruned model, and would be {new} in one built from it")
        return [AttributeEdit(*place, after, new)]

    def _check_buffers(self) -> None:
        """Tensors that are not saved are computed anew when the model is loaded."""
        # Patterns of names that a model keeps out of its files, where it has such a list.
        omitted: Sequence[str] = getattr(self._model, "_keys_to_ignore_on_save", None) or ()
        saved = self._model.state_dict(keep_vars=True).keys()
        for sliced in self._edits.slices:
            if sliced.tensor not in saved or any(re.search(pattern, sliced.tensor) for pattern in omitted):
                raise _UnknownError(
                    f"{sliced.tensor!r} is not saved but computed from it, which cannot leave out the entries that "
                    "were pruned; name axes that leave it whole"
                )


def number_at(config: Any, chain: Chain) -> Any:
    """What a configuration holds at the end of a chain of names and positions."""
    value = config
    for step in chain:
        value = value[step] if isinstance(step, int) else getattr(value, step)
    return value


def shapes_of(model: nn.Module, numbers: Mapping[Chain, int]) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors of the class of `model`, built from its configuration with other numbers, by their chains.

    Raises:
        PlanError: it cannot be built from them.
    """
    config: Any = copy.deepcopy(model.config)
    for chain, value in numbers.items():
        _assign(config, chain[1:], value)
    try:
        with preserved_random_state():
            _read_back(config)
            return _shapes(_built(type(model), config))
    except _UnknownError as reason:
        raise PlanError(f"target gives numbers of the configuration that cannot be had together: {reason}.") from reason


def accepts(model: nn.Module, numbers: Mapping[Chain, int]) -> bool:
    """Whether the configuration of `model` can be read back with other numbers, by their chains from the model."""
    config = copy.deepcopy(model.config)
    for chain, value in numbers.items():
        _assign(config, chain[1:], value)
    try:
        _read_back(config)
    except _UnknownError:
        return False
    return True


def _read_back(config: Any) -> None:
    """Write a configuration and read it, as saving and loading do: it may check what its numbers have in common."""
    read = getattr(config, "from_dict", None)
    if not callable(read):
        return
    try:
        read(config.to_dict())
    except Exception as error:  # its checks may raise anything; it only means that it cannot be loaded
        cause = error.__cause__ or error
        raise _UnknownError(f"it could not be read back ({type(cause).__name__}: {cause})") from error


def _assign(config: Any, chain: Sequence[str | int], value: int) -> None:
    """Set a number in a configuration, without its own checks: those see it whole, when the class is built."""
    owner, steps = config, list(chain)
    while len(steps) > 1 and isinstance(steps[1], str):
        owner = getattr(owner, str(steps.pop(0)))
    name = str(steps[0])
    vars(owner)[name] = _replaced(vars(owner)[name], steps[1:], value)


def _replaced(value: Any, steps: Sequence[Any], new: int) -> Any:
    if not steps:
        return new
    items = list(value)
    items[steps[0]] = _replaced(items[steps[0]], steps[1:], new)
    return type(value)(items)


def _built(kind: Callable[[Any], nn.Module], config: Any) -> nn.Module:
    """An object of the class, without memory for its weights."""
    try:
        with torch.device("meta"):
            return kind(config).eval()
    except Exception as error:  # a constructor may raise anything; it only means that this is no way to build it
        raise _UnknownError(f"the class cannot be built from it ({type(error).__name__}: {error})") from error


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors that a state dict would hold."""
    return {name: tuple(map(int, tensor.shape)) for name, tensor in model.state_dict(keep_vars=True).items()}


def _numbers(model: nn.Module) -> Numbers:
    """Every number in the attributes of the modules and of the settings that they hold, by its place."""
    found: Numbers = {}
    seen: set[int] = set()
    for path, module in model.named_modules():
        for key, value in vars(module).items():
            if key not in INTERNAL:
                _collect(found, seen, path, (key,), value)
    return found


def _collect(found: Numbers, seen: set[int], path: str, chain: tuple[str | int, ...], value: Any) -> None:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        found[path, chain] = value
    elif isinstance(value, (tuple, list)) and len(value) <= 64:
        for i, item in enumerate(value):
            if isinstance(item, (int, float, tuple)):
                _collect(found, seen, path, (*chain, i), item)
    elif is_config(value) and id(value) not in seen:
        seen.add(id(value))
        for key, item in vars(value).items():
            _collect(found, seen, path, (*chain, key), item)


def _read_in(graph: ChannelGraph) -> set[Place]:
    """Places of the attributes that the traced forward reads in a way that matters."""
    expressions: list[Expression] = [e.expression for e in graph.trace.escapes]
    for c in graph.trace.comparisons:
        expressions += [c.left, c.right]
    for node in graph.trace.all_nodes:
        expressions += [number.expression for number in node.meta.get("tracked", ())]
    return {(leaf.module, leaf.chain) for e in expressions for leaf in leaves(e) if isinstance(leaf, Attribute)}


class _IntType(type):
    """The type of `_Int`: ``int(a / b)`` of tracked numbers stays tracked, and ``isinstance(x, int)`` works on."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and isinstance(args[0], SizeFloat):
            return SizeInt(int(plain(args[0])), Arithmetic("int", int, args[0].expression))
        return args[0] if len(args) == 1 and isinstance(args[0], SizeInt) else int(*args, **kwargs)

    def __instancecheck__(cls, value: Any) -> bool:
        return isinstance(value, int)


class _Int(metaclass=_IntType):
    """Takes the place of ``int`` while a constructor runs."""


@contextmanager
def _tracking_int(model: nn.Module) -> Generator[None]:
    """``int`` keeps track of numbers in the files that define the modules of `model`."""
    names = {type(module).__module__ for module in model.modules()}
    files = [vars(sys.modules[name]) for name in names if name in sys.modules and not name.startswith("torch")]
    changed: list[tuple[dict[str, Any], Mapping[str, Any]]] = []
    try:
        for scope in files:
            changed.append((scope, {"int": scope["int"]} if "int" in scope else {}))
            scope["int"] = _Int
        yield
    finally:
        for scope, before in changed:
            del scope["int"]
            scope.update(before)
