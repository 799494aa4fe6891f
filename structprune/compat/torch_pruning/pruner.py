"""torch-pruning's pruner classes: which channels go by its rules, chosen and removed by structprune."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from structprune.api import decide
from structprune.checking import MODEL, real, require, whole
from structprune.checking import function as function_of
from structprune.compat.torch_pruning import function as function
from structprune.compat.torch_pruning import importance as importance
from structprune.compat.torch_pruning.dependency import DependencyGraph, Group
from structprune.compat.torch_pruning.function import BasePruningFunc as BasePruningFunc
from structprune.coupling import groups as coupled
from structprune.coupling.roles import AXES
from structprune.importance.compose import PerLayer
from structprune.importance.weight import norm_scales
from structprune.planning.decide import Ranking, decide_channels
from structprune.planning.options import PlanOptions
from structprune.pruner import keys_of, left_together
from structprune.training.channel_decay import ChannelDecay, lack, shrinkage
from structprune.training.penalties import GroupLasso, NormScalePenalty, add_gradient

Ratios = Mapping[nn.Module | tuple[nn.Module, ...], float]


def linear_scheduler(pruning_ratio: float, steps: int) -> list[float]:
    """The share that is gone after each step, from none."""
    return [i / steps * pruning_ratio for i in range(steps + 1)]


@dataclass(eq=False, repr=False)
class BasePruner:
    """Prunes a model in place, in steps, with the arguments of torch-pruning's pruner of this name.

    The model's outputs stay without being named in ``ignored_layers``. ``num_heads``, ``unwrapped_parameters``,
    ``output_transform`` and channel groups are not needed, as the trace tells them; ``num_heads`` is kept up to date.

    Raises:
        PlanError: an argument is wrong.
        TraceError: the forward cannot be recorded.
    """

    model: nn.Module
    example_inputs: Any
    importance: Callable[[Group], Tensor | None]
    global_pruning: bool = False
    pruning_ratio: float = 0.5
    pruning_ratio_dict: Ratios | None = None
    max_pruning_ratio: float = 1.0
    iterative_steps: int = 1
    iterative_pruning_ratio_scheduler: Callable[[float, int], Sequence[float]] = linear_scheduler
    ignored_layers: Iterable[nn.Module | nn.Parameter] | None = None
    round_to: int | None = None
    isomorphic: bool = False
    in_channel_groups: Any = None
    out_channel_groups: Any = None
    num_heads: dict[nn.Module, int] = field(default_factory=dict)
    prune_num_heads: bool = False
    prune_head_dims: bool = True
    head_pruning_ratio: float = 0.0
    head_pruning_ratio_dict: Ratios | None = None
    customized_pruners: Mapping[type, BasePruningFunc] | None = None
    unwrapped_parameters: Any = None
    root_module_types: Sequence[type] = (_ConvNd, nn.Linear, nn.LSTM)
    forward_fn: Callable[[nn.Module, Any], Any] | None = None
    output_transform: Any = None
    channel_groups: Any = None

    def __post_init__(self) -> None:
        given, share = vars(self), real(least=0, most=1)
        require(given, model=MODEL, importance=function_of("group"), pruning_ratio=share, max_pruning_ratio=share)
        require(given, iterative_steps=whole(1), round_to=whole(1).or_none, head_pruning_ratio=share)
        ignored = [*(self.ignored_layers or ())]
        layers = [layer for layer in ignored if isinstance(layer, nn.Module)]
        self.ignored_layers = [part for layer in layers for part in layer.modules()]
        self.DG = DependencyGraph().build_dependency(
            self.model, self.example_inputs, self.forward_fn, customized_pruners=self.customized_pruners,
            ignored_params=[each for each in ignored if isinstance(each, Tensor)], ignore_outputs=layers, outputs=None,
        )  # fmt: skip
        self.DG.after_removal.append(self._count_heads)
        self.pruning_history, self.load_pruning_history = self.DG.pruning_history, self.DG.load_pruning_history
        wanted = {"heads": self.prune_num_heads, "head_size": self.prune_head_dims, "groups": False, "experts": False}
        self._axes = tuple(axis for axis in AXES if wanted.get(axis, True))
        self._ratios = self.pruning_ratio, _by_layer(self.pruning_ratio_dict or {})
        self._head_ratios = self.head_pruning_ratio, _by_layer(self.head_pruning_ratio_dict or {})
        self._first = {key: group.channels for group, key in keys_of(self.DG.graph.groups()).items()}
        self._first_heads = {layer: (number, self._heads(layer)) for layer, number in self.num_heads.items()}
        self._scores: dict[coupled.Group, Tensor] = {}
        self.current_step = 0
        self.update_regularizer()

    def _heads(self, layer: nn.Module) -> int:
        made = f"{self.DG.graph.path_of(layer)}.weight", 0
        groups = [group for group in self.DG.graph.groups() if group.axis == "heads"]
        return math.prod(g.channels for g in groups if any((m.tensor, m.dim) == made for m in g.members))

    def _count_heads(self) -> None:
        for layer, (number, first) in self._first_heads.items():
            self.num_heads[layer] = number * self._heads(layer) // first

    # -- which channels --------------------------------------------------------------------------------------------

    def estimate_importance(self, group: Group) -> Tensor | None:
        """The scores of a group's channels."""
        return self.importance(group)

    def _scored(self) -> Iterator[tuple[coupled.Group, Group, Tensor]]:
        """The groups that layers of the root types make, as torch-pruning sees them, and their scores."""
        for group, seen in [(group, self.DG.of(group)) for group in self.DG.graph.groups()]:
            if seen.made_by(self.root_module_types):
                scores = self.estimate_importance(seen)
                if scores is not None and len(scores):
                    yield group, seen, scores.detach()

    def _asked(self, group: coupled.Group, seen: Group, alone: Hashable) -> tuple[Hashable, float]:
        """What groups that compete with this one have in common, and the share of them that is to be gone by now."""
        ratio, given = self._head_ratios if group.axis == "heads" else self._ratios
        named, ratio = next((given[id(la)] for la in seen.made_by([object]) if id(la) in given), (None, ratio))
        alike = tuple(sorted((type(dep.layer).__name__, dep.handler.name) for dep, _ in seen))
        rivals = group.axis == "heads", named, alike if self.isomorphic and named is None else ""
        share = self.iterative_pruning_ratio_scheduler(ratio, self.iterative_steps)[self.current_step]
        return rivals if self.global_pruning else alone, min(share, self.max_pruning_ratio)

    def _kept(self) -> dict[coupled.Group, int]:
        """How many channels each group keeps now: of all that compete, those with the lowest scores go."""
        graph = self.DG.graph
        keys, groups = keys_of(graph.groups()), graph.groups()
        together = {groups[number]: balanced.groups for balanced in graph.balanced() for number in balanced.groups}
        first = {group: self._first.get(key, group.channels) for group, key in keys.items()}
        scored = [(group, seen, scores) for group, seen, scores in self._scored() if group.axis in self._axes]
        self._scores = {group: scores.double().cpu() for group, _, scores in scored}
        asked = {group: self._asked(group, seen, together.get(group, group)) for group, seen, _ in scored}
        before, now = Counter[Hashable](), Counter[Hashable]()
        for group, (rivals, _) in asked.items():
            before[rivals], now[rivals] = before[rivals] + first[group], now[rivals] + group.channels

        def ratio(group: coupled.Group) -> float:
            rivals, share = asked.get(group, (None, 0.0))
            total = max(1, now[rivals])
            going = math.ceil(share * total) if group.axis == "heads" else total - int(before[rivals] * (1 - share))
            return max(0, min(going, total - 1)) / total

        options = PlanOptions(ratio=ratio, scope=lambda group: asked.get(group, (0,))[0], axes=self._axes, round_to=1)
        kept = decide_channels(graph, options, Ranking(graph, PerLayer(self._score, "none"))).kept
        return {group: self._rounded(kept.get(group, group.channels), group.channels, first[group]) for group in keys}

    def _score(self, group: coupled.Group, tensors: Mapping[str, Tensor]) -> Tensor:
        return self._scores.get(group, torch.zeros(group.channels))

    def _rounded(self, left: int, channels: int, first: int) -> int:
        least = max(1, math.ceil(first * (1 - self.max_pruning_ratio) - 1e-9))
        left = max(left, min(least, channels))
        return left - (left % self.round_to if self.round_to and left < channels else 0) or channels

    # -- steps -----------------------------------------------------------------------------------------------------

    def step(self, interactive: bool = False) -> Iterator[Group] | None:
        """Remove the next share of the channels; with `interactive`, give the groups, to be pruned one by one."""
        self.current_step += 1
        if self.current_step > self.iterative_steps:
            raise ValueError(f"All {self.iterative_steps} steps were taken. Make a new pruner to go further.")
        left: dict[coupled.Group, float] = {}

        def ratio(group: coupled.Group) -> float:
            if group not in left:  # groups are made anew where the engine finds that more has to stay
                shares = {each: kept / each.channels for each, kept in self._kept().items()}
                left.update(left_together(self.DG.graph, shares))
            return 1 - left[group]

        options = PlanOptions(ratio=ratio, importance=self._score, axes=self._axes, round_to=1)
        chosen = decide(self.DG.graph, options).chosen
        if interactive:
            return iter([self.DG.of(g, chosen) for g in self.DG.graph.groups() if np.isin(g.components, chosen).any()])
        if len(chosen):
            self.DG.carry_out(chosen, "plan")
        return None

    # -- sparse training -------------------------------------------------------------------------------------------

    def update_regularizer(self) -> None:
        """Begin anew after a step; only `GrowingRegPruner` has to."""

    def _pull(self, strengths: Mapping[Group, Tensor], model: nn.Module, bias: bool) -> None:
        """Add each channel's strength times its weights to the gradients."""
        counted = {name for group in strengths for name in group.weights(("conv", "linear", "batchnorm"), bias)}
        each = {group.coupled: strength for group, strength in strengths.items()}
        add_gradient(ChannelDecay(self.DG.graph, each, counted), model)


@dataclass(eq=False, repr=False)
class BNScalePruner(BasePruner):
    """Pulls the scales of batch norms to zero (Network Slimming); ``reg`` is the strength."""

    _: KW_ONLY
    reg: float = 1e-5
    group_lasso: bool = False

    def regularize(self, model: nn.Module, reg: float | None = None, bias: bool = False) -> None:
        """Add the penalty's gradient; call it between ``backward`` and the optimizer's step."""
        graph, strength = self.DG.graph, self.reg if reg is None else reg
        scales = norm_scales(graph, ("batch_norm",))
        alone = NormScalePenalty(graph, strength)
        add_gradient(GroupLasso(graph, strength, parameters=scales) if self.group_lasso else alone, model)


@dataclass(eq=False, repr=False)
class GroupNormPruner(BasePruner):
    """Pulls the channels of a group to zero, the least important ones most (DepGraph); ``reg`` is the strength."""

    _: KW_ONLY
    reg: float = 1e-4
    alpha: float = 4

    def regularize(self, model: nn.Module, alpha: float = 2**4, bias: bool = False) -> None:
        """Add the penalty's gradient; call it between ``backward`` and the optimizer's step."""
        scored = ((seen, scores.sqrt()) for _, seen, scores in self._scored())
        self._pull({seen: self.reg * shrinkage(roots, math.log2(alpha)) for seen, roots in scored}, model, bias)


@dataclass(eq=False, repr=False)
class GrowingRegPruner(BasePruner):
    """Weight decay on the channels of a group that grows with each `update_reg`, fastest for the least important."""

    _: KW_ONLY
    reg: float = 1e-5
    delta_reg: float = 1e-5

    def update_regularizer(self) -> None:
        """Begin with the first strength after a step."""
        groups = self.DG.get_all_groups(root_module_types=self.root_module_types)
        self.group_reg = {group: torch.full((group.coupled.channels,), self.reg) for group in groups}

    def update_reg(self) -> None:
        """Let the strengths grow."""
        for group, strength in self.group_reg.items():
            scores = self.estimate_importance(group)
            if scores is not None:
                self.group_reg[group] = strength + self.delta_reg * lack(scores.detach().cpu())

    def regularize(self, model: nn.Module, bias: bool = False) -> None:
        """Add the penalty's gradient; call it between ``backward`` and the optimizer's step."""
        self._pull(self.group_reg, model, bias)


MetaPruner = MagnitudePruner = BasePruner


def _by_layer(given: Ratios) -> dict[int, tuple[int, float]]:
    """For each module: the number of its key, and the ratio."""
    keys = ((number, key if isinstance(key, tuple) else (key,)) for number, key in enumerate(given))
    return {id(part): (number, [*given.values()][number]) for number, key in keys for m in key for part in m.modules()}
