"""What there is, of all that a target may limit, of a network without some of its branches; and what one saves."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import ExitStack
from math import prod

from torch import fx, nn

from structprune.benchmarking.timing import device_of
from structprune.coupling.costs import KeyValueCache, count_cost
from structprune.coupling.graph import ChannelGraph
from structprune.coupling.propagate import propagate
from structprune.depth.ordering import NodeCost, Saved, counted
from structprune.depth.scoring import Scorer
from structprune.latency.measure import DeviceTimer, Latency, Timer
from structprune.latency.specs import uses
from structprune.ops import op_of
from structprune.planning.targets import amounts
from structprune.tracing.trace import ExampleInputs, trace


class Amounts:
    """Counts and measures networks.

    Args:
        model: the whole network.
        example_inputs: what it runs on.
        kinds: names of `structprune.planning.targets.TARGETS`.
        latency: how time is measured, if a target names it.
    """

    def __init__(
        self, model: nn.Module, example_inputs: ExampleInputs, kinds: Collection[str], latency: Latency | None
    ) -> None:
        self._model, self._inputs, self._kinds = model, example_inputs, kinds
        self._latency = latency or Latency()
        self._seconds: float | None = None

    def whole(self) -> dict[str, float]:
        """The amounts of the whole network; latency in milliseconds."""
        reached = self._counted(self._model)
        if "latency" in self._kinds:
            with self._timer() as timer:
                (self._seconds,) = timer.networks([self._model], self._inputs)
            reached["latency"] = 1e3 * self._seconds
        return reached

    def of(self, slim: nn.Module) -> dict[str, float]:
        """The amounts of a smaller network, timed beside the whole one, which counts as it did at first."""
        reached = self._counted(slim)
        if self._seconds is not None:
            with self._timer() as timer:
                now, then = timer.networks([self._model, slim], self._inputs)
            reached["latency"] = 1e3 * self._seconds * then / now
        return reached

    def _counted(self, model: nn.Module) -> dict[str, float]:
        recorded = trace(model, self._inputs, operations=op_of)
        channels = propagate(recorded)
        total = 0
        if "channels" in self._kinds:
            total = sum(group.channels for group in ChannelGraph(model, self._inputs).groups())
        reached = amounts(count_cost(model, recorded, channels, lambda axis: axis.size), total)
        if "kv_cache" in self._kinds:
            reached["kv_cache"] = KeyValueCache(recorded, channels).bytes(lambda axis: axis.size)
        return {kind: amount for kind, amount in reached.items() if kind in self._kinds}

    def _timer(self) -> _Opened:
        return _Opened(self._latency, self._inputs)

    def times(self, scorer: Scorer) -> dict[fx.Node, float]:
        """Seconds of each operation of the whole network that the table of latencies holds."""
        operations = uses(scorer.trace, scorer.channels)
        with self._timer() as timer:
            table = self._latency.table([use.spec for use in operations], timer, device_of(self._inputs))
        return {use.node: table.seconds(use.spec, use.spec.widths) for use in operations}


class _Opened:
    """The timer of a `Latency`, closed at the end if it is made here."""

    def __init__(self, latency: Latency, example_inputs: ExampleInputs) -> None:
        self._latency, self._inputs, self._stack = latency, example_inputs, ExitStack()

    def __enter__(self) -> Timer:
        return self._latency.timer or self._stack.enter_context(DeviceTimer(self._latency, self._inputs))

    def __exit__(self, *_: object) -> None:
        self._stack.close()


def saved_by(scorer: Scorer, kinds: Collection[str], seconds: Mapping[fx.Node, float]) -> Saved:
    """What branches save of all that a target limits.

    Args:
        scorer: of the whole network.
        kinds: the names in the target.
        seconds: of each operation, for latency.
    """
    costs: dict[str, NodeCost] = {}
    for kind in kinds:
        if kind == "latency":
            costs[kind] = lambda node: seconds.get(node, 0.0)
        elif kind == "kv_cache":
            costs[kind] = _entries_of(scorer)
        else:  # for memory the weights are counted; what activations take is seen once the network is there
            costs[kind] = counted(scorer, "macs" if kind == "macs" else "params")
    return Saved(scorer, costs)


def _entries_of(scorer: Scorer) -> NodeCost:
    """Keys and values for a token."""
    cache = KeyValueCache(scorer.trace, scorer.channels)
    held = {node: prod(node.meta["shape"]) / tokens for node, tokens in cache.kept}
    return lambda node: held.get(node, 0.0)
