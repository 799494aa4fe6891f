"""Which channels may not go because the forward, at other widths, would ask for what no expression explains."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isclose, isfinite
from operator import pow as power
from typing import Any

import numpy as np
from torch import fx, nn

from structprune.coupling.propagate import Channels
from structprune.coupling.random_removals import Counter
from structprune.coupling.size_constraints import Sizes
from structprune.coupling.solve import Mask
from structprune.errors import PlanError
from structprune.ops import op_of
from structprune.ops.relations import Axis, Ids
from structprune.tracing.comparing import is_number
from structprune.tracing.describe import described_dim
from structprune.tracing.provenance import (
    Arithmetic,
    Attribute,
    Constant,
    Dim,
    Expression,
    SizeFloat,
    SizeInt,
    evaluated,
    leaves,
)
from structprune.tracing.rehearsal import Deviation, Widths, rehearse
from structprune.tracing.state import join
from structprune.tracing.trace import ExampleInputs, Trace


@dataclass
class Rehearsals:
    """Rehearsals of one model at widths of choice.

    Args:
        model: the model that was traced.
        trace: what was recorded.
        example_inputs: those of the trace.
    """

    model: nn.Module
    trace: Trace
    example_inputs: ExampleInputs
    _always: tuple[Deviation, ...] | None = None
    _settled: bytes = b""

    def deviations(self, sizes: Sizes, removed: Mask) -> list[Deviation]:
        """What the forward does that is not foreseen once `removed` is removed, other than what it does anyway."""
        if not removed.any() or removed.tobytes() == self._settled:
            return []
        deviations = self._at(sizes, removed)
        if deviations and self._always is None:
            # A forward that counts its calls, or draws numbers, is never twice the same: that says nothing of widths.
            self._always = tuple(self._at(sizes, np.zeros_like(removed)))
        always = {deviation.place for deviation in self._always or ()}
        deviations = [deviation for deviation in deviations if deviation.place not in always]
        self._settled = b"" if deviations else removed.tobytes()
        return deviations

    @property
    def unchecked(self) -> str:
        """What rehearsals could not say, because two runs of the forward differ there at the same widths already."""
        if not self._always:
            return ""
        last = self._always[-1]
        much = "there and from there on" if last.ends else "there"
        return f"two runs of the forward differ ({last}), so numbers of unknown origin were not checked {much}"

    def _at(self, sizes: Sizes, removed: Mask) -> list[Deviation]:
        count = Counter(sizes.components, removed)
        axes = sizes.channels.axes

        def shape(number: int) -> Any:
            of_node = axes[number]
            if isinstance(of_node, list):
                return [None if part is None else tuple(map(count, part)) for part in of_node]
            return tuple(map(count, of_node))

        try:
            values = sizes.values(count)
        except PlanError as error:
            return [Deviation(str(error), "")]
        number = sizes.valuation(count)
        whole = sizes.valuation(Counter(sizes.components, np.zeros_like(removed)))
        for factor in sizes.channels.factors:
            if _divides(whole, factor.expression) != _divides(number, factor.expression):
                return [Deviation("a factor becomes 0 or infinite, or was so", factor.where)]
        widths = Widths(shape, number, values)
        return rehearse(self.model, self.trace, self.example_inputs, op_of, widths)

    def trace_back(self, sizes: Sizes, removed: Mask, deviations: Sequence[Deviation]) -> bool:
        """Whether numbers in `deviations` were given back their origin, so that channels have to be related anew."""
        count = Counter(sizes.components, removed)
        traced = [trace_back(self.trace, sizes.channels.axes, count, deviation) for deviation in deviations]
        return any(traced)

    def pin_deviating(self, sizes: Sizes, removed: Mask, groups: Sequence[Ids], reason: str) -> None:
        """Pin those of `groups` that make the forward deviate once `removed` is removed; balanced ones go together."""
        components = sizes.components
        units = [np.concatenate(split_group.classes) for split_group in components.splits.split_groups]
        together = {int(part) for unit in units for part in unit}
        units += [group for group in groups if int(group[0]) not in together]
        at_fault = self._at_fault(sizes, removed, units) or units
        every = components.of(Axis(components.ids, array=np.arange(components.ids)))
        numbers, first = np.unique(every, return_index=True)
        ids = first[np.isin(numbers, np.concatenate(at_fault))].astype(np.int64)  # one of each component is enough
        sizes.channels.relations.pin(Axis(len(ids), array=ids), reason)

    def _at_fault(self, sizes: Sizes, removed: Mask, units: Sequence[Ids]) -> list[Ids]:
        """Those of `units` (components that go together) that make the forward deviate when they go.

        Halves are looked at until single units are left, so that a few of many take few rehearsals. Where only units
        of both halves together make it deviate, the last one is named.
        """
        part = np.zeros_like(removed)
        for unit in units:
            part[unit] = removed[unit]
        if not part.any() or not self.deviations(sizes, sizes.components.closure(part)):
            return []
        if len(units) == 1:
            return list(units)
        middle = len(units) // 2
        halves = (units[:middle], units[middle:])
        return [unit for half in halves for unit in self._at_fault(sizes, removed, half)] or [units[-1]]


def _divides(number: Callable[[Expression], float], expression: Expression) -> bool:
    """Whether what an expression becomes can be divided by: ``c % 4`` becomes 0 where 8 of 9 channels are left."""
    try:
        value = number(expression)
    except ZeroDivisionError:
        return False
    return bool(value) and isfinite(value)


def described_axis(
    modules: Mapping[str, nn.Module], trace: Trace, channels: Channels, attribute: Attribute
) -> Axis | None:
    """The axis that an attribute of a standard layer counts by what the layer says of its own shape."""
    described = described_dim(modules[attribute.module], attribute.chain)
    if described is None:
        return None
    name = join(attribute.module, described[0])
    name = next((names[0] for names in trace.tensors.values() if name in names), name)
    axis = next((channels.axes[n.meta["index"]] for n in trace.all_nodes if n.target == name), None)
    return None if axis is None else axis[described[1]]


# -- where a number came from that lost its origin: ``int(c) ** -0.5`` reaches a product as a plain float ------------
# A rehearsal says what such a number is at two widths. If at both it is the same power of a number of channels, it is
# taken for that, and is compensated like a number whose origin is known; the next rehearsal proves or refutes it.

_POWERS = (-0.5, 0.5, -1.0, 1.0)


def trace_back(trace: Trace, axes: Sequence[Any], count: Callable[[Axis], int], deviation: Deviation) -> bool:
    """Give a factor in a product or quotient back its origin, in `trace`; whether that was possible.

    Args:
        trace: what was recorded.
        axes: the axes of its nodes.
        count: the kept channels of an axis in the rehearsal.
        deviation: what the forward did that was not foreseen.
    """
    if deviation.numbers is None or len(deviation.place) != 3 or deviation.place[1] != "args":
        return False
    node, position = trace.all_nodes[int(deviation.place[0])], int(deviation.place[2])
    args = list(node.args)
    if node.meta["name"] not in ("mul", "div") or len(args) != 2 or not isinstance(args[1 - position], fx.Node):
        return False
    if not is_number(args[position]) or isinstance(args[position], (SizeInt, SizeFloat)):
        return False
    for dim, axis in _counted(axes, node.meta["index"]):
        for exponent in _POWERS:
            sizes = axis.size**exponent, count(axis) ** exponent
            if all(isclose(a, b, rel_tol=1e-9) for a, b in zip(sizes, deviation.numbers, strict=True)):
                origin = Arithmetic("**", power, dim, Constant(exponent))
                args[position] = number = SizeFloat(deviation.numbers[0], origin)
                node.args = tuple(args)
                node.meta["tracked"] = [*node.meta.get("tracked", ()), number]
                return True
    return False


def _counted(axes: Sequence[Any], end: int) -> Iterator[tuple[Dim, Axis]]:
    """The dimensions whose channels may go of the tensors before node number `end`, the last ones first."""
    seen: set[object] = set()
    for number in range(end - 1, -1, -1):
        made = axes[number]
        for dim, axis in enumerate(made if isinstance(made, tuple) else ()):
            if axis.free and axis.key not in seen:
                seen.add(axis.key)
                yield Dim(number, dim), axis


def follows_inputs(expression: Expression, axes: Sequence[Any]) -> bool:
    """Whether what a factor becomes when channels go depends on the sizes of the inputs too: ``(tokens + c) ** -0.5``.

    Then no weight can make up for it. ``(tokens * c) ** -0.5`` is the same factor for all numbers of tokens.
    """
    fixed = {leaf for leaf in leaves(expression) if isinstance(leaf, Dim) and not axes[leaf.node][leaf.dim].free}
    if not fixed:
        return False

    def at(channels: int, tokens: int) -> float:
        return evaluated(expression, lambda leaf: tokens if leaf in fixed else channels)

    # Any numbers will do that are no powers of one another.
    return not all(isclose(at(48, tokens) * at(20, 7), at(20, tokens) * at(48, 7), rel_tol=1e-9) for tokens in (11, 30))
