"""Criteria made of criteria: sums, products, normalisation in each layer, a price on what a channel costs.

Each fits its parts on the same data, which therefore must be something that can be run through several times.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from structprune.checking import one_of, real, require, several, shown
from structprune.coupling.costs import node_macs
from structprune.coupling.graph import ChannelGraph
from structprune.coupling.groups import Group
from structprune.coupling.solve import Components
from structprune.errors import PlanError
from structprune.importance.base import Fittable, Importance, check_scores, importance_of
from structprune.importance.data import Batches
from structprune.ops.relations import Axis, Ids

Part = str | Importance


def _fit(part: Importance, graph: ChannelGraph, batches: Batches | None) -> Importance:
    return part.fit(graph, batches) if isinstance(part, Fittable) else part


def _scores(part: Importance, group: Group, tensors: Mapping[str, Tensor]) -> Tensor:
    return check_scores(part(group, tensors), group).double()


@dataclass(frozen=True)
class Sum:
    """A weighted sum of criteria: of their scores as they are, so normalise them by `PerLayer` if they differ in scale.

    Args:
        parts: names or criteria.
        weights: a factor for each; one if not given.

    Raises:
        PlanError: there are no parts, or another number of weights.

    Example:
        >>> Sum([PerLayer("l2", "mean"), PerLayer("bn_scale", "mean")], weights=[1.0, 0.5]).weights
        (1.0, 0.5)
    """

    parts: Sequence[Part]
    weights: Sequence[float] | None = None

    def __post_init__(self) -> None:
        require({"weights": self.weights}, weights=NUMBERS.or_none)
        object.__setattr__(self, "parts", _all(self.parts))
        weights = tuple(self.weights) if self.weights is not None else (1.0,) * len(self.parts)
        if len(weights) != len(self.parts):
            raise PlanError(f"There are {len(self.parts)} criteria to add and {len(weights)} weights; give one each.")
        object.__setattr__(self, "weights", weights)

    def fit(self, graph: ChannelGraph, batches: Batches | None) -> Importance:
        """Fit all parts."""
        return Sum([_fit(importance_of(part), graph, batches) for part in self.parts], self.weights)

    def __call__(self, group: Group, tensors: Mapping[str, Tensor]) -> Tensor:
        """Scores of shape ``(group.channels,)``."""
        scores = [_scores(importance_of(part), group, tensors) for part in self.parts]
        return torch.stack([w * s.cpu() for w, s in zip(self.weights or (), scores, strict=True)]).sum(0)


@dataclass(frozen=True)
class Product:
    """A product of criteria, each to a power.

    Args:
        parts: names or criteria.
        powers: an exponent for each; one if not given. Scores below zero need whole powers.

    Raises:
        PlanError: there are no parts, or another number of powers.
    """

    parts: Sequence[Part]
    powers: Sequence[float] | None = None

    def __post_init__(self) -> None:
        require({"powers": self.powers}, powers=NUMBERS.or_none)
        object.__setattr__(self, "parts", _all(self.parts))
        powers = tuple(self.powers) if self.powers is not None else (1.0,) * len(self.parts)
        if len(powers) != len(self.parts):
            raise PlanError(f"There are {len(self.parts)} criteria and {len(powers)} powers; give one for each.")
        object.__setattr__(self, "powers", powers)

    def fit(self, graph: ChannelGraph, batches: Batches | None) -> Importance:
        """Fit all parts."""
        return Product([_fit(importance_of(part), graph, batches) for part in self.parts], self.powers)

    def __call__(self, group: Group, tensors: Mapping[str, Tensor]) -> Tensor:
        """Scores of shape ``(group.channels,)``."""
        scores = [_scores(importance_of(part), group, tensors) for part in self.parts]
        return torch.stack([s.cpu() ** p for p, s in zip(self.powers or (), scores, strict=True)]).prod(0)


def _all(parts: Sequence[Part]) -> tuple[Importance, ...]:
    """The criteria themselves, so that one given by name keeps its state from group to group."""
    if not isinstance(parts, (tuple, list)) or not parts:
        raise PlanError(f"parts is {shown(parts)}; give a list of criteria, one or more, by name or as objects.")
    return tuple(importance_of(part, "one of parts") for part in parts)


def _ranks(scores: Tensor) -> Tensor:
    """The share of channels below, with half of those that are equal: in (0, 1)."""
    ordered = scores.sort().values
    below = torch.searchsorted(ordered, scores, side="left")
    upto = torch.searchsorted(ordered, scores, side="right")
    return (below + upto).double() / (2 * len(scores))


def _over(scores: Tensor, scale: Tensor) -> Tensor:
    return scores / torch.where(scale > 0, scale, 1)


NUMBERS = several(real(), "numbers")
SCALES: dict[str, Callable[[Tensor], Tensor]] = {
    "l2": lambda s: torch.linalg.vector_norm(s),
    "mean": lambda s: s.abs().mean(),
    "max": lambda s: s.abs().max(),
}
OTHERS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda s: s,
    "rank": _ranks,
    "standard": lambda s: _over(s - s.mean(), s.std(correction=0)),
}


@dataclass(frozen=True)
class PerLayer:
    """Scores divided by what is usual in their group, so that groups can be compared.

    The global scope takes the result as it is, and does not divide it by each group's mean once more.

    Args:
        part: a name or a criterion.
        how: ``"l2"``: the L2 norm of the group's scores, as Molchanov et al., 2017, require for a global
            ranking; ``"mean"`` or ``"max"`` of their absolute values; ``"rank"``: the share of channels that score
            lower; ``"standard"``: mean zero and deviation one, as FLAP does; ``"none"``: the scores
            as they are, for criteria whose scores of all groups are in one unit.
        power: of the L2 norm, mean or maximum by which scores are divided: 1 makes all groups alike, 0 changes
            nothing, and between them groups with large scores keep a part of their lead.

    Raises:
        PlanError: there is no such normalisation.
    """

    part: Part
    how: str = "l2"
    power: float = 1.0
    comparable = True

    def __post_init__(self) -> None:
        require({"how": self.how, "power": self.power}, how=one_of((*SCALES, *OTHERS)), power=real())
        object.__setattr__(self, "part", importance_of(self.part, "part"))
        if self.power != 1 and self.how in OTHERS:
            raise PlanError(f"power is {self.power}, but {self.how!r} divides by nothing that it could apply to.")

    def fit(self, graph: ChannelGraph, batches: Batches | None) -> Importance:
        """Fit the criterion that is normalised."""
        return PerLayer(_fit(importance_of(self.part), graph, batches), self.how, self.power)

    def __call__(self, group: Group, tensors: Mapping[str, Tensor]) -> Tensor:
        """Scores of shape ``(group.channels,)``."""
        scores = _scores(importance_of(self.part), group, tensors)
        if self.how in OTHERS:
            return OTHERS[self.how](scores)
        return _over(scores, SCALES[self.how](scores) ** self.power)


@dataclass(frozen=True)
class CostPenalty:
    """A score minus a price on the multiply-accumulates that go with the channel.

    Molchanov et al., 2017 (FLOPs regularised pruning): ``score - price * MACs``. The global scope takes the scores as
    they are, so normalise those of `part` by `PerLayer` if they differ in scale. The MACs are those that
    removing this channel alone saves, in units of the whole model's, so that `price` does not depend on its size.

    Args:
        part: a name or a criterion.
        price: how much score the whole model's MACs are worth.
    """

    part: Part
    price: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "part", importance_of(self.part))

    def fit(self, graph: ChannelGraph, batches: Batches | None) -> Importance:
        """Fit the criterion, and count what channels cost."""
        return _Priced(_fit(importance_of(self.part), graph, batches), macs_of_channels(graph) * self.price)

    def __call__(self, group: Group, tensors: Mapping[str, Tensor]) -> Tensor:
        """Always raises: what a channel costs is known after `fit`."""
        raise PlanError("CostPenalty has to see the graph first: call fitted(criterion, graph, data, loss).")


@dataclass(frozen=True, eq=False)
class _Priced:
    part: Importance
    prices: Tensor
    comparable = True

    def __call__(self, group: Group, tensors: Mapping[str, Tensor]) -> Tensor:
        """Scores of shape ``(group.channels,)``."""
        return _scores(self.part, group, tensors).cpu() - self.prices[torch.from_numpy(group.components)]


def macs_of_channels(graph: ChannelGraph) -> Tensor:
    """For each component, the share of the model's MACs that removing it alone saves; shape ``(components,)``.

    Channels of a group that are alike in an operation are counted once for all of them; no channel is counted by a
    loop of its own.
    """
    saved = np.zeros(graph.components.count)
    total = 0
    known: dict[object, tuple[Ids, Ids]] = {}
    for node in graph.trace.nodes:
        axes: dict[object, Axis] = {}

        def full(axis: Axis, axes: dict[object, Axis] = axes) -> int:
            if axis.free:
                axes[axis.key] = axis
            return axis.size

        macs = node_macs(node, graph.channels, full)
        total += macs
        if not macs or not axes:
            continue
        counts = {key: _multiplicity(graph, axis, known) for key, axis in axes.items()}
        roots = np.unique(np.concatenate([these for these, _ in counts.values()]))
        # How many positions of each axis each root takes; roots that take alike cost alike.
        table = np.zeros((len(axes), len(roots)), dtype=np.int64)
        for i, (these, number) in enumerate(counts.values()):
            table[i, np.searchsorted(roots, these)] = number
        kinds, inverse = np.unique(table, axis=1, return_inverse=True)
        for kind in range(kinds.shape[1]):
            taken = dict(zip(axes, kinds[:, kind].tolist(), strict=True))
            left = node_macs(node, graph.channels, partial(_left, taken=taken))
            saved[roots[inverse.ravel() == kind]] += macs - left
    return torch.from_numpy(saved / max(1, total))


def _left(axis: Axis, taken: Mapping[object, int]) -> int:
    return axis.size - taken.get(axis.key, 0) if axis.free else axis.size


def _multiplicity(graph: ChannelGraph, axis: Axis, known: dict[object, tuple[Ids, Ids]]) -> tuple[Ids, Ids]:
    """The roots in an axis, and how many positions each takes."""
    counted = known.get(axis.key)
    if counted is None:
        components: Components = graph.components
        _, roots = graph.roots.of(components.of(axis))
        roots = roots[components.roots[roots]]
        counted = known[axis.key] = np.unique(roots, return_counts=True)
    return counted
