"""`Course`: a `Pruner` whose steps are taken at given times of a training run. What all integrations share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from structprune.coupling.costs import cost
from structprune.errors import PlanError
from structprune.optimizers import remap_optimizer
from structprune.planning.options import PlanKeywords
from structprune.planning.plan import Plan, plans_of, replay
from structprune.pruner import Pruner, Schedule
from structprune.tracing.trace import ExampleInputs
from structprune.wrapping import prunable


class Course:
    """When a model is pruned in a training run, and how far it is.

    Args:
        at: the times: each step of the pruning is taken once so many epochs (or steps of the optimizer) are done; whole
            numbers from 0 in increasing order.
        schedule: how much is gone after each of them; see `Pruner`.
        options: those of `structprune.plan`.
        unit: what is counted, for messages.

    Raises:
        PlanError: the times are not such numbers.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> course = Course([1, 3], "linear", {"ratio": 0.5})
        >>> course.begin(model, torch.randn(1, 4))
        >>> widths = []
        >>> for epoch in range(4):
        ...     _ = course.take(epoch)  # and train
        ...     widths.append(model[0].out_features)
        >>> widths
        [16, 12, 12, 8]
    """

    def __init__(self, at: Iterable[int], schedule: Schedule, options: PlanKeywords, unit: str = "epochs") -> None:
        self.at: Sequence[int] = tuple(at)
        whole = all(type(time) is int and time >= 0 for time in self.at)
        if not whole or not self.at or list(self.at) != sorted(set(self.at)):
            raise PlanError(
                f"{unit} is {list(self.at)}; give the numbers of {unit} after which to prune, from 0 and in increasing "
                "order, such as [1, 3, 5]."
            )
        self._schedule: Schedule = schedule
        self._options = options
        self._pruner: Pruner | None = None

    def begin(self, model: nn.Module, example_inputs: ExampleInputs, state: Mapping[str, Any] | None = None) -> None:
        """Decide how much goes in the end, or go on from `state`; does nothing the second time, on the same model.

        Raises:
            PlanError: what is asked for cannot be planned, or `state` belongs to another course.
            UnsupportedModelError: the model cannot be changed in place, as one inside DistributedDataParallel.
        """
        if self._pruner is not None and self._pruner.model is model and state is None:
            return
        prunable(model, inplace=True)
        self._pruner = Pruner(
            model, example_inputs, steps=len(self.at), schedule=self._schedule, state=state, **self._options
        )

    def take(
        self,
        now: int,
        optimizers: Iterable[Optimizer] = (),
        averages: Iterable[nn.Module] = (),
        agreed: Callable[[Plan], Plan] = lambda plan: plan,
    ) -> list[Plan]:
        """Take the steps that are due when `now` epochs or steps are done.

        Args:
            now: how many are done.
            optimizers: those that train the model, or part of it; others are left alone.
            averages: models of the same shapes, which lose the same channels.
            agreed: gives the plan that all processes carry out.

        Returns:
            What was carried out; mostly nothing.
        """
        pruner, done = self._begun(), list[Plan]()
        while not pruner.done and self.at[pruner.taken] <= now:
            plan = pruner.step(agreed(pruner.next_plan()))
            own = {id(parameter) for parameter in pruner.model.parameters()}
            for optimizer in optimizers:
                if any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
                    remap_optimizer(optimizer, plan, pruner.model)
            for average in averages:
                plan.apply(average, inplace=True)
            done.append(plan)
        return done

    def follow(self, averages: Iterable[nn.Module]) -> None:
        """Take models of the shapes that the model once had to those that it has now."""
        for average in averages:
            replay(average, plans_of(self._begun().model))

    def state_dict(self) -> dict[str, Any]:
        """See `Pruner.state_dict`."""
        return self._begun().state_dict()

    def _begun(self) -> Pruner:
        assert self._pruner is not None, "begin comes first"
        return self._pruner


def costs(model: nn.Module, example_inputs: ExampleInputs) -> dict[str, float]:
    """What is logged: multiply-accumulates on the example inputs, and parameters.

    Example:
        >>> import torch
        >>> costs(nn.Linear(4, 2), torch.randn(1, 4))
        {'macs': 8, 'params': 10}
    """
    counted = cost(model, example_inputs)
    return {"macs": counted.macs, "params": counted.params}
