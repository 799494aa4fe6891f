"""Channels of a group in the order in which a consumer that is solved again misses them least."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

RIDGE = 1e-4


@dataclass(slots=True)
class View:
    """What one consumer sees of a group.

    Attributes:
        xx: second moments of its features, with the intercept last, shape ``(features + 1, features + 1)``.
        matrix: its weight as a matrix, with a last row of zeros for the intercept, shape ``(features + 1, outputs)``.
        places: features of each channel of the group, shape ``(channels, each)``.
    """

    xx: Tensor
    matrix: Tensor
    places: Tensor

    def penalised(self) -> Tensor:
        """`xx` with a small ridge, so that it has an inverse."""
        diagonal = self.xx.diagonal()
        penalty = RIDGE * (diagonal + 1e-2 * diagonal.mean())
        penalty[-1] = 1e-10 * diagonal.mean()
        return self.xx + torch.diag(penalty)

    def power(self) -> Tensor:
        """Sum of squares of the consumer's result about its mean."""
        mean = self.xx[-1] @ self.matrix / self.xx[-1, -1]
        return ((self.matrix * (self.xx @ self.matrix)).sum(0) - self.xx[-1, -1] * mean.square()).sum().clamp_min(0)

    def change(self, removed: Tensor) -> Tensor:
        """What to add to `matrix` so that the consumer does best without the channels `removed`."""
        gone = torch.zeros(len(self.xx), dtype=torch.bool, device=self.xx.device)
        gone[self.places[removed].flatten()] = True
        left = ~gone
        solved = torch.linalg.solve(self.penalised()[left][:, left], self.xx[left] @ self.matrix)
        change = -self.matrix
        change[left] += solved
        return change


@dataclass(slots=True)
class _State:
    """A consumer while channels go: the inverse over what is left, the solution, where each channel's features are."""

    inverse: Tensor
    solution: Tensor
    places: Tensor
    weight: Tensor

    def costs(self) -> Tensor:
        """For each channel left, how far the error rises if it goes alone."""
        blocks = self.inverse[self.places[:, :, None], self.places[:, None, :]]
        own = self.solution[self.places]
        return self.weight * (own * torch.linalg.solve(blocks, own)).sum((1, 2))

    def remove(self, channels: Tensor) -> None:
        """Take channels out: the inverse and the solution of what is left follow by a block update."""
        gone = self.places[channels].flatten()
        left = torch.ones(len(self.inverse), dtype=torch.bool, device=gone.device)
        left[gone] = False
        across = self.inverse[left][:, gone]
        factor = torch.linalg.solve(self.inverse[gone][:, gone], torch.cat([self.solution[gone], across.T], 1))
        outputs = self.solution.shape[1]
        self.solution = self.solution[left] - across @ factor[:, :outputs]
        self.inverse = self.inverse[left][:, left] - across @ factor[:, outputs:]
        stays = torch.ones(len(self.places), dtype=torch.bool, device=gone.device)
        stays[channels] = False
        self.places = (torch.cumsum(left, 0) - 1)[self.places[stays]]


def eliminate(views: list[View], at_once: float = 1 / 128) -> tuple[Tensor, Tensor]:
    """Backward elimination: the channel whose loss costs least after solving again goes, until one is left.

    Each step is exact for the features left (Hassibi and Stork, Optimal Brain Surgeon, 1993, equation 5, for blocks of
    features and several outputs): the error rises by ``w^T [(H^-1)_cc]^-1 w``. Errors of several consumers are added,
    each over the power of its own result.

    Args:
        views: what each consumer sees.
        at_once: share of the channels left that may go in one step, where it comes to more than one.

    Returns:
        Channels in the order in which they go, the one that stays last; and how far the error has risen once each is
        gone, shape ``(channels - 1,)``.
    """
    states: list[_State] = []
    for view in views:
        inverse = torch.linalg.inv(view.penalised())
        weight = 1 / view.power().clamp_min(torch.finfo(torch.float64).tiny)
        states.append(_State(inverse, inverse @ (view.xx @ view.matrix), view.places, weight))
    alive = torch.arange(len(views[0].places), device=views[0].xx.device)
    order: list[Tensor] = []
    rises: list[Tensor] = []
    while len(alive) > 1:
        costs = torch.stack([state.costs() for state in states]).sum(0)
        number = min(len(alive) - 1, max(1, int(len(alive) * at_once)))
        chosen = torch.topk(costs, number, largest=False).indices
        order.append(alive[chosen])
        rises.append(costs[chosen].clamp_min(0))
        for state in states:
            state.remove(chosen)
        stays = torch.ones(len(alive), dtype=torch.bool, device=alive.device)
        stays[chosen] = False
        alive = alive[stays]
    empty = torch.zeros(0, dtype=torch.float64, device=alive.device)
    return torch.cat([*order, alive]), torch.cat([empty, *rises]).cumsum(0)
