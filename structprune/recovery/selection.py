"""`Reconstruction`: channels ranked by what is missing after the layers behind them are solved again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from structprune.errors import PlanError
from structprune.graph import ChannelGraph
from structprune.groups import Group
from structprune.importance.data import Batches
from structprune.importance.weight import LnNorm
from structprune.inputs import device_of
from structprune.ops import layer_of
from structprune.ranks import all_reduced, failing_together, nobody_failed
from structprune.recovery.contraction import argument
from structprune.recovery.elimination import View, eliminate
from structprune.recovery.lockstep import Lane, Side, Stop, lanes
from structprune.recovery.measuring import changed_output, form_of, output_of
from structprune.recovery.recover import inputs_of
from structprune.recovery.restart import KeepingLane
from structprune.tracing.state import lent, shield
from structprune.tracing.trace import preserved_random_state, tensors_in

Distance = Callable[[Tensor, Tensor], Tensor]


def divergence(dense: Tensor, changed: Tensor) -> Tensor:
    """Sum over all positions of the Kullback-Leibler divergence between softmaxes over the last dimension."""
    log_p, log_q = F.log_softmax(dense.double(), -1), F.log_softmax(changed.double(), -1)
    return (log_p.exp() * (log_p - log_q)).sum()


def squared_error(dense: Tensor, changed: Tensor) -> Tensor:
    """Sum of the squared differences of all outputs: a `Reconstruction` by it heeds every sample.

    A classifier is sure of most images that it was trained on, and there the divergence sees next to nothing.
    """
    return (dense.double() - changed.double()).square().sum()


Key = tuple[tuple[str, int, bytes, bytes], ...]


def _key(group: Group) -> Key:
    """What is equal for the same group of another graph of the same model."""
    return tuple((m.tensor, m.dim, m.positions.tobytes(), m.channels.tobytes()) for m in group.members)


@dataclass(frozen=True, slots=True)
class _Seat:
    """A consumer of a group: the operation, and the features of each channel."""

    node: fx.Node
    places: Tensor


@dataclass(frozen=True, slots=True)
class _Curve:
    """A group's channels in the order in which they go, the error as each goes, and the price of each step."""

    order: np.ndarray
    error: np.ndarray
    price: np.ndarray


class FittedReconstruction:
    """Scores and prices of the groups of one model; give it to `structprune.plan` as importance and as scope."""

    def __init__(self, curves: dict[Key, _Curve]) -> None:
        self._curves = curves
        self._norm = LnNorm(2.0)

    def __repr__(self) -> str:
        return "reconstruction"

    def _curve(self, group: Group) -> _Curve | None:
        return self._curves.get(_key(group))

    def __call__(self, group: Group, tensors: Mapping[str, Tensor]) -> Tensor:
        """Scores of shape ``(group.channels,)``: the error once the channel is gone, with all those before it.

        A group that no layer consumes linearly is ranked by the L2 norm.
        """
        curve = self._curve(group)
        if curve is None:
            return self._norm(group, tensors)
        scores = np.zeros(group.channels)
        steps = np.append(curve.error, np.inf if len(curve.error) == 0 else curve.error[-1] * 2 + 1)
        # The order counts where errors are equal.
        scores[curve.order] = np.nan_to_num(steps, posinf=1.0) + np.arange(group.channels) * 1e-9
        return torch.from_numpy(scores)

    def depth(self, group: Group, kept: np.ndarray) -> np.ndarray:
        """What the last channel costs that goes when `kept` are kept: change of the output over what it saves."""
        curve = self._curve(group)
        if curve is None:
            top = max((c.price.max() for c in self._curves.values() if len(c.price)), default=1.0)
            return 1e3 * top * (1 + group.channels - kept)
        return curve.price[np.minimum(group.channels - kept, group.channels - 1) - 1]


@dataclass(frozen=True)
class Reconstruction:
    """Ranks channels by the error that remains once the layers that consume them are solved again.

    For each group the second moments of what its consumers see are gathered, and channels are eliminated one by one
    (`structprune.recovery.elimination`). How much that error matters to the network is measured: the consumers alone
    are solved without a part of the channels, and the model's output is compared with its own. Neither labels nor
    gradients are needed. Fitted, it also says in which groups channels cost least for what they save: give it as
    ``importance=`` and as ``scope=`` with a ``target=``.

    Args:
        per: what a channel saves: ``"macs"`` or ``"params"``.
        levels: shares of a group's channels to take out for measuring.
        probes: number of samples to measure on, at least one batch.
        rows: positions of all batches together to take second moments of.
        axes: kinds of channels to look at, as for `structprune.plan`; by default all.
        distance: from the dense and the changed output, summed over samples; by default `divergence`;
            `squared_error` where the samples are some that a classifier was trained on.
        seed: of the draw of positions.

    Example:
        >>> import torch, structprune
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> data = [torch.randn(64, 4)]
        >>> graph = structprune.DependencyGraph(model, data[0])
        >>> chosen = structprune.Reconstruction().fit(graph, data)
        >>> plan = structprune.plan(
        ...     model, data[0], importance=chosen, scope=chosen, target={"macs": 0.5}, round_to=1
        ... )
        >>> plan.layers
        (LayerWidth(layer='0', before=8, after=4),)
    """

    per: str = "macs"
    levels: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    probes: int = 256
    rows: int = 65536
    axes: tuple[str, ...] | None = None
    distance: Distance = divergence
    seed: int = 0

    def __call__(self, group: Group, tensors: Mapping[str, Tensor]) -> Tensor:
        """Refused: it has to be fitted first.

        Raises:
            PlanError: always.
        """
        raise PlanError(
            "Reconstruction has to see data before it can score: call fit(graph, batches), and pass what it returns."
        )

    def fit(self, graph: ChannelGraph, batches: Iterable[Any] | Batches | None) -> FittedReconstruction:
        """Scores for the groups of `graph`; the model stays as it was.

        Args:
            graph: the coupled channels of the model.
            batches: as for `structprune.recover`.

        Raises:
            PlanError: there is no data; or another rank of ``torch.distributed`` has failed.
        """
        with failing_together(PlanError, "Reconstruction.fit"):
            return self._fitted(graph, batches)

    def _fitted(self, graph: ChannelGraph, batches: Iterable[Any] | Batches | None) -> FittedReconstruction:
        model = graph.model
        device = device_of(model)
        found = batches.once("reconstruction") if isinstance(batches, Batches) else batches or ()
        data = [inputs_of(batch, device) for batch in found]
        if not data:
            raise PlanError("Reconstruction looks at data: give an iterable with at least one batch.")
        nobody_failed()
        # Forwards may branch on the size of the batch, which the example inputs need not share with the data.
        graph = ChannelGraph(model, data[0], ignore=graph.ignored, outputs=graph._wanted)
        wanted = [n for n, group in enumerate(graph.groups()) if self.axes is None or group.axis in self.axes]
        seats = {number: found for number in wanted if (found := _seats(graph, graph.groups()[number]))}
        with preserved_random_state(), torch.no_grad(), lent(model, shield, track=False):
            model.eval()
            orders = self._orders(graph, seats, data)
            probes = _first(data, self.probes)
            measured = self._measured(graph, seats, {n: changes for n, (_, _, changes) in orders.items()}, probes)
            curves: dict[Key, _Curve] = {}
            for number, (order, error, _) in orders.items():
                group = graph.groups()[number]
                prices = _prices(error, self._counts(group), measured[number]) / self._saved(graph, group)
                curves[_key(group)] = _Curve(order, error, prices)
        return FittedReconstruction(curves)

    def _counts(self, group: Group) -> list[int]:
        """How many channels go at each level."""
        return [min(group.channels - 1, max(1, round(group.channels * level))) for level in self.levels]

    def _saved(self, graph: ChannelGraph, group: Group) -> float:
        """What one channel of the group saves."""
        dead = np.zeros(graph.components.count, dtype=bool)
        full = graph.costs.at(graph.counter(dead))
        dead[group.components[:1]] = True
        less = graph.costs.at(graph.counter(graph.components.closure(dead)))
        return max(1.0, float(getattr(full, self.per) - getattr(less, self.per)))

    def _orders(
        self, graph: ChannelGraph, seats: dict[int, list[_Seat]], data: Sequence[Any]
    ) -> dict[int, tuple[np.ndarray, np.ndarray, list[list[Tensor]]]]:
        """For each group: the order in which channels go, the error, and the changes of its consumers at each level."""
        events = sorted({(seat.node.meta["index"], Side.BEFORE) for found in seats.values() for seat in found})
        last = {number: max(seat.node.meta["index"] for seat in found) for number, found in seats.items()}
        views: dict[tuple[int, int], View] = {}
        result: dict[int, tuple[np.ndarray, np.ndarray, list[list[Tensor]]]] = {}
        with lanes(Lane, graph.model, data, graph.trace, set(events)) as running:
            for event in events:
                stops = [lane.until(event) for lane in running]
                here = [(n, s) for n, found in seats.items() for s in found if s.node.meta["index"] == event[0]]
                moments = self._moments(here[0][1].node, stops)
                for number, seat in here:
                    views[(number, event[0])] = View(*moments, seat.places.to(moments[0].device))
                for number in {n for n, _ in here if last[n] == event[0]}:
                    mine = [views.pop((number, seat.node.meta["index"])) for seat in seats[number]]
                    order, error = eliminate(mine)
                    changes = [
                        [view.change(order[:count]) for view in mine] for count in self._counts(graph.groups()[number])
                    ]
                    result[number] = (order.cpu().numpy(), error.cpu().numpy(), changes)
        return result

    def _moments(self, node: fx.Node, stops: list[Stop]) -> tuple[Tensor, Tensor]:
        """Second moments of a consumer's features with the intercept last, and its matrix with a row of zeros."""
        name = node.meta["name"]
        form = form_of(name, stops[0])
        generator = torch.Generator().manual_seed(self.seed + node.meta["index"])
        matrix = form.matrix(argument(name, "weight", stops[0].args, stops[0].kwargs)).double()[0]
        xx = torch.zeros(form.features + 1, form.features + 1, dtype=torch.float64, device=matrix.device)
        quota = max(1, self.rows // len(stops))
        shape = node.meta["shape"]
        for stop in stops:
            x: Tensor = argument(name, "input", stop.args, stop.kwargs)
            flat = not form.kernel
            total = x.numel() // x.shape[-1] if flat else x.shape[0] * int(np.prod(shape[2:]))
            drawn = torch.arange(total)
            if quota < total:
                drawn = torch.randint(total, (quota,), generator=generator).sort().values
            for some in drawn.to(x.device).split(max(1, (1 << 25) // form.features)):
                rows = form.rows(x, some)[0]
                rows = torch.cat([rows, rows.new_ones(len(rows), 1)], 1)
                xx.addmm_(rows.T, rows)
        return all_reduced(xx), torch.cat([matrix, matrix.new_zeros(1, matrix.shape[1])])

    def _measured(
        self,
        graph: ChannelGraph,
        seats: dict[int, list[_Seat]],
        changes: dict[int, list[list[Tensor]]],
        probes: Sequence[Any],
    ) -> dict[int, list[float]]:
        """For each group, how far the output moves at each level: the forward before its consumers is shared."""
        outputs = [output_of(graph, batch, {}) for batch in probes]
        starts = {number: min(seat.node.meta["index"] for seat in seats[number]) for number in changes}
        found: dict[int, list[float]] = {}
        events = {(start, Side.BEFORE) for start in starts.values()}
        with lanes(KeepingLane, graph.model, probes, graph.trace, events) as kept:
            for event in sorted(events):
                for lane in kept:
                    lane.until(event)
                for number in [n for n, start in starts.items() if start == event[0]]:
                    places = [seat.node.meta["index"] for seat in seats[number]]
                    totals: list[Tensor] = []
                    for change in changes[number]:
                        edits = dict(zip(places, change, strict=True))
                        moved = [
                            self.distance(dense, changed_output(graph, edits, batch, lane)).double()
                            for batch, lane, dense in zip(probes, kept, outputs, strict=True)
                        ]
                        totals.append(torch.stack(moved).sum())
                    found[number] = all_reduced(torch.stack(totals)).tolist()
        return found


def _first(data: Sequence[Any], samples: int) -> list[Any]:
    """The first batches that together hold so many samples."""
    found: list[Any] = []
    for batch in data:
        found.append(batch)
        samples -= next((t.shape[0] for t in tensors_in(batch) if t.dim()), 1)
        if samples <= 0:
            break
    return found


_INPUT_DIM = {"linear": 1, "matmul": 0, "mm": 0, "addmm": 0}


def _seats(graph: ChannelGraph, group: Group) -> list[_Seat]:
    """The consumers of a group: operations that sum over its channels with a held weight."""
    found: list[_Seat] = []
    for member in group.members:
        for node in graph.trace.nodes:
            name = node.meta["name"]
            if layer_of(name) is None or not any(str(n.target) == member.tensor for n in node.all_input_nodes):
                continue
            weight = argument(name, "weight", node.args, dict(node.kwargs))
            groups = 1 if not name.startswith("conv") else argument(name, "groups", node.args, dict(node.kwargs)) or 1
            of_input = _INPUT_DIM.get(name, 0 if "transpose" in name else 1)
            if not isinstance(weight, fx.Node) or str(weight.target) != member.tensor or groups != 1:
                continue
            shape = weight.meta["shape"]
            if member.dim != of_input or len(shape) < 2:
                continue
            places = _places(member.positions, member.channels, group.channels, int(np.prod(shape[2:])))
            if places is not None:
                found.append(_Seat(node, places))
    return found


def _places(positions: np.ndarray, channels: np.ndarray, count: int, kernel: int) -> Tensor | None:
    """Features of each channel, shape ``(count, each)``; None if they do not have equally many."""
    order = np.lexsort((positions, channels))
    numbers = np.bincount(channels, minlength=count)
    if numbers.min() != numbers.max() or not numbers.max():
        return None
    rows = positions[order].reshape(count, -1)
    return torch.from_numpy((rows[:, :, None] * kernel + np.arange(kernel)).reshape(count, -1))


def _prices(error: np.ndarray, counts: list[int], measured: list[float]) -> np.ndarray:
    """What each step costs: the slope of the convex hull of the distance, which is read off the error in between.

    Between two measurements the ratio of distance to error is taken to change evenly on a logarithmic scale.
    """
    at = np.maximum(error[np.asarray(counts) - 1], 1e-30)
    ratio = np.log(np.maximum(np.asarray(measured), 1e-12) / at)
    steps = np.arange(1, len(error) + 1)
    distance = np.maximum.accumulate(np.concatenate([[0.0], error * np.exp(np.interp(steps, counts, ratio))]))
    hull = [0]
    for step in steps:
        while len(hull) > 1 and (distance[step] - distance[hull[-1]]) * (hull[-1] - hull[-2]) <= (
            distance[hull[-1]] - distance[hull[-2]]
        ) * (step - hull[-1]):
            hull.pop()
        hull.append(int(step))
    return np.diff(np.interp(np.arange(len(distance)), hull, distance[hull]))
