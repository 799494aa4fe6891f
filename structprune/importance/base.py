"""What a criterion is, and how one is found by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from structprune.checking import Check, function, one_of, require
from structprune.coupling.graph import ChannelGraph
from structprune.coupling.groups import Group, Member
from structprune.distributed import failing_together
from structprune.errors import PlanError
from structprune.importance.data import Batches, Forward, Loss


@runtime_checkable
class Importance(Protocol):
    """Gives each channel of a group a score: the lower, the sooner it goes.

    A criterion sees tensors and index arrays only, so that a new kind of layer needs no change here.
    """

    def __call__(self, group: Group, tensors: Mapping[str, Tensor]) -> Tensor:
        """Scores of shape ``(group.channels,)``.

        Args:
            group: the channels; ``group.members`` says which slices of which tensors each takes along.
            tensors: the tensors of the model by name.
        """
        ...


@runtime_checkable
class Fittable(Importance, Protocol):
    """A criterion that has to see the graph, and perhaps data, before it can score."""

    def fit(self, graph: ChannelGraph, batches: Batches | None) -> Importance:
        """What scores the groups of `graph`; the criterion itself and the model stay as they were.

        Raises:
            PlanError: data or a loss is needed and missing, or does not fit the model.
        """
        ...


@runtime_checkable
class WeightCriterion(Protocol):
    """A criterion that has a score for each single weight too."""

    def weight_scores(self, graph: ChannelGraph, batches: Batches | None) -> dict[str, Tensor]:
        """By the names of parameters, a score for each entry: the lower, the sooner it goes.

        Raises:
            PlanError: data or a loss is needed and missing, or does not fit the model.
        """
        ...


_IMPORTANCE = function("group", "tensors")
CRITERIA: dict[str, Callable[[], Importance]] = {}


def criterion(name: str) -> Callable[[Callable[[], Importance]], Callable[[], Importance]]:
    """Register a criterion under `name`; the decorated function makes it."""

    def register(make: Callable[[], Importance]) -> Callable[[], Importance]:
        if name in CRITERIA:
            raise PlanError(f"There is a criterion named {name!r} already. Choose another name.")
        CRITERIA[name] = make
        return make

    return register


def importance_of(chosen: str | Importance, argument: str = "importance") -> Importance:
    """The criterion of this name; an object that is one is returned as it is.

    Args:
        chosen: a name or a criterion.
        argument: what it was given for, for the message.

    Raises:
        PlanError: there is no such criterion.
    """
    if not isinstance(chosen, str):
        if not _IMPORTANCE.fits(chosen):
            raise PlanError(
                f"{argument} is a {type(chosen).__name__}; give a name or a callable of a group and tensors."
            )
        return chosen
    if chosen not in CRITERIA:
        known = ", ".join(sorted(CRITERIA))
        raise PlanError(f"There is no criterion {chosen!r}, which {argument} names. Those known are {known}.")
    return CRITERIA[chosen]()


def fitted(
    importance: str | Importance,
    graph: ChannelGraph,
    data: Iterable[Any] | Batches | None = None,
    loss: Loss | None = None,
    forward: Forward | None = None,
) -> Importance:
    """A criterion that is ready to score the groups of `graph`.

    Args:
        importance: a name or a criterion.
        graph: the coupled channels of the model.
        data: an iterable of batches, or `Batches`; only criteria that look at data need it.
        loss: called with the model and a batch; returns a scalar.
        forward: called with the model and a batch; by default the model is called on the batch.

    Raises:
        PlanError: there is no such criterion; data or a loss is needed and missing, or does not fit the model; or
            another rank of ``torch.distributed``, where it is in use, has failed.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1))
        >>> graph = ChannelGraph(model, torch.randn(1, 2))
        >>> score = fitted("activation_mean", graph, data=[torch.randn(8, 2)])
        >>> score(graph.groups()[0], dict(model.named_parameters())).shape
        torch.Size([3])
    """
    chosen = importance_of(importance)
    if not isinstance(chosen, Fittable):
        return chosen
    if isinstance(data, Batches) and (loss is not None or forward is not None):
        raise PlanError("data is Batches, which hold loss and forward; give them there.")
    if data is None:
        return chosen.fit(graph, None)
    with failing_together(PlanError, f"fitting {type(chosen).__name__}"):
        return chosen.fit(graph, data if isinstance(data, Batches) else Batches(data, forward, loss))


def comparable(importance: Importance) -> bool:
    """Whether the criterion says that its scores of all groups are in one unit: by an attribute ``comparable``."""
    return bool(getattr(importance, "comparable", False))


class Unfitted:
    """A criterion that has to see the graph, and perhaps data, before it can score: `Fittable.fit` gives what does."""

    __slots__ = ()

    def __call__(self, group: Group, tensors: Mapping[str, Tensor]) -> Tensor:
        """Always raises: this criterion has to be fitted first."""
        raise PlanError(
            f"{type(self).__name__} has to see the model's graph, and perhaps data, before it can score. Call "
            "structprune.importance.base.fitted(criterion, graph, data, loss) first, or leave that to plan and prune."
        )


def check_scores(scores: Tensor, group: Group) -> Tensor:
    """`scores`, after checking that they are finite and one a channel."""
    given: object = scores
    if not isinstance(given, Tensor):
        raise PlanError(f"importance gave a {type(given).__name__} for {group.name}; it must give a tensor of scores.")
    if tuple(scores.shape) != (group.channels,):
        raise PlanError(
            f"The criterion that importance names gave scores of shape {list(scores.shape)} for {group.name}, of "
            f"{group.channels} channels. It must give one score a channel."
        )
    if scores.is_meta:
        raise PlanError(
            f"The weights of {group.name} are on the meta device and have no values to rank. Load real weights, or "
            "plan with importance='random', or with a callable that needs none."
        )
    if not bool(torch.isfinite(scores).all()):
        raise PlanError(
            f"The criterion that importance names gave scores for {group.name} that are not finite. Are its weights?"
        )
    return scores


# -- from entries of tensors and positions of sites to one score a channel -------------------------------------------

REDUCTIONS = ("sum", "mean", "max", "prod", "first")


REDUCTION: Check = one_of(REDUCTIONS)


def reduced(parts: Sequence[tuple[Tensor, Tensor]], how: str, channels: int) -> Tensor:
    """One score a channel from several.

    Args:
        parts: pairs of scores, shape ``(channels,)``, and whether each channel has one there, same shape.
        how: ``"sum"``, ``"mean"``, ``"max"``, ``"prod"`` or ``"first"``, over those parts that have a score.
        channels: how many there are.

    Example:
        >>> import torch
        >>> here = torch.tensor([True, True])
        >>> reduced([(torch.tensor([1.0, 2.0]), here), (torch.tensor([5.0, 0.0]), here)], "max", 2)
        tensor([5., 2.])
    """
    require(locals(), how=REDUCTION)
    if not parts:
        return torch.zeros(channels)
    device, kind = parts[0][0].device, parts[0][0].dtype
    scores = torch.stack([score.to(device, kind) for score, _ in parts])
    here = torch.stack([present.to(device) for _, present in parts])
    if how == "max":
        best = scores.masked_fill(~here, -torch.inf).amax(0)
        return torch.where(here.any(0), best, 0)
    if how == "prod":
        return torch.where(here.any(0), scores.masked_fill(~here, 1).prod(0), 0)
    if how == "first":
        first = here.to(torch.uint8).argmax(0, keepdim=True)
        return torch.where(here.any(0), scores.gather(0, first)[0], 0)
    total = scores.masked_fill(~here, 0).sum(0)
    return total / here.sum(0).clamp(min=1) if how == "mean" else total


def gathered(
    values: Tensor, positions: Tensor, channels: Tensor, count: int, *, mean: bool = False
) -> tuple[Tensor, Tensor]:
    """Sum (or mean) of `values` at the positions of each channel, and which channels have any."""
    number = torch.bincount(channels, minlength=count)
    total = torch.zeros(count, dtype=values.dtype, device=values.device).index_add_(0, channels, values[positions])
    return (total / number.clamp(min=1).to(total.dtype) if mean else total), number > 0


def indices(member: Member, device: torch.device) -> tuple[Tensor, Tensor]:
    """Positions and channels of a member as tensors."""
    return torch.from_numpy(member.positions).to(device), torch.from_numpy(member.channels).to(device)


def along(entries: Tensor, dim: int) -> Tensor:
    """Sum over all dimensions but `dim`."""
    return entries.movedim(dim, 0).flatten(1).sum(1) if entries.dim() > 1 else entries


def member_sums(group: Group, entries: Callable[[str], Tensor | None]) -> Iterator[tuple[Tensor, Tensor]]:
    """For each member, the sum over each channel's slice of the entries, and which channels have a slice.

    Args:
        group: the channels.
        entries: entries of the tensor of this name, in its shape; None to leave it out.
    """

    def sums(name: str, dim: int) -> Tensor | None:
        values = entries(name)
        return None if values is None else along(values, dim)

    return member_scores(group, sums)


def member_scores(group: Group, scores: Callable[[str, int], Tensor | None]) -> Iterator[tuple[Tensor, Tensor]]:
    """For each member, the sum over each channel's indices of the scores of these, and which channels have any.

    Args:
        group: the channels.
        scores: for the name of a tensor and a dimension, a score for each index; None to leave it out.
    """
    for member in group.members:
        values = scores(member.tensor, member.dim)
        if values is not None:
            positions, channels = indices(member, values.device)
            yield gathered(values, positions, channels, group.channels)


def padded(positions: Tensor, channels: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The positions of each channel as a rectangle, shape ``(count, most)``, and which of its entries are real."""
    order = torch.argsort(channels, stable=True)
    number = torch.bincount(channels, minlength=count)
    start = torch.cumsum(number, 0) - number
    rank = torch.arange(len(order), device=order.device) - start[channels[order]]
    most = int(number.max()) if len(order) else 0
    table = torch.zeros(count, most, dtype=torch.int64, device=positions.device)
    real = torch.zeros(count, most, dtype=torch.bool, device=positions.device)
    table[channels[order], rank] = positions[order]
    real[channels[order], rank] = True
    return table, real


def floating(weight: Tensor) -> Tensor:
    """`weight` without gradient, in float32 if it is narrower."""
    weight = weight.detach()
    return weight.float() if weight.dtype in (torch.float16, torch.bfloat16) else weight
