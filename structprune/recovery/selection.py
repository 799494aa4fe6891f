"""`Reconstruction`: channels ranked by the error that is left once the layers that consume them are solved again."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from structprune.checking import PATH, SEED, function, one_of, real, require, several, some_of, whole
from structprune.coupling.graph import ChannelGraph
from structprune.coupling.groups import Group
from structprune.coupling.roles import AXES
from structprune.distributed import all_reduced, failing_together, nobody_failed
from structprune.equations.elimination import ConsumerMoments, eliminate
from structprune.equations.least_squares import add_second_moments
from structprune.equations.linear_maps import LinearMap, argument, linear_map, with_intercept
from structprune.errors import PlanError, RecoveryError
from structprune.forwards.activation_files import runs_of
from structprune.forwards.batches import inputs_of, samples_in
from structprune.forwards.parallel_forward import BatchRun, Pause, Side, parallel_runs
from structprune.forwards.prefix import PrefixCache, output_of
from structprune.forwards.turns import Turns
from structprune.forwards.widened import wide
from structprune.importance.data import Batches
from structprune.inputs import device_of
from structprune.recovery.candidates import Piece
from structprune.recovery.directions import MAX_FEATURES, Directions, entry_moments, has_many_features, moments_of
from structprune.recovery.layers import GroupConsumer, group_consumers
from structprune.recovery.price_curves import Curve, FittedReconstruction, Key, key_of
from structprune.recovery.prices import prices
from structprune.recovery.probes import Probes, affordable
from structprune.tracing.replay import Hook, ReplayedCall
from structprune.tracing.state import copy_buffer, swapped_tensors
from structprune.tracing.trace import preserved_random_state

Distance = Callable[[Tensor, Tensor], Tensor]

DIRECTION_ROWS = 2048  # positions of all batches of a rank that the directions of many features are found by
DIRECTED_ROWS = 8 * MAX_FEATURES  # positions of all batches that the moments in these directions are computed on
CHUNK = 1 << 22  # entries of features that are unfolded at a time


def divergence(dense: Tensor, changed: Tensor) -> Tensor:
    """Sum over all positions of the Kullback-Leibler divergence between softmaxes over the last dimension.

    With ``d = log q - log p`` it is the sum of ``p (exp(d) - 1 - d)``, as both sum up to one. No term is negative, so
    that float32 is enough.
    """
    log_p, log_q = F.log_softmax(wide(dense), -1), F.log_softmax(wide(changed), -1)
    d = log_q.sub_(log_p).clamp_(max=80)  # above that exp(d) leaves float32
    return d.expm1().sub_(d).mul_(log_p.exp_()).sum(dtype=torch.float64)


def squared_error(dense: Tensor, changed: Tensor) -> Tensor:
    """Sum of the squared differences of all outputs: every sample counts.

    A classifier is sure of most images that it was trained on, and on these the divergence hardly changes.
    """
    return (dense.double() - changed.double()).square().sum()


@dataclass(frozen=True, slots=True)
class _Removal:
    """The removal of a group's channels one by one.

    Attributes:
        order: the channels in the order in which they are removed, the one that is kept last.
        error: of the consumers once each is removed, shape ``(channels - 1,)``.
        changes: for each level, what is added to the matrix of each consumer when so many channels are removed.
    """

    order: np.ndarray
    error: np.ndarray
    changes: list[list[Tensor]]


@dataclass(frozen=True)
class Reconstruction:
    """Ranks channels by the error that remains once the layers that consume them are solved again.

    For each group the second moments of its consumers' features are summed up, and channels are eliminated one by one
    (`structprune.equations.elimination.eliminate`). How much that error matters to the network is measured: only the
    consumers are solved without a part of the channels, and the output is compared with that of the whole model.
    Neither labels nor gradients are needed. Fitted, it also says in which groups channels cost least for what they
    save: give it as ``importance=`` and as ``scope=`` with a ``target=``.

    Args:
        per: what a channel saves: ``"macs"`` or ``"params"``.
        levels: shares of a group's channels to remove for measuring.
        probes: number of samples to measure on, at least one batch: those that come first. Consumers are not solved on
            them if the others are at least as many; else they are solved on the first three quarters of each batch. By
            default as many as cost no more than a forward of all samples, 256 at most, but samples with at least 256
            rows of the output in all (images of a classifier, tokens of a language model).
        rows: positions of all batches together that second moments are computed on; for convolutions with more than
            1,536 features 12,288 at most.
        axes: kinds of channels to rank, as for `structprune.plan`; by default all.
        distance: from the dense and the changed output, summed over samples; by default `divergence`;
            `squared_error` where the samples are some that a classifier was trained on.
        seed: of the draw of positions.
        offload: as for `structprune.recover`: a folder for what batches hold between layers.

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
    probes: int | None = None
    rows: int = 65536
    axes: tuple[str, ...] | None = None
    distance: Distance = divergence
    seed: int = 0
    offload: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        """Check what was given."""
        shares, function_of_two = real(above=0, most=1), function("the dense output", "the changed one")
        require(vars(self), per=one_of(("macs", "params")), levels=several(shares, "shares above 0"))
        require(
            vars(self),
            probes=whole(1).or_none,
            rows=whole(1),
            axes=some_of(AXES).or_none,
            distance=function_of_two,
            seed=SEED,
            offload=PATH.or_none,
        )

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

        Where ``torch.distributed`` is in use, every rank gives its share of the data, in turns as for
        `structprune.recover`, and all get the same scores.

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
        given = batches if isinstance(batches, Batches) else Batches(batches or ())
        data = [inputs_of(batch, device) for batch in given.once("reconstruction", model)] if batches else []
        if not data:
            raise PlanError("Reconstruction looks at data: give an iterable with at least one batch.")
        nobody_failed()
        # Forwards may branch on the size of the batch, which the example inputs need not share with the data.
        graph = ChannelGraph(
            model, data[0], ignore=graph.ignored, ignore_outputs=graph.outputs_ignored, outputs=graph._wanted
        )
        groups = {n: g for n, g in enumerate(graph.groups()) if self.axes is None or g.axis in self.axes}
        consumers = {number: members for number, group in groups.items() if (members := group_consumers(graph, group))}
        with preserved_random_state(), torch.no_grad(), swapped_tensors(model, copy_buffer, track=False):
            model.eval()
            sizes = list(map(samples_in, data))
            starts = [min(consumer.number for consumer in members) for members in consumers.values()]
            wanted = self.probes or affordable(graph.trace, starts, len(self.levels), sum(Turns.of(sizes).sizes))
            probes = Probes.among(data, sizes, wanted)
            removals = self._removals(graph, consumers, data, probes)
            distances = self._distances(graph, consumers, removals, probes)
            curves: dict[Key, Curve] = {}
            for number, removal in removals.items():
                group = groups[number]
                saved = self._saved(graph, group)
                price = prices(removal.error, self._counts(group), distances[number]) / saved
                curves[key_of(group)] = Curve(removal.order, removal.error, price, saved)
        return FittedReconstruction(curves)

    def _counts(self, group: Group) -> list[int]:
        """How many channels are removed at each level: of 8 channels 2, 4, 6 and 7, as one is always kept."""
        return [min(group.channels - 1, max(1, round(group.channels * level))) for level in self.levels]

    def _saved(self, graph: ChannelGraph, group: Group) -> float:
        """What one channel of the group saves."""
        full = graph.costs.at(graph.counter())
        less = graph.costs.at(graph.counter(graph.components.removed(group.components[:1])))
        return max(1.0, float(getattr(full, self.per) - getattr(less, self.per)))

    def _removals(
        self, graph: ChannelGraph, consumers: dict[int, list[GroupConsumer]], data: Sequence[Any], probes: Probes
    ) -> dict[int, _Removal]:
        """For each group the order in which its channels are removed, while all data pass once through the model.

        A group is done once the last of its consumers has been reached.

        Args:
            graph: of the model.
            consumers: of each group, by its number.
            data: batches.
            probes: which of them are for measuring.
        """
        events = sorted({(consumer.number, Side.BEFORE) for group in consumers.values() for consumer in group})
        last = {number: max(consumer.number for consumer in group) for number, group in consumers.items()}
        moments: dict[tuple[int, int], ConsumerMoments] = {}
        removals: dict[int, _Removal] = {}
        with (
            runs_of(BatchRun, self.offload, graph.model) as kind,
            parallel_runs(kind, graph.model, data, graph.trace, set(events)) as runs,
        ):
            for event in events:
                pauses = [run.run_to(event) for run in runs]
                here = [(n, c) for n, group in consumers.items() for c in group if c.number == event[0]]
                xx, matrix, directions = self._moments(here[0][1].node, pauses, probes)
                for number, consumer in here:
                    moments[number, event[0]] = moments_of(xx, matrix, consumer.places.to(xx.device), directions)
                for number in {n for n, _ in here if last[n] == event[0]}:
                    in_order = [moments.pop((number, consumer.number)) for consumer in consumers[number]]
                    removals[number] = self._removal(graph.groups()[number], in_order)
        return removals

    def _removal(self, group: Group, consumers: list[ConsumerMoments]) -> _Removal:
        order, error = eliminate(consumers)
        changes = [[consumer.change(order[:count]) for consumer in consumers] for count in self._counts(group)]
        return _Removal(order.cpu().numpy(), error.cpu().numpy(), changes)

    def _moments(self, node: fx.Node, pauses: list[Pause], probes: Probes) -> tuple[Tensor, Tensor, Directions | None]:
        """Second moments of a consumer's features with the intercept last, and its matrix with a row of zeros.

        Shapes ``(features + 1, features + 1)`` and ``(features + 1, outputs)``. Where it has too many features, moments
        are those in few directions of each channel, which come third.
        """
        name = node.meta["name"]
        layer = _map_of(name, pauses[0])
        generator = torch.Generator().manual_seed(self.seed + node.meta["index"])
        matrix = layer.matrix_of(argument(name, "weight", pauses[0].args, pauses[0].kwargs)).double()[0]
        inputs: list[Tensor] = [argument(name, "input", pause.args, pause.kwargs) for pause in pauses]
        # The operation has not run: its result has the spatial sizes of the trace, and the samples of each batch.
        sizes = [
            x.shape[0] * int(np.prod(node.meta["shape"][2:])) if layer.kernel else x.numel() // x.shape[-1]
            for x in inputs
        ]
        totals = [int(probes.seen(number, size)) for number, size in enumerate(sizes)]
        totals = [max(1, total) if probes.seen(number, 1.0) else 0 for number, total in enumerate(totals)]
        rows = min(self.rows, DIRECTED_ROWS) if has_many_features(layer) else self.rows
        positions = probes.turns.drawn(totals, max(1, rows // max(1, probes.solved_batches)), generator)
        directions = self._directions(layer, matrix, inputs, positions) if has_many_features(layer) else None
        size = (layer.features if directions is None else directions.count) + 1
        xx = torch.zeros(1, size, size, dtype=torch.float64, device=matrix.device)
        for x, drawn in zip(inputs, positions, strict=True):
            for some in drawn.to(x.device).split(max(1, CHUNK // layer.features)) if len(drawn) else ():
                # The ridge of the elimination is far above the rounding of float32.
                features = layer.features_at(x, some, x.dtype)
                features = features if directions is None else directions.of_features(features[0])[None]
                add_second_moments(xx, with_intercept(features))
        if not bool(torch.isfinite(xx).all()):
            raise PlanError(f"The inputs of {node.meta['name']} are NaN or infinite on data. Check it and the weights.")
        return all_reduced(xx)[0], torch.cat([matrix, matrix.new_zeros(1, matrix.shape[1])]), directions

    def _directions(
        self, layer: LinearMap, matrix: Tensor, inputs: Sequence[Tensor], positions: Sequence[Tensor]
    ) -> Directions:
        """Few directions for a layer of many features, from some of the positions."""
        entries, some = prod(layer.kernel), max(1, DIRECTION_ROWS // len(inputs))
        moments = torch.zeros(layer.features // entries, entries, entries, dtype=torch.float64, device=matrix.device)
        for x, drawn in zip(inputs, positions, strict=True):
            at = drawn[:: max(1, len(drawn) // some)].to(x.device)
            moments += entry_moments(layer, layer.features_at(x, at, x.dtype)[0])
        return Directions.of(matrix.view(len(moments), entries, -1), all_reduced(moments))

    def _distances(
        self,
        graph: ChannelGraph,
        consumers: dict[int, list[GroupConsumer]],
        removals: dict[int, _Removal],
        probes: Probes,
    ) -> dict[int, list[float]]:
        """For each group, how far the output moves at each level; forwards share what precedes its consumers.

        Args:
            graph: of the model.
            consumers: of each group, by its number.
            removals: the same.
            probes: batches to measure on.
        """
        pieces, device = probes.pieces(), device_of(graph.model)
        measured = [piece.inputs for piece in pieces]

        def part(piece: Piece, output: Tensor) -> Tensor:
            return piece.part(output) if output.dim() else output

        outputs = [part(piece, output_of(graph.model, piece.inputs, {}, graph.trace)) for piece in pieces]
        starts = {number: min(consumer.number for consumer in consumers[number]) for number in removals}
        distances: dict[int, list[float]] = {}
        events = {(start, Side.BEFORE) for start in starts.values()}
        with (
            runs_of(PrefixCache, self.offload, graph.model) as kind,
            parallel_runs(kind, graph.model, measured, graph.trace, events) as caches,
        ):
            for event in sorted(events):
                for cache in caches:
                    cache.run_to(event)
                for number in [n for n, start in starts.items() if start == event[0]]:
                    totals = torch.zeros(len(removals[number].changes), dtype=torch.float64, device=device)
                    for level, changes in enumerate(removals[number].changes):
                        hooks = _changing_hooks(consumers[number], changes)
                        for piece, cache, dense in zip(pieces, caches, outputs, strict=True):
                            changed = cache.output_from(event[0], graph.model, piece.inputs, hooks, graph.trace)
                            totals[level] += self.distance(dense, part(piece, changed)).double()
                    distances[number] = all_reduced(totals).tolist()
        return distances


# -- changed consumers -----------------------------------------------------------------------------------------------


def _map_of(name: str, call: Pause | ReplayedCall) -> LinearMap:
    """The linear map of an operation for a batch.

    Raises:
        RecoveryError: the input has another number of dimensions than the example inputs gave it.
    """
    layer = linear_map(name, call.args, call.kwargs)
    if layer is None:
        raise RecoveryError(f"A batch reaches {name} with another number of dimensions than the example inputs.")
    return layer


def _changing_hooks(consumers: Sequence[GroupConsumer], changes: Sequence[Tensor]) -> dict[int, Hook]:
    """Hooks by which each consumer computes with a changed matrix."""
    numbers = [consumer.number for consumer in consumers]
    return {number: partial(_changed_result, change) for number, change in zip(numbers, changes, strict=True)}


def _changed_result(change: Tensor, call: ReplayedCall) -> Tensor:
    """The result of a layer when `change` is added to its matrix, shape ``(features + 1, outputs)``, intercept last."""
    name = call.call.name
    layer = _map_of(name, call)
    x, weight, bias = (argument(name, which, call.args, call.kwargs) for which in ("input", "weight", "bias"))
    changed = layer.matrix_of(weight).double() + change[None, :-1]
    shift = change[-1] if bias is None else change[-1] + bias
    return layer(x, layer.weight_of(changed).to(x.dtype), shift.to(x.dtype))
