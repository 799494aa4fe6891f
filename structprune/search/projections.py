"""Projections: from dense weights to the nearest compressed ones; schemes bound to a model.

A projection sees parameters by name and gives those that it compresses. So it serves an augmented Lagrangian, which
projects what is no network's weights, as well as the weights themselves.

For example, a layer of 4 weights at a density of 0.5::

    values      {"0.weight": [[3, -1], [0.5, 2]], "0.bias": [...]}
    compressed  {"0.weight": [[3, 0], [0, 2]]}
    support     {"0.weight": [[True, False], [False, True]]}
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from structprune.api import decide
from structprune.coupling.graph import ChannelGraph
from structprune.coupling.groups import Group
from structprune.dependency_graph import DependencyGraph
from structprune.errors import PlanError
from structprune.importance.base import Fittable, Importance, importance_of
from structprune.importance.weight import SliceNorm
from structprune.masks.saliency import Saliency
from structprune.planning.build import plan_removal, tensors_of
from structprune.planning.options import PlanOptions
from structprune.search.layer_types import cast_layers, chosen_layers, is_chosen, require_matches
from structprune.surgery.reference import norms_over_kept, weights_kept
from structprune.surgery.slicing import zero
from structprune.tracing.state import collection_paused
from structprune.tracing.trace import ExampleInputs

Values = Mapping[str, Tensor]
# Criteria that are the norm of a filter: of several layers that make a channel, the mean of theirs.
FILTER_NORMS = {"l1": 1.0, "l2": 2.0, "linf": math.inf}
# Channels that may go one by one; heads and positions in them are factors of products.
_AXES = ("channels", "mlp", "hidden")


class Projection(Protocol):
    """A scheme on the parameters of a model."""

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters that it compresses."""
        ...

    def compressed(self, values: Values) -> dict[str, Tensor]:
        """The nearest compressed values of the parameters in `names`, in the type that they have.

        Args:
            values: of all parameters, by name; they stay as they were.
        """
        ...

    def support(self, values: Values) -> dict[str, Tensor]:
        """Where the compressed values may differ from zero; without the parameters that may everywhere."""
        ...

    def realised(self, model: nn.Module) -> nn.Module:
        """The model, whose values are compressed ones, in the form in which they are held; changed in place."""
        ...


def values_of(model: nn.Module) -> dict[str, Tensor]:
    """The parameters of a model by name, each tied one once; the live tensors."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@torch.no_grad()
def fill(model: nn.Module, values: Values) -> None:
    """Write values into the parameters of a model, in place; those that are not named stay."""
    parameters = dict(model.named_parameters())
    for name, value in values.items():
        parameters[name].copy_(value)


class _Masking:
    """A projection that sets some entries to zero."""

    names: tuple[str, ...]

    def support(self, values: Values) -> dict[str, Tensor]:
        """Which entries stay."""
        raise NotImplementedError

    def compressed(self, values: Values) -> dict[str, Tensor]:
        """The values with zeros where an entry goes."""
        kept = self.support(values)
        return {name: values[name] * kept[name] if name in kept else values[name].clone() for name in self.names}

    def realised(self, model: nn.Module) -> nn.Module:
        """The model itself: zeros are dense weights."""
        return model


class Weights(_Masking):
    """The largest weights of linear layers and convolutions stay; see `structprune.search.Prune`."""

    def __init__(self, model: nn.Module, layers: tuple[str, ...], ignore: tuple[str, ...], density: float) -> None:
        self.names = _weights(model, layers, ignore)
        self._density = density

    def support(self, values: Values) -> dict[str, Tensor]:
        """The largest absolute values over all layers; of equal ones the first."""
        scores = Saliency({name: values[name].abs() for name in self.names})
        return dict(scores.mask(_going(self._density, sum(values[name].numel() for name in self.names))))


class Blocks(_Masking):
    """The blocks of the largest norms stay; see `structprune.search.BlockPrune`."""

    def __init__(
        self,
        model: nn.Module,
        layers: tuple[str, ...],
        ignore: tuple[str, ...],
        density: float,
        size: tuple[int, ...],
        criterion: str,
    ) -> None:
        shapes = {name: tuple(values_of(model)[name].shape) for name in _weights(model, layers, ignore)}
        self.names = tuple(name for name, shape in shapes.items() if len(shape) == len(size))
        if not self.names:
            raise PlanError(f"block_size is {size}, and no layer has a weight of {len(size)} dimensions.")
        for name in self.names:
            if any(length % step for length, step in zip(shapes[name], size, strict=True)):
                raise PlanError(
                    f"block_size is {size}, and {name!r} of shape {list(shapes[name])} is no whole number of blocks. "
                    "Name the layer in ignore=, or give another size."
                )
        self._density, self._size, self._criterion = density, size, criterion

    def support(self, values: Values) -> dict[str, Tensor]:
        """The blocks of the largest norms over all layers; of equal ones the first."""
        norms = Saliency({name: self._norms(values[name]) for name in self.names})
        count = sum(tensor.numel() for tensor in norms.values())
        kept = norms.mask(_going(self._density, count))
        return {name: self._spread(kept[name]) for name in self.names}

    def _norms(self, weight: Tensor) -> Tensor:
        """A norm for each block: a weight (8, 4) in blocks of (2, 4) gives (4, 1)."""
        dims = weight.dim()
        steps = [n for length, step in zip(weight.shape, self._size, strict=True) for n in (length // step, step)]
        entries = weight.reshape(steps).abs()  # (4, 2, 1, 4): how many blocks, and how large, by turns
        inside = [2 * dim + 1 for dim in range(dims)]
        if self._criterion == "linf":
            return entries.amax(inside)
        return entries.sum(inside) if self._criterion == "l1" else entries.square().sum(inside).sqrt()

    def _spread(self, kept: Tensor) -> Tensor:
        for dim, step in enumerate(self._size):
            kept = kept.repeat_interleave(step, dim)
        return kept


class Rounding:
    """Values that a narrow type can say; see `structprune.search.Quantize`."""

    def __init__(self, model: nn.Module, layers: tuple[str, ...], ignore: tuple[str, ...], dtype: torch.dtype) -> None:
        self._paths = tuple(chosen_layers(model, layers, ignore))
        self._dtype = dtype
        inside = {path: f"{path}." if path else "" for path in self._paths}
        parameters = values_of(model)
        self.names = tuple(
            f"{start}{key}"
            for path, start in inside.items()
            for key in model.get_submodule(path)._parameters
            if f"{start}{key}" in parameters
        )

    def compressed(self, values: Values) -> dict[str, Tensor]:
        """The nearest values of the narrow type; what is beyond its range becomes its largest."""
        most = torch.finfo(self._dtype).max
        return {name: values[name].clamp(-most, most).to(self._dtype).to(values[name].dtype) for name in self.names}

    def support(self, values: Values) -> dict[str, Tensor]:
        """Nothing is zero."""
        return {}

    def realised(self, model: nn.Module) -> nn.Module:
        """The layers in the narrow type."""
        return cast_layers(model, self._paths, self._dtype)


@dataclass(frozen=True)
class Sequential:
    """Projections one after the other; see `structprune.search.Compose`."""

    projections: tuple[Projection, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Those of all of them."""
        return tuple(dict.fromkeys(name for each in self.projections for name in each.names))

    def compressed(self, values: Values) -> dict[str, Tensor]:
        """Each on what those before it gave."""
        projected: dict[str, Tensor] = {}
        for each in self.projections:
            projected |= each.compressed({**values, **projected})
        return projected

    def support(self, values: Values) -> dict[str, Tensor]:
        """What none of them sets to zero."""
        together: dict[str, Tensor] = {}
        held = dict(values)
        for each in self.projections:
            for name, kept in each.support(held).items():
                together[name] = together[name] & kept if name in together else kept
            held |= each.compressed(held)
        return together

    def realised(self, model: nn.Module) -> nn.Module:
        """Each in its form."""
        for each in self.projections:
            model = each.realised(model)
        return model


def _weights(model: nn.Module, layers: tuple[str, ...], ignore: tuple[str, ...]) -> tuple[str, ...]:
    """The weights of the layers that are chosen, each tied one once."""
    names = [f"{path}.weight".lstrip(".") for path in chosen_layers(model, layers, ignore)]
    parameters = values_of(model)
    return tuple(name for name in names if name in parameters)


def _going(density: float, count: int) -> int:
    """How many of `count` go; one stays at least."""
    return count - max(1, round(density * count))


# -- coupled channels ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _OneThreshold:
    """Scores of channels that are compared over all groups.

    Attributes:
        score: the criterion.
        places: dimensions of tensors that it sees; None for all.
        comparable: whether as they are; if not, over their mean in the group.
    """

    score: Importance
    places: frozenset[tuple[str, int]] | None
    comparable: bool

    def __call__(self, group: Group, tensors: Mapping[str, Tensor]) -> Tensor:
        """Scores of shape ``(group.channels,)``."""
        if self.places is not None:
            members = tuple(m for m in group.members if (m.tensor, m.dim) in self.places)
            group = replace(group, members=members)
        return self.score(group, tensors)


def _one_threshold(criterion: str | Importance, graph: ChannelGraph, relative: bool) -> Importance:
    """A criterion whose scores are compared over all groups; norms are those of the filters alone."""
    if isinstance(criterion, str) and criterion in FILTER_NORMS:
        return _OneThreshold(SliceNorm(FILTER_NORMS[criterion]), graph.roles.producers, not relative)
    chosen = importance_of(criterion, "criterion")
    return _OneThreshold(chosen.fit(graph, None) if isinstance(chosen, Fittable) else chosen, None, not relative)


class Channels(_Masking):
    """The coupled channels of the highest scores stay; see `structprune.search.FilterPrune`.

    Attributes:
        left: why groups of channels that are meant stay whole, by name.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: ExampleInputs,
        layers: tuple[str, ...],
        ignore: tuple[str, ...],
        density: float,
        *,
        kinds: tuple[str, ...],
        align: int | None,
        criterion: str | Importance,
        relative: bool,
        bias: bool,
    ) -> None:
        require_matches(model, layers, ignore)
        self._graph = DependencyGraph(model, example_inputs)
        self._layers, self._ignore, self._kinds, self._bias = layers, ignore, kinds, bias
        self.left: dict[str, str] = {}
        self._parameters = frozenset(values_of(model))
        self._chosen: dict[bytes, bool] = {}
        groups = [group for group in self._graph.groups() if self._goes(group)]
        if not groups:
            reasons = "".join(f" {name}: {why}." for name, why in [*self.left.items()][:3])
            raise PlanError(f"layers and ignore leave no {' or '.join(kinds)} that may go.{reasons}")
        self._options = PlanOptions(
            ratio=lambda group: 1 - density if self._goes(group) else 0.0,
            scope="global",
            importance=_one_threshold(criterion, self._graph, relative),
            round_to=align or 1,
            uniform=False,
        )
        self.names = tuple(dict.fromkeys(m.tensor for group in groups for m in group.members if self._zeroes(m)))

    def _zeroes(self, place: Any) -> bool:
        """Whether a slice of this dimension of a tensor is set to zero with its channel."""
        known = place.tensor in self._parameters
        return known and (self._bias or (place.tensor, place.dim) in self._graph.roles.producers)

    def _goes(self, group: Group) -> bool:
        """Whether the channels of a group may go by this scheme."""
        key = group.components.tobytes()
        if key not in self._chosen:
            self._chosen[key] = self._meant(group) and self._may_go(group)
        return self._chosen[key]

    def _meant(self, group: Group) -> bool:
        """Whether all layers that make the channels are named, and make channels of the kinds that are meant."""
        roles = self._graph.roles
        makers = roles.makers(group)
        layers = [tensor.rpartition(".")[0] for tensor in makers]
        kinds = {_kind(self._graph, tensor) for tensor in makers}
        return (
            group.axis in _AXES
            and kinds <= {*self._kinds}
            and all(is_chosen(layer, self._layers, self._ignore) for layer in layers)
        )

    def _may_go(self, group: Group) -> bool:
        """Whether the others stay what they are without one of the channels."""
        removed = self._graph.components.removed(group.components[:1])
        if any(norms_over_kept(self._graph, removed)):
            self.left[group.name] = "a norm or a mean runs over its channels"
        elif any(weights_kept(self._graph, removed)) or any(
            member.tensor not in self._parameters and ".parametrizations." in member.tensor for member in group.members
        ):
            self.left[group.name] = "its weights are computed from others"
        return group.name not in self.left

    def support(self, values: Values) -> dict[str, Tensor]:
        """The channels of the highest scores over all groups."""
        # Criteria know weights by their class, and each by its identity.
        given = {name: nn.Parameter(values[name].detach(), requires_grad=False) for name in self._parameters}
        decision = decide(self._graph, self._options, tensors={**tensors_of(self._graph), **given})
        with collection_paused(), torch.no_grad():
            plan = plan_removal(self._graph, decision.chosen, decision.settings, config=False)
        kept = {name: torch.ones_like(values[name], dtype=torch.bool) for name in self.names}
        for sliced in plan.slices:
            if sliced.tensor in kept and self._zeroes(sliced):
                zero(kept[sliced.tensor], sliced, value=False)
        return kept


def _kind(graph: ChannelGraph, tensor: str) -> str:
    """Which kind of channels a tensor makes: filters, neurons, or others (rows of a table, say)."""
    if tensor in graph.roles.kernels:
        return "filters"
    return "neurons" if (tensor, 0) in graph.roles.weights or (tensor, 1) in graph.roles.weights else "others"
