"""A target of latency: measure, predict, decide, measure what was decided, and decide once more if it missed."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from structprune.benchmarking.timing import device_of
from structprune.errors import PlanError
from structprune.graph import ChannelGraph
from structprune.groups import Group
from structprune.importance.base import Importance, comparable
from structprune.latency.measure import DeviceTimer, Latency, Timer
from structprune.latency.predict import TimeModel, calibrated
from structprune.latency.specs import uses
from structprune.planning.build import plan_removal
from structprune.planning.decide import Decision, Request
from structprune.planning.targets import target_of
from structprune.tracing.state import held_tensors

# A plan that comes so near to the limit, as measured, is taken.
NEAR = 0.05
ATTEMPTS = 3
# Predictions are calibrated by a uniformly thinned copy of about the time asked for and by one of this share of its
# width: copies that differ little leave it to chance how much of the time is a constant, which no plan can save.
THINNER = 1 / 3


class _Remembered:
    """Scores of each group, computed once."""

    def __init__(self, score: Importance) -> None:
        self._score = score
        self.comparable = comparable(score)
        self._known: dict[Group, Tensor] = {}

    def __call__(self, group: Group, tensors: Mapping[str, Tensor]) -> Tensor:
        if group not in self._known:
            self._known[group] = self._score(group, tensors)
        return self._known[group]


@dataclass(frozen=True)
class _Attempt:
    decision: Decision
    predicted: float
    measured: float


class TimedDecision:
    """The channels to remove so that the network takes no more than a given time.

    Args:
        graph: the coupled channels; the model has real weights.
        score: what a channel is worth.
        request: what is asked for; its target names ``"latency"``.
        latency: where and how time is measured.

    Attributes:
        chosen: the components that go.
        settings: those of the decision, and under ``"latency"`` what was predicted and measured, in milliseconds.

    Raises:
        PlanError: the target cannot be met, or the model cannot be timed.
    """

    def __init__(self, graph: ChannelGraph, score: Importance, request: Request, latency: Latency) -> None:
        if any(held.tensor.is_meta for held in held_tensors(graph.model).values()):
            raise PlanError("The model's weights are on the meta device, where nothing takes time. Give real ones.")
        self._graph, self._score, self._request = graph, _Remembered(score), request
        with ExitStack() as stack:
            self._timer: Timer
            if latency.timer is not None:
                self._timer = latency.timer
            else:
                self._timer = stack.enter_context(DeviceTimer(latency, graph.example_inputs))
            found = uses(graph.trace, graph.channels)
            table = latency.table([use.spec for use in found], self._timer, device_of(graph.example_inputs))
            self._time = TimeModel(graph.trace, graph.channels, found, table)
            self._calibrate()
            attempts = self._attempts()
        best = min(attempts, key=lambda a: (self._misses(a.measured), abs(a.measured - self._limit)))
        self.chosen, self.kept = best.decision.chosen, best.decision.kept
        self.settings = dict(best.decision.settings)
        self.settings["reached"] = {**self._reached(best.decision), "latency": best.measured / self._whole}
        self.settings["latency"] = {
            "backend": latency.backend if latency.timer is None else type(latency.timer).__name__,
            "threads": latency.threads or torch.get_num_threads(),
            "before_ms": 1e3 * self._whole,
            "limit_ms": 1e3 * self._limit,
            "predicted_ms": 1e3 * best.predicted,
            "measured_ms": 1e3 * best.measured,
            "met": not self._misses(best.measured),
        }

    def _reached(self, decision: Decision) -> dict[str, float]:
        found = decision.settings["reached"]
        return dict(found) if isinstance(found, dict) else {}

    def _misses(self, seconds: float) -> bool:
        return seconds > self._limit * (1 + NEAR)

    def _thinned(self, decision: Decision) -> nn.Module:
        return plan_removal(self._graph, decision.chosen).apply(self._graph.model)

    def _measure(self, *models: nn.Module) -> list[float]:
        """Seconds of each model; the whole one is timed beside them, and counts as it did the first time."""
        whole, *others = self._timer.networks([self._graph.model, *models], self._graph.example_inputs)
        return [self._whole * each / whole for each in others]

    def _calibrate(self) -> None:
        """Time the whole network and some of uniform width, and fit the prediction to them."""
        graph, time = self._graph, self._time
        (self._whole,) = self._timer.networks([graph.model], graph.example_inputs)
        asked = (self._request.target or {})["latency"]
        self._limit = target_of({"latency": asked}, {"latency": 1e3 * self._whole}).limits["latency"] / 1e3
        goes = min(0.8, max(0.2, 1 - self._limit / self._whole))
        decisions = [
            Decision(graph, self._score, replace(self._request, target=None, ratio=ratio, scope="local"), time)
            for ratio in (goes, 1 - (1 - goes) * THINNER)
        ]
        gone = [np.zeros(0, dtype=np.int64), *(decision.chosen for decision in decisions)]
        counts = [graph.counter(graph.components.dead(chosen)) for chosen in gone]
        measured = [self._whole, *self._measure(*(self._thinned(decision) for decision in decisions))]
        time.calibration = calibrated([time.features(count) for count in counts], measured)
        time.whole = self._whole

    def _attempts(self) -> list[_Attempt]:
        """Decide, measure, correct the prediction by what was measured, and decide again until it is near enough."""
        found: list[_Attempt] = []
        for _ in range(ATTEMPTS):
            decision = Decision(self._graph, self._score, self._request, self._time)
            predicted = self._time.seconds(self._graph.counter(self._graph.components.dead(decision.chosen)))
            (measured,) = self._measure(self._thinned(decision))
            found.append(_Attempt(decision, predicted, measured))
            if abs(measured / predicted - 1) <= NEAR and not self._misses(measured):
                break
            self._time.calibration = self._time.calibration.scaled(measured / predicted)
        return found
