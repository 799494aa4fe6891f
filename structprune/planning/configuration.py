"""Configurations: what `model.config` must say, so that the class, built from it, has the shapes of the pruned model.

Some models are built from one object of settings (``model.config``, which can be written out with ``to_dict``), and are
saved and loaded through it. After pruning that object should describe the pruned model. Which of its numbers is which
width is worked out, not assumed:

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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import islice, product
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from torch import nn

from structprune.coupling.graph import ChannelGraph
from structprune.coupling.random_removals import Counter
from structprune.errors import StructpruneError
from structprune.ops import op_of
from structprune.ops.relations import Axis
from structprune.planning.built_from_config import (
    Chain,
    Place,
    UnknownError,
    assign,
    is_built_from_config,
    number_at,
    numbers_in,
    read_back,
    rebuilt,
    state_shapes,
    tracking_int,
)
from structprune.planning.configured_part import OTHER, described_module, part_like
from structprune.planning.constants import Folding, Values, changed_values, same_operations, unsaved_values
from structprune.surgery.apply import apply
from structprune.surgery.edits import AttributeEdit, Edits, Rescale
from structprune.tracing.provenance import (
    Attribute,
    Expression,
    SizeFloat,
    SizeInt,
    evaluate,
    expression_of,
    leaves,
    plain,
)
from structprune.tracing.state import tracked_object
from structprune.tracing.trace import preserved_random_state, trace

Assignment = dict[Attribute, int]
# What classes compute when they are built, as the models of these graphs are.
_UNSAVED: WeakKeyDictionary[ChannelGraph, Values] = WeakKeyDictionary()
# Each candidate takes building the class once; no more than these are tried.
CANDIDATES = 8
COMBINATIONS = 4096


def config_edits(
    graph: ChannelGraph, edits: Edits, count: Counter, numbers: Mapping[Chain, int] | None = None
) -> tuple[tuple[AttributeEdit, ...], str | None, tuple[Rescale, ...]]:
    """What to set in ``model.config``, and in attributes that follow from it, so that they describe the pruned model.

    Args:
        graph: the graph of the model.
        edits: what the plan changes otherwise.
        count: counts the channels that are left.
        numbers: what it is to say, by chains from the model; None to find that out.

    Returns:
        The edits of attributes; what the configuration cannot say, if anything: then there are no edits, unless it is
        of tensors that are no part of what it describes; and what makes up for factors that follow from it.
    """
    if not (edits.slices or numbers) or not is_built_from_config(graph.model):
        return (), None, ()
    try:
        with preserved_random_state():
            search = _Search(graph, edits, count)
            return search.run(numbers), search.outside(), search.rescales
    except UnknownError as reason:
        return (), str(reason), ()


class _ShapesError(UnknownError):
    """The class built from it has other shapes, which says little: another choice may have the right ones."""


class _Search:
    """One search for the configuration of a pruned model."""

    def __init__(self, graph: ChannelGraph, edits: Edits, count: Counter) -> None:
        self._model = graph.model
        self._config: Any = graph.model.config
        self._graph = graph
        self._edits = edits
        self._count = count
        self._module = described_module(graph.model)[1]
        self._kind = type(self._module)
        self.rescales: tuple[Rescale, ...] = ()
        self._used = {str(node.target) for node in graph.trace.all_nodes if node.op == "get_attr"}

    def run(self, numbers: Mapping[Chain, int] | None) -> tuple[AttributeEdit, ...]:
        if self._edits.literal_edits:
            raise UnknownError("a size is written as a number in a forward, which the class has from its source")
        self._compare_with_pruned()
        if numbers is not None:
            return self._checked({Attribute("", chain): value for chain, value in numbers.items()})
        fixed = self._fixed()
        reasons: list[UnknownError] = []
        choices = self._choices(fixed)
        found = (self._assignments(choices), self._given_at_last(choices))
        for assignment in (each for some in found for each in islice(some, CANDIDATES)):
            try:
                return self._checked(assignment)
            except UnknownError as error:
                reasons.append(error)
        reasons.sort(key=lambda error: isinstance(error, _ShapesError))  # those that say more first
        if reasons:
            raise reasons[0]
        raise UnknownError("no numbers in it give the widths of all layers; name axes so that they are pruned alike")

    # -- the class as it is, with formulas -----------------------------------------------------------------------

    def _compare_with_pruned(self) -> None:
        """Build the class from the configuration as it is, for its formulas; then apply the edits, as a model."""
        config = copy.deepcopy(self._config)
        with ExitStack() as stack:
            tracked_object("", ("config",), config, stack)
            stack.enter_context(tracking_int(self._model))
            base = rebuilt(self._kind, config)
            self._part = part_like(self._model, base, self._used)
            if state_shapes(base) != self._part.shapes(self._model):
                raise UnknownError(OTHER)
            self._read = {place for at in _read_in(self._graph) if (place := self._part.place(*at)) is not None}
            self._formulas = numbers_in(base)
            self._before = {place: plain(value) for place, value in self._formulas.items()}
            try:
                apply(base, self._part.edits(self._edits), inplace=True)
            except StructpruneError as error:
                raise UnknownError(f"the class built from it is another than this model ({error})") from error
            after = numbers_in(base)
        self._shapes = state_shapes(base)
        self._known = {place for place, value in after.items() if value is not self._formulas.get(place)}
        self._after = {place: plain(value) for place, value in after.items()}

    def outside(self) -> str | None:
        """What goes of tensors that the class does not have, and does not follow from what goes of others."""
        if self._part.whole:
            return None
        components, slots = self._graph.components, self._graph.slots
        inside = np.zeros(components.count, dtype=bool)
        for slot in slots:
            if self._part.tensor(slot.tensor) is not None:
                inside[components.of(slot.axis)] = True
        axes = {(slot.tensor, slot.dim): slot.axis for slot in slots}
        for sliced in self._edits.slices:
            if self._part.tensor(sliced.tensor) is None:
                gone = components.of(axes[sliced.tensor, sliced.dim])[list(sliced.removed)]
                if not inside[gone].all():
                    return f"it says nothing of {sliced.tensor!r}, which is no part of the class that it builds"
        return None

    # -- equations -----------------------------------------------------------------------------------------------

    def _equations(self, read: bool = True) -> list[tuple[Expression, Any]]:
        """Formulas of attributes with the values that they must have afterwards.

        With `read`, those too that the forward reads and surgery leaves; they may turn out to decide nothing.
        """
        equations: dict[tuple[Expression, Any], None] = {}
        for place, value in self._formulas.items():
            needed = place in self._known or (read and place in self._read)
            if isinstance(value, (SizeInt, SizeFloat)) and needed:
                equations[value.expression, self._after[place]] = None
        return list(equations)

    def _fixed(self) -> Assignment:
        """Numbers of the configuration that are the width of something themselves.

        What the forward reads may be made up for, so that it does not count where surgery sets something else.
        """
        fixed: Assignment = {}
        widths = {expression for expression, _ in self._equations(read=False)}
        for expression, value in (*self._equations(read=False), *self._equations()):
            if not isinstance(expression, Attribute):
                continue
            if expression in widths and (expression, value) not in self._equations(read=False):
                continue
            if fixed.setdefault(expression, value) != value:
                raise UnknownError(
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

    def _choices(self, fixed: Assignment) -> list[Assignment]:
        """Choices for the numbers that are not fixed, with those that are; those that change least first."""
        formulas = [v.expression for v in self._formulas.values() if isinstance(v, (SizeInt, SizeFloat))]
        used = {leaf for e in formulas for leaf in leaves(e) if isinstance(leaf, Attribute)}
        left = self._channels_left()
        options: dict[Attribute, list[int]] = {}
        for leaf in sorted(used - fixed.keys(), key=str):
            old = self._value(leaf)
            others = sorted((left.get(old, set()) | self._shrunk(leaf, old)) - {old}, reverse=True)
            if others:
                options[leaf] = [old, *others]
        choices = islice(product(*options.values()), COMBINATIONS)
        ranked = sorted((dict(zip(options, choice, strict=True)) for choice in choices), key=self._changes)
        return [{**fixed, **choice} for choice in ranked]

    def _assignments(self, choices: list[Assignment]) -> Iterator[Assignment]:
        """Those of the choices for which all equations hold; what the forward reads counts first."""
        fitting: list[Assignment] = []
        for equations in (self._equations(), self._equations(read=False)):
            for assignment in choices:
                if assignment not in fitting and all(self._holds(e, value, assignment) for e, value in equations):
                    fitting.append(assignment)
                    yield assignment

    def _given_at_last(self, choices: list[Assignment]) -> Iterator[Assignment]:
        """Choices that give a number which was left to the class, such as GPT-2's inner width of four times another."""
        unset = _left_to_class(self._config)
        equations = self._equations(read=False)
        computed = [place for place, v in self._formulas.items() if not isinstance(expression_of(v), Attribute)]
        widths = {self._after[place] for place in computed if isinstance(self._formulas[place], SizeInt)}
        for width in sorted(widths, reverse=True):
            # The formulas of the width no longer count.
            others = [equation for equation in equations if equation[1] != width]
            fitting = [each for each in choices if all(self._holds(*equation, each) for equation in others)]
            for assignment, name in product(fitting, unset):
                yield {**assignment, Attribute("", ("config", name)): width}

    def _shrunk(self, leaf: Attribute, old: int) -> set[int]:
        """The number, shrunk as a width is that it takes part in: 8 heads of 8 channels are 4, if 64 became 32."""
        numbers: set[int] = set()
        for place, value in self._formulas.items():
            before, after = self._before[place], self._after[place]
            if place in self._known and type(before) is int and before and leaf in leaves(expression_of(value)):
                numbers.add(old * after // before if old * after % before == 0 else old)
        return numbers

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
        left: dict[int, set[int]] = {}
        for axes in self._graph.channels.axes:
            for axis in axes if isinstance(axes, tuple) else ():
                if isinstance(axis, Axis) and axis.free:
                    left.setdefault(axis.size, set()).add(self._count(axis))
        return left

    # -- the check -----------------------------------------------------------------------------------------------

    def _checked(self, assignment: Assignment) -> tuple[AttributeEdit, ...]:
        """The edits of attributes for this assignment, if the class built from it is the pruned model."""
        config = copy.deepcopy(self._config)
        for leaf, value in assignment.items():
            if value != self._value(leaf):
                assign(config, leaf.chain[1:], value)
        read = read_back(config)
        built = rebuilt(self._kind, config)
        self._check_shapes(state_shapes(built))
        if read.to_dict() != config.to_dict():  # reading sets a number that follows from one that was changed
            self._check_shapes(state_shapes(rebuilt(self._kind, read)))
        self._check_buffers()
        attribute_edits: list[AttributeEdit] = []
        self._doubts: list[str] = []
        for place, new in numbers_in(built).items():
            attribute_edits += self._compared(place, plain(new))
        changed = self._changed_values(config)
        if changed:
            self._doubts.append(f"{min(changed)!r} is not saved but computed from it, and would be another number")
        self.rescales = self._made_up_for(built, changed) if self._doubts else ()
        return tuple(sorted(attribute_edits, key=lambda edit: (edit.module, str(edit.chain))))

    def _check_shapes(self, shapes: dict[str, tuple[int, ...]]) -> None:
        if more := shapes.keys() - self._shapes.keys():
            raise _ShapesError(f"a model built from it has {min(more)!r} too, which this one lacks")
        for name, shape in self._shapes.items():
            if shapes.get(name) != shape:
                unused = (
                    ""
                    if self._part.name(name) in self._used
                    else ", which the forward does not use on the example inputs"
                )
                raise _ShapesError(
                    f"it cannot give {name!r}{unused}, the shape {list(shape)} together with all others; a model built "
                    f"from it has {list(shapes.get(name, ()))} there"
                )

    def _compared(self, place: Place, new: Any) -> list[AttributeEdit]:
        """One number of the class built anew, against what the pruned model has."""
        before, after = self._before.get(place), self._after.get(place)
        if new == after or (new == before and place not in self._known):
            return []
        name = ".".join([place[0] or "model", *map(str, place[1])])
        different = f"{name} is {after} in the pruned model, and would be {new} in one built from it"
        kinds = (float,) if type(new) is float else (int, type(None))
        told = isinstance(new, int | float) and isinstance(after, kinds) and place[0] in self._part.outer
        if place in self._known or not told:
            raise UnknownError(different)
        if place in self._read or type(new) is float:
            self._doubts.append(different)
        path, chain = place
        # The model itself holds the configuration too, whatever stands around the class.
        return [AttributeEdit("" if not path and chain[0] == "config" else self._part.outer[path], chain, after, new)]

    def _changed_values(self, config: Any) -> dict[str, tuple[float, float]]:
        """Single numbers in unsaved tensors that would be others in a model built from `config`."""
        if self._graph not in _UNSAVED:
            _UNSAVED[self._graph] = unsaved_values(self._kind, copy.deepcopy(self._config))
        before = _UNSAVED[self._graph]
        return changed_values(before, unsaved_values(self._kind, copy.deepcopy(config))) if before else {}

    def _made_up_for(self, built: nn.Module, changed: Mapping[str, tuple[float, float]]) -> tuple[Rescale, ...]:
        """What makes a model run the very operations of the pruned one, whatever its attributes say.

        A number that the forward reads may decide nothing there: how often heads are repeated, where an operation
        repeats them by itself. One that multiplies can be made up for.

        Raises:
            UnknownError: there is a difference that nothing makes up for.
        """
        pruned = rebuilt(self._kind, copy.deepcopy(self._config))
        apply(pruned, self._part.edits(self._edits), inplace=True)
        ours, theirs = (trace(model, self._graph.example_inputs, operations=op_of) for model in (pruned, built))
        if not changed and same_operations(ours, theirs):
            return ()
        if not self._part.whole:
            raise UnknownError(self._doubts[0])
        return Folding(self._graph, self._doubts[0]).run(ours, theirs, changed)

    def _check_buffers(self) -> None:
        """Tensors that are not saved are computed anew when the model is loaded."""
        # Patterns of names that a model keeps out of its files, where it has such a list.
        omitted: Sequence[str] = getattr(self._module, "_keys_to_ignore_on_save", None) or ()
        saved = self._shapes.keys()
        for sliced in self._part.edits(self._edits).slices:
            if sliced.tensor not in saved or any(re.search(pattern, sliced.tensor) for pattern in omitted):
                raise UnknownError(
                    f"{sliced.tensor!r} is not saved but computed from it, which cannot leave out the entries that "
                    "were pruned; name axes that leave it whole"
                )


def _left_to_class(config: Any) -> list[str]:
    """Names of whole numbers that a configuration could give and does not; a token's number counts nothing."""
    hints: dict[str, str] = {}
    for kind in type(config).__mro__:
        hints = {**{name: str(hint) for name, hint in vars(kind).get("__annotations__", {}).items()}, **hints}
    unset = [name for name, value in vars(config).items() if value is None]
    return [name for name in unset if "int" in hints.get(name, "") and not name.endswith("_id")]


def _read_in(graph: ChannelGraph) -> set[Place]:
    """Places of the attributes that the traced forward reads in a way that matters."""
    expressions: list[Expression] = [e.expression for e in graph.trace.escapes]
    for c in graph.trace.comparisons:
        expressions += [c.left, c.right]
    for node in graph.trace.all_nodes:
        expressions += [number.expression for number in node.meta.get("tracked", ())]
    return {(leaf.module, leaf.chain) for e in expressions for leaf in leaves(e) if isinstance(leaf, Attribute)}
