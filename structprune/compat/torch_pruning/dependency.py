"""`DependencyGraph` and `Group` with torch-pruning's methods."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from structprune.checking import MODEL, require, shown
from structprune.compat.torch_pruning.functions import PruningFunction, dim_of, function_of, side_of
from structprune.coupling import groups as coupled
from structprune.dependency_graph import DependencyGraph as Graph
from structprune.errors import PinnedError, PlanError
from structprune.ops.relations import Ids
from structprune.planning.build import plan_removal
from structprune.planning.plan import Settings
from structprune.recovery.batches import calls_of
from structprune.tracing.state import held_tensors

History = list[list[Any]]


@dataclass(frozen=True, eq=False)
class Node:
    """A layer, or a parameter that no layer of torch holds."""

    module: Any
    name: str


@dataclass(frozen=True, eq=False)
class Dependency:
    """The part of a layer that goes with the root's channels."""

    target: Node
    source: Node
    handler: PruningFunction
    trigger: PruningFunction

    @property
    def layer(self) -> Any:
        """The layer."""
        return self.target.module

    @property
    def pruning_fn(self) -> PruningFunction:
        """What of it goes: outputs or inputs."""
        return self.handler

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


class Group:
    """Channels of a root layer with all that goes with them: a sequence of pairs of dependency and indices."""

    def __init__(self, graph: DependencyGraph, items: list[GroupItem]) -> None:
        self._graph, self.items = graph, items

    def prune(self, idxs: Sequence[int] | None = None, record_history: bool = True) -> None:
        """Remove the channels `idxs` of the root, by default those of the group, from the model in place.

        Raises:
            PlanError: nothing would be left of a layer.
        """
        dep, own = self.items[0]
        self._graph.remove(dep.layer, dep.handler, list(own if idxs is None else idxs), record_history)

    exec = __call__ = prune

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, number: int) -> GroupItem:
        return self.items[number]

    def __iter__(self) -> Iterator[GroupItem]:
        return iter(self.items)

    def __str__(self) -> str:
        return "\n".join(f"[{i}] {item.dep}, len(idxs)={len(item.idxs)}" for i, item in enumerate(self.items))

    def details(self) -> str:
        """A line for each dependency, with all indices."""
        return "\n".join(f"[{i}] {item.dep}, idxs={item.idxs}" for i, item in enumerate(self.items))


class DependencyGraph:
    """The coupled channels of a model; `build_dependency` finds them."""

    def __init__(self) -> None:
        self._history: History = []
        self.model: nn.Module
        self.graph: Graph

    def build_dependency(
        self,
        model: nn.Module,
        example_inputs: Any,
        forward_fn: Callable[[nn.Module, Any], Any] | None = None,
        output_transform: Callable[[Any], Any] | None = None,
        unwrapped_parameters: Any = None,
        customized_pruners: Any = None,
        ignored_layers: Iterable[nn.Module] | None = None,
        ignored_params: Iterable[nn.Parameter] | None = None,
        verbose: bool = True,
    ) -> DependencyGraph:
        """Find what is coupled.

        Args:
            model: any ``nn.Module`` whose forward can be traced.
            example_inputs: a tensor, a list or tuple of positional arguments, or a dict of keyword arguments.
            forward_fn: called with the model and the example inputs; what it gives the model is traced.
            output_transform: not needed: outputs may be nested.
            unwrapped_parameters: not needed: bare parameters are seen.
            customized_pruners: refused; `structprune.register_module_rule` does this.
            ignored_layers: layers that stay whole.
            ignored_params: parameters that stay whole.
            verbose: without effect.

        Raises:
            PlanError: customized pruners are given.
            TraceError: the forward cannot be recorded.
        """
        require(locals(), model=MODEL)
        if customized_pruners:
            raise PlanError(
                "customized_pruners have no meaning here: torch operations need none, and for others "
                "structprune.register_op and structprune.register_module_rule say how channels are carried."
            )
        self.model = model
        inputs = example_inputs if forward_fn is None else calls_of(model, example_inputs, forward_fn)[0]
        named = {id(held.tensor): name for name, held in held_tensors(model).items()}
        ignored = [*(ignored_layers or ()), *(named[id(parameter)] for parameter in ignored_params or ())]
        self.graph = Graph(model, inputs, ignore=ignored)
        return self

    # -- groups --------------------------------------------------------------------------------------------------

    def items_of(self, members: Iterable[coupled.Member], roots: Sequence[int]) -> list[GroupItem]:
        """What goes with channels: an item for each layer and side; ``roots[c]`` is channel c's index in the root."""
        found: dict[tuple[int, str], tuple[Node, PruningFunction, coupled.Member]] = {}
        held = held_tensors(self.graph.model)
        for member in members:
            path, _, leaf = member.tensor.rpartition(".")
            module: Any = self.graph.model.get_submodule(path)
            handler = function_of(module, member.dim)
            if handler.name.startswith("parameter"):
                path, module = member.tensor, held[member.tensor].tensor
            key = (id(module), handler.name)
            if key not in found or (leaf == "weight" and not found[key][2].tensor.endswith(".weight")):
                found[key] = Node(module, path), handler, member
        parts = sorted(found.values(), key=lambda part: not part[1].out)  # the root first: a layer that makes them
        source, trigger, _ = parts[0]
        return [
            GroupItem(
                Dependency(node, source, handler, trigger),
                member.positions.tolist(),
                [roots[channel] for channel in member.channels.tolist()],
            )
            for node, handler, member in parts
        ]

    def of(self, group: coupled.Group) -> Group:
        """One of structprune's groups, all of its channels."""
        return Group(self, self.items_of(group.members, range(group.channels)))

    def get_pruning_group(self, module: Any, pruning_fn: PruningFunction, idxs: int | Sequence[int]) -> Group:
        """The channels `idxs` of a layer's outputs or inputs with all that goes with them; nothing is removed.

        Raises:
            PinnedError: they may not be removed; the message says why.
        """
        path, wanted = self._path(module), [idxs] if isinstance(idxs, int) else [int(index) for index in idxs]
        components, roots = self._components(path, module, pruning_fn, wanted)
        members = [m for group in self.graph.groups() for m in coupled.restricted(group, components)]
        items = self.items_of(members, roots)
        first = [i for i in items if i.dep.layer is module and i.dep.handler.out == pruning_fn.out]
        ordered = [*first, *(item for item in items if item not in first)]
        source = Node(module, path)
        return Group(self, [
            GroupItem(Dependency(i.dep.target, source, i.dep.handler, pruning_fn), i.idxs, i.root_idxs) for i in ordered
        ])  # fmt: skip

    def _path(self, module: Any) -> str:
        if isinstance(module, Tensor):
            return next(name for name, held in held_tensors(self.graph.model).items() if held.tensor is module)
        return self.graph.path_of(module)

    def _components(
        self, path: str, module: Any, function: PruningFunction, idxs: Sequence[int]
    ) -> tuple[Ids, list[int]]:
        """The components of these channels, and for each the index of its first channel."""
        if not isinstance(function, PruningFunction):
            raise PlanError(
                f"pruning_fn is {shown(function)}; give one of this module, such as prune_conv_out_channels."
            )
        tensor = path if isinstance(module, Tensor) else f"{path}.weight"
        size = (module if isinstance(module, Tensor) else module.weight).shape[dim_of(module, function)]
        if function.out and len(idxs) < size:
            components = self.graph.chosen(path, idxs)
        else:
            wanted = set(idxs)
            parts = [
                (group.components[channel], position)
                for group in self.graph.groups()
                for member in group.members
                if (member.tensor, member.dim) == (tensor, dim_of(module, function))
                for position, channel in zip(member.positions.tolist(), member.channels.tolist(), strict=True)
                if position in wanted
            ]
            components = np.unique(np.array([component for component, _ in parts], dtype=np.int64))
            if not len(components):
                raise PinnedError(
                    f"The channels of {path!r} may not be removed: {self.graph.pinned().get(tensor, '')}."
                )
        first: dict[int, int] = {}
        for group in self.graph.groups():
            for member in group.members:
                if (member.tensor, member.dim) == (tensor, dim_of(module, function)):
                    for position, channel in zip(member.positions.tolist(), member.channels.tolist(), strict=True):
                        first.setdefault(int(group.components[channel]), position)
        order = sorted(components.tolist(), key=lambda component: first.get(component, 0))
        return np.array(order, dtype=np.int64), [first.get(component, 0) for component in order]

    def check_pruning_group(self, group: Group) -> bool:
        """Whether something is left of every layer."""
        tensors = {id(dep.layer): dep.layer if isinstance(dep.layer, Tensor) else dep.layer.weight for dep, _ in group}
        return all(len(set(idxs)) < tensors[id(dep.layer)].shape[dim_of(dep.layer, dep.handler)] for dep, idxs in group)

    def get_all_groups(
        self,
        ignored_layers: Iterable[nn.Module] = (),
        root_module_types: Sequence[type] = (nn.modules.conv._ConvNd, nn.Linear),
    ) -> Iterator[Group]:
        """All groups that such layers make and none of the ignored ones does, each with all of its channels."""
        ignored = {id(layer) for layer in ignored_layers}
        for coupled_group in self.graph.groups():
            group = self.of(coupled_group)
            made = [dep.layer for dep, _ in group if dep.handler.out]
            if ignored.isdisjoint(map(id, made)) and any(isinstance(m, tuple(root_module_types)) for m in made):
                yield group

    # -- removing ------------------------------------------------------------------------------------------------

    def remove(self, module: Any, function: PruningFunction, idxs: list[int], record_history: bool = True) -> None:
        """Remove channels of a layer with all that is coupled to them, in place."""
        path = self._path(module)
        components, _ = self._components(path, module, function, idxs)
        with torch.no_grad():
            plan_removal(self.graph, components, Settings(asked={"indices": idxs})).apply(self.model, inplace=True)
        self.graph._analyse()
        if record_history:
            self._history.append([path, function.out, idxs])

    def pruning_history(self) -> History:
        """What was removed: name of the layer, whether outputs were meant, indices."""
        return self._history

    def load_pruning_history(self, pruning_history: History) -> None:
        """Remove again what a history says."""
        for path, out, idxs in pruning_history:
            held = held_tensors(self.graph.model).get(path)
            module: Any = self.graph.model.get_submodule(path) if held is None else held.tensor
            self.remove(module, side_of(module, out), list(idxs), record_history=False)
        self._history = [list(entry) for entry in pruning_history]
