"""A target of latency: measure, predict, decide, measure what was decided, and decide once more if it missed."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from structprune.benchmarking.timing import device_of
from structprune.coupling.graph import ChannelGraph
from structprune.errors import PlanError
from structprune.latency.measure import DeviceTimer, Latency, Timer
from structprune.latency.predict import Calibration, TimeModel, calibrated
from structprune.latency.specs import uses
from structprune.planning.build import plan_removal
from structprune.planning.decide import Decision, Ranking, decide_channels
from structprune.planning.options import PlanOptions
from structprune.planning.targets import target_of
from structprune.tracing.state import held_tensors

# A plan that comes so near to the limit, as measured, is taken.
NEAR = 0.05
ATTEMPTS = 3
# Predictions are calibrated by a uniformly pruned copy of about the time asked for and by one of this share of its
# width: copies that differ little leave it to chance how much of the time is a constant, which no plan can save.
SMALLER = 1 / 3


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """A decision, with the predicted and the measured time of the network that it leads to, in seconds."""

    decision: Decision
    predicted: float
    measured: float


@dataclass(frozen=True, kw_only=True)
class NetworkTimes:
    """Times a network and smaller copies of it, in seconds.

    Attributes:
        graph: the coupled channels of the network.
        timer: what measures.
        whole: the time of the network as it is.
    """

    graph: ChannelGraph
    timer: Timer
    whole: float

    def measure(self, decisions: Sequence[Decision]) -> list[float]:
        """The time that each decision leads to; the whole network is timed beside them, and counts as `whole`."""
        models: list[nn.Module] = [
            plan_removal(self.graph, decision.chosen).apply(self.graph.model) for decision in decisions
        ]
        now, *others = self.timer.networks([self.graph.model, *models], self.graph.example_inputs)
        return [self.whole * each / now for each in others]


def decide_for_latency(graph: ChannelGraph, options: PlanOptions, ranking: Ranking) -> Decision:
    """The channels to remove so that the network takes no more than a given time.

    Args:
        graph: the coupled channels; the model has real weights.
        options: what is asked for; the target names ``"latency"``.
        ranking: the scores of the channels.

    Raises:
        PlanError: the target cannot be met, or the model cannot be timed.
    """
    latency = options.latency or Latency()
    with _timed(graph, options) as (time, times):
        whole = times.whole
        limit = _limit(options, whole)
        _calibrate(time, times, options, ranking, limit)
        attempts = _attempts(time, times, options, ranking, limit)
    best = min(attempts, key=lambda a: (_misses(a.measured, limit), abs(a.measured - limit)))
    measured = {
        "backend": latency.backend if latency.timer is None else type(latency.timer).__name__,
        "threads": latency.threads or torch.get_num_threads(),
        "before_ms": 1e3 * whole,
        "limit_ms": 1e3 * limit,
        "predicted_ms": 1e3 * best.predicted,
        "measured_ms": 1e3 * best.measured,
        "met": not _misses(best.measured, limit),
    }
    settings = best.decision.settings
    reached = {**settings.reached, "latency": best.measured / whole}
    return replace(best.decision, settings=replace(settings, reached=reached, measured=measured))


@contextmanager
def _timed(graph: ChannelGraph, options: PlanOptions) -> Generator[tuple[TimeModel, NetworkTimes]]:
    """The table of a network's operations as a model of its time, and what measures networks, while the block runs.

    Raises:
        PlanError: the model cannot be timed.
    """
    if any(held.tensor.is_meta for held in held_tensors(graph.model).values()):
        raise PlanError("The model's weights are on the meta device, where no time can be measured. Give real ones.")
    latency = options.latency or Latency()
    with ExitStack() as stack:
        timer: Timer = latency.timer or stack.enter_context(DeviceTimer(latency, graph.example_inputs))
        operations = uses(graph.trace, graph.channels)
        table = latency.table([use.spec for use in operations], timer, device_of(graph.example_inputs))
        (whole,) = timer.networks([graph.model], graph.example_inputs)
        yield (
            TimeModel(graph.trace, graph.channels, operations, table),
            NetworkTimes(graph=graph, timer=timer, whole=whole),
        )


def _limit(options: PlanOptions, whole: float) -> float:
    """The limit in seconds, of a network that takes `whole` seconds."""
    asked = {"latency": (options.target or {})["latency"]}
    return target_of(asked, {"latency": 1e3 * whole}).limits["latency"] / 1e3


def calibration_of(graph: ChannelGraph, options: PlanOptions, ranking: Ranking) -> Calibration:
    """What makes the time of a network of the times of its operations, by two thinner copies of it.

    Raises:
        PlanError: the model cannot be timed.
    """
    with _timed(graph, options) as (time, times):
        _calibrate(time, times, options, ranking, _limit(options, times.whole))
    return time.calibration


def decide_by_prediction(
    graph: ChannelGraph, options: PlanOptions, ranking: Ranking, *, calibration: Calibration, whole: float
) -> Decision:
    """The channels to remove so that the network is predicted to take no more than a given time; none is measured.

    Args:
        graph: the coupled channels.
        options: what is asked for; the target names ``"latency"``.
        ranking: the scores of the channels.
        calibration: of a network of the same kind, such as one with more blocks.
        whole: the time of this network as it is, in seconds.

    Raises:
        PlanError: the target cannot be met.
    """
    latency = options.latency or Latency()
    operations = uses(graph.trace, graph.channels)
    with ExitStack() as stack:
        timer: Timer = latency.timer or stack.enter_context(DeviceTimer(latency, graph.example_inputs))
        table = latency.table([use.spec for use in operations], timer, device_of(graph.example_inputs))
    time = TimeModel(graph.trace, graph.channels, operations, table)
    time.calibration, time.whole = calibration, whole
    time.calibration = calibration.scaled(whole / time.seconds(lambda axis: axis.size))
    return decide_channels(graph, options, ranking, time)


def _misses(seconds: float, limit: float) -> bool:
    return seconds > limit * (1 + NEAR)


def _calibrate(time: TimeModel, times: NetworkTimes, options: PlanOptions, ranking: Ranking, limit: float) -> None:
    """Fit the prediction to the whole network and to two copies of uniform width."""
    graph = times.graph
    goes = min(0.8, max(0.2, 1 - limit / times.whole))
    decisions = [
        decide_channels(
            graph,
            replace(options, target=None, latency=None, ratio=ratio, scope="local", allocation="greedy"),
            ranking,
            time,
        )
        for ratio in (goes, 1 - (1 - goes) * SMALLER)
    ]
    removed = [np.zeros(0, dtype=np.int64), *(decision.chosen for decision in decisions)]
    counts = [graph.counter(graph.components.removed(chosen)) for chosen in removed]
    measured = [times.whole, *times.measure(decisions)]
    time.calibration = calibrated([time.features(count) for count in counts], measured)
    time.whole = times.whole


def _attempts(
    time: TimeModel, times: NetworkTimes, options: PlanOptions, ranking: Ranking, limit: float
) -> list[Attempt]:
    """Decide, measure, correct the prediction by what was measured, and decide again until it is near enough."""
    graph = times.graph
    attempts: list[Attempt] = []
    for _ in range(ATTEMPTS):
        decision = decide_channels(graph, options, ranking, time)
        predicted = time.seconds(graph.counter(graph.components.removed(decision.chosen)))
        (measured,) = times.measure([decision])
        attempts.append(Attempt(decision=decision, predicted=predicted, measured=measured))
        if abs(measured / predicted - 1) <= NEAR and not _misses(measured, limit):
            break
        time.calibration = time.calibration.scaled(measured / predicted)
    return attempts
