"""`ChannelGraph`: which slices of which parameters go together, and what may not go at all."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from functools import cached_property, partial
from math import lcm
from typing import Any

import numpy as np
from torch import fx, nn

from structprune.checking import INDICES, INPUTS, LAYER_OR_DIMENSION, require
from structprune.coupling.compensation import Compensation
from structprune.coupling.compensation_ahead import compensations
from structprune.coupling.computed_weights import normalised_weights
from structprune.coupling.costs import CostModel
from structprune.coupling.groups import BalancedGroups, Group, Roots, Slot, coupled_groups, group_numbers, joined
from structprune.coupling.naming import Dimension, Layer, path_of
from structprune.coupling.propagate import Channels, Invariant, propagate
from structprune.coupling.random_removals import Counter
from structprune.coupling.rehearsed import Rehearsals, described_axis, follows_inputs
from structprune.coupling.roles import Roles, roles
from structprune.coupling.size_solver import SizeSolver
from structprune.coupling.solve import Mask
from structprune.coupling.unreached import pin_caches, pin_ignored, pin_outputs_of, pin_unreached, pin_unseen
from structprune.coupling.zero_propagation import pin_what_is_not_zero
from structprune.errors import PinnedError, PlanError, UnknownLayerError
from structprune.ops import op_of
from structprune.ops.relations import Axis, Ids
from structprune.tracing.containers import leaves_of
from structprune.tracing.provenance import Attribute
from structprune.tracing.rehearsal import Deviation
from structprune.tracing.state import collection_paused, modules_of
from structprune.tracing.subgraph import can_be_rebuilt, own_operations
from structprune.tracing.trace import ExampleInputs, OutputName, Trace, chosen_names, trace
from structprune.wrapping import prunable


class ChannelGraph:
    """The coupled channels of a model; `structprune.DependencyGraph` adds their removal.

    Args:
        model: any ``nn.Module`` whose forward can be traced.
        example_inputs: a tensor, a tuple (positional) or a dict (keyword) that the model accepts.
        ignore: layers (modules or dotted names) to leave whole.
        ignore_outputs: layers whose outputs stay whole; their inputs may lose channels.
        outputs: names of the outputs that keep their shape; None for all.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: ExampleInputs,
        *,
        ignore: Iterable[Layer] = (),
        ignore_outputs: Iterable[Layer] = (),
        outputs: Iterable[OutputName] | None = None,
    ) -> None:
        require(locals(), example_inputs=INPUTS)
        self.model = prunable(model)
        self.example_inputs = example_inputs
        self._wanted = None if outputs is None else tuple([outputs] if isinstance(outputs, (str, int)) else outputs)
        self.ignored = tuple(self.path_of(layer) for layer in ignore)
        self.outputs_ignored = tuple(self.path_of(layer) for layer in ignore_outputs)
        self._analyse()

    def _analyse(self) -> None:
        with collection_paused():
            self.trace: Trace = trace(self.model, self.example_inputs, operations=op_of)
            self._relate()

    def _relate(self) -> None:
        for name in ("costs", "slots"):
            self.__dict__.pop(name, None)
        self._modules = dict(modules_of(self.model))
        self.outputs = chosen_names(self.trace.outputs, self._wanted)
        self.channels: Channels = propagate(self.trace, self.outputs)
        self._rebuilt: dict[str, bool] = {}
        pin_ignored(self.ignored, self.trace, self.channels)
        pin_outputs_of(self.outputs_ignored, self.trace, self.channels)
        pin_caches(self.model, self.trace, self.channels)
        pin_unseen(self.trace, self.channels)
        pin_unreached(self.model, self.trace, self.channels)
        self.normalised = normalised_weights(self.trace, self.channels)
        pin_what_is_not_zero(self.trace, self.channels)
        self.compensations: list[Compensation] = []
        scales = self.channels.relations.scales
        for scale, compensation in zip(scales, compensations(self.trace, scales), strict=True):
            factor = Invariant(scale.expression, self.trace.all_nodes[scale.node].meta["where"])
            if compensation is None or follows_inputs(scale.expression, self.channels.axes):
                self.channels.invariants.append(factor)
            else:
                self.compensations.append(compensation)
                self.channels.factors.append(factor)
        described = partial(described_axis, self._modules, self.trace, self.channels)
        self._solver = SizeSolver(self.channels, self.trace.comparisons, self.read, self._rewritable, described)
        self._rehearsals = Rehearsals(self.model, self.trace, self.example_inputs)
        self._solve()

    def _solve(self) -> None:
        for name in ("_groups", "roles", "roots"):
            self.__dict__.pop(name, None)
        self.sizes = self._solver.solve()
        self.components = self.sizes.components

    def settle(self, removed: Mask, *, pin: bool = True) -> bool:
        """Whether the forward runs as foreseen at the widths that `removed` leaves.

        Where it does not, the origin of a number is found, or what it depends on is pinned (without `pin`, left for
        `check` to refuse): ask for groups once more.
        """
        with collection_paused():
            deviations = self._rehearsals.deviations(self.sizes, removed)
            if deviations and self._rehearsals.trace_back(self.sizes, removed, deviations):
                self._relate()
                return False
            if deviations and pin:
                self._pin_deviating(removed, deviations[0])
        return not deviations or not pin

    @property
    def unchecked(self) -> str:
        """What could not be rehearsed at other widths; empty if nothing, or if no rehearsal needed it."""
        return self._rehearsals.unchecked

    def _pin_deviating(self, removed: Mask, deviation: Deviation) -> None:
        groups = [group.components for group in coupled_groups(self.components, self.slots)]
        before = self.components.pinned_ids
        self._rehearsals.pin_deviating(self.sizes, removed, groups, f"with fewer of its channels, {deviation}")
        self._solve()
        if self.components.pinned_ids <= before:
            raise PlanError(f"With fewer channels, {deviation}, and no channels are known that it depends on.")

    def _rewritable(self, number: int) -> bool:
        """Whether the forward of the module that runs this node can be rebuilt with another literal in it."""
        call = self.trace.all_nodes[number].meta["call"]
        path = self.trace.calls[call].path if 0 <= call < len(self.trace.calls) else None
        if path is None:
            return False
        if path not in self._rebuilt:
            self._rebuilt[path] = can_be_rebuilt(self.trace, self.trace.calls[call])
        return self._rebuilt[path]

    # -- looking up ----------------------------------------------------------------------------------------------

    def path_of(self, layer: Layer) -> str:
        """The dotted name of a layer, a block or a tensor.

        Raises:
            UnknownLayerError: the model has none such.
        """
        return path_of(self.model, layer)

    def read(self, attribute: Attribute) -> int:
        """Value of an int attribute of the model."""
        value: Any = self._modules.get(attribute.module)
        if value is None:
            value = self._modules[attribute.module] = self.model.get_submodule(attribute.module)
        for step in attribute.chain:
            value = value[step] if isinstance(step, int) else getattr(value, step)
        return value

    @cached_property
    def slots(self) -> list[Slot]:
        """Every dimension of every tensor that the model holds and the forward uses, where channels may go."""
        slots = []
        for node in self.trace.all_nodes:
            if node.meta["name"] == "parameter":
                for dim, axis in enumerate(self.channels.axes[node.meta["index"]]):
                    if axis.free and axis.size:
                        slots.append(Slot(str(node.target), dim, axis))
        return slots

    @cached_property
    def _groups(self) -> tuple[Group, ...]:
        groups = coupled_groups(self.components, self.slots)
        return tuple(dataclasses.replace(group, axis=self.roles.axis(group)) for group in groups)

    @cached_property
    def roles(self) -> Roles:
        """The parts that channels and weights play in the network."""
        return roles(self.trace, self.channels, self.components, self.roots)

    @cached_property
    def roots(self) -> Roots:
        """The roots that decide about each component."""
        return Roots(self.components)

    @cached_property
    def costs(self) -> CostModel:
        """What the model costs at any widths."""
        return CostModel(self.model, self.trace, self.channels, lambda axis: self.components.of(axis).tobytes())

    def groups(self) -> tuple[Group, ...]:
        """All prunable groups, in the order of the model.

        Where a dimension is a product (heads x head size, groups x channels in a group), its factors are groups of
        their own: a head is a channel of one, an index into every head a channel of another.
        """
        return self._groups

    def balanced(self) -> tuple[BalancedGroups, ...]:
        """Groups that may only be pruned together, in equal or otherwise fitting numbers.

        They come from forwards that cut a tensor into equal sections (``chunk``, a channel shuffle).
        """
        number = group_numbers(self.components, self.groups())
        return tuple(
            BalancedGroups(tuple(int(number[ids[0]]) for ids in split_group.classes), split_group.counts)
            for split_group in self.components.splits.split_groups
        )

    def output_axis(self, layer: Layer | Dimension) -> tuple[str, Axis]:
        """The path of a layer and the axis of its output channels, or of the dimension that is given.

        Raises:
            UnknownLayerError: there is no such layer, or it takes no part in the forward.
        """
        if isinstance(layer, tuple):
            return self._dimension_axis(*layer)
        path = self.path_of(layer)
        axes = self._axes_at(path)
        if not axes:
            raise UnknownLayerError(
                f"The layer {path!r} takes no part in the forward on these example inputs, so it has no channels."
            )
        free = [axis for axis in axes if axis.free]
        return path, ([axis for axis in free if self.sizes.moves(axis)] or free or axes)[-1]

    def _dimension_axis(self, tensor: str, dim: int) -> tuple[str, Axis]:
        """The layer that holds a tensor, and the axis of a dimension of it."""
        for node in self.trace.all_nodes:
            axes = self.channels.axes[node.meta["index"]]
            if node.op == "get_attr" and node.target == tensor and 0 <= dim < len(axes):
                return tensor.rpartition(".")[0] or tensor, axes[dim]
        raise UnknownLayerError(f"No tensor that the forward uses is named {tensor!r} and has a dimension {dim}.")

    def _axes_at(self, path: str) -> list[Axis]:
        """The axes of what the module at `path` gives, or of the tensor of that name."""
        nodes = [n for call in self.trace.every_call if call.path == path for n in leaves_of(call.output, fx.Node)]
        nodes += [node for node in self.trace.all_nodes if node.op == "get_attr" and node.target == path]
        return [axis for node in nodes for axis in self.channels.axes[node.meta["index"]] if isinstance(axis, Axis)]

    def _layer_roots(self, layer: Layer | Dimension) -> tuple[str, Ids]:
        """For each output channel of a layer, the component that decides about it (of a cell: the longest factor)."""
        path, axis = self.output_axis(layer)
        if not axis.free or self.components.pinned[self.components.of(axis)].all():
            raise PinnedError(f"The channels of {path!r} may not be removed: {self._reason(axis)}.")
        parts = self.components.of(axis)
        positions, roots = self.roots.of(parts)
        sizes = np.zeros(self.components.count, dtype=np.int64)
        np.add.at(sizes, roots, 1)
        order = np.lexsort((sizes[roots], positions))
        first = np.unique(positions[order], return_index=True)[1]
        return path, roots[order][first]

    def group(self, layer: Layer | Dimension, indices: Sequence[int] | None = None) -> Group:
        """The group of a layer's output channels, in their order.

        Args:
            layer: a module of the model, or its dotted name; or a dimension of a tensor: ``("fc.weight", 1)``.
            indices: those that count, as in `chosen`; None for all.

        Raises:
            UnknownLayerError: there is no such layer, or the forward does not use it.
            PinnedError: its channels may not be removed; the message says why.
        """
        path, roots = self._layer_roots(layer)
        chosen = np.unique(roots) if indices is None else self.chosen(layer, indices)
        chosen = chosen[self.components.roots[chosen]]
        deciding = self.roots.of(self.components.of(self.output_axis(layer)[1]))[1]  # position by position
        known, first = np.unique(deciding, return_index=True)
        chosen = chosen[np.argsort(first[np.searchsorted(known, chosen)])]
        axes = [group.axis for group in self.groups() if np.isin(chosen, group.components).any()]
        return Group(path, chosen, joined(self.groups(), chosen), axes[0] if axes else "channels")

    def _reason(self, axis: Axis) -> str:
        if not axis.free:
            return axis.pin or ""
        numbers = self.components.reason[self.components.of(axis)]
        numbers = numbers[numbers >= 0]
        return self.components.reasons[int(numbers[0])] if len(numbers) else "nothing pins it"

    def explain(self, layer: Layer) -> str:
        """Why a layer's channels are pinned, or what goes with them.

        Example:
            >>> import torch
            >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
            >>> graph = ChannelGraph(model, torch.randn(1, 4))
            >>> print(graph.explain("1"))
            1: 2 channels, pinned: it is a dimension of the model's output
        """
        path, axis = self.output_axis(layer)
        pinned = self.components.pinned[self.components.of(axis)] if axis.free else np.ones(axis.size, dtype=bool)
        if pinned.all():
            return f"{path}: {axis.size} channels, pinned: {self._reason(axis)}"
        text = str(self.group(layer))
        if pinned.any():
            text += f"\n  {int(pinned.sum())} of {axis.size} pinned: {self._reason(axis)}"
        return text

    def pinned(self) -> dict[str, str]:
        """Every dimension of a parameter whose channels may not be removed, and the reason."""
        reasons: dict[str, str] = {}
        for slot in self.slots:
            if self.components.pinned[self.components.of(slot.axis)].all():
                reasons[f"{slot.tensor}, dim {slot.dim}"] = self._reason(slot.axis)
        return reasons

    # -- removing ------------------------------------------------------------------------------------------------

    def chosen(self, target: Group | Layer | Dimension, indices: Sequence[int]) -> Ids:
        """Components of the channels `indices` of a group, of the outputs of a layer, or of a dimension of a tensor.

        Where a layer's channels are a product (groups x channels in a group), whole rows and columns of it go as such.

        Raises:
            PlanError: indices out of range or repeated.
            PinnedError: one of them may not be removed.
        """
        require(locals(), indices=INDICES)
        if isinstance(target, Group):
            name, components = target.name, target.components
        else:
            require(locals(), target=LAYER_OR_DIMENSION)
            name, components = self._layer_roots(target)
        picked = np.asarray(list(indices), dtype=np.int64)
        if len(picked) and (picked.min() < 0 or picked.max() >= len(components)):
            raise PlanError(
                f"{name!r} has channels 0 to {len(components) - 1}; "
                f"the indices {sorted(set(picked.tolist()))} go beyond."
            )
        if len(np.unique(picked)) < len(picked):
            raise PlanError(f"Some of the indices for {name!r} are repeated: {sorted(picked.tolist())}.")
        if len(picked) == len(components):
            raise PlanError(f"indices are all {len(components)} channels of {name!r}; at least one has to stay.")
        chosen = components[picked]
        if not isinstance(target, Group):
            parts = self.components.of(self.output_axis(target)[1])
            whole, rest = self.roots.taking(parts, picked)
            chosen = np.concatenate([whole, components[rest]])
            if len(rest) and len(picked) < len(parts) and self.components.removed(chosen)[parts].all():
                raise PlanError(
                    f"All {len(parts)} channels of {name!r} would go with {picked.tolist()}: they form a "
                    "grid (groups or heads x channels in each), of which whole rows and columns go. Keep one; name, "
                    "say, the first of each group."
                )
        held = chosen[~self.components.roots[chosen]]
        if len(held):
            reason = self.components.reasons[int(self.components.reason[held[0]])]
            raise PinnedError(f"Channels of {name!r} among {picked.tolist()} may not be removed: {reason}.")
        return np.unique(chosen)

    def literal_site(self, number: int) -> tuple[str, int]:
        """The module that runs node `number` itself, and the number of that operation among the module's own."""
        node = self.trace.nodes[number]
        path = self.trace.calls[node.meta["call"]].path
        return path, own_operations(self.trace, path)[1].index(node)

    def bounds(self, group: Group) -> tuple[int, int]:
        """How many channels of `group` must be left at least, and the number that theirs must be a multiple of."""
        least, step = 1, 1
        for bound in self.channels.relations.bounds:
            if not self.components.pinned[self.components.of(bound.axis)].all() and self._rules(bound.axis, group):
                least, step = max(least, bound.least), lcm(step, bound.step)
        return least, step

    def _rules(self, axis: Axis, group: Group) -> bool:
        """Whether channels of `group` decide about those of `axis`."""
        return bool(np.isin(self.roots.of(self.components.of(axis))[1], group.components).any())

    def counter(self, removed: Mask | None = None) -> Counter:
        """Counts kept channels of axes once the components marked in `removed` are removed; all channels by default."""
        return Counter(self.components, np.zeros(self.components.count, dtype=bool) if removed is None else removed)

    def check(self, removed: Mask) -> dict[Attribute, int]:
        """Values of the attributes that must change once `removed` is removed, after a check that every int fits.

        Raises:
            PlanError: an int of the forward could not follow, or fewer channels are left than are chosen from them.
        """
        count = self.counter(removed)
        for bound in self.channels.relations.bounds:
            left = count(bound.axis)
            if left < bound.axis.size and (left < bound.least or left % bound.step):
                raise PlanError(
                    f"{left} channels would be left of {bound.axis.size}, where at least {bound.least} and a multiple "
                    f"of {bound.step} are needed, by {bound.where}. Remove fewer, or give round_to={bound.step}."
                )
        values = self.sizes.values(count)
        for deviation in self._rehearsals.deviations(self.sizes, removed):
            raise PlanError(f"With fewer channels, {deviation}, and nothing tells how it follows. Name it in ignore=.")
        return values
