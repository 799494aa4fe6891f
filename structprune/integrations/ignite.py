"""A handler for PyTorch-Ignite: it prunes the model in steps while an engine trains it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Unpack

from torch import nn
from torch.optim import Optimizer

from structprune.extras import missing_extra
from structprune.integrations.course import Course, costs
from structprune.planning.options import PlanKeywords
from structprune.pruner import Schedule
from structprune.tracing.trace import ExampleInputs

try:
    from ignite.engine import Engine, Events
except ModuleNotFoundError as error:
    if error.name != "ignite":
        raise
    raise missing_extra("This integration", "pytorch-ignite", "ignite") from error


class PruningHandler:
    """Prunes a model in place before the epochs that you name, in the steps of `structprune.Pruner`.

    At the start of each epoch ``engine.state.metrics`` gets ``macs`` (of the example inputs) and ``params``, so that
    loggers attached to the engine write them down.

    It has a state, like the model and the optimizer. Put it *first* among what is saved and loaded: it gives the model
    the shapes that the other states fit.

    Args:
        model: the model that the engine trains; not a DistributedDataParallel.
        example_inputs: a tensor, a tuple (positional) or a dict (keyword) that the model accepts.
        epochs: after how many epochs of training to prune, once for each number; 0 is before the first.
        optimizers: those that train it; their states go on with what is left.
        averages: models of the same shapes, such as ``EMAHandler(...).ema_model``, which lose the same channels.
        schedule: how much is gone after each step; see `structprune.Pruner`.
        options: those of `structprune.plan`: ``ratio``, ``target``, ``importance``, ``data``, ``scope`` and the others.

    Raises:
        PlanError: what is asked for cannot be planned.
        UnsupportedModelError: a model of this kind cannot be pruned in place.
        MissingExtraError: ignite is not installed.

    Example:
        >>> import torch
        >>> from ignite.engine import Engine
        >>> model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> trainer = Engine(lambda engine, batch: model(batch).sum().item())
        >>> handler = PruningHandler(model, torch.randn(1, 4), epochs=[1, 2], ratio=0.5).attach(trainer)
        >>> state = trainer.run([torch.randn(3, 4)], max_epochs=3)
        >>> model[0].out_features, state.metrics["params"]
        (8, 58)
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: ExampleInputs,
        *,
        epochs: Iterable[int],
        optimizers: Optimizer | Iterable[Optimizer] = (),
        averages: Iterable[nn.Module] = (),
        schedule: Schedule = "cubic",
        **options: Unpack[PlanKeywords],
    ) -> None:
        self._model = model
        self._inputs = example_inputs
        self._optimizers = (optimizers,) if isinstance(optimizers, Optimizer) else tuple(optimizers)
        self._averages = tuple(averages)
        self._course = Course(epochs, schedule, options)
        self._course.begin(model, example_inputs)

    def attach(self, engine: Engine) -> PruningHandler:
        """Prune at the start of the epochs of `engine`.

        Returns:
            The handler itself.
        """
        engine.add_event_handler(Events.EPOCH_STARTED, self)
        return self

    def __call__(self, engine: Engine) -> None:
        """Prune if it is time, and note the costs."""
        # Ignite counts the epoch that begins.
        pruned = self._course.take(engine.state.epoch - 1, self._optimizers, self._averages)
        if pruned or "macs" not in engine.state.metrics:
            engine.state.metrics |= costs(self._model, self._inputs)

    def state_dict(self) -> dict[str, Any]:
        """What was removed and how much is to go, for a checkpoint; see `structprune.Pruner.state_dict`."""
        return self._course.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take the model, and the averages, to the shapes that they had then, and go on from there.

        Raises:
            PlanError: the state belongs to other steps, or the model was pruned further.
        """
        self._course.begin(self._model, self._inputs, state_dict)
        self._course.follow(self._averages)
