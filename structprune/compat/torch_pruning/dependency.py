"""`DependencyGraph` and `Group` with torch-pruning's methods."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from structprune.checking import MODEL, require
from structprune.compat.torch_pruning.function import (
    BasePruningFunc,
    PruningFunction,
    channels_of,
    dim_of,
    is_out,
    kind_of,
    side_of,
)
from structprune.coupling import groups as coupled
from structprune.coupling.graph import ChannelGraph
from structprune.coupling.naming import Dimension
from structprune.dependency_graph import DependencyGraph as Graph
from structprune.errors import PlanError, UnknownLayerError
from structprune.ops.relations import Ids
from structprune.planning.build import plan_removal, tensors_of
from structprune.planning.plan import Plan, Settings
from structprune.recovery.batches import calls_of
from structprune.surgery.edits import AttributeEdit
from structprune.tracing.state import held_tensors

History = list[Any]


class Node(NamedTuple):
    """A layer, or a parameter that no layer of torch holds."""

    module: Any
    name: str

    def dimension(self, out: bool) -> Dimension:
        """The tensor, and the dimension of it, that the outputs or inputs stand in."""
        bare = not isinstance(self.module, nn.Module)
        return self.name if bare else f"{self.name}.weight".lstrip("."), dim_of(self.module, out)


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
    coupled: coupled.Group  # the same as structprune sees it
    made_after: int  # so many removals

    def prune(self, idxs: Sequence[int] | None = None, record_history: bool = True) -> None:
        """Remove the channels `idxs` of the root, by default those of the group, from the model in place.

        What went with other groups since this one was made is left out, and the rest is counted anew.

        Raises:
            PlanError: nothing would be left of a layer.
        """
        (dep, own), *_ = self
        out = is_out(dep.handler)
        now = self.graph.now(dep.target.dimension(out), own if idxs is None else idxs, self.made_after)
        if now:
            self.graph.remove(dep.target, out, now, record_history)

    exec = __call__ = prune
    items = property(list)

    def layers(self, out: bool) -> list[Any]:
        """The layers whose outputs or inputs go."""
        return [dep.layer for dep, _ in self if is_out(dep.handler) == out]

    def weights(self, kinds: Sequence[str], bias: bool, types: tuple[type, ...] = (object,)) -> dict[str, Any]:
        """The weights, and biases if they count, of layers of these kinds and types that channels go with, by name."""
        found: dict[str, Any] = {}
        for name in dict.fromkeys(member.tensor for member in self.coupled.members):
            path, _, leaf = name.rpartition(".")
            layer = self.graph.graph.model.get_submodule(path)
            if (leaf == "weight" or (bias and leaf == "bias")) and kind_of(layer) in kinds and isinstance(layer, types):
                found[name] = getattr(layer, leaf)
        return found

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
        self.after_removal: list[Callable[[], None]] = []

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
        ignored_layers: Iterable[nn.Module] | None = None,
        ignored_params: Iterable[nn.Parameter] | None = None,
        verbose: bool = True,
        **kept: Any,
    ) -> DependencyGraph:
        """Find what is coupled; the model is left as it was.

        The arguments are torch-pruning's, of which `output_transform`, `unwrapped_parameters` and `verbose` are not
        needed; those in `kept` are of `structprune.DependencyGraph`. Without them, outputs of the model may go where
        one prunes them by hand.

        Raises:
            TraceError: the forward cannot be recorded.
        """
        require(locals(), model=MODEL)
        self._customized |= customized_pruners or {}
        self.model = model
        inputs = example_inputs if forward_fn is None else calls_of(model, example_inputs, forward_fn)[0]
        named = {id(held.tensor): name for name, held in held_tensors(model).items()}
        ignored = [*(ignored_layers or ()), *(named[id(parameter)] for parameter in ignored_params or ())]
        self.graph = _Graph(model, inputs, ignore=ignored, **kept)
        return self

    # -- groups --------------------------------------------------------------------------------------------------

    def _group(self, groups: Iterable[coupled.Group], chosen: Ids, roots: Sequence[int], root: object = None) -> Group:
        """An item for each layer and side of the components chosen; ``roots[c]`` is the c-th one's index in the root."""
        joined: dict[Dimension, list[coupled.Member]] = {}
        for member in (member for group in groups for member in coupled.restricted(group, chosen)):
            joined.setdefault((member.tensor, member.dim), []).append(member)
        parts: dict[tuple[str, PruningFunction], tuple[Node, list[coupled.Member]]] = {}
        for (tensor, dim), found in joined.items():
            path, _, leaf = tensor.rpartition(".")
            layer: Any = self.graph.model.get_submodule(path)
            if kind_of(layer) == "parameter":
                path, layer = tensor, tensors_of(self.graph)[tensor]
            handler = side_of(layer, leaf != "weight" or dim == dim_of(layer, True))
            positions, channels = np.concatenate([(m.positions, m.channels) for m in found], axis=1)
            member = coupled.Member(tensor, dim, positions, channels)
            parts.setdefault((path, handler), (Node(layer, path), []))[1].append(member)
        order = sorted(parts, key=lambda part: (part != root, not is_out(part[1])))
        (source, _), (_, trigger) = parts[order[0]], order[0]
        items: list[GroupItem] = []
        for (_, handler), (node, (first, *_)) in ((part, parts[part]) for part in order):
            at = [roots[channel] for channel in first.channels]
            items.append(GroupItem(Dependency(node, source, handler, trigger), first.positions.tolist(), at))
        group = Group(items)
        group.graph, group.made_after = self, len(self._gone)
        group.coupled = coupled.Group(source.name, chosen, tuple(m for part in order for m in parts[part][1]))
        return group

    def of(self, group: coupled.Group, components: Ids | None = None) -> Group:
        """One of structprune's groups, by default all of its channels."""
        channels = np.flatnonzero(np.isin(group.components, group.components if components is None else components))
        return self._group([group], group.components[channels], channels.tolist())

    def get_pruning_group(self, module: Any, pruning_fn: Any, idxs: int | Sequence[int]) -> Group:
        """The channels `idxs` of a layer's outputs or inputs with all that goes with them; nothing is removed.

        Raises:
            PinnedError: they may not be removed; the message says why.
        """
        out, named = is_out(pruning_fn), self._named
        node = next((Node(module, name) for name, each in named.items() if each is module), None)
        if node is None:
            raise UnknownLayerError(f"The {type(module).__name__} given is no layer and no parameter of the model.")
        chosen, roots = self._components(node.dimension(out), [idxs] if isinstance(idxs, int) else idxs)
        return self._group(self.graph.groups(), chosen, roots, (node.name, side_of(module, out)))

    @property
    def _named(self) -> dict[str, Any]:
        return dict(self.graph.model.named_modules()) | tensors_of(self.graph)

    def _components(self, dimension: Dimension, idxs: Iterable[int]) -> tuple[Ids, list[int]]:
        """The components of these channels, and for each the index of its first channel in the dimension."""
        size = tensors_of(self.graph)[dimension[0]].shape[dimension[1]]
        gone = sorted({int(index) % size for index in idxs})  # of the inputs of a convolution in groups, those of each
        all_go = len(gone) == size
        chosen = self.graph.group(dimension).components if all_go else self.graph.chosen(dimension, gone)
        first = self._first(dimension)
        order = sorted(chosen.tolist(), key=lambda component: first.get(component, 0))
        return np.array(order, dtype=np.int64), [first.get(component, 0) for component in order]

    def _first(self, dimension: Dimension) -> dict[int, int]:
        """The components that decide about a dimension, each with the first position that goes with it."""
        members = [(g.components, m) for g in self.graph.groups() for m in g.members if (m.tensor, m.dim) == dimension]
        pairs = [(c[m.channels[::-1]].tolist(), m.positions[::-1].tolist()) for c, m in members]
        return {component: position for pair in pairs for component, position in zip(*pair, strict=True)}

    def check_pruning_group(self, group: Group) -> bool:
        """Whether something is left of every layer."""
        tensors = tensors_of(self.graph)
        return all(len({*m.positions.tolist()}) < tensors[m.tensor].shape[m.dim] for m in group.coupled.members)

    def get_all_groups(
        self, ignored_layers: Iterable[nn.Module] = (), root_module_types: Sequence[type] = (_ConvNd, nn.Linear)
    ) -> Iterator[Group]:
        """All groups that such layers make and none of the ignored ones does, each with all of its channels."""
        ignored = {id(layer) for layer in ignored_layers}
        for group in [self.of(group) for group in self.graph.groups()]:
            made = group.layers(out=True)
            if ignored.isdisjoint(map(id, made)) and any(isinstance(m, tuple(root_module_types)) for m in made):
                yield group

    get_out_channels = staticmethod(lambda layer: channels_of(layer, True))
    get_in_channels = staticmethod(lambda layer: channels_of(layer, False))
    is_out_channel_pruning_fn = staticmethod(is_out)
    is_in_channel_pruning_fn = staticmethod(lambda fn: not is_out(fn))

    # -- removing ------------------------------------------------------------------------------------------------

    def now(self, dimension: Dimension, idxs: Iterable[int], made_after: int) -> list[int]:
        """What became of indices that were taken after so many removals; those that went are left out."""
        left = np.asarray(list(idxs), dtype=np.int64)
        for plan in self._gone[made_after:]:
            gone = np.array(plan.removed.get(dimension[0], {}).get(dimension[1], ()), dtype=np.int64)
            left = left[~np.isin(left, gone)]
            left = left - np.searchsorted(gone, left)
        return left.tolist()

    def remove(self, node: Node, out: bool, idxs: list[int], record_history: bool = True) -> None:
        """Remove channels of a layer with all that is coupled to them, in place."""
        chosen, _ = self._components(node.dimension(out), idxs)
        self.carry_out(chosen, [node.name, out, idxs] if record_history else None)

    def carry_out(self, chosen: Ids, entry: Any = None) -> None:
        """Remove components with all that is coupled to them, in place; the history gets the entry, or the plan."""
        with torch.no_grad():
            plan = plan_removal(self.graph, chosen, Settings(asked={"history": entry}))
        more, edits = self._by_customized(plan)
        if more - set(chosen.tolist()):
            self.carry_out(np.union1d(chosen, [*more]), entry)
            return
        plan = replace(plan, attribute_edits=(*plan.attribute_edits, *edits))
        self._apply(plan)
        self._history += [] if entry is None else [plan.to_json() if entry == "plan" else entry]

    def _apply(self, plan: Plan) -> None:
        plan.apply(self.model, inplace=True)
        self._gone.append(plan)
        self.graph._analyse()
        for after in self.after_removal:
            after()

    def _by_customized(self, plan: Plan) -> tuple[set[int], list[AttributeEdit]]:
        """What customized pruners remove beside the plan, and the ints that they set beside those that it sets.

        Each is asked to prune a copy of its layer, where all that goes has the same indices.

        Raises:
            PlanError: it makes other tensors than the plan does.
        """
        more: set[int] = set()
        edits: list[AttributeEdit] = []
        for path, module in self.graph.model.named_modules() if self._customized else ():
            pruner = next((own for kind, own in self._customized.items() if isinstance(module, kind)), None)
            gone = {part.removed for part in plan.slices if part.tensor.startswith(f"{path}.")}
            if pruner is None or kind_of(module) != "parameter" or len(gone) != 1:
                continue
            theirs, ours = copy.deepcopy(module), plan.apply(self.model).get_submodule(path)
            pruner.prune_out_channels(theirs, list(*gone))
            made, wanted = theirs.state_dict(), ours.state_dict()
            sizes = [(name, dim, size) for name, tensor in wanted.items() for dim, size in enumerate(tensor.shape)]
            smaller = [(f"{path}.{name}", dim) for name, dim, size in sizes if made[name].shape[dim] < size]
            if not smaller and not all(torch.equal(made[n].nan_to_num(), t.nan_to_num()) for n, t in wanted.items()):
                raise PlanError(f"{type(pruner).__name__} makes other tensors of {path!r} than the forward asks for.")
            firsts = [self._first(dimension) for dimension in smaller]
            more |= {component for first in firsts for component, at in first.items() if at in next(iter(gone))}
            ints = [(name, old, vars(theirs)[name]) for name, old in vars(module).items() if type(old) is int]
            edits += [AttributeEdit(path, (n,), old, new) for n, old, new in ints if old != new != vars(ours)[n]]
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
                self.remove(Node(self._named[path], path), out, list(idxs), False)
            self._history.append(entry)
