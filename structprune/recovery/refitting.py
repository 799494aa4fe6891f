"""The producers of a layer on their way: their inputs are kept until it is solved, then all are solved together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from structprune.graph import ChannelGraph
from structprune.ops.arguments import arguments
from structprune.ranks import all_reduced
from structprune.recovery.chain import Batch, Chain, Weights
from structprune.recovery.consumers import Consumer
from structprune.recovery.contraction import argument
from structprune.recovery.linear_maps import LinearMap, linear_map
from structprune.recovery.lockstep import Event, Side, Stop
from structprune.recovery.pieces import Piece, behind
from structprune.recovery.refit import GAIN, Refit, refit, settled

HELD_OUT = 5  # the last of so many parts of each batch
REPEATED = 4  # samples of each batch on which the piece is compared with the forward
TOLERANCE = 1e-2  # of that comparison: above the rounding of TF32
ENTRIES = 1 << 27  # of the consumer's input at most, however many positions are asked for


@dataclass(slots=True)
class _Producer:
    consumer: Consumer
    name: str
    stops: list[Stop] = field(default_factory=list)

    def tensor(self, number: int) -> Tensor:
        stop = self.stops[number]
        return argument(self.name, "input", stop.args, stop.kwargs)

    def own(self, which: str) -> Any:
        return argument(self.name, which, self.stops[0].args, self.stops[0].kwargs)


@dataclass(frozen=True, slots=True)
class Seen:
    """What the consumer has when it has been solved alone.

    Attributes:
        target: number of the operation whose result is to meet the original's.
        map: its linear map.
        weight: with the scale of the norms behind it, in the shape of the weight.
        shifts: whether something can take a shift of its result up.
        hidden: its input, one a batch.
        ours: results of its target on the pruned network; corrected in place.
        wanted: the original's.
        ridge: that was best for it alone.
    """

    target: int
    map: LinearMap
    weight: Tensor
    shifts: bool
    hidden: list[Tensor]
    ours: list[Tensor]
    wanted: list[Tensor]
    ridge: float


class Producers:
    """The producers of one consumer.

    Args:
        graph: of the original.
        piece: what was found in front of the consumer.
        rows: positions of the result to solve on, of all batches together; whole samples are taken.
        rounds: of Gauss-Newton.
    """

    def __init__(self, graph: ChannelGraph, piece: Piece, rows: int, rounds: int) -> None:
        self._graph, self._piece, self._rows, self._rounds = graph, piece, rows, rounds
        nodes = graph.trace.nodes
        self._all = [_Producer(producer, nodes[producer.node].meta["name"]) for producer in piece.producers]
        self.refused = ""

    @property
    def layers(self) -> tuple[str, ...]:
        """Paths of the modules."""
        return tuple(producer.consumer.layer for producer in self._all)

    @property
    def events(self) -> list[Event]:
        """Where to look."""
        return [(producer.consumer.node, Side.BEFORE) for producer in self._all]

    def look(self, event: Event, stops: list[Stop]) -> bool:
        """Remember what goes into a producer; whether it is one."""
        for producer in self._all:
            if producer.consumer.node == event[0]:
                producer.stops = list(stops)
                return True
        return False

    def solve(self, seen: Seen, tensors: dict[str, Tensor]) -> tuple[Refit, Callable[[], None]] | None:
        """Solve producers and consumer together on whole samples; what was found, and what puts it into the producers.

        The results at hand are not corrected yet. None if it cannot be done; `refused` says why.
        """
        maps = [linear_map(p.name, p.stops[0].args, p.stops[0].kwargs) for p in self._all]
        known = tuple(m for m in maps if m is not None)
        scales = [self._scale(producer, tensors) for producer in self._all]
        self.refused = self._fault(seen, maps, scales)
        if self.refused:
            return None
        chain = Chain(known, self._piece.between(self._graph, tensors), seen.map, behind(self._graph, seen.target))
        start = Weights(
            [*(p.own("weight") for p in self._all), seen.weight],
            [
                *(self._shift(p) for p in self._all),
                seen.weight.new_zeros(self._channels(seen)) if seen.shifts else None,
            ],
        )
        if not self._repeats(chain, start, seen):
            self.refused = "what is in front of it differs when it is repeated: something is drawn, or written over"
            return None
        train, held = self._batches(seen)
        # The last round sees what was held out, too; where the others found next to nothing it is not worth its time.
        found = refit(chain, train, held, start, max(1, self._rounds - 1), ridge=seen.ridge)
        if found.gain >= GAIN and self._rounds > 1:
            found = settled(chain, [*train, *held], start, found, ridge=seen.ridge)
        if found.helps:
            self._correct(chain, found.weights, seen)
        return found, lambda: self._write(start, found.weights, scales, tensors)

    def forget(self) -> None:
        """Let go of what was kept."""
        for producer in self._all:
            producer.stops = []

    def _fault(self, seen: Seen, maps: Sequence[LinearMap | None], scales: Sequence[Tensor | None]) -> str:
        if any(found is None for found in maps):
            return "a producer has a form that is not solved for"
        if any(scale is None for scale in scales):
            return "a batch norm behind a producer takes its statistics from the batch"
        for producer in self._all:
            own = producer.own("bias")
            if own is not None and producer.consumer.bias is None:
                return "the bias of a producer is used elsewhere too"
        sizes = {t.shape[0] for p in self._all for t in (p.tensor(0), seen.hidden[0], seen.ours[0])}
        return "" if len(sizes) == 1 else "the first dimension of its result does not count samples"

    def _repeats(self, chain: Chain, start: Weights, seen: Seen) -> bool:
        """Whether the chain gives the consumer's input of the forward, on some samples; the same on all ranks.

        A forward may write over a tensor by another view, or draw at random; the trace alone does not tell.
        """
        sums = torch.zeros(2, dtype=torch.float64, device=seen.weight.device)
        for number, hidden in enumerate(seen.hidden):
            inputs = tuple(p.tensor(number)[:REPEATED] for p in self._all)
            wanted = hidden[:REPEATED].double()
            given = chain.between(chain.results(Batch(inputs, wanted, wanted), start)).double()
            sums += torch.stack([(given - wanted).square().sum(), wanted.square().sum()])
        missing, power = all_reduced(sums).tolist()
        return missing <= power * max(TOLERANCE, 4 * torch.finfo(seen.weight.dtype).eps) ** 2

    def _scale(self, producer: _Producer, tensors: dict[str, Tensor]) -> Tensor | None:
        """What the norms behind a producer scale its channels by; None where they have no fixed statistics."""
        weight: Tensor = producer.own("weight")
        scale = torch.ones((), dtype=torch.float64, device=weight.device)
        for number in producer.consumer.norms:
            node = self._graph.trace.nodes[number]
            variance = arguments(node)["running_var"]
            if variance is None:
                return None
            eps = arguments(node)["eps"]
            scale = scale * (tensors[str(variance.target)].double() + (1e-5 if eps is None else float(eps))).rsqrt()
            factor = arguments(node)["weight"]
            scale = scale if factor is None else scale * tensors[str(factor.target)].double()
        return scale

    def _shift(self, producer: _Producer) -> Tensor | None:
        own: Tensor | None = producer.own("bias")
        if own is not None or producer.consumer.bias is None:
            return own
        weight: Tensor = producer.own("weight")
        form = linear_map(producer.name, producer.stops[0].args, producer.stops[0].kwargs)
        assert form is not None
        return weight.new_zeros(form.form.weight_outputs * form.form.groups)

    def _channels(self, seen: Seen) -> int:
        return seen.map.form.weight_outputs * seen.map.form.groups

    def _batch(self, number: int, seen: Seen) -> Batch:
        own = seen.map(seen.hidden[number], seen.weight)
        return Batch(tuple(p.tensor(number) for p in self._all), seen.ours[number] - own, seen.wanted[number])

    def _batches(self, seen: Seen) -> tuple[list[Batch], list[Batch]]:
        """Samples to solve on and samples held out: some of the first and of the last ones of each batch.

        They are others from batch to batch, as batches may hold the same samples in the same places, changed a little.
        """
        train: list[Batch] = []
        held: list[Batch] = []
        rows = min(self._rows, ENTRIES // seen.hidden[0].shape[seen.map.form.channel_dim])
        for number, result in enumerate(seen.ours):
            count = result.shape[0]
            each = max(1, seen.map.form.positions(result) // count)
            used = min(count, max(2, -(-rows // (each * len(seen.ours)))))
            split = max(1, count - max(1, count // HELD_OUT)) if count > 1 else 1
            whole = self._batch(number, seen)
            own = max(1, used - max(1, used // HELD_OUT))
            for part, found in ((_some(number, own, 0, split), train), (_some(number, used - own, split, count), held)):
                if part.start < part.stop:
                    inputs = tuple(_packed(x[part]) for x in whole.inputs)
                    found.append(Batch(inputs, _packed(whole.rest[part]), _packed(whole.goal[part])))
        return train, held

    def _correct(self, chain: Chain, found: Weights, seen: Seen) -> None:
        """Bring the consumer's inputs and results at hand to what the new weights give.

        Its input goes nowhere else, but the consumer may be a producer of the next layer, which is solved on it.
        """
        for number, result in enumerate(seen.ours):
            batch = self._batch(number, seen)
            hidden = chain.between(chain.results(batch, found))
            result.copy_(batch.rest + chain.consumer(hidden, found.weights[-1], found.shifts[-1]))
            seen.hidden[number].copy_(hidden)

    def _write(
        self, start: Weights, found: Weights, scales: Sequence[Tensor | None], tensors: dict[str, Tensor]
    ) -> None:
        for place, producer in enumerate(self._all):
            _put(tensors[producer.consumer.weight], found.weights[place])
            before, after, scale = start.shifts[place], found.shifts[place], scales[place]
            if before is not None and after is not None and producer.consumer.bias is not None and scale is not None:
                moved = (after - before).double()
                bias = tensors[producer.consumer.bias]
                _put(bias, bias.double() + (moved if producer.consumer.own_bias else moved * scale))


def _some(number: int, wanted: int, start: int, stop: int) -> slice:
    """So many in a row from `start` up to `stop`, at another place for each number of a batch."""
    wanted = min(wanted, stop - start)
    first = start + number * wanted % (stop - start - wanted + 1)
    return slice(first, first + wanted)


def _packed(x: Tensor) -> Tensor:
    """With channels last in memory: convolutions of few channels are two to four times as fast so."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.contiguous(memory_format=formats.get(x.dim(), torch.contiguous_format))


def _put(tensor: Tensor, value: Tensor) -> None:
    tensor.data.copy_(value.reshape(tensor.shape))
