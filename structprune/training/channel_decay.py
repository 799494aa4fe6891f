"""Weight decay that is stronger for some channels than for others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from structprune.checking import Check, instance, real, require
from structprune.coupling.graph import ChannelGraph
from structprune.coupling.groups import Group
from structprune.training.channel_slices import GRAPH, NAMES, ChannelSlices, checked


def shrinkage(scores: Tensor, alpha: float = 4.0) -> Tensor:
    """How hard to pull at each channel of a group: from 1 for the most important to ``2 ** alpha`` for the least.

    Fang et al., DepGraph: Towards Any Structural Pruning, 2023 (section 3.3, sparse training): 2 to the power of alpha
    times the share of the range of scores that lies above the channel's.

    Args:
        scores: the importance of the channels of one group, shape ``(channels,)``.
        alpha: the exponent for the least important channel.

    Example:
        >>> import torch
        >>> shrinkage(torch.tensor([1.0, 3.0, 2.0]))
        tensor([16.,  1.,  4.])
    """
    require(locals(), scores=instance(Tensor, "give a tensor of scores"), alpha=real(least=0))
    return 2 ** (alpha * lack(scores))


def lack(scores: Tensor) -> Tensor:
    """For each channel the share of the range of scores that lies above its own; zero where all are equal."""
    most = scores.max()
    return (most - scores) / (most - scores.min()).clamp(min=torch.finfo(scores.dtype).tiny)


class ChannelDecay:
    """Weight decay with a strength for each channel: the gradient is the strength times the weights.

    Half the sum over all channels of the strength times the squares of everything that goes with the channel. With
    strengths by `shrinkage` it is the sparse training of Fang et al., DepGraph, 2023 (section 3.3): build it anew
    whenever the scores should be.

    Args:
        graph: the coupled channels of the model.
        strengths: for each group of ``graph.groups()`` to pull at, one a channel, shape ``(channels,)``.
        parameters: names of those that count; None for all.

    Raises:
        PlanError: there is nothing to penalise, or a group has another number of strengths than channels.

    Example:
        >>> import torch, structprune
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1))
        >>> from structprune.training import ChannelDecay, shrinkage
        >>> graph, weights = structprune.DependencyGraph(model, torch.randn(1, 2)), dict(model.named_parameters())
        >>> score = structprune.LnNorm(2)
        >>> strengths = {group: 1e-4 * shrinkage(score(group, weights).detach()) for group in graph.groups()}
        >>> loss = model(torch.randn(8, 2)).square().mean() + ChannelDecay(graph, strengths)(model)
        >>> loss.backward()
    """

    def __init__(
        self, graph: ChannelGraph, strengths: Mapping[Group, Tensor], parameters: Iterable[str] | None = None
    ) -> None:
        require(locals(), graph=GRAPH, strengths=_STRENGTHS, parameters=NAMES.or_none)
        self._slices = ChannelSlices(graph, strengths, None if parameters is None else frozenset(parameters))
        self._strengths = torch.cat([each.detach().cpu() for each in strengths.values()])

    def __call__(self, model: nn.Module) -> Tensor:
        """The penalty, a scalar.

        Raises:
            PlanError: the model was pruned since, or is another.
        """
        parameters = checked(model, self._slices.shapes, "DependencyGraph")
        squares = self._slices.sums({name: value.square() for name, value in parameters.items()})
        return 0.5 * (self._strengths.to(squares.device, squares.dtype) * squares).sum()


_STRENGTHS = Check(
    lambda value: (
        isinstance(value, Mapping)
        and bool(value)
        and all(isinstance(group, Group) for group in value)
        and all(isinstance(each, Tensor) and each.shape == (group.channels,) for group, each in value.items())
    ),
    "give a dict of a tensor of one strength a channel for each group",
)
