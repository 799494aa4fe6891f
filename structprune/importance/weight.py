"""Criteria that look at weights alone."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from structprune.checking import FLAG, SEED, Check, is_number, require, some_of
from structprune.coupling.graph import ChannelGraph
from structprune.coupling.groups import Group, Member
from structprune.errors import PlanError
from structprune.importance.base import REDUCTION, Importance, Unfitted, criterion, floating, member_sums, reduced
from structprune.importance.data import Batches
from structprune.ops.arguments import tensors


class _Version:
    """A tensor as it is now: another one of the same name, or the same after a step of training, is another version."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = weakref.ref(tensor)
        self._writes = -1 if tensor.is_inference() else tensor._version

    def is_of(self, tensor: Tensor) -> bool:
        """Whether `tensor` is the very tensor, unchanged; of an inference tensor that cannot be known."""
        return self._tensor() is tensor and 0 <= self._writes == tensor._version


# The order of a norm: that of the greatest entry too.
ORDER = Check(lambda n: n == math.inf or (is_number(n) and n > 0), "the order of a norm is above 0")


@dataclass(frozen=True, slots=True)
class LnNorm:
    """The Ln norm of everything that goes with a channel, over the whole coupled group.

    The score of channel i is the n-th root of the sum of ``|w| ** n`` over all parameter entries that removing it
    removes: its filter, its bias and norm entries, and the columns of its consumers. An entry that belongs to several
    dimensions of the group counts once for each.

    Li et al., Pruning Filters for Efficient ConvNets, 2017 (section 3.1, for n = 1 and the filter alone); Fang et al.,
    DepGraph, 2023 (equation 4, for n = 2 over the group).

    Args:
        n: the order of the norm, above 0; ``math.inf`` takes the largest entry.
        root: whether the n-th root is taken. Within a group that changes no rank. Where groups compete, the sums
            themselves, over their mean in the group, do better (``benchmarks/results/criteria.md``): so ``"l2"``, the
            sum of squares, as in DepGraph.

    Example:
        >>> import torch, structprune
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> plan = structprune.plan(model, torch.randn(1, 4), ratio=0.5, importance=structprune.LnNorm(1))
        >>> plan.layers[0].after
        4
    """

    n: float = 2.0
    root: bool = True
    _sums: dict[tuple[str, int], tuple[_Version, Tensor]] = field(default_factory=dict, repr=False, compare=False)
    _spaces: dict[tuple[torch.dtype, torch.device], Tensor] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        require({"n": self.n, "root": self.root}, n=ORDER, root=FLAG)

    def __call__(self, group: Group, tensors: Mapping[str, Tensor]) -> Tensor:
        """Scores of shape ``(group.channels,)``, in float32 or the weights' own type if that is wider."""
        total: Tensor | None = None
        places: dict[tuple[int, int], tuple[Tensor, Tensor] | None] = {}
        for member in group.members:
            weight = tensors[member.tensor]
            if not isinstance(weight, nn.Parameter) or not weight.is_floating_point():
                continue
            sums = self._along(member.tensor, weight, member.dim)
            if total is None:
                total = torch.zeros(group.channels, dtype=sums.dtype, device=sums.device)
            # Most members of a group share their arrays, and most of these say that index i goes with channel i.
            key = id(member.positions), id(member.channels)
            if key not in places:
                places[key] = _indices(member, group.channels, sums.device)
            indices = places[key]
            if indices is None:
                entries = sums[: group.channels].to(total.dtype)
                total = torch.maximum(total, entries) if math.isinf(self.n) else total.add_(entries)
                continue
            positions, channels = indices
            entries = sums[positions].to(total.dtype)
            if math.isinf(self.n):
                total.scatter_reduce_(0, channels, entries, "amax")
            else:
                total.index_add_(0, channels, entries)
        if total is None:
            return torch.zeros(group.channels)
        return total.pow(1 / self.n) if self.root and not math.isinf(self.n) else total

    def weight_scores(self, graph: ChannelGraph, batches: Batches | None) -> dict[str, Tensor]:
        """Absolute values: single weights rank alike for every n; see `structprune.importance.base.WeightCriterion`."""
        parameters = graph.model.named_parameters()
        return {name: weight.detach().abs() for name, weight in parameters if weight.is_floating_point()}

    def _along(self, name: str, weight: Tensor, dim: int) -> Tensor:
        """Sum (for n = inf: largest) of ``|w| ** n`` for each index of `dim`, shape ``(weight.shape[dim],)``."""
        known = self._sums.get((name, dim))
        if known is None or not known[0].is_of(weight):
            powers = self._powers(weight.detach())
            version = _Version(weight)
            # One pass over the weight serves its first two dimensions, which are asked for one after the other.
            for place in {dim, *range(min(2, weight.dim()))}:
                self._sums[(name, place)] = version, self._reduced(powers, place)
            known = self._sums[(name, dim)]
        return known[1]

    def _powers(self, weight: Tensor) -> Tensor:
        powers = self._workspace(weight)
        if powers.dtype != weight.dtype:
            weight = powers.copy_(weight)
        if self.n == 2:
            return torch.mul(weight, weight, out=powers)
        torch.abs(weight, out=powers)
        return powers if self.n == 1 or math.isinf(self.n) else powers.pow_(self.n)

    def _workspace(self, like: Tensor) -> Tensor:
        """Memory for one weight at a time: fresh memory for each costs more than the arithmetic.

        Powers of a vector are the sums themselves, so they have memory of their own.
        """
        dtype = torch.float32 if like.dtype in (torch.float16, torch.bfloat16) else like.dtype
        if like.dim() == 1:
            return torch.empty(like.shape, dtype=dtype, device=like.device)
        key = (dtype, like.device)
        space = self._spaces.get(key)
        if space is None or space.numel() < like.numel():
            space = self._spaces[key] = torch.empty(like.numel(), dtype=dtype, device=like.device)
        return space[: like.numel()].view(like.shape)

    def _reduced(self, powers: Tensor, dim: int) -> Tensor:
        if powers.dim() == 1:
            return powers
        if math.isinf(self.n):
            return powers.amax([d for d in range(powers.dim()) if d != dim])
        if dim == 1:  # summing rows first keeps to the order of memory
            return powers.flatten(1).sum(0).view(powers.shape[1], math.prod(powers.shape[2:])).sum(1)
        return powers.movedim(dim, 0).reshape(powers.shape[dim], powers.numel() // max(powers.shape[dim], 1)).sum(1)


def _indices(member: Member, count: int, device: torch.device) -> tuple[Tensor, Tensor] | None:
    """Positions and channels of a member; None if index i goes with channel i, for each of `count` channels."""
    each = np.arange(count)
    if np.array_equal(member.positions, each) and np.array_equal(member.channels, each):
        return None
    return torch.from_numpy(member.positions).to(device), torch.from_numpy(member.channels).to(device)


@dataclass(frozen=True, slots=True)
class SliceNorm:
    """The Ln norm of each slice that goes with a channel, joined over the slices of the group.

    `LnNorm` is one norm over all slices; here each layer counts alike, however many weights it has.

    Args:
        n: the order of the norm, above 0; ``math.inf`` takes the largest entry.
        reduce: how the slices are joined: ``"mean"``, ``"sum"``, ``"max"``, ``"prod"`` or ``"first"``.
    """

    n: float = 2.0
    reduce: str = "mean"
    _norm: LnNorm = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        require({"n": self.n, "reduce": self.reduce}, n=ORDER, reduce=REDUCTION)
        object.__setattr__(self, "_norm", LnNorm(self.n))

    def __call__(self, group: Group, tensors: Mapping[str, Tensor]) -> Tensor:
        """Scores of shape ``(group.channels,)``."""
        parts: list[tuple[Tensor, Tensor]] = []
        for member in group.members:
            weight = tensors[member.tensor]
            if isinstance(weight, nn.Parameter) and weight.is_floating_point():
                one = Group(group.name, group.components, (member,))
                here = torch.zeros(group.channels, dtype=torch.bool)
                here[torch.from_numpy(member.channels)] = True
                parts.append((self._norm(one, tensors), here))
        return reduced(parts, self.reduce, group.channels)


@dataclass(frozen=True, slots=True)
class LAMP:
    """Layer-adaptive magnitude: a channel's squared norm over that of all channels of its group that are no smaller.

    Lee et al., Layer-Adaptive Sparsity for the Magnitude-based Pruning, 2021, with the squared L2 norm of
    everything that goes with a channel in place of a single squared weight. The largest channel of each group scores
    one, so that a global ranking leaves every group a channel. Channels of equal norm count each other.
    """

    _norm: LnNorm = field(default_factory=LnNorm, repr=False, compare=False)

    def __call__(self, group: Group, tensors: Mapping[str, Tensor]) -> Tensor:
        """Scores of shape ``(group.channels,)`` in [0, 1]."""
        squares = self._norm(group, tensors).double().square()
        return squares if squares.is_meta else tail_shares(squares)


def tail_shares(scores: Tensor) -> Tensor:
    """Each score over the sum of those that are no smaller.

    Example:
        >>> tail_shares(torch.tensor([1.0, 3.0, 6.0]))
        tensor([0.1000, 0.3333, 1.0000])
    """
    ordered, order = scores.sort()
    tails = ordered.flip(0).cumsum(0).flip(0)
    # The tail of equal values is that of the first of them.
    tails = tails[torch.searchsorted(ordered, ordered)]
    shares = torch.where(tails > 0, ordered / torch.where(tails > 0, tails, 1), 0)
    return torch.zeros_like(scores).index_copy_(0, order, shares)


NORMS = ("batch_norm", "instance_norm", "group_norm", "layer_norm", "rms_norm")


@dataclass(frozen=True, slots=True)
class NormScale(Unfitted):
    """Absolute value of the scale that a channel has in its batch norms.

    Liu et al., Learning Efficient Convolutional Networks through Network Slimming, 2017. It says something
    after training with an L1 penalty on the scales. The scales are found in the trace, as the weights of operations of
    these kinds, whatever module holds them.

    Args:
        kinds: of norms: ``"batch_norm"``, ``"instance_norm"``, ``"group_norm"``, ``"layer_norm"``, ``"rms_norm"``.
        reduce: how several norms on a group are joined: ``"mean"``, ``"sum"``, ``"max"``, ``"prod"`` or ``"first"``.
    """

    kinds: tuple[str, ...] = ("batch_norm",)
    reduce: str = "mean"

    def __post_init__(self) -> None:
        require({"reduce": self.reduce, "kinds": self.kinds}, reduce=REDUCTION, kinds=some_of(NORMS))

    def fit(self, graph: ChannelGraph, batches: Batches | None) -> Importance:
        """Find the scales of norms; no data is needed."""
        return _Scales(norm_scales(graph, self.kinds), self.reduce, ", ".join(self.kinds))


def _check_kinds(kinds: Iterable[str]) -> tuple[str, ...]:
    kinds = tuple(kinds)
    unknown = [kind for kind in kinds if kind not in NORMS]
    if unknown:
        raise PlanError(f"There is no norm {unknown[0]!r}. Those known are {', '.join(NORMS)}.")
    return kinds


def norm_scales(graph: ChannelGraph, kinds: Iterable[str]) -> frozenset[str]:
    """Names of the parameters that are the scale of a norm of these kinds.

    Raises:
        PlanError: there is no such kind.
    """
    kinds = _check_kinds(kinds)
    names: set[str] = set()
    for node in graph.trace.nodes:
        if node.meta["name"] in kinds:
            # Only the scale and the shift are parameters, in this order.
            held = [str(n.target) for n in tensors(node)[1:] if n.meta["name"] == "parameter"]
            parameters = [name for name in held if isinstance(_parameter(graph, name), nn.Parameter)]
            names.update(parameters[:1])
    return frozenset(names)


def _parameter(graph: ChannelGraph, name: str) -> Tensor:
    path, _, key = name.rpartition(".")
    return getattr(graph.model.get_submodule(path), key)


@dataclass(frozen=True, slots=True)
class _Scales:
    """Scores by the scales of the norms of these names."""

    names: frozenset[str]
    reduce: str
    kinds: str

    def __call__(self, group: Group, tensors: Mapping[str, Tensor]) -> Tensor:
        """Scores of shape ``(group.channels,)``."""
        parts = list(member_sums(group, lambda n: floating(tensors[n]).abs() if n in self.names else None))
        if not parts:
            raise PlanError(
                f"The channels of {group.name!r} have no scale of a norm of the kinds {self.kinds}. Name the layer in "
                "ignore=, give NormScale other kinds, or choose another criterion, such as 'l2'."
            )
        return reduced(parts, self.reduce, group.channels)


@dataclass(frozen=True, slots=True)
class Random:
    """Uniform random scores from a generator of its own: the baseline, and a way to test everything else.

    Args:
        seed: of the generator; the global random state is not touched.

    Example:
        >>> import torch, structprune
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> criteria = structprune.Random(seed=1), structprune.Random(seed=1)
        >>> first, second = (structprune.plan(model, torch.randn(1, 4), importance=each) for each in criteria)
        >>> first.removed == second.removed
        True
    """

    seed: int = 0
    _generator: torch.Generator = field(default_factory=torch.Generator, repr=False, compare=False)

    def __post_init__(self) -> None:
        require({"seed": self.seed}, seed=SEED)
        self._generator.manual_seed(self.seed)

    def __call__(self, group: Group, tensors: Mapping[str, Tensor]) -> Tensor:
        """Scores of shape ``(group.channels,)`` in [0, 1)."""
        return torch.rand(group.channels, generator=self._generator)

    def weight_scores(self, graph: ChannelGraph, batches: Batches | None) -> dict[str, Tensor]:
        """A score in [0, 1) for each weight; see `structprune.importance.base.WeightCriterion`."""
        return {name: torch.rand(w.shape, generator=self._generator) for name, w in graph.model.named_parameters()}


criterion("l1")(lambda: LnNorm(1.0))
criterion("l2")(lambda: LnNorm(2.0, root=False))
criterion("linf")(lambda: LnNorm(math.inf))
criterion("random")(Random)
criterion("lamp")(LAMP)
criterion("bn_scale")(NormScale)
