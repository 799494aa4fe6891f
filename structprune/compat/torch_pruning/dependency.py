"""`DependencyGraph` and `Group` with torch-pruning's methods."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from structprune.checking import MODEL, require, shown
from structprune.compat.torch_pruning.function import (
    PRUNING_FUNCTIONS,
    BasePruningFunc,
    PruningFunction,
    dim_of,
    kind_of,
    side_of,
)
from structprune.coupling import groups as coupled
from structprune.coupling.graph import ChannelGraph
from structprune.dependency_graph import DependencyGraph as Graph
from structprune.errors import PinnedError, PlanError
from structprune.ops.relations import Ids
from structprune.planning.build import plan_removal
from structprune.planning.plan import Plan, Settings
from structprune.recovery.batches import calls_of
from structprune.surgery.edits import AttributeEdit
from structprune.tracing.state import held_tensors

History = list[Any]


@dataclass(frozen=True, eq=False)
class Node:
    """A layer, or a parameter that no layer of torch holds."""

    module: Any
    name: str


@dataclass(frozen=True, eq=False)
class Dependency:
    """The part of a layer, outputs or inputs (`handler`), that goes with the root's channels."""

    target: Node
    source: Node
    handler: PruningFunction
    trigger: PruningFunction

    layer = property(lambda self: self.target.module)
    pruning_fn = property(lambda self: self.handler)

    def __str__(self) -> str:
        return f"prune_{self.trigger.name} on {self.source.name} => prune_{self.handler.name} on {self.target.name}"


@dataclass(frozen=True, eq=False)
class GroupItem:
    """A dependency with the indices that go, and the index of the root's channel that each belongs to."""

    dep: Dependency
    idxs: list[int]
    root_idxs: list[int]

    def __iter__(self) -> Iterator[Any]:
        return iter((self.dep, self.idxs))

    def __getitem__(self, number: int) -> Any:
        return (self.dep, self.idxs)[number]


class Group(tuple[GroupItem, ...]):
    """Channels of a root layer with all that goes with them: a sequence of pairs of dependency and indices."""

    graph: DependencyGraph
    made_after: int  # so many removals

    def prune(self, idxs: Sequence[int] | None = None, record_history: bool = True) -> None:
        """Remove the channels `idxs` of the root, by default those of the group, from the model in place.

        What went with other groups since this one was made is left out, and the rest is counted anew.

        Raises:
            PlanError: nothing would be left of a layer.
        """
        dep, own = self[0]
        now = self.graph.now(dep.target, dep.handler.out, own if idxs is None else idxs, self.made_after)
        if now:
            self.graph.remove(dep.layer, dep.handler.out, now, record_history)

    exec = __call__ = prune
    items = property(lambda self: list(self))

    def __str__(self) -> str:
        return "\n".join(f"[{i}] {item.dep}, len(idxs)={len(item.idxs)}" for i, item in enumerate(self))

    def details(self) -> str:
        """A line for each dependency, with all indices."""
        return "\n".join(f"[{i}] {item.dep}, idxs={item.idxs}" for i, item in enumerate(self))


class _Graph(Graph):
    """One in which outputs of the model may lose channels too, where nothing else is asked for."""

    def __init__(self, model: nn.Module, example_inputs: Any, **kept: Any) -> None:
        ChannelGraph.__init__(self, model, example_inputs, **({"outputs": ()} | kept))


class DependencyGraph:
    """The coupled channels of a model; `build_dependency` finds them."""

    model: nn.Module
    graph: Graph

    def __init__(self) -> None:
        self._history: History = []
        self._gone: list[Plan] = []
        self._customized: dict[type, BasePruningFunc] = {}

    def register_customized_layer(self, layer_type: type, layer_pruner: BasePruningFunc) -> None:
        """What prunes a kind of layer; the trace tells what goes, and this one is asked to do the same to a copy."""
        self._customized[layer_type] = layer_pruner

    def build_dependency(
        self,
        model: nn.Module,
        example_inputs: Any,
        forward_fn: Callable[[nn.Module, Any], Any] | None = None,
        output_transform: Callable[[Any], Any] | None = None,
        unwrapped_parameters: Any = None,
        customized_pruners: Mapping[type, BasePruningFunc] | None = None,
        ignored_layers: Iterable[nn.Module] = (),
        ignored_params: Iterable[nn.Parameter] = (),
        verbose: bool = True,
        **kept: Any,
    ) -> DependencyGraph:
        """Find what is coupled, and leave the model in eval mode, as torch-pruning does.

        Args:
            model: any ``nn.Module`` whose forward can be traced.
            example_inputs: a tensor, a list or tuple of positional arguments, or a dict of keyword arguments.
            forward_fn: called with the model and the example inputs; what it gives the model is traced.
            output_transform: not needed: outputs may be nested.
            unwrapped_parameters: not needed: bare parameters are seen.
            customized_pruners: see `register_customized_layer`.
            ignored_layers: layers that stay whole.
            ignored_params: parameters that stay whole.
            verbose: without effect.
            kept: of `structprune.DependencyGraph`; outputs of the model may go where one prunes them by hand.

        Raises:
            TraceError: the forward cannot be recorded.
        """
        require(locals(), model=MODEL)
        self._customized |= customized_pruners or {}
        self.model = model.eval()
        inputs = example_inputs if forward_fn is None else calls_of(model, example_inputs, forward_fn)[0]
        named = {id(held.tensor): name for name, held in held_tensors(model).items()}
        ignored = [*(ignored_layers or ()), *(named[id(parameter)] for parameter in ignored_params or ())]
        self.graph = _Graph(model, inputs, ignore=ignored, **kept)
        return self

    # -- groups --------------------------------------------------------------------------------------------------

    def group_of(self, members: Iterable[coupled.Member], roots: Sequence[int], root: Any = None) -> Group:
        """An item for each layer and side; ``roots[c]`` is channel c's index in the root."""
        nodes: dict[tuple[int, str], tuple[Node, PruningFunction, coupled.Member]] = {}
        tensors = self._tensors
        for member in members:
            path, _, leaf = member.tensor.rpartition(".")
            module: Any = self.graph.model.get_submodule(path)
            if kind_of(module) == "parameter":
                path, module = member.tensor, tensors[member.tensor]
            handler = side_of(module, leaf != "weight" or member.dim == dim_of(module, True))
            if (key := (id(module), handler.name)) not in nodes or leaf == "weight":
                nodes[key] = Node(module, path), handler, member
        parts = sorted(nodes.values(), key=lambda part: ((part[0].module, part[1]) != root, not part[1].out))
        source, trigger, _ = parts[0]
        group = Group(
            GroupItem(Dependency(node, source, handler, trigger), m.positions.tolist(), [roots[c] for c in m.channels])
            for node, handler, m in parts
        )
        group.graph, group.made_after = self, len(self._gone)
        return group

    def of(self, group: coupled.Group, components: Ids | None = None) -> Group:
        """One of structprune's groups, by default all of its channels."""
        channels = np.arange(group.channels)
        if components is not None:
            channels = channels[np.isin(group.components, components)]
        return self.group_of(coupled.restricted(group, group.components[channels]), channels.tolist())

    @property
    def _tensors(self) -> dict[str, Tensor]:
        return {name: held.tensor for name, held in held_tensors(self.graph.model).items()}

    def path(self, module: Any) -> str:
        """The dotted name of a layer or a parameter."""
        return self.graph.path_of(module)

    def get_pruning_group(self, module: Any, pruning_fn: Any, idxs: int | Sequence[int]) -> Group:
        """The channels `idxs` of a layer's outputs or inputs with all that goes with them; nothing is removed.

        Raises:
            PinnedError: they may not be removed; the message says why.
        """
        name = pruning_fn.name if isinstance(pruning_fn, PruningFunction) else getattr(pruning_fn, "__name__", "")
        if not name.endswith(("out_channels", "in_channels")):
            raise PlanError(f"pruning_fn is {shown(pruning_fn)}; give one of {', '.join([*PRUNING_FUNCTIONS][:3])} ...")
        out, wanted = name.endswith("out_channels"), [idxs] if isinstance(idxs, int) else [int(i) for i in idxs]
        components, roots = self._components(module, out, wanted)
        members = [m for group in self.graph.groups() for m in coupled.restricted(group, components)]
        return self.group_of(members, roots, (module, side_of(module, out)))

    def _components(self, module: Any, out: bool, idxs: Sequence[int]) -> tuple[Ids, list[int]]:
        """The components of these channels, and for each the index of its first channel in the layer."""
        path, bare = self.path(module), isinstance(module, Tensor)
        tensor, dim = path if bare else f"{path}.weight", dim_of(module, out)
        first = self._first(tensor, dim)
        if out and not bare and len(idxs) < module.weight.shape[dim]:
            chosen = self.graph.chosen(path, idxs).tolist()
        else:
            chosen = [component for component, position in first.items() if position in set(idxs)]
        if not chosen:
            why = self.graph.pinned().get(f"{tensor}, dim {dim}", "they go with others")
            raise PinnedError(f"The channels {list(idxs)} of {path!r} may not be removed: {why}.")
        order = sorted(chosen, key=lambda component: first.get(component, 0))
        return np.array(order, dtype=np.int64), [first.get(component, 0) for component in order]

    def _first(self, tensor: str, dim: int) -> dict[int, int]:
        """The components that decide about a dimension, each with the first position that goes with it."""
        first: dict[int, int] = {}
        for group in self.graph.groups():
            for member in group.members:
                if (member.tensor, member.dim) == (tensor, dim):
                    for position, channel in zip(member.positions.tolist(), member.channels.tolist(), strict=True):
                        first.setdefault(int(group.components[channel]), position)
        return first

    def check_pruning_group(self, group: Group) -> bool:
        """Whether something is left of every layer."""
        return all(len(set(idxs)) < self._channels(dep.layer, dep.handler.out) for dep, idxs in group)

    def _channels(self, layer: Any, out: bool) -> int:
        weight = layer if isinstance(layer, Tensor) else layer.weight
        return int(weight.shape[dim_of(layer, out)])

    def get_out_channels(self, layer: Any) -> int:
        """How many outputs a layer has."""
        return self._channels(layer, True)

    def get_in_channels(self, layer: Any) -> int:
        """How many inputs a layer has."""
        return self._channels(layer, False) * (layer.groups if kind_of(layer) == "conv" else 1)

    def get_all_groups(
        self, ignored_layers: Iterable[nn.Module] = (), root_module_types: Sequence[type] = (_ConvNd, nn.Linear)
    ) -> Iterator[Group]:
        """All groups that such layers make and none of the ignored ones does, each with all of its channels."""
        ignored = {id(layer) for layer in ignored_layers}
        for group in [self.of(group) for group in self.graph.groups()]:
            made = [dep.layer for dep, _ in group if dep.handler.out]
            if ignored.isdisjoint(map(id, made)) and any(isinstance(m, tuple(root_module_types)) for m in made):
                yield group

    # -- removing ------------------------------------------------------------------------------------------------

    def now(self, node: Node, out: bool, idxs: Sequence[int], made_after: int) -> list[int]:
        """What became of indices that were taken after so many removals; those that went are left out."""
        tensor = node.name if isinstance(node.module, Tensor) else f"{node.name}.weight"
        left = np.asarray(list(idxs), dtype=np.int64)
        for plan in self._gone[made_after:]:
            gone = np.array(plan.removed.get(tensor, {}).get(dim_of(node.module, out), ()), dtype=np.int64)
            left = left[~np.isin(left, gone)]
            left = left - np.searchsorted(gone, left)
        return left.tolist()

    def remove(self, module: Any, out: bool, idxs: list[int], record_history: bool = True) -> None:
        """Remove channels of a layer with all that is coupled to them, in place."""
        path = self.path(module)
        self.carry_out(self._components(module, out, idxs)[0], [path, out, idxs] if record_history else None)

    def carry_out(self, components: Ids, entry: Any = None) -> None:
        """Remove components with all that is coupled to them, in place; the history gets the entry, or the plan."""
        with torch.no_grad():
            plan = plan_removal(self.graph, components, Settings(asked={"history": entry}))
            more, edits = self._by_customized(plan)
        if more - set(components.tolist()):
            return self.carry_out(np.union1d(components, [*more]), entry)
        plan = replace(plan, attribute_edits=(*plan.attribute_edits, *edits))
        self._apply(plan)
        if entry is not None:
            self._history.append(plan.to_json() if entry == "plan" else entry)
        return None

    def _apply(self, plan: Plan) -> None:
        plan.apply(self.model, inplace=True)
        self._gone.append(plan)
        self.graph._analyse()

    def _by_customized(self, plan: Plan) -> tuple[set[int], list[AttributeEdit]]:
        """What customized pruners remove beside the plan, and what they set beside what the forward reads.

        Each is asked to prune a copy of its layer, where all that goes has the same indices.

        Raises:
            PlanError: it makes other tensors than the plan does.
        """
        more: set[int] = set()
        edits: list[AttributeEdit] = []
        for path, module in self.model.named_modules() if self._customized else ():
            pruner = next((own for kind, own in self._customized.items() if isinstance(module, kind)), None)
            gone = {part.removed for part in plan.slices if part.tensor.startswith(f"{path}.")}
            if pruner is None or kind_of(module) != "parameter" or len(gone) != 1:
                continue
            theirs, ours = copy.deepcopy(module), plan.apply(self.model).get_submodule(path)
            pruner.prune_out_channels(theirs, list(*gone))
            made, wanted = theirs.state_dict(), ours.state_dict()
            shapes = [(name, dim) for name, tensor in wanted.items() for dim in range(tensor.dim())]
            beyond = [(name, dim) for name, dim in shapes if made[name].shape[dim] < wanted[name].shape[dim]]
            for name, dim in beyond:
                first = self._first(f"{path}.{name}", dim)
                more |= {component for component, position in first.items() if position in {*chain(*gone)}}
            if not more and not all(_alike(made[name], wanted[name]) for name in wanted):
                raise PlanError(f"{type(pruner).__name__} makes other tensors of {path!r} than the forward asks for.")
            edits += [
                AttributeEdit(path, (name,), old, new)
                for name, old in vars(module).items()
                if type(old) is type(new := vars(theirs)[name]) is int and old != new != vars(ours)[name]
            ]
        return more, edits

    def pruning_history(self) -> History:
        """What was removed, in order: name of a layer, whether outputs were meant, indices; or the plan of a step."""
        return self._history

    def load_pruning_history(self, pruning_history: Iterable[Any]) -> None:
        """Remove again what a history says, this library's or torch-pruning's."""
        for entry in pruning_history:
            if isinstance(entry, str):
                self._apply(Plan.from_json(entry))
            else:
                path, out, idxs = entry
                module = self._tensors.get(path)
                self.remove(self.model.get_submodule(path) if module is None else module, out, list(idxs), False)
            self._history.append(entry)


def _alike(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one.nan_to_num(), other.nan_to_num())
