"""What a network costs: counted, measured, or by a user's function; and what such a function says."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from torch import nn

from structprune.coupling.costs import cost
from structprune.errors import PlanError
from structprune.inputs import evaluating
from structprune.latency.measure import DeviceTimer, Latency
from structprune.planning.plan import Plan
from structprune.planning.targets import amounts
from structprune.tracing.trace import ExampleInputs

COUNTED = ("macs", "params", "memory")
TIMED = ("latency", "throughput")
Evaluate = Callable[[nn.Module], float]


class Costs:
    """What a network costs, as a share of what the whole one does.

    Attributes:
        name: of the objective.
        counted: whether it is known without building the network.
    """

    def __init__(
        self, model: nn.Module, inputs: ExampleInputs, objective: str | Evaluate, latency: Latency, stack: ExitStack
    ) -> None:
        self._model, self._inputs = model, inputs
        self.name = objective if isinstance(objective, str) else getattr(objective, "__name__", "objective")
        self._function = None if isinstance(objective, str) else objective
        self._timer = None
        if self.name in TIMED and self._function is None:
            self._timer = latency.timer or stack.enter_context(DeviceTimer(latency, inputs))
        self._dense = cost(model, inputs)

    def whole(self) -> float:
        """The cost of the whole network, in its own unit."""
        if self._timer is not None:
            return float(self._timer.networks([self._model], self._inputs)[0])
        if self._function is not None:
            return self._asked(self._model)
        return amounts(self._dense, 0)[self.name]

    def share(self, slim: nn.Module, plan: Plan) -> float:
        """The cost of a pruned network over that of the whole one, which is timed beside it."""
        if self._timer is not None:
            dense, other = self._timer.networks([self._model, slim], self._inputs)[:2]
            return float(other / dense)
        if self._function is not None:
            return self._asked(slim) / self._asked(self._model)
        return amounts(plan.after, 0)[self.name] / amounts(self._dense, 0)[self.name]

    def _asked(self, model: nn.Module) -> float:
        assert self._function is not None
        amount = number_of(self._function, model, "minimize")
        if amount <= 0:
            raise PlanError(f"The function minimize gave {amount:g}; let it give a number above 0.")
        return amount


def number_of(function: Evaluate, model: nn.Module, what: str) -> float:
    """What a user's function says of a model in eval mode.

    Raises:
        PlanError: it is no finite number.
    """
    with evaluating(model):
        answer: Any = function(model)
    try:
        value = float(answer)
    except (TypeError, ValueError) as error:
        raise PlanError(f"{what} returned a {type(answer).__name__}; let it return a number.") from error
    if not abs(value) < float("inf"):
        raise PlanError(f"{what} returned {value}, which is no finite number. Check the data that it looks at.")
    return value
