"""torch-pruning's pruner classes: which channels go by its rules, removed by structprune."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from structprune.api import decide
from structprune.checking import MODEL, function, real, require, whole
from structprune.compat.torch_pruning.dependency import DependencyGraph, Group, History
from structprune.compat.torch_pruning.functions import CONV_IN, CONV_OUT, LINEAR_IN, LINEAR_OUT, PruningFunction, dim_of
from structprune.coupling import groups as coupled
from structprune.coupling.roles import AXES
from structprune.dependency_graph import DependencyGraph as Graph
from structprune.planning.build import plan_removal
from structprune.planning.options import PlanOptions
from structprune.pruner import keys_of

Ratios = Mapping[nn.Module | tuple[nn.Module, ...], float]
Scheduler = Callable[[float, int], Sequence[float]]


def linear_scheduler(pruning_ratio: float, steps: int) -> list[float]:
    """The share that is gone after each step, from none."""
    return [i / steps * pruning_ratio for i in range(steps + 1)]


class BasePruner:
    """Prunes a model in place, in steps.

    Args:
        model: any ``nn.Module`` whose forward can be traced.
        example_inputs: a tensor, a list or tuple of positional arguments, or a dict of keyword arguments.
        importance: called with a `Group`, gives a score for each channel.
        global_pruning: all groups compete.
        pruning_ratio: share of the channels to remove.
        pruning_ratio_dict: that of a layer or block, or of several that compete.
        max_pruning_ratio: no group loses more.
        iterative_steps: number of steps.
        iterative_pruning_ratio_scheduler: from the ratio and the steps to the share that is gone after each, from none.
        ignored_layers: layers and parameters whose outputs stay. The model's outputs stay without being named.
        round_to: widths become multiples of this.
        isomorphic: with `global_pruning`, groups of like structure compete.
        prune_num_heads: whole heads may go, by `head_pruning_ratio`.
        prune_head_dims: channels inside heads may go.
        head_pruning_ratio: share of the heads to remove.
        head_pruning_ratio_dict: that of the layers that make them.
        root_module_types: only groups that such layers make.
        forward_fn: called with the model and the example inputs; what it gives the model is traced.
        not_needed: ``num_heads``, ``in_channel_groups``, ``out_channel_groups``, ``channel_groups``,
            ``unwrapped_parameters`` and ``output_transform``, which the trace tells; ``customized_pruners``, refused.

    Raises:
        PlanError: an argument is wrong.
        TraceError: the forward cannot be recorded.
    """

    _NOT_NEEDED: ClassVar = frozenset(
        {"num_heads", "in_channel_groups", "out_channel_groups", "channel_groups", "unwrapped_parameters",
         "output_transform", "customized_pruners"}
    )  # fmt: skip

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        importance: Callable[[Group], Tensor | None],
        global_pruning: bool = False,
        pruning_ratio: float = 0.5,
        pruning_ratio_dict: Ratios | None = None,
        max_pruning_ratio: float = 1.0,
        iterative_steps: int = 1,
        iterative_pruning_ratio_scheduler: Scheduler = linear_scheduler,
        ignored_layers: Iterable[nn.Module | nn.Parameter] | None = None,
        round_to: int | None = None,
        isomorphic: bool = False,
        *,
        prune_num_heads: bool = False,
        prune_head_dims: bool = True,
        head_pruning_ratio: float = 0.0,
        head_pruning_ratio_dict: Mapping[nn.Module, float] | None = None,
        root_module_types: Sequence[type] = (_ConvNd, nn.Linear, nn.LSTM),
        forward_fn: Callable[[nn.Module, Any], Any] | None = None,
        **not_needed: Any,
    ) -> None:
        share = real(least=0, most=1)
        require(locals(), model=MODEL, importance=function("group"), pruning_ratio=share, max_pruning_ratio=share)
        require(locals(), iterative_steps=whole(1), round_to=whole(1).or_none, head_pruning_ratio=share)
        if unknown := sorted(not_needed.keys() - self._NOT_NEEDED):
            raise TypeError(f"{type(self).__name__} has no argument {unknown[0]!r}.")
        self.model, self.importance = model, importance
        self.global_pruning, self.isomorphic, self.round_to = global_pruning, isomorphic, round_to
        self.max_pruning_ratio, self.iterative_steps, self.current_step = max_pruning_ratio, iterative_steps, 0
        self.root_module_types = tuple(root_module_types)
        self.ignored_layers = [m for layer in ignored_layers or () for m in _parts(layer)]
        customized = not_needed.get("customized_pruners")
        self.DG = DependencyGraph().build_dependency(
            model, example_inputs, forward_fn=forward_fn, customized_pruners=customized
        )
        paths = [self.DG._path(layer) for layer in self.ignored_layers]
        self.DG.graph = Graph(model, self.DG.graph.example_inputs, ignore_outputs=paths)
        self._schedule = iterative_pruning_ratio_scheduler
        self._ratio, self._head_ratio = pruning_ratio, head_pruning_ratio
        self._ratios = _by_layer(pruning_ratio_dict or {})
        self._head_ratios = _by_layer(head_pruning_ratio_dict or {})
        self._axes = tuple(
            axis
            for axis in AXES
            if not (axis == "heads" and not prune_num_heads)
            and not (axis == "head_size" and not prune_head_dims)
            and axis not in ("groups", "experts")
        )
        groups = self.DG.graph.groups()
        self._first = {key: group.channels for group, key in keys_of(groups).items()}
        self._groups = self._all_groups()

    # -- which channels --------------------------------------------------------------------------------------------

    def estimate_importance(self, group: Group) -> Tensor | None:
        """The scores of a group's channels."""
        return self.importance(group)

    def _made(self, group: Group) -> list[Any]:
        return [dep.layer for dep, _ in group if dep.handler.out]

    def _target(self, layers: list[Any], heads: bool) -> tuple[object, float]:
        """What a group competes in by the ratios given, None if by none, and the share that is to be gone by now."""
        given = self._head_ratios if heads else self._ratios
        scope, ratio = next(
            (given[id(m)] for m in layers if id(m) in given), (None, self._head_ratio if heads else self._ratio)
        )
        return scope, min(self._schedule(ratio, self.iterative_steps)[self.current_step], self.max_pruning_ratio)

    def _scope(self, group: coupled.Group, alike: object, named: object) -> object:
        """What is equal for the groups that compete."""
        if not self.global_pruning:
            return id(group)
        if named is not None:
            return named
        if group.axis == "heads":
            return "heads"
        return alike if self.isomorphic else "all"

    def _numbers(self, graph: Graph) -> tuple[dict[coupled.Group, int], dict[coupled.Group, Tensor]]:
        """How many channels of each group go now, and the scores of all."""
        scopes: dict[object, list[tuple[coupled.Group, float]]] = {}
        scores: dict[coupled.Group, Tensor] = {}
        keys = keys_of(graph.groups())
        for group in graph.groups():
            seen = self.DG.of(group)
            layers = self._made(seen)
            if not any(isinstance(layer, self.root_module_types) for layer in layers) or group.axis not in self._axes:
                continue
            found = self.estimate_importance(seen)
            if found is not None:
                scores[group] = found.detach().double().cpu()
                named, ratio = self._target(layers, group.axis == "heads")
                alike = tuple(sorted((type(dep.layer).__name__, dep.handler.name) for dep, _ in seen))
                scopes.setdefault(self._scope(group, alike, named), []).append((group, ratio))
        going: dict[coupled.Group, int] = {}
        for members in scopes.values():
            joined = torch.cat([scores[group] for group, _ in members])
            first = sum(self._first[keys[group]] for group, _ in members)
            ratio = members[0][1]
            heads = members[0][0].axis == "heads"
            count = math.ceil(ratio * len(joined)) if heads else len(joined) - int(first * (1 - ratio))
            if count <= 0:
                continue
            threshold = joined.sort().values[min(count, len(joined)) - 1]
            for group, _ in members:
                alone = not self.global_pruning or len(members) == 1
                wanted = count if alone else int((scores[group] <= threshold).sum())
                going[group] = self._rounded(wanted, group.channels, self._first[keys[group]])
        return going, scores

    def _rounded(self, going: int, channels: int, first: int) -> int:
        most = channels - max(1, math.ceil(first * (1 - self.max_pruning_ratio) - 1e-9))
        left = channels - min(going, most)
        if self.round_to and going:
            left -= left % self.round_to
        return channels - left if left > 0 else 0

    def _planned(self) -> tuple[Graph, dict[coupled.Group, Any]]:
        """The channels that go now: components of each group, as far as groups that depend on each other allow."""
        graph = self.DG.graph
        going: dict[coupled.Group, int] = {}
        scores: dict[coupled.Group, Tensor] = {}

        def ratio(group: coupled.Group) -> float:
            if group not in scores and group not in going:
                more, found = self._numbers(graph)
                going.update(more)
                scores.update(found)
            return going.get(group, 0) / group.channels

        def score(group: coupled.Group, tensors: Mapping[str, Tensor]) -> Tensor:
            return scores.get(group, torch.zeros(group.channels, dtype=torch.float64))

        options = PlanOptions(ratio=ratio, importance=score, axes=self._axes, round_to=1)
        chosen = set(decide(graph, options).chosen.tolist())
        return graph, {g: [c for c in g.components.tolist() if c in chosen] for g in graph.groups()}

    # -- steps -----------------------------------------------------------------------------------------------------

    def step(self, interactive: bool = False) -> Iterator[Group] | None:
        """Remove the next share of the channels; with `interactive`, give the groups, to be pruned one by one."""
        self.current_step += 1
        if self.current_step > self.iterative_steps:
            raise ValueError(f"All {self.iterative_steps} steps were taken. Make a new pruner to go further.")
        with torch.no_grad():
            graph, chosen = self._planned()
            removed = [self._group(graph, group, components) for group, components in chosen.items() if components]
            if interactive:
                return iter(removed)
            everything = np.array([c for components in chosen.values() for c in components], dtype=np.int64)
            if len(everything):
                plan_removal(graph, everything).apply(self.model, inplace=True)
                graph._analyse()
        for group in removed:
            item = group[0]
            self.DG.pruning_history().append([item.dep.target.name, True, item.idxs])
        return None

    def _group(self, graph: Graph, group: coupled.Group, components: list[int]) -> Group:
        ids = np.array(components, dtype=np.int64)
        channels = np.flatnonzero(np.isin(group.components, ids)).tolist()
        return Group(self.DG, self.DG.items_of(list(coupled.restricted(group, group.components[channels])), channels))

    def manual_prune_width(self, layer: nn.Module, pruning_fn: PruningFunction, pruning_ratios_or_idxs: Any) -> None:
        """Remove channels of one layer: a list of indices, or the share that is to go, the lowest scores first."""
        if isinstance(pruning_ratios_or_idxs, float):
            size = int(getattr(layer, "weight").shape[dim_of(layer, pruning_fn)])  # noqa: B009 - typed as a module
            scores = self.estimate_importance(self.DG.get_pruning_group(layer, pruning_fn, range(size)))
            assert scores is not None
            pruning_ratios_or_idxs = scores.argsort()[: int(size * pruning_ratios_or_idxs)].tolist()
        self.DG.get_pruning_group(layer, pruning_fn, pruning_ratios_or_idxs).prune()

    def pruning_history(self) -> History:
        """What was removed: name of the layer, whether outputs were meant, indices."""
        return self.DG.pruning_history()

    def load_pruning_history(self, pruning_history: History) -> None:
        """Remove again what a history says."""
        self.DG.load_pruning_history(pruning_history)

    def reset(self) -> None:
        """Begin to count steps anew."""
        self.current_step = 0

    # -- sparse training -------------------------------------------------------------------------------------------

    def _all_groups(self) -> list[Group]:
        if type(self) is BasePruner:
            return []
        found = self.DG.get_all_groups(root_module_types=self.root_module_types)
        return [group for group in found if self.importance(group) is not None]

    def update_regularizer(self) -> None:
        """Find the groups anew after a step."""
        self._groups = self._all_groups()

    def _pull(self, group: Group, strength: Tensor, bias: bool) -> None:
        """Add each channel's strength times its weights to the gradients."""
        for item in group:
            layer, handler = item.dep.layer, item.dep.handler
            if handler not in (CONV_OUT, CONV_IN, LINEAR_OUT, LINEAR_IN) and not isinstance(layer, _BatchNorm):
                continue
            for tensor in (layer.weight, layer.bias if bias and handler.out else None):
                if tensor is None or tensor.grad is None:
                    continue
                dim = dim_of(layer, handler) if tensor is layer.weight else 0
                own = strength[torch.tensor(item.root_idxs)].to(tensor.device, tensor.dtype)
                rows = tensor.detach().index_select(dim, torch.tensor(item.idxs, device=tensor.device))
                shape = [-1 if d == dim else 1 for d in range(tensor.dim())]
                tensor.grad.index_add_(dim, torch.tensor(item.idxs, device=tensor.device), rows * own.view(shape))


class BNScalePruner(BasePruner):
    """Pulls the scales of batch norms to zero (Network Slimming); ``reg`` is the strength."""

    def __init__(self, *args: Any, reg: float = 1e-5, group_lasso: bool = False, **options: Any) -> None:
        super().__init__(*args, **options)
        self.reg, self.group_lasso = reg, group_lasso

    @torch.no_grad()
    def regularize(self, model: nn.Module, reg: float | None = None, bias: bool = False) -> None:
        """Add the penalty's gradient; call it between ``backward`` and the optimizer's step."""
        strength = self.reg if reg is None else reg
        ignored = {id(layer) for layer in self.ignored_layers}
        norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.affine and id(m) not in ignored]
        for norm in norms if not self.group_lasso else []:
            if norm.weight.grad is not None:
                norm.weight.grad.add_(norm.weight.sign(), alpha=strength)
        for group in self._groups if self.group_lasso else []:
            scales = [item for item in group if isinstance(item.dep.layer, _BatchNorm)]
            if scales:
                squares = torch.zeros(len(group[0].idxs))
                for item in scales:
                    squares.index_add_(0, torch.tensor(item.root_idxs), item.dep.layer.weight[item.idxs].cpu().square())
                self._pull(Group(self.DG, scales), strength / (squares / len(scales) + 1e-9).sqrt(), bias)


class GroupNormPruner(BasePruner):
    """Pulls the channels of a group to zero, the least important ones most (DepGraph); ``reg`` is the strength."""

    def __init__(self, *args: Any, reg: float = 1e-4, alpha: float = 4, **options: Any) -> None:
        super().__init__(*args, **options)
        self.reg, self.alpha = reg, alpha

    @torch.no_grad()
    def regularize(self, model: nn.Module, alpha: float = 2**4, bias: bool = False) -> None:
        """Add the penalty's gradient; call it between ``backward`` and the optimizer's step."""
        for group in self._groups:
            scores = self.estimate_importance(group)
            assert scores is not None
            roots = scores.sqrt()
            spread = (roots.max() - roots) / (roots.max() - roots.min())
            if not bool(spread.isnan().any()):
                self._pull(group, self.reg * alpha**spread, bias)


class GrowingRegPruner(BasePruner):
    """Weight decay on the channels of a group that grows with each `update_reg`, fastest for the least important."""

    def __init__(self, *args: Any, reg: float = 1e-5, delta_reg: float = 1e-5, **options: Any) -> None:
        super().__init__(*args, **options)
        self.base_reg, self.delta_reg = reg, delta_reg
        self.update_regularizer()

    def update_regularizer(self) -> None:
        """Find the groups anew after a step, and begin with the first strength."""
        super().update_regularizer()
        self.group_reg = {id(group): torch.full((len(group[0].idxs),), self.base_reg) for group in self._groups}

    @torch.no_grad()
    def update_reg(self) -> None:
        """Let the strengths grow."""
        for group in self._groups:
            scores = self.estimate_importance(group)
            assert scores is not None
            lacking = (scores.max() - scores) / (scores.max() - scores.min() + 1e-8)
            self.group_reg[id(group)] = self.group_reg[id(group)] + self.delta_reg * lacking.cpu()

    @torch.no_grad()
    def regularize(self, model: nn.Module, bias: bool = False) -> None:
        """Add the penalty's gradient; call it between ``backward`` and the optimizer's step."""
        for group in self._groups:
            self._pull(group, self.group_reg[id(group)], bias)


MetaPruner = MagnitudePruner = BasePruner


def _parts(layer: nn.Module | nn.Parameter) -> list[Any]:
    return list(layer.modules()) if isinstance(layer, nn.Module) else [layer]


def _by_layer(given: Mapping[Any, float]) -> dict[int, tuple[object, float]]:
    """For each module: what its key is, and the ratio."""
    found: dict[int, tuple[object, float]] = {}
    for number, (key, ratio) in enumerate(given.items()):
        for layer in key if isinstance(key, tuple) else (key,):
            found |= {id(module): (number, ratio) for module in layer.modules()}
    return found
