"""Objectives: what a compressed network is to be good at, measured beside the dense one or counted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

from structprune.benchmarking.backends import BACKENDS
from structprune.benchmarking.run import benchmark
from structprune.checking import function, one_of, require, shown, whole
from structprune.coupling.costs import cost
from structprune.errors import PlanError
from structprune.inputs import batch_size, device_of, resize_batch
from structprune.planning.targets import amounts
from structprune.search.network_costs import COUNTED, number_of
from structprune.tracing.trace import ExampleInputs

_OF_MODEL = function("model")
TIMED = ("throughput", "latency")


def _counted(of: str, model: nn.Module, inputs: ExampleInputs) -> float:
    """What can be counted; of parameters those that are not zero, since schemes leave zeros in dense layers."""
    if of == "params":
        return float(sum(int(parameter.count_nonzero()) for parameter in model.parameters()))
    return amounts(cost(model, inputs), 0)[of]


@dataclass(frozen=True)
class Objective:
    """Something to be made large or small; see `Maximize` and `Minimize`.

    Attributes:
        of: its name, or a function of the compressed model that returns a number.
        backend: where time is measured.
        batch: samples in one run.
        runs: timed runs of each model.
    """

    of: str | Callable[[nn.Module], float]
    backend: str = "eager"
    batch: int | None = None
    runs: int = 20

    direction: ClassVar[str] = ""
    known: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        if isinstance(self.of, str) or not _OF_MODEL.fits(self.of):
            names = ", ".join(map(repr, self.known))
            if self.of not in self.known:
                raise PlanError(f"of is {shown(self.of)}; give {names}, or a function of the model.")
        require(vars(self), backend=one_of(BACKENDS), batch=whole(1).or_none, runs=whole(2))

    @property
    def name(self) -> str:
        """What it is called."""
        return self.of if isinstance(self.of, str) else getattr(self.of, "__name__", type(self.of).__name__)

    def better(self, value: float, other: float) -> bool:
        """Whether a value is better than another."""
        return value > other if self.direction == "maximize" else value < other


@dataclass(frozen=True)
class Maximize(Objective):
    """To be made as large as the accuracy allows.

    Args:
        of: ``"throughput"``, samples a second, or a function of the compressed model that returns a number.
        backend: where time is measured (see `structprune.benchmark`).
        batch: samples in one run; None for as many as there are in a batch of the training data.
        runs: timed runs of each model, by turns with the dense one.

    Raises:
        PlanError: a setting is none that can be.

    Example:
        >>> Maximize("throughput").direction
        'maximize'
    """

    direction: ClassVar[str] = "maximize"
    known: ClassVar[tuple[str, ...]] = ("throughput",)


@dataclass(frozen=True)
class Minimize(Objective):
    """To be made as small as the accuracy allows.

    Args:
        of: ``"latency"``, seconds that one sample takes; ``"macs"`` of one sample; ``"params"``, those that are not
            zero; ``"memory"``, bytes of weights, and of activations at their peak, for one sample; or a function of the
            compressed model that returns a number, such as the joules that you measure.
        backend: where time is measured (see `structprune.benchmark`).
        batch: samples in one run, for latency; None for one.
        runs: timed runs of each model, by turns with the dense one.

    Raises:
        PlanError: a setting is none that can be.

    Example:
        >>> Minimize(lambda model: float(model[0].weight.abs().sum())).direction
        'minimize'
    """

    direction: ClassVar[str] = "minimize"
    known: ClassVar[tuple[str, ...]] = ("latency", *COUNTED)


@dataclass
class Measure:
    """Measures an objective on compressed models; the dense one's value is measured first.

    Times are those of the dense model at first, divided by how many times faster a model is in runs by turns with it:
    a machine that is slower for a while then slows both.

    Args:
        objective: what is measured.
        dense: the dense model.
        batch: inputs of the model, as many as there are in a batch.

    Attributes:
        before: the dense model's value.
    """

    objective: Objective
    dense: nn.Module
    batch: ExampleInputs
    before: float = field(init=False)

    def __post_init__(self) -> None:
        single = resize_batch(self.batch, 1)
        self._one = single
        default = batch_size(self.batch) if self.objective.of == "throughput" else 1
        self._inputs = resize_batch(self.batch, self.objective.batch or default)
        self._seconds: float | None = None
        self.before = self(self.dense)

    def __call__(self, model: nn.Module) -> float:
        """The value of a model.

        Raises:
            PlanError: the user's function returned no finite number.
        """
        of = self.objective.of
        if not isinstance(of, str):
            return number_of(of, model, f"The objective {self.objective.name}")
        if of in COUNTED:
            return _counted(of, model, self._one)
        seconds = self._time(model)
        return batch_size(self._inputs) / seconds if of == "throughput" else seconds

    def _time(self, model: nn.Module) -> float:
        """Median of the seconds that a run takes."""
        given: dict[str, Any] = {"backends": (self.objective.backend,), "runs": self.objective.runs}
        if device_of(self.dense).type == "cpu" and torch.get_num_threads() == 1:
            given["clock"] = "process"  # what others do on the machine is not the network's time
        models = {"dense": self.dense} if self._seconds is None else {"dense": self.dense, "compressed": model}
        timed = benchmark(models, self._inputs, memory=False, explanations=False, **given)
        if self._seconds is None:
            self._seconds = timed.timing("dense", self.objective.backend).median
            return self._seconds
        return self._seconds / timed.speedup("compressed", self.objective.backend).ratio
