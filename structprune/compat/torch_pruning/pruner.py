"""torch-pruning's pruner classes: which channels go by its rules, removed by structprune."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from structprune.api import decide
from structprune.checking import MODEL, function, real, require, whole
from structprune.compat.torch_pruning.dependency import DependencyGraph, Group, History
from structprune.compat.torch_pruning.function import BasePruningFunc as BasePruningFunc
from structprune.compat.torch_pruning.function import dim_of, kind_of
from structprune.coupling import groups as coupled
from structprune.coupling.naming import path_of
from structprune.coupling.roles import AXES
from structprune.planning.options import PlanOptions
from structprune.pruner import keys_of

Ratios = Mapping[nn.Module | tuple[nn.Module, ...], float]
Scheduler = Callable[[float, int], Sequence[float]]
_NOT_NEEDED = frozenset(
    {
        "num_heads",
        "in_channel_groups",
        "out_channel_groups",
        "channel_groups",
        "unwrapped_parameters",
        "output_transform",
    }
)


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
        customized_pruners: see `DependencyGraph.register_customized_layer`.
        not_needed: what the trace tells: ``num_heads``, ``unwrapped_parameters``, ``output_transform``, channel groups.

    Raises:
        PlanError: an argument is wrong.
        TraceError: the forward cannot be recorded.
    """

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
        head_pruning_ratio_dict: Ratios | None = None,
        root_module_types: Sequence[type] = (_ConvNd, nn.Linear, nn.LSTM),
        forward_fn: Callable[[nn.Module, Any], Any] | None = None,
        customized_pruners: Mapping[type, BasePruningFunc] | None = None,
        **not_needed: Any,
    ) -> None:
        share = real(least=0, most=1)
        require(locals(), model=MODEL, importance=function("group"), pruning_ratio=share, max_pruning_ratio=share)
        require(locals(), iterative_steps=whole(1), round_to=whole(1).or_none, head_pruning_ratio=share)
        if unknown := sorted(not_needed.keys() - _NOT_NEEDED):
            raise TypeError(f"{type(self).__name__} has no argument {unknown[0]!r}.")
        self.model, self.importance = model, importance
        self.global_pruning, self.isomorphic, self.round_to = global_pruning, isomorphic, round_to
        self.max_pruning_ratio, self.iterative_steps, self.current_step = max_pruning_ratio, iterative_steps, 0
        self.root_module_types = tuple(root_module_types)
        self.ignored_layers = [m for layer in ignored_layers or () for m in _parts(layer)]
        kept = [path_of(model, layer) for layer in self.ignored_layers]
        self.DG = DependencyGraph().build_dependency(
            model,
            example_inputs,
            forward_fn=forward_fn,
            customized_pruners=customized_pruners,
            ignore_outputs=kept,
            outputs=None,
        )
        self._schedule = iterative_pruning_ratio_scheduler
        self._ratios = {False: (pruning_ratio, _by_layer(pruning_ratio_dict or {}))}
        self._ratios[True] = head_pruning_ratio, _by_layer(head_pruning_ratio_dict or {})
        without = {"groups", "experts", "" if prune_num_heads else "heads", "" if prune_head_dims else "head_size"}
        self._axes = tuple(axis for axis in AXES if axis not in without)
        self._first = {key: group.channels for group, key in keys_of(self.DG.graph.groups()).items()}
        self.update_regularizer()

    # -- which channels --------------------------------------------------------------------------------------------

    def estimate_importance(self, group: Group) -> Tensor | None:
        """The scores of a group's channels."""
        return self.importance(group)

    def _now(self, key: coupled.Group, seen: Group) -> tuple[object, float]:
        """The groups that this one competes with, and the share of them that is to be gone by now."""
        heads = key.axis == "heads"
        ratio, given = self._ratios[heads]
        layers = [dep.layer for dep, _ in seen if dep.handler.out]
        named, ratio = next((given[id(layer)] for layer in layers if id(layer) in given), (None, ratio))
        alike = tuple(sorted((type(dep.layer).__name__, dep.handler.name) for dep, _ in seen))
        scope = "heads" if heads else alike if self.isomorphic else "all"
        share = self._schedule(ratio, self.iterative_steps)[self.current_step]
        competing = id(key) if not self.global_pruning else scope if named is None else named
        return competing, min(share, self.max_pruning_ratio)

    def _numbers(self, groups: Iterable[coupled.Group]) -> dict[coupled.Group, tuple[int, Tensor]]:
        """How many channels of each group go now, and the scores of them."""
        scopes: dict[object, list[tuple[coupled.Group, Tensor, int, float]]] = {}
        for group, key in keys_of(groups).items():
            seen = self.DG.of(group)
            made = (dep.layer for dep, _ in seen if dep.handler.out)
            if group.axis in self._axes and any(isinstance(layer, self.root_module_types) for layer in made):
                scores = self.estimate_importance(seen)
                if scores is not None:
                    scope, ratio = self._now(group, seen)
                    known = group, scores.detach().double().cpu(), self._first.get(key, group.channels), ratio
                    scopes.setdefault(scope, []).append(known)
        going_and_scores: dict[coupled.Group, tuple[int, Tensor]] = {}
        for members in scopes.values():
            joined = torch.cat([scores for _, scores, _, _ in members])
            heads, ratio = members[0][0].axis == "heads", members[0][-1]
            left = int(sum(first for _, _, first, _ in members) * (1 - ratio))
            count = math.ceil(ratio * len(joined)) if heads else len(joined) - left
            threshold = joined.sort().values[min(count, len(joined)) - 1] if count > 0 else -math.inf
            for group, scores, first, _ in members:
                going = max(0, count) if len(members) == 1 else int((scores <= threshold).sum())
                going_and_scores[group] = self._rounded(going, group.channels, first), scores
        return going_and_scores

    def _rounded(self, going: int, channels: int, first: int) -> int:
        least = max(1, math.ceil(first * (1 - self.max_pruning_ratio) - 1e-9))
        left = max(channels - going, min(least, channels))
        if self.round_to and going:
            left -= left % self.round_to
        return channels - left if left > 0 else 0

    # -- steps -----------------------------------------------------------------------------------------------------

    def step(self, interactive: bool = False) -> Iterator[Group] | None:
        """Remove the next share of the channels; with `interactive`, give the groups, to be pruned one by one."""
        self.current_step += 1
        if self.current_step > self.iterative_steps:
            raise ValueError(f"All {self.iterative_steps} steps were taken. Make a new pruner to go further.")
        numbers: dict[coupled.Group, tuple[int, Tensor]] = {}

        def known(group: coupled.Group) -> tuple[int, Tensor]:
            if group not in numbers:  # groups are made anew where the engine finds that more has to stay
                numbers.update({each: (0, torch.zeros(each.channels)) for each in self.DG.graph.groups()})
                numbers.update(self._numbers(self.DG.graph.groups()))
            return numbers[group]

        options = PlanOptions(
            ratio=lambda group: known(group)[0] / group.channels,
            importance=lambda group, tensors: known(group)[1],
            axes=self._axes,
            round_to=1,
        )
        chosen = decide(self.DG.graph, options).chosen
        if interactive:
            parts = [self.DG.of(g, chosen) for g in self.DG.graph.groups() if np.isin(g.components, chosen).any()]
            return iter(parts)
        if len(chosen):
            self.DG.carry_out(chosen, "plan")
        return None

    def manual_prune_width(self, layer: Any, pruning_fn: Any, pruning_ratios_or_idxs: Any) -> None:
        """Remove channels of one layer: a list of indices, or the share that is to go, the lowest scores first."""
        if isinstance(pruning_ratios_or_idxs, float):
            group = self.DG.get_pruning_group(layer, pruning_fn, range(1 << 30))
            scores = self.estimate_importance(group)
            assert scores is not None
            lowest = scores.argsort()[: int(len(scores) * pruning_ratios_or_idxs)]
            pruning_ratios_or_idxs = [sorted(set(group[0].root_idxs))[number] for number in lowest]
        self.DG.get_pruning_group(layer, pruning_fn, pruning_ratios_or_idxs).prune()

    def pruning_history(self) -> History:
        """What was removed: see `DependencyGraph.pruning_history`."""
        return self.DG.pruning_history()

    def load_pruning_history(self, pruning_history: History) -> None:
        """Remove again what a history says."""
        self.DG.load_pruning_history(pruning_history)

    # -- sparse training -------------------------------------------------------------------------------------------

    def update_regularizer(self) -> None:
        """Find the groups anew after a step."""
        all_groups = (
            [] if type(self) is BasePruner else self.DG.get_all_groups(root_module_types=self.root_module_types)
        )
        self._groups = list(all_groups)

    def _pull(self, group: Iterable[Any], strength: Tensor, bias: bool) -> None:
        """Add each channel's strength times its weights to the gradients."""
        for item in group:
            layer, handler = item.dep.layer, item.dep.handler
            if kind_of(layer) not in ("conv", "linear", "batchnorm"):
                continue
            for tensor in (layer.weight, layer.bias if bias and handler.out else None):
                if tensor is None or tensor.grad is None:
                    continue
                dim = dim_of(layer, handler.out) if tensor is layer.weight else 0
                idxs = torch.tensor(item.idxs, device=tensor.device)
                own = strength.cpu()[item.root_idxs].to(tensor.device, tensor.dtype)
                rows = tensor.detach().index_select(dim, idxs).movedim(dim, -1) * own
                tensor.grad.index_add_(dim, idxs, rows.movedim(-1, dim))


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
                self._pull(scales, strength / (squares / len(scales) + 1e-9).sqrt(), bias)


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
            if scores is None:
                continue
            roots = scores.sqrt()
            spread = (roots.max() - roots) / (roots.max() - roots.min())
            if not bool(spread.isnan().any()):
                self._pull(group, self.reg * alpha**spread, bias)


class GrowingRegPruner(BasePruner):
    """Weight decay on the channels of a group that grows with each `update_reg`, fastest for the least important."""

    def __init__(self, *args: Any, reg: float = 1e-5, delta_reg: float = 1e-5, **options: Any) -> None:
        self.base_reg, self.delta_reg = reg, delta_reg
        super().__init__(*args, **options)

    def update_regularizer(self) -> None:
        """Find the groups anew after a step, and begin with the first strength."""
        super().update_regularizer()
        self.group_reg = {id(group): torch.full((len(group[0].idxs),), self.base_reg) for group in self._groups}

    @torch.no_grad()
    def update_reg(self) -> None:
        """Let the strengths grow."""
        for group in self._groups:
            scores = self.estimate_importance(group)
            if scores is None:
                continue
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
    by_module: dict[int, tuple[object, float]] = {}
    for number, (key, ratio) in enumerate(given.items()):
        for layer in key if isinstance(key, tuple) else (key,):
            by_module |= {id(module): (number, ratio) for module in layer.modules()}
    return by_module
