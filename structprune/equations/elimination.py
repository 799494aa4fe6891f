"""The order in which channels are missed least, if the layers that consume them are solved again.

What is made least is the change of a layer's result, ``(W' - W)^T (x^T x + ridge) (W' - W)``: the ridge pulls towards
the weights as they were, not towards zero. A layer of 4,608 features on 2,000 positions keeps what its weights do along
the other 2,608 directions, of which these data say nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

ELIMINATION_RIDGE = 1e-4


@dataclass(slots=True)
class ConsumerMoments:
    """What elimination needs of one layer that consumes the channels of a group.

    For a consumer with a weight of shape (5, 4, 3, 3) there are 4 * 9 = 36 features and the intercept. Where the group
    is its 4 input channels, `places` has shape (4, 9), and ``places[1]`` is 9, 10, ..., 17.

    Attributes:
        xx: second moments of its features, with the intercept last, shape ``(features + 1, features + 1)``.
        matrix: its weight as a matrix, with a last row of zeros for the intercept, shape ``(features + 1, outputs)``.
        places: the features that each channel of the group makes, shape ``(channels, features of a channel)``.
    """

    xx: Tensor
    matrix: Tensor
    places: Tensor

    def penalised(self) -> Tensor:
        """`xx` with a small ridge, so that it has an inverse."""
        diagonal = self.xx.diagonal()
        penalty = ELIMINATION_RIDGE * (diagonal + 1e-2 * diagonal.mean())
        penalty[-1] = 1e-10 * diagonal.mean()
        return self.xx + torch.diag(penalty)

    def power(self) -> Tensor:
        """Sum of squares of the consumer's result about its mean, shape ``()``."""
        mean = self.xx[-1] @ self.matrix / self.xx[-1, -1]
        return ((self.matrix * (self.xx @ self.matrix)).sum(0) - self.xx[-1, -1] * mean.square()).sum().clamp_min(0)

    def change(self, removed: Tensor) -> Tensor:
        """What to add to `matrix`, in its shape, so that the result changes least without the channels `removed`."""
        gone = self.places[removed].flatten()
        kept = torch.ones(len(self.xx), dtype=torch.bool, device=self.xx.device)
        kept[gone] = False
        change = torch.zeros_like(self.matrix)
        change[gone] = -self.matrix[gone]
        change[kept] = torch.linalg.solve(self.penalised()[kept][:, kept], self.xx[kept][:, gone] @ self.matrix[gone])
        return change


@dataclass(slots=True)
class _Elimination:
    """One consumer while channels are removed.

    Attributes:
        inverse: of its penalised moments over the remaining features, shape ``(features, features)``.
        solution: its best matrix on the remaining features, shape ``(features, outputs)``.
        places: the features of each remaining channel.
        weight: of its error beside that of other consumers, shape ``()``.
        remaining: whether each feature remains, shape ``(features,)``.
    """

    inverse: Tensor
    solution: Tensor
    places: Tensor
    weight: Tensor
    remaining: Tensor

    def costs(self) -> Tensor:
        """How far the error rises if a channel alone is removed, for each remaining one, shape ``(channels,)``."""
        # (channels, features of a channel, features of a channel)
        blocks = self.inverse[self.places[:, :, None], self.places[:, None, :]]
        rows = self.solution[self.places]  # (channels, features of a channel, outputs)
        return self.weight * (rows * torch.linalg.solve(blocks, rows)).sum((1, 2))

    def remove(self, channels: Tensor) -> None:
        """Remove channels; the inverse and the solution for the remaining features follow by a block update.

        Rows and columns of removed features stay, with zeros, until they are an eighth of all. With features 0 to 5 in
        three channels, ``places`` is [[0, 1], [2, 3], [4, 5]]. Without channel 1 features 0, 1, 4, 5 remain, which are
        numbered 0 to 3 from then on, and ``places`` is [[0, 1], [2, 3]].
        """
        removed = self.places[channels].flatten()
        across = self.inverse[:, removed]
        factor = torch.linalg.solve(across[removed], torch.cat([self.solution[removed], across.T], 1))
        outputs = self.solution.shape[1]
        self.solution.addmm_(across, factor[:, :outputs], alpha=-1)
        self.inverse.addmm_(across, factor[:, outputs:], alpha=-1)
        self.places = self.places[_without(len(self.places), channels)]
        self.remaining[removed] = False
        if len(self.remaining) <= 8 * int((~self.remaining).sum()):
            kept = self.remaining.nonzero()[:, 0]
            self.solution, self.inverse = self.solution[kept], self.inverse[kept][:, kept]
            self.places = (torch.cumsum(self.remaining, 0) - 1)[self.places]
            self.remaining = torch.ones_like(kept, dtype=torch.bool)


def eliminate(consumers: list[ConsumerMoments], at_once: float = 1 / 128) -> tuple[Tensor, Tensor]:
    """Backward elimination: the channel that costs least once all is solved again is removed, until one is left.

    Each step is exact for the remaining features (Hassibi and Stork, Optimal Brain Surgeon, 1993, equation 5, for
    blocks of features and several outputs): the error rises by ``w^T [(H^-1)_cc]^-1 w``. Errors of several consumers
    are added, each over the power of its own result.

    Args:
        consumers: of one and the same channels.
        at_once: share of the remaining channels that may be removed in one step, where it is more than one channel.

    Returns:
        Channels in the order of their removal, the one that is kept last; and how far the error has risen once each is
        removed, shape ``(channels - 1,)``.
    """
    states: list[_Elimination] = []
    for consumer in consumers:
        inverse = _inverse(consumer.penalised())
        weight = 1 / consumer.power().clamp_min(torch.finfo(torch.float64).tiny)
        remaining = _without(len(inverse), consumer.places[:0])
        states.append(_Elimination(inverse, consumer.matrix.clone(), consumer.places, weight, remaining))
    remaining = torch.arange(len(consumers[0].places), device=consumers[0].xx.device)
    order: list[Tensor] = []
    rises: list[Tensor] = []
    while len(remaining) > 1:
        costs = torch.stack([state.costs() for state in states]).sum(0)
        number = min(len(remaining) - 1, max(1, int(len(remaining) * at_once)))
        chosen = torch.topk(costs, number, largest=False).indices
        order.append(remaining[chosen])
        rises.append(costs[chosen].clamp_min(0))
        for state in states:
            state.remove(chosen)
        remaining = remaining[_without(len(remaining), chosen)]
    empty = torch.zeros(0, dtype=torch.float64, device=remaining.device)
    return torch.cat([*order, remaining]), torch.cat([empty, *rises]).cumsum(0)


def _inverse(matrix: Tensor) -> Tensor:
    """The inverse of a symmetric matrix; from its Cholesky factor, in half the time, where it is positive definite."""
    factor, failed = torch.linalg.cholesky_ex(matrix)
    return torch.linalg.inv(matrix) if bool(failed) else torch.cholesky_inverse(factor)


def _without(count: int, removed: Tensor) -> Tensor:
    """A mask of shape ``(count,)`` that is False at `removed`."""
    mask = torch.ones(count, dtype=torch.bool, device=removed.device)
    mask[removed] = False
    return mask
