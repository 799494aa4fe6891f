"""`LC`: learning and compression by turns, tied by an augmented Lagrangian."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from structprune.checking import real, require, whole
from structprune.search.direct import Direct
from structprune.search.projections import Projection, Values, values_of
from structprune.search.task import Best, Compressed, Task, mean_of, sgd

# What Condensa's examples give: mu, and of an L step the first and the last learning rate, the batches, and momentum.
_MU = 1e-3
_PUBLISHED = (0.01, 1e-4, 3000, 0.95)
_TURNS_GROWTH = 1.1**28  # from the first of 29 L steps to the last
# So many batches give the statistics of batch norms. Whether to give up is asked in the training at the end; if
# there is none, when so much is done: theta is no good network before w has come near to it.
_SHOWN, _LATE = 8, 0.75


def _way(first: float, last: float, count: int, momentum: float) -> float:
    """How far a constant gradient of 1 carries weights in an L step."""
    return sum(first * (last / first) ** (number / count) for number in range(count)) / (1 - momentum)


@dataclass(frozen=True)
class LC:
    """Keeps accuracy by the learning-compression algorithm, for any scheme.

    The weights w are to be at once good for the loss L and those of the scheme, theta = Pi(theta). By turns

    - the L step trains w on ``L(w) + mu/2 ||w - theta - lambda/mu||^2`` by SGD, whose learning rate falls within the
      step from `lr` to `lr_end`, and whose state begins anew with each step;
    - the C step projects: ``theta = Pi(w - lambda/mu)``;
    - the multipliers follow: ``lambda = lambda - mu (w - theta)``, and mu grows by `mu_factor` up to `mu_cap`.

    Step 0 compresses without training. Of the thetas of all steps the one with the best score on the validation data is
    kept. Batch norms of theta take their statistics anew, on eight batches: those of w belong to other weights.

    Carreira-Perpinan and Idelbayev, "Learning-Compression" Algorithms for Neural Net Pruning, 2018 (figure 2,
    augmented Lagrangian); steps, growth and cap are those of Joseph et al., Condensa, 2020. The learning rate is never
    above ``1/mu``: beyond that, descending on the penalty need not converge.

    Args:
        steps: L-C iterations, the one without training included.
        lr: learning rate at the beginning of each L step.
        lr_end: at its end; None for a hundredth.
        iterations: batches in each L step; None for one pass over the training data.
        first_iterations: batches in the first L step; None for as many as in the others.
        mu: weight of the penalty in the first L step. None: so much that the penalty draws the weights in the last L
            step as far as in the last one of the published settings: 1e-3 for 29 L steps of 3,000 batches, at rates
            from 0.01 to 1e-4 and momentum 0.95; more where steps are shorter or fewer.
        mu_factor: by which it grows with each step, at least 1.
        mu_cap: beyond which it does not.
        finish: share of the steps that, at the end, train what is not zero in the best theta, as `Direct` does; 0 for
            none, as published. Without it, short L steps leave w at a distance from theta, which then is no network
            that was trained.
        momentum: of SGD, from 0 to below 1.
        weight_decay: of SGD, for parameters with two dimensions or more.

    Raises:
        PlanError: a setting is out of its range.

    Example:
        >>> from structprune.search import Compressor, Prune
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> data = [(torch.randn(16, 4), torch.randint(2, (16,))) for _ in range(4)]
        >>> lc = LC(steps=3, lr=0.01)
        >>> sparse = Compressor(model, scheme=Prune(0.25), optimizer=lc, trainloader=data, valloader=data[:1]).run()
        >>> int((sparse[0].weight != 0).sum() + (sparse[2].weight != 0).sum())
        12
    """

    steps: int = 30
    lr: float = 0.01
    lr_end: float | None = None
    iterations: int | None = None
    first_iterations: int | None = None
    mu: float | None = None
    mu_factor: float = 1.1
    mu_cap: float = 1e4
    finish: float = 0.2
    momentum: float = 0.95
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        positive, count = real(above=0), whole(1)
        require(vars(self), steps=count, lr=positive, lr_end=positive.or_none)
        require(vars(self), mu=positive.or_none, mu_factor=real(least=1))
        require(
            vars(self),
            iterations=count.or_none,
            first_iterations=count.or_none,
            mu_cap=real(least=self.mu or 0, above=0),
        )
        require(vars(self), finish=real(least=0, below=1))
        require(vars(self), momentum=real(least=0, below=1), weight_decay=real(least=0))

    def compress(self, model: nn.Module, projection: Projection, task: Task) -> Compressed:
        """See `structprune.search.task.AccuracyOptimizer`."""
        w = copy.deepcopy(model)
        batches = task.batches()
        theta = projection.compressed(values_of(w))
        multipliers = {name: torch.zeros_like(value) for name, value in theta.items()}
        best = Best(w, task, [next(batches) for _ in range(_SHOWN)])
        best.offer(theta, None)
        mu = self._first_mu(task)
        last = self.steps - 1 - self._turns
        for step in range(1, 1 + self._turns):
            loss = self._learn(w, theta, multipliers, mu, batches, self._length(step, task), task)
            with torch.no_grad():
                values = values_of(w)
                shifted = {name: values[name] - multipliers[name] / mu for name in theta}
                theta = projection.compressed({**values, **shifted})
                best.offer(theta, loss, mu)
                for name, multiplier in multipliers.items():
                    multiplier.sub_(values[name] - theta[name], alpha=mu)
            mu = min(mu * self.mu_factor, self.mu_cap)
            done = step / (self.steps - 1)
            if not last and done >= _LATE and best.hopeless(done):
                return best.result(model, True)
        if not last:
            return best.result(model, False)
        w.load_state_dict(best.kept.state_dict())
        best.shown = ()  # from here on the norms see the network that is scored
        direct = Direct(last, self.lr, momentum=self.momentum, weight_decay=self.weight_decay)
        return best.result(model, direct.train(w, projection, best, batches, self._length(2, task)))

    @property
    def _last(self) -> float:
        """The learning rate at the end of each L step."""
        return self.lr / 100 if self.lr_end is None else self.lr_end

    def _first_mu(self, task: Task) -> float:
        """The weight of the penalty in the first L step."""
        if self.mu is not None:
            return self.mu
        if not self._turns:
            return _MU
        way = _way(self.lr, self._last, self._length(2, task), self.momentum)
        # As strong in the last L step as in the published last one.
        last = _MU * _way(*_PUBLISHED) / way * _TURNS_GROWTH
        return min(last / self.mu_factor ** (self._turns - 1), self.mu_cap)

    @property
    def _turns(self) -> int:
        """How many L steps there are."""
        return self.steps - 1 - round(self.finish * (self.steps - 1))

    def _length(self, step: int, task: Task) -> int:
        """How many batches an L step trains on."""
        given = self.first_iterations if step == 1 and self.first_iterations is not None else self.iterations
        return task.length() if given is None else given

    def _learn(
        self,
        w: nn.Module,
        theta: Values,
        multipliers: Values,
        mu: float,
        batches: Iterator[Any],
        count: int,
        task: Task,
    ) -> float:
        """One L step; the mean loss, without the penalty."""
        optimizer = sgd(w, self.lr, self.momentum, self.weight_decay)
        held = dict(w.named_parameters())
        w.train()
        losses: list[Tensor] = []
        for number in range(count):
            for group in optimizer.param_groups:
                group["lr"] = min(self.lr * (self._last / self.lr) ** (number / count), 1 / mu)
            loss = task.loss(w, next(batches))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            with torch.no_grad():
                for name, goal in theta.items():
                    gradient = held[name].grad
                    if gradient is not None:
                        # The gradient of mu/2 ||w - theta - lambda/mu||^2.
                        gradient.add_(held[name] - goal, alpha=mu).sub_(multipliers[name])
            optimizer.step()
            losses.append(loss.detach())
        return mean_of(losses)
