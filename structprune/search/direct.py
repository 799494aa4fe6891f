"""`Direct` and `Recover`: compress once, then train what is left, or solve its layers again."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from structprune.checking import real, require, whole
from structprune.errors import PlanError
from structprune.importance.data import size_of
from structprune.masks.compacting import compact
from structprune.recovery.recover import recover
from structprune.search.projections import Projection, Values, fill, values_of
from structprune.search.task import Best, Compressed, Task, TrainingStep, mean_of, sgd


@dataclass(frozen=True)
class Direct:
    """Keeps accuracy by training after the compression: what is zero stays zero, the rest is trained.

    Which weights go is decided once, on the dense network. Then SGD trains what is left, with a learning rate that
    falls along half a cosine over all epochs. After each epoch the network is projected (rounded, where the scheme
    rounds) and scored on the validation data; the best is kept.

    Args:
        epochs: passes over the training data, or rather of `iterations` each; with 0 nothing is trained.
        lr: learning rate at the beginning.
        iterations: batches in an epoch; None for one pass over the training data.
        momentum: of SGD, from 0 to below 1.
        weight_decay: of SGD, for parameters with two dimensions or more.

    Raises:
        PlanError: a setting is out of its range.

    Example:
        >>> from structprune.search import Compressor, Prune
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> data = [(torch.randn(16, 4), torch.randint(2, (16,))) for _ in range(4)]
        >>> give = dict(optimizer=Direct(epochs=2), trainloader=data, valloader=data[:1])
        >>> sparse = Compressor(model, scheme=Prune(0.25), **give).run()
        >>> int((sparse[0].weight != 0).sum() + (sparse[2].weight != 0).sum())
        12
    """

    epochs: int = 30
    lr: float = 0.01
    iterations: int | None = None
    momentum: float = 0.9
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        require(vars(self), epochs=whole(0), lr=real(above=0), iterations=whole(1).or_none)
        require(vars(self), momentum=real(least=0, below=1), weight_decay=real(least=0))

    def compress(self, model: nn.Module, projection: Projection, task: Task) -> Compressed:
        """See `structprune.search.task.AccuracyOptimizer`."""
        w = copy.deepcopy(model)
        best = Best(w, task)
        best.offer(projection.compressed(values_of(w)), None)
        if not self.epochs:
            return best.result(model, False)
        count = task.length() if self.iterations is None else self.iterations
        return best.result(model, self.train(w, projection, best, task.batches(), count))

    def train(self, w: nn.Module, projection: Projection, best: Best, batches: Iterator[Any], count: int) -> bool:
        """Train what a projection of the weights leaves, in place; whether that was given up."""
        support = projection.support(values_of(w))
        fill(w, {name: value * support[name] for name, value in values_of(w).items() if name in support})
        optimizer = sgd(w, self.lr, self.momentum, self.weight_decay)
        for epoch in range(self.epochs):
            loss = self._epoch(w, support, optimizer, epoch, batches, count, best.task)
            best.offer(projection.compressed(values_of(w)), loss)
            if best.hopeless((epoch + 1) / self.epochs):
                return True
        return False

    def _epoch(
        self,
        w: nn.Module,
        support: Values,
        optimizer: torch.optim.Optimizer,
        epoch: int,
        batches: Iterator[Any],
        count: int,
        task: Task,
    ) -> float:
        """The mean loss of one epoch."""
        held = dict(w.named_parameters())
        w.train()
        losses: list[Tensor] = []
        for number in range(count):
            done = (epoch + number / count) / self.epochs
            for group in optimizer.param_groups:
                group["lr"] = self.lr * 0.5 * (1 + math.cos(math.pi * done))
            loss = task.loss(w, next(batches))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                for name, kept in support.items():
                    held[name].mul_(kept)
            losses.append(loss.detach())
        return mean_of(losses)


@dataclass(frozen=True)
class Recover:
    """Keeps accuracy by `structprune.recover`: the layers that are left are solved again; no labels, no training.

    For schemes that remove whole channels.

    Args:
        samples: at most so many of the first training samples, in whole batches.
        rows: see `structprune.recover`.
        rounds: see `structprune.recover`.

    Raises:
        PlanError: a setting is out of its range; or, when it is used, the scheme removes no channels.
    """

    samples: int = 1024
    rows: int = 65536
    rounds: int = 3

    def __post_init__(self) -> None:
        require(vars(self), samples=whole(1), rows=whole(1), rounds=whole(0))

    def compress(self, model: nn.Module, projection: Projection, task: Task) -> Compressed:
        """See `structprune.search.task.AccuracyOptimizer`."""
        batches = list(self._batches(task))
        dense = copy.deepcopy(model)
        theta = projection.compressed(values_of(dense))
        best = Best(dense, task)
        best.offer(theta, None)
        before = best.result(model, False)
        given = inputs_of(batches[0])
        slim = compact(before.model.eval(), given)
        if _sizes(slim) == _sizes(model):
            raise PlanError("optimizer is Recover, which is for schemes that remove channels, and none are removed.")
        recovered = recover(slim, model, batches, rows=self.rows, rounds=self.rounds, seed=task.seed)
        score = task.score(recovered)
        step = TrainingStep(1, None, score, 0.0)
        if score <= before.score:
            return Compressed(before.model, before.score, (*before.history, step))
        return Compressed(recovered, score, (*before.history, step))

    def _batches(self, task: Task) -> Iterator[Any]:
        held = 0
        for batch in islice(task.batches(), task.length()):
            yield batch
            held += size_of(batch)
            if held >= self.samples:
                return


def inputs_of(batch: Any) -> Any:
    """What a model takes of a batch: the first of a pair, or all of it."""
    return batch[0] if isinstance(batch, (tuple, list)) else batch


def _sizes(model: nn.Module) -> list[torch.Size]:
    return [parameter.shape for parameter in model.parameters()]
