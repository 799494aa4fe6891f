"""What weights of a scheme are trained with, and what comes of it; the same for all ways to keep accuracy."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from structprune.errors import PlanError
from structprune.importance.data import call_on_batch
from structprune.inputs import modes_kept
from structprune.search.projections import Projection, Values, fill, values_of
from structprune.training.stepping import begin_epoch


@dataclass(frozen=True)
class Task:
    """Data, loss and score of a network that is compressed.

    Attributes:
        train: batches, run through again and again.
        loss: of a model and a batch: a scalar, the mean over the batch.
        score: of a model in eval mode on the validation data, the higher the better; it leaves the model as it was.
        seed: of shuffling, augmentation and dropout.
        hopeless: told the share of the training that is done and the best score after each step so far; whether what is
            left cannot be enough.
    """

    train: Iterable[Any]
    loss: Callable[[nn.Module, Any], Tensor]
    score: Callable[[nn.Module], float]
    seed: int = 0
    hopeless: Callable[[float, list[float]], bool] = lambda _done, _best: False

    def batches(self) -> Iterator[Any]:
        """The training data without end, each pass in an order of its own.

        Raises:
            PlanError: there is no batch.
        """
        number = 0
        while True:
            begin_epoch(self.train, (), self.seed, number)
            empty = True
            for batch in self.train:
                empty = False
                yield batch
            if empty:
                raise PlanError(
                    "trainloader holds no batch. If it is a generator, give something that can be started again."
                )
            number += 1

    def length(self) -> int:
        """Batches in one pass over the training data.

        Raises:
            PlanError: that is not known beforehand.
        """
        known = getattr(self.train, "__len__", None)
        if known is None:
            raise PlanError("trainloader has no length; say how many batches to train on by iterations=.")
        return known()


@dataclass(frozen=True)
class TrainingStep:
    """One step of a way to keep accuracy, after which the compressed network is scored.

    Attributes:
        number: counted from 0, which is the network compressed without training.
        loss: mean over the batches of the step; None where there were none.
        score: of the compressed network on the validation data.
        distance: Euclidean distance between the trained weights and the compressed ones.
        mu: weight of the penalty; 0 where there is none.
    """

    number: int
    loss: float | None
    score: float
    distance: float
    mu: float = 0.0


@dataclass(frozen=True, eq=False)
class Compressed:
    """The compressed network with the best score on the validation data.

    Attributes:
        model: a copy; its values are those of the scheme, held as dense weights.
        score: its score.
        history: all steps.
        ended_early: whether training was given up, as the score could not have become what was needed.
    """

    model: nn.Module
    score: float
    history: tuple[TrainingStep, ...]
    ended_early: bool = False


class AccuracyOptimizer(Protocol):
    """A way to keep the accuracy of a network that is compressed: `LC`, `Direct`, `Recover`, or your own."""

    def compress(self, model: nn.Module, projection: Projection, task: Task) -> Compressed:
        """The compressed network.

        Args:
            model: the dense one; it stays as it was.
            projection: the scheme on its parameters.
            task: data, loss and score.
        """
        ...


@dataclass
class Best:
    """The compressed networks that were scored, of which the best is kept.

    Attributes:
        model: what is trained; it is scored with compressed values in place of its own.
        task: data, loss and score.
        shown: batches on which batch norms take the statistics that they are scored with; if there are none, they have
            those that they took in training.
    """

    model: nn.Module
    task: Task
    shown: Sequence[Any] = ()
    history: list[TrainingStep] = field(default_factory=list)
    best: list[float] = field(default_factory=list)
    _kept: nn.Module | None = None

    def offer(self, theta: Values, loss: float | None, mu: float = 0.0) -> None:
        """Score the model with these values in place of its own."""
        own = {name: value.clone() for name, value in values_of(self.model).items() if name in theta}
        squares = sum(float((own[name] - theta[name]).double().square().sum()) for name in theta)
        fill(self.model, theta)
        with _statistics_on(self.model, self.shown):
            score = self.task.score(self.model)
            if self._kept is None or score > self.best[-1]:
                self._kept = copy.deepcopy(self.model)
            self.best.append(max([score, *self.best[-1:]]))
        fill(self.model, own)
        self.history.append(TrainingStep(len(self.history), loss, score, math.sqrt(squares), mu))

    @property
    def kept(self) -> nn.Module:
        """The best of them."""
        assert self._kept is not None
        return self._kept

    def hopeless(self, done: float) -> bool:
        """Whether what is left of the training cannot be enough."""
        return done < 1 and self.task.hopeless(done, self.best)

    def result(self, mode: nn.Module, ended_early: bool) -> Compressed:
        """The best of them, its modules in the modes of another model."""
        for mine, other in zip(self.kept.modules(), mode.modules(), strict=True):
            mine.training = other.training
        return Compressed(self.kept, self.best[-1], tuple(self.history), ended_early)


@contextmanager
def _statistics_on(model: nn.Module, batches: Sequence[Any]) -> Generator[None]:
    """Batch norms have the statistics of these batches inside, and afterwards those that they had."""
    norms = [
        module
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None
    ]
    if not norms or not batches:
        yield
        return
    before = [({name: tensor.clone() for name, tensor in norm.named_buffers()}, norm.momentum) for norm in norms]
    with modes_kept(model), torch.no_grad():
        model.eval()
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the mean over all batches
            norm.training = True
        for batch in batches:
            call_on_batch(model, batch)
        for norm, (_, momentum) in zip(norms, before, strict=True):
            norm.momentum = momentum
    yield
    for norm, (buffers, _) in zip(norms, before, strict=True):
        for name, tensor in norm.named_buffers():
            tensor.copy_(buffers[name])


def sgd(model: nn.Module, lr: float, momentum: float, weight_decay: float) -> torch.optim.SGD:
    """SGD, with Nesterov's momentum if there is any, that decays parameters of two dimensions or more.

    Raises:
        PlanError: nothing requires a gradient.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise PlanError("No parameter of model requires a gradient, so there is nothing to train.")
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.SGD([g for g in groups if g["params"]], lr=lr, momentum=momentum, nesterov=momentum > 0)


def mean_of(losses: list[Tensor]) -> float:
    """Mean of the losses of batches, after checking that it is finite.

    Raises:
        PlanError: it is not.
    """
    mean = float(torch.stack(losses).double().mean())
    if not math.isfinite(mean):
        raise PlanError(f"The loss on trainloader became {mean}. Check its data, or lower lr.")
    return mean
