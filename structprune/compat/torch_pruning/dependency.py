"""`DependencyGraph` and `Group` with torch-pruning's methods."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from structprune.checking import MODEL, require
from structprune.compat.torch_pruning import function as fn
from structprune.coupling import groups as coupled
from structprune.coupling.naming import Dimension
from structprune.dependency_graph import DependencyGraph as Graph
from structprune.errors import UnknownLayerError
from structprune.forwards.batches import calls_of
from structprune.ops.relations import Ids
from structprune.planning.build import plan_removal, tensors_of
from structprune.planning.plan import Plan, Settings, plans_of
from structprune.surgery.own_slimming import Slim, own_changes
from structprune.tracing.state import held_tensors

History = list[Any]


class Node(NamedTuple):
    """A layer, or a parameter that no layer of torch holds."""

    module: Any
    name: str


class Dependency(NamedTuple):
    """The part of a layer, outputs or inputs (`handler`), that goes with the root's channels."""

    target: Node
    source: Node
    handler: fn.PruningFunction
    trigger: fn.PruningFunction

    layer = property(lambda self: self.target.module)
    pruning_fn = property(lambda self: self.handler)

    def __str__(self) -> str:
        return f"prune_{self.trigger.name} on {self.source.name} => prune_{self.handler.name} on {self.target.name}"


class GroupItem(tuple[Dependency, list[int]]):
    """A dependency with the indices that go, and the index of the root's channel that each belongs to."""

    root_idxs: list[int]
    dep = property(itemgetter(0))
    idxs = property(itemgetter(1))


class Group(tuple[GroupItem, ...]):
    """Channels of a root layer with all that goes with them: a sequence of pairs of dependency and indices."""

    graph: DependencyGraph
    coupled: coupled.Group  # the same as structprune sees it
    made_after: int  # so many removals

    def prune(self, idxs: Sequence[int] | None = None, record_history: bool = True) -> None:
        """Remove the channels `idxs` of the root, by default those of the group, from the model in place.

        What went with other groups since this one was made is left out, and the rest is counted anew.

        Raises:
            PlanError: nothing would be left of a layer.
        """
        (dep, own), out = self[0], fn.is_out(self[0].dep.handler)
        now = tuple(own if idxs is None else idxs)
        for plan in plans_of(self.graph.model)[self.made_after :]:
            now = plan.left(*self.graph.dimension(dep.target, out), now)
        if now:
            self.graph.remove(dep.target, out, list(now), record_history)

    exec = __call__ = prune
    items = property(list)
    __eq__, __hash__ = object.__eq__, object.__hash__

    def made_by(self, kinds: Iterable[type]) -> list[Any]:
        """The layers of these kinds whose outputs go."""
        return [dep.layer for dep, _ in self if fn.is_out(dep.handler) and isinstance(dep.layer, tuple(kinds))]

    def weights(self, kinds: Sequence[str], bias: bool, types: Iterable[type] = (object,)) -> dict[str, Any]:
        """The weights, and biases if they count, of the layers of these kinds and types, by name."""
        found, counted = dict[str, Any](), ("weight", "bias") if bias else ("weight",)
        for name in (member.tensor for member in self.coupled.members):
            path, _, leaf = name.rpartition(".")
            layer = self.graph.named[path]
            if leaf in counted and fn.kind_of(layer) in kinds and isinstance(layer, tuple(types)):
                found[name] = getattr(layer, leaf)
        return found

    def __str__(self) -> str:
        return "\n".join(f"[{i}] {item.dep}, len(idxs)={len(item.idxs)}" for i, item in enumerate(self))

    def details(self) -> str:
        """A line for each dependency, with all indices."""
        return "\n".join(f"[{i}] {item.dep}, idxs={item.idxs}" for i, item in enumerate(self))


class DependencyGraph:
    """The coupled channels of a model; `build_dependency` finds them."""

    model: nn.Module
    graph: Graph
    named: dict[str, Any]  # layers, parameters and buffers
    get_out_channels = staticmethod(lambda layer: fn.channels_of(layer, True))
    get_in_channels = staticmethod(lambda layer: fn.channels_of(layer, False))
    is_out_channel_pruning_fn = staticmethod(fn.is_out)
    is_in_channel_pruning_fn = staticmethod(lambda pruning_fn: not fn.is_out(pruning_fn))

    def __init__(self) -> None:
        self._own: dict[type, Slim] = {}
        self.after_removal: list[Callable[[], None]] = []

    def register_customized_layer(self, layer_type: type, layer_pruner: fn.BasePruningFunc) -> None:
        """What prunes a kind of layer; the trace tells what goes, and this one is asked to do the same to a copy."""
        self._own |= {} if issubclass(layer_type, fn.STANDARD) else {layer_type: layer_pruner.prune_out_channels}

    def build_dependency(
        self, model: nn.Module, example_inputs: Any, forward_fn: Callable[[nn.Module, Any], Any] | None = None,
        output_transform: Any = None, unwrapped_parameters: Any = None,
        customized_pruners: Mapping[type, fn.BasePruningFunc] | None = None,
        ignored_layers: Iterable[nn.Module] | None = None, ignored_params: Iterable[nn.Parameter] | None = None,
        verbose: bool = True, **kept: Any,
    ) -> DependencyGraph:  # fmt: skip
        """Find what is coupled; the model is left as it was.

        The arguments are torch-pruning's, of which `output_transform`, `unwrapped_parameters` and `verbose` are not
        needed; those in `kept` are of `structprune.DependencyGraph`. Without them, outputs of the model may go where
        one prunes them by hand.

        Raises:
            TraceError: the forward cannot be recorded.
        """
        require(locals(), model=MODEL)
        for kind, pruner in (customized_pruners or {}).items():
            self.register_customized_layer(kind, pruner)
        self.model, self._begun = model, len(plans_of(model))
        inputs = example_inputs if forward_fn is None else calls_of(model, example_inputs, forward_fn)[0]
        named = {id(held.tensor): name for name, held in held_tensors(model).items()}
        ignored = [*(ignored_layers or ()), *(named[id(parameter)] for parameter in ignored_params or ())]
        self.graph = Graph(model, inputs, ignore=ignored, **({"outputs": ()} | kept))
        self.named = dict(self.graph.model.named_modules()) | tensors_of(self.graph)
        return self

    # -- groups --------------------------------------------------------------------------------------------------

    def _group(self, group: coupled.Group, roots: Sequence[int], root: object = None) -> Group:
        """An item for each layer and side; ``roots[c]`` is channel c's index in the root."""
        named, parts = self.named, dict[tuple[str, fn.PruningFunction], list[coupled.Member]]()
        for member in group.members:
            path, _, leaf = member.tensor.rpartition(".")
            path = member.tensor if fn.kind_of(named[path]) == "parameter" else path
            out = leaf != "weight" or member.dim == fn.dim_of(named[path], True)
            parts.setdefault((path, fn.side_of(named[path], out)), []).append(member)
        order = sorted(parts, key=lambda part: (part != root, not fn.is_out(part[1])))
        source = Node(named[order[0][0]], order[0][0])
        items: list[GroupItem] = []
        for path, handler in order:
            first = parts[path, handler][0]
            dep = Dependency(Node(named[path], path), source, handler, order[0][1])
            items.append(GroupItem((dep, first.positions.tolist())))
            items[-1].root_idxs = [roots[channel] for channel in first.channels]
        made = Group(items)
        made.graph, made.made_after = self, len(plans_of(self.model))
        made.coupled = replace(group, members=tuple(member for part in order for member in parts[part]))
        return made

    def of(self, group: coupled.Group, components: Ids | None = None) -> Group:
        """One of structprune's groups, by default all of its channels."""
        at = np.flatnonzero(np.isin(group.components, group.components if components is None else components))
        chosen = group.components[at]
        part = replace(group, components=chosen, members=coupled.joined([group], chosen))
        return self._group(part, at.tolist())

    def get_pruning_group(self, module: Any, pruning_fn: Any, idxs: int | Sequence[int]) -> Group:
        """The channels `idxs` of a layer's outputs or inputs with all that goes with them; nothing is removed.

        Raises:
            PinnedError: they may not be removed; the message says why.
        """
        name = next((name for name, each in self.named.items() if each is module), None)
        if name is None:
            raise UnknownLayerError(f"The {type(module).__name__} given is no layer and no parameter of the model.")
        out, node = fn.is_out(pruning_fn), Node(module, name)
        group = self._channels(node, out, [idxs] if isinstance(idxs, int) else idxs)
        roots = group.first_positions(*self.dimension(node, out)).tolist()
        return self._group(group, roots, (name, fn.side_of(module, out)))

    def dimension(self, node: Node, out: bool) -> Dimension:
        """The tensor and its dimension that outputs or inputs stand in; of a bare one, that which may lose channels."""
        if isinstance(node.module, nn.Module):
            return f"{node.name}.weight".lstrip("."), fn.dim_of(node.module, out)
        members = [member for group in self.graph.groups() for member in group.members if member.tensor == node.name]
        return node.name, members[0].dim if members else 0

    def _channels(self, node: Node, out: bool, idxs: Iterable[int]) -> coupled.Group:
        name, dim = self.dimension(node, out)
        size = self.named[name].shape[dim]
        inside = range(fn.channels_of(node.module, out))  # more than `size` are the inputs of a convolution in groups
        gone = sorted({int(index) % size if index in inside else int(index) for index in idxs})
        return self.graph.group((name, dim), None if gone == [*range(size)] else gone)

    def check_pruning_group(self, group: Group) -> bool:
        """Whether something is left of every layer."""
        members = group.coupled.members
        return all(len({*m.positions.tolist()}) < self.named[m.tensor].shape[m.dim] for m in members)

    def get_all_groups(
        self, ignored_layers: Iterable[nn.Module] = (), root_module_types: Iterable[type] = (_ConvNd, nn.Linear)
    ) -> Iterator[Group]:
        """All groups that such layers make and none of the ignored ones does, each with all of its channels."""
        ignored = {id(layer) for layer in ignored_layers}
        for group in [self.of(group) for group in self.graph.groups()]:
            if ignored.isdisjoint(map(id, group.made_by([object]))) and group.made_by(root_module_types):
                yield group

    # -- removing ------------------------------------------------------------------------------------------------

    def remove(self, node: Node, out: bool, idxs: list[int], record_history: bool = True) -> None:
        """Remove channels of a layer with all that is coupled to them, in place."""
        entry = [node.name, out, idxs] if record_history else None
        self.carry_out(self._channels(node, out, idxs).components, entry)

    def carry_out(self, chosen: Ids, entry: Any = None) -> None:
        """Remove components with all that is coupled to them, in place; the history gets the entry, or the plan."""
        with torch.no_grad():
            plan = plan_removal(self.graph, chosen, Settings(asked={"history": entry}))
        beyond, edits = own_changes(self.graph.model, plan, self._own)
        more = np.unique([c for dimension, gone in beyond for c in self.graph.chosen(dimension, gone).tolist()])
        if len(np.setdiff1d(more, chosen)):
            self.carry_out(np.union1d(chosen, more.astype(chosen.dtype)), entry)
            return
        self._apply(replace(plan, attribute_edits=(*plan.attribute_edits, *edits)))

    def _apply(self, plan: Plan) -> None:
        self.graph.carry_out(plan)
        for after in self.after_removal:
            after()

    def pruning_history(self) -> History:
        """What was removed, in order: the name of a layer, whether outputs were meant, and indices; or a plan."""
        entries = [(plan, plan.settings.asked.get("history", "plan")) for plan in plans_of(self.model)[self._begun :]]
        return [plan.to_json() if entry == "plan" else entry for plan, entry in entries if entry is not None]

    def load_pruning_history(self, pruning_history: Iterable[Any]) -> None:
        """Remove again what a history says, this library's or torch-pruning's."""
        for entry in pruning_history:
            if isinstance(entry, str):
                self._apply(Plan.from_json(entry))
            else:
                path, out, idxs = entry
                self.remove(Node(self.named[path], path), out, list(idxs))
