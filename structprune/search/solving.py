"""The consumers of each group solved again at several widths, while the data stream through the model.

A group of 8 channels between ``conv1`` and ``conv2`` at the levels 1/4 and 1/2: the second moments of what goes into
``conv2`` are summed up, channels are eliminated one by one, and ``conv2`` is solved without the first 2 and without the
first 4 of them. What is kept is the change of its weight and of the bias (its own, or that of the batch norm behind
it), for each of the two widths.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from structprune.coupling.graph import ChannelGraph
from structprune.coupling.groups import Group
from structprune.distributed import all_reduced
from structprune.equations.elimination import ConsumerMoments, eliminate
from structprune.equations.linear_maps import LinearMap, argument, linear_map, with_intercept
from structprune.errors import PlanError, RecoveryError
from structprune.forwards.batches import Forward, batches_of, samples_in
from structprune.importance.base import check_scores
from structprune.importance.weight import LnNorm
from structprune.ops.arguments import arguments
from structprune.planning.build import tensors_of
from structprune.planning.plan import Plan
from structprune.recovery.layers import GroupConsumer, as_consumer, group_consumers
from structprune.recovery.norms import norm_scale, uses_batch_statistics
from structprune.recovery.probes import Probes
from structprune.surgery.slicing import smaller_tensor
from structprune.tracing.replay import Replay, ReplayedCall
from structprune.tracing.state import held_tensors
from structprune.tracing.trace import as_call

CHUNK = 1 << 25  # entries of features that are unfolded at a time


class Stream:
    """The inputs of a model for each batch of data, one batch after the other, any number of times.

    Args:
        model: what takes them.
        data: batches, as for `structprune.recover`. What can be run through only once is held.
        forward: how the model is called on a batch, if it has to be told.

    Raises:
        RecoveryError: there is no batch, or one that the model does not take.
    """

    def __init__(self, model: nn.Module, data: Iterable[Any], forward: Forward | None) -> None:
        self._model, self._forward = model, forward
        self._data = list(data) if iter(data) is data else data
        self.sizes = [samples_in(inputs) for inputs in self]
        if not self.sizes:
            raise RecoveryError("data holds no batch, so there is nothing to solve layers on.")

    def __iter__(self) -> Iterator[Any]:
        for batch in self._data:
            yield from batches_of(self._model, [batch], self._forward, "is nothing to solve layers on", padding=False)

    def probes(self, samples: int) -> Probes:
        """The first batches that hold so many samples together, to measure on; see `Probes`."""
        return Probes.among(self, self.sizes, samples)


@dataclass(frozen=True, slots=True)
class Solution:
    """What is known of one group once its consumers are solved.

    Attributes:
        order: its channels in the order in which they go, shape ``(channels,)``.
        error: of its consumers once each is gone, shape ``(channels - 1,)``.
        changes: for each number of kept channels, what is added to which tensors.
    """

    order: NDArray[np.int64]
    error: NDArray[np.float64]
    changes: dict[int, dict[str, Tensor]]


@dataclass(frozen=True, slots=True)
class _Layer:
    """A consumer that can be solved.

    Attributes:
        consumer: the operation, and which of its features belong to which channel.
        weight: name of its weight.
        bias: name of what takes a constant; None if nothing does.
        norms: names of variance and weight, and epsilon, of the batch norms that scale before `bias` is added.
    """

    consumer: GroupConsumer
    weight: str
    bias: str | None
    norms: tuple[tuple[str, str | None, float | None], ...]


class _Draws:
    """Positions of one layer's result on each batch, as a single process draws them for the batches of all ranks.

    Args:
        probes: what is not solved on.
        quota: positions to draw of a batch.
        seed: of the generator.
    """

    def __init__(self, probes: Probes, quota: int, seed: int) -> None:
        self._probes, self._quota = probes, quota
        self._generator = torch.Generator().manual_seed(seed)
        self._next = 0

    def of(self, number: int, positions: int) -> Tensor:
        """Those of a batch of this rank that has so many; batches of other ranks are drawn for up to it.

        How many positions those have follows from their samples.
        """
        turns = self._probes.turns
        place = turns.places[number]
        drawn = torch.arange(0)
        for other in range(self._next, place + 1):
            here = positions * turns.sizes[other] / turns.sizes[place] if other != place else positions
            total = max(1, int(self._probes.share(other) * here)) if self._probes.share(other) else 0
            drawn = torch.arange(total)
            if self._quota < total:
                drawn = torch.randint(total, (self._quota,), generator=self._generator).sort().values
        self._next = place + 1
        return drawn


class Solver:
    """Solves the consumers of groups on a stream of data.

    Args:
        graph: the coupled channels of the model, which is in eval mode.
        stream: the data.
        probes: samples that nothing is solved on.
        rows: positions of all batches together that second moments are computed on.
        seed: of their draw.
    """

    def __init__(self, graph: ChannelGraph, stream: Stream, probes: Probes, rows: int, seed: int) -> None:
        self._graph, self._stream, self._probes, self._seed = graph, stream, probes, seed
        self._used = [number for number in range(len(stream.sizes)) if probes.seen(number, 1.0) > 0]
        self._quota = max(1, rows // max(1, probes.solved_batches))
        self._tensors = tensors_of(graph)
        self._layers: dict[Group, list[_Layer]] = {}

    def layers(self, group: Group) -> list[_Layer]:
        """The consumers of a group that can be solved."""
        if group not in self._layers:
            layers = (self._layer(consumer) for consumer in group_consumers(self._graph, group))
            self._layers[group] = [layer for layer in layers if layer is not None]
        return self._layers[group]

    def _layer(self, consumer: GroupConsumer) -> _Layer | None:
        known = as_consumer(self._graph, consumer.node, sums=False)
        if known is None:
            return None
        norms: list[tuple[str, str | None, float | None]] = []
        for number in () if known.own_bias else known.norms:
            given = arguments(self._graph.trace.nodes[number])
            if uses_batch_statistics(given.get("training"), given.get("running_var")):
                return _Layer(consumer, known.weight, None, ())
            weight = given.get("weight")
            norms.append((str(given["running_var"].target), weight and str(weight.target), given.get("eps")))
        return _Layer(consumer, known.weight, known.bias, tuple(norms))

    def memory(self, group: Group) -> int:
        """Bytes of the second moments that solving a group takes."""
        return sum(
            {layer.consumer.number: 8 * (self._features(layer) + 1) ** 2 for layer in self.layers(group)}.values()
        )

    def _features(self, layer: _Layer) -> int:
        """Features of a layer: a convolution of 16 to 32 channels with a kernel of 3 x 3 has 144."""
        node, weight = layer.consumer.node, self._tensors[layer.weight]
        kernel = weight.dim() - 2
        return weight.numel() // int(node.meta["shape"][-1 - kernel])

    def solve(self, groups: Sequence[Group], kept: dict[Group, list[int]]) -> Iterator[tuple[Group, Solution]]:
        """Solve some groups, for the numbers of channels to keep of each, in one pass over the data."""
        nodes = {layer.consumer.number: layer.consumer.node for group in groups for layer in self.layers(group)}
        sums = self._moments(list(nodes.values()))
        for group in groups:
            yield group, self._solution(group, sums, kept[group])

    def _moments(self, nodes: Sequence[fx.Node]) -> dict[int, tuple[Tensor, LinearMap]]:
        """For each operation the second moments of its features, with the intercept last, and its linear map."""
        moments: dict[int, tuple[Tensor, LinearMap]] = {}
        if not nodes:
            return moments
        model, trace = self._graph.model, self._graph.trace
        draws = {
            node.meta["index"]: _Draws(self._probes, self._quota, self._seed + node.meta["index"]) for node in nodes
        }
        # A rank that has nothing to add still has to know the shapes of the sums.
        used = self._used or [0]
        for number, inputs in enumerate(self._stream):
            if number not in used:
                continue
            hooks = {index: partial(self._seen, moments, drawn, number) for index, drawn in draws.items()}
            args, kwargs = as_call(inputs)
            with Replay(trace, hooks, whole=True, error=RecoveryError).over(model):
                model(*args, **kwargs)
        for index in draws:
            all_reduced(moments[index][0])
        return moments

    def _seen(
        self,
        moments: dict[int, tuple[Tensor, LinearMap]],
        draws: _Draws,
        number: int,
        call: ReplayedCall,
    ) -> Any:
        """Add the second moments of an operation's features on a batch; what the operation returns."""
        assert call.node is not None
        name, index = call.call.name, call.node.meta["index"]
        layer = linear_map(name, call.args, call.kwargs)
        if layer is None:
            raise RecoveryError(f"A batch reaches {name} with another number of dimensions than the example inputs.")
        x: Tensor = argument(name, "input", call.args, call.kwargs)
        result = call()
        if index not in moments:
            size = layer.features + 1
            moments[index] = torch.zeros(size, size, dtype=torch.float64, device=x.device), layer
        xx = moments[index][0]
        drawn = draws.of(number, layer.positions(result))
        for some in drawn.to(x.device).split(max(1, CHUNK // layer.features)) if len(drawn) else ():
            rows = with_intercept(layer.features_at(x, some))[0]
            xx.addmm_(rows.T, rows)
        return result

    def _solution(self, group: Group, sums: dict[int, tuple[Tensor, LinearMap]], kept: list[int]) -> Solution:
        layers = self.layers(group)
        if not layers:
            return self._by_norm(group, kept)
        moments: list[ConsumerMoments] = []
        for layer in layers:
            xx, linear = sums[layer.consumer.number]
            if not bool(torch.isfinite(xx).all()):
                raise PlanError(f"The inputs of {layer.weight} are NaN or infinite on data. Check it and the weights.")
            matrix = linear.matrix_of(self._tensors[layer.weight].detach()).double()[0]
            matrix = torch.cat([matrix, matrix.new_zeros(1, matrix.shape[1])])
            moments.append(
                ConsumerMoments(
                    _without_intercept(xx) if layer.bias is None else xx, matrix, layer.consumer.places.to(xx.device)
                )
            )
        order, error = eliminate(moments)
        changes: dict[int, dict[str, Tensor]] = {}
        for count in kept:
            changes[count] = {}
            for layer, moment in zip(layers, moments, strict=True):
                removed = order[: group.channels - count]
                change = moment.change(removed)
                change[moment.places[removed].flatten()] = 0.0  # what goes is cut out
                self._add(changes[count], layer, sums[layer.consumer.number][1], change)
        return Solution(order.cpu().numpy(), error.cpu().numpy(), changes)

    def _add(self, changes: dict[str, Tensor], layer: _Layer, linear: LinearMap, change: Tensor) -> None:
        """Add a change of a layer's matrix, the intercept last, to those of the tensors."""
        weight = linear.weight_of(change[None, :-1])
        changes[layer.weight] = changes.get(layer.weight, 0) + weight.to(self._tensors[layer.weight].dtype)
        if layer.bias is None:
            return
        shift = change[-1]
        for variance, scale, eps in layer.norms:
            of_norm = None if scale is None else self._tensors[scale].detach()
            shift = shift * norm_scale(self._tensors[variance], eps, of_norm)
        changes[layer.bias] = changes.get(layer.bias, 0) + shift.to(self._tensors[layer.bias].dtype)

    def _by_norm(self, group: Group, kept: list[int]) -> Solution:
        """A group that no layer consumes linearly loses its smallest channels first."""
        scores = check_scores(LnNorm(2.0)(group, self._tensors), group).double().cpu().numpy()
        order = np.lexsort((-np.arange(len(scores)), scores))
        gone = np.cumsum(scores[order] ** 2)
        return Solution(order, gone[:-1] / max(gone[-1], 1e-30), {count: {} for count in kept})


def _without_intercept(xx: Tensor) -> Tensor:
    """Moments by which the intercept stays zero, for a layer that nothing behind adds a constant to."""
    xx = xx.clone()
    xx[-1], xx[:, -1] = 0.0, 0.0
    xx[-1, -1] = 1.0
    return xx


def changed(slim: nn.Module, plan: Plan, changes: Mapping[str, Tensor]) -> nn.Module:
    """A pruned model with changes, given in the shapes of the original, added to its tensors in place.

    Args:
        slim: what the plan made of the original.
        plan: the plan.
        changes: by the names of the original's tensors.
    """
    held = held_tensors(slim)
    for name, change in changes.items():
        tensor = held[name].tensor
        tensor.data += smaller_tensor(change.to(tensor.device), plan, {name})
    return slim
