"""From a decision about channels to a `Plan`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from structprune.coupling.graph import ChannelGraph
from structprune.coupling.grouped_choices import GroupedChoice
from structprune.coupling.random_removals import Counter
from structprune.coupling.roles import AXES
from structprune.coupling.solve import Mask
from structprune.errors import PlanError
from structprune.ops.gains import Gain
from structprune.ops.relations import Ids
from structprune.planning.built_from_config import Chain
from structprune.planning.configuration import config_edits
from structprune.planning.plan import AxisWidth, LayerWidth, Plan, Settings
from structprune.surgery.edits import AttributeEdit, Edits, LiteralEdit, RemovedSlice, Rescale, SectionedSlice
from structprune.surgery.reference import norms_over_kept
from structprune.tracing.containers import specify
from structprune.tracing.provenance import Attribute, Dim, evaluate, literal_for, literals
from structprune.tracing.state import held_tensors


def tensors_of(graph: ChannelGraph) -> dict[str, Tensor]:
    """The tensors of the graph's model by name."""
    return {name: held.tensor for name, held in held_tensors(graph.model).items()}


@dataclass(frozen=True)
class Description:
    """What a model's configuration says of the smaller model.

    Attributes:
        edits: what to set in the configuration, and in attributes that follow from it.
        rescales: what makes up for factors that follow from it.
        reason: why it has to stay as it is, or what goes that it says nothing of; None if it says all.
    """

    edits: tuple[AttributeEdit, ...] = ()
    reason: str | None = None
    rescales: tuple[Rescale, ...] = ()


def describe(graph: ChannelGraph, chosen: Ids, numbers: Mapping[Chain, int] | None = None) -> Description:
    """What the configuration says once the components `chosen` and all that is coupled to them are gone.

    Args:
        graph: the coupled channels.
        chosen: what goes.
        numbers: what the configuration is to say, by chains from the model; None to find that out.

    Raises:
        PlanError: nothing would be left of some dimension, or some int of the forward could not follow.
    """
    removed = graph.components.removed(chosen)
    count = graph.counter(removed)
    edits = _edits(graph, removed, graph.sizes.values(count), None)
    return Description(*config_edits(graph, edits, count, numbers))


def plan_removal(
    graph: ChannelGraph,
    chosen: Ids | GroupedChoice,
    settings: Settings | None = None,
    *,
    config: bool = True,
    described: Description | None = None,
) -> Plan:
    """The plan that removes the components `chosen` and all that is coupled to them, or other ones of each group.

    With `config`, a configuration that the model's class is built from is made to say what the smaller model is (see
    `structprune.planning.configuration`); it costs building the class on the ``meta`` device twice or more, unless it
    is `described` already.

    Raises:
        PlanError: nothing would be left of some dimension, or some int of the forward could not follow.
    """
    removed = chosen.removed if isinstance(chosen, GroupedChoice) else graph.components.removed(chosen)
    count = graph.counter(removed)
    edits = _edits(graph, removed, graph.check(removed), chosen if isinstance(chosen, GroupedChoice) else None)
    if described is None:
        described = Description(*config_edits(graph, edits, count)) if config else Description()
    return Plan(
        slices=edits.slices,
        attribute_edits=(*edits.attribute_edits, *described.edits),
        rescales=(*edits.rescales, *described.rescales),
        literal_edits=edits.literal_edits,
        caches=edits.caches,
        inputs=edits.inputs,
        outputs=edits.outputs,
        layers=_layers(edits.slices),
        axes=_axes(graph, removed),
        before=graph.costs.at(lambda axis: axis.size),
        after=graph.costs.at(count),
        settings=replace(
            settings or Settings(),
            left={**(settings.left if settings else {}), **_left(graph, described)},
            over_survivors=_norms(graph, removed),
        ),
    )


def _edits(graph: ChannelGraph, removed: Mask, values: Mapping[Attribute, int], grouped: GroupedChoice | None) -> Edits:
    """All that changes but the configuration; `values` are those of the attributes that follow."""
    slices = _slices(graph, removed, grouped)
    count = graph.counter(removed)
    attribute_edits = tuple(
        AttributeEdit(attribute.module, attribute.chain, graph.read(attribute), new)
        for attribute, new in sorted(values.items(), key=lambda item: str(item[0]))
    )
    return Edits(
        slices=slices,
        attribute_edits=attribute_edits,
        rescales=(*_rescales(graph, count, values), *_gains(graph, slices)),
        literal_edits=_literal_edits(graph, count),
        caches=graph.trace.caches,
        inputs=specify(graph.example_inputs),
        outputs=tuple(graph.outputs) if len(graph.outputs) < len(graph.trace.outputs) else None,
    )


def _left(graph: ChannelGraph, described: Description) -> dict[str, str]:
    """What a reader of the plan should know was left as it is."""
    left: dict[str, str] = {}
    if described.reason:
        unchanged = f"unchanged: {described.reason}; structprune.save and structprune.load keep the model"
        left["config"] = described.reason if described.edits else unchanged
    if graph.trace.training_error:
        unseen = ", ".join(sorted({name.rpartition(".")[0] for name in graph.trace.unreached(graph.model)})[:5])
        left["training"] = f"{unseen} unchanged: in training mode the forward raised {graph.trace.training_error}"
    if graph.unchecked:
        left["rehearsal"] = graph.unchecked
    return left


def _norms(graph: ChannelGraph, removed: Mask) -> tuple[str, ...]:
    """Where the smaller model does not compute what the original does with the channels switched off, by name."""
    names: dict[str, None] = {}
    for reduction, _ in norms_over_kept(graph, removed):
        node = graph.trace.all_nodes[reduction.node]
        call = node.meta["call"]
        path = graph.trace.every_call[call].path if call >= 0 else ""
        names[f"{path or 'the model'} ({node.meta['name'].removeprefix('python.')})"] = None
    return tuple(names)


def _slices(graph: ChannelGraph, removed: Mask, grouped: GroupedChoice | None) -> tuple[RemovedSlice, ...]:
    slices: list[RemovedSlice] = []
    orders = graph.components.splits.orders(removed)
    # Coupled tensors lose the same channels: they share one tuple of them.
    shared: dict[bytes, tuple[tuple[int, ...], tuple[int, ...] | None]] = {}
    for slot in graph.slots:
        parts = graph.components.of(slot.axis)
        if grouped is not None and np.array_equal(parts, grouped.positions):
            sections = tuple(tuple(kept.tolist()) for kept in grouped.kept)
            last = tuple(range(grouped.kept.shape[1], slot.axis.size))
            slices.append(SectionedSlice(slot.tensor, slot.dim, slot.axis.size, last, None, sections))
            continue
        key = parts.tobytes()
        if key not in shared:
            gone = removed[parts]
            if gone.all():
                raise PlanError(
                    f"This would remove all {slot.axis.size} channels of dimension {slot.dim} of {slot.tensor!r}. Keep "
                    "at least one; to remove a whole layer is another operation."
                )
            order = orders.get(key) if orders and gone.any() else None
            places = None if order is None else tuple(order.tolist())
            shared[key] = tuple(np.flatnonzero(gone).tolist()), places
        indices, places = shared[key]
        if indices:
            slices.append(RemovedSlice(slot.tensor, slot.dim, slot.axis.size, indices, places))
    return tuple(slices)


def _layers(slices: tuple[RemovedSlice, ...]) -> tuple[LayerWidth, ...]:
    return tuple(
        LayerWidth(t.tensor.rpartition(".")[0] or t.tensor, t.size, t.size - len(t.removed))
        for t in slices
        if t.dim == 0 and t.tensor.endswith("weight")
    )


def _axes(graph: ChannelGraph, removed: Mask) -> tuple[AxisWidth, ...]:
    widths: list[AxisWidth] = []
    for axis in AXES:
        mine = [group for group in graph.groups() if group.axis == axis]
        if mine:
            before = sum(group.channels for group in mine)
            after = before - sum(int(np.count_nonzero(removed[group.components])) for group in mine)
            widths.append(AxisWidth(axis, len(mine), before, after))
    return tuple(widths)


def _rescales(graph: ChannelGraph, count: Counter, values: Mapping[Attribute, int]) -> tuple[Rescale, ...]:
    def before(leaf: Dim | Attribute) -> float:
        return graph.channels.axes[leaf.node][leaf.dim].size if isinstance(leaf, Dim) else graph.read(leaf)

    def after(leaf: Dim | Attribute) -> float:
        if isinstance(leaf, Dim):
            return count(graph.channels.axes[leaf.node][leaf.dim])
        return values.get(leaf, graph.read(leaf))

    rescales: list[Rescale] = []
    for compensation in graph.compensations:
        old, new = (evaluate(compensation.scale.expression, each) for each in (before, after))
        if old != new:
            factor = old / new
            rescales += [Rescale(c.tensor, c.dim, c.positions, factor) for c in compensation.scaled]
    return tuple(rescales)


def _gains(graph: ChannelGraph, slices: tuple[RemovedSlice, ...]) -> tuple[Gain, ...]:
    """What makes up for the norms of weights that lose some of what the norms run over."""
    sliced_dims = {(sliced.tensor, sliced.dim) for sliced in slices}
    gains = dict.fromkeys(normalised.gain for normalised in graph.normalised)
    return tuple(
        gain
        for gain in gains
        if any(tensor == gain.weight and (dim != gain.dim or gain.vectors) for tensor, dim in sliced_dims)
    )


def _literal_edits(graph: ChannelGraph, count: Counter) -> tuple[LiteralEdit, ...]:
    edits: dict[tuple[str, int, tuple[int | str, ...]], LiteralEdit] = {}
    for constraint in graph.sizes.literals:
        (literal,) = literals(constraint.expression)
        new = int(literal_for(constraint.expression, count(constraint.axis)))
        if new == literal.value:
            continue
        path, number = graph.literal_site(literal.node)
        rewrite = LiteralEdit(path, number, literal.place, literal.value, new)
        known = edits.setdefault((path, number, literal.place), rewrite)
        if known != rewrite:
            raise PlanError(f"The literal {literal.value} at {constraint.where} would have to be two numbers at once.")
    return tuple(edits.values())
