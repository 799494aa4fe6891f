"""A consumer solved together with its producers while the batches pass.

The producers of a layer run before it. Their inputs are stored until the layer itself has been solved alone. Then
producers and layer are one chain (`chain`), which `gauss_newton` solves on whole samples. The new weights are written
into the pruned model, and the results at hand are brought to what these weights give.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from structprune.coupling.graph import ChannelGraph
from structprune.distributed import agreed, all_reduced
from structprune.equations.linear_maps import LinearMap, argument, linear_map
from structprune.forwards.parallel_forward import Event, Pause, Side
from structprune.ops.arguments import arguments
from structprune.recovery.candidates import HeldOut
from structprune.recovery.chain import (
    Chain,
    ChainWeights,
    Producers,
    activation_behind,
    elementwise_between,
)
from structprune.recovery.gauss_newton import MAX_STRIDE, MIN_GAIN, ChainFit, final_step, fit_chain
from structprune.recovery.layers import Consumer
from structprune.recovery.norms import norm_scale
from structprune.recovery.samples import Samples, joined

HELD_OUT = 5  # a fifth of each batch, the last samples, is held out
COMPARED_SAMPLES = 4  # of each batch: on these the chain is compared with the forward
TOLERANCE = 1e-2  # of that comparison: above the rounding of TF32
JOINED = 1 << 20  # entries of the largest tensor of samples that are joined
MAX_ENTRIES = 1 << 27  # of the consumer's input, however many positions are asked for


@dataclass(slots=True)
class _Producer:
    """A producer, and its calls with each batch."""

    layer: Consumer
    name: str
    pauses: list[Pause] = field(default_factory=list)

    def input(self, number: int) -> Tensor:
        """What it gets from a batch."""
        pause = self.pauses[number]
        return argument(self.name, "input", pause.args, pause.kwargs)

    def held(self, which: str) -> Any:
        """Its ``"weight"`` or its ``"bias"``."""
        return argument(self.name, which, self.pauses[0].args, self.pauses[0].kwargs)

    def map(self) -> LinearMap | None:
        """Its linear map; None if it has no adjoints."""
        layer = linear_map(self.name, self.pauses[0].args, self.pauses[0].kwargs)
        return layer if layer is not None and layer.has_adjoints else None


@dataclass(frozen=True, slots=True)
class ConsumerState:
    """A consumer that has been solved alone, with the batches paused at its target.

    Attributes:
        target: number of the operation whose result has to meet the original's.
        map: its linear map.
        weight: its weight times the scale of the norms behind it.
        has_shift: whether a parameter can take a shift of its result.
        hidden: its input, one for each batch; corrected in place.
        ours: results of its target on the pruned network, one for each batch; corrected in place.
        goal: the original's.
        ridge: the best one for it alone.
    """

    target: int
    map: LinearMap
    weight: Tensor
    has_shift: bool
    hidden: list[Tensor]
    ours: list[Tensor]
    goal: Sequence[Tensor]
    ridge: float


class JointSolver:
    """Solves one consumer together with its producers.

    Args:
        graph: of the original.
        producers: of the consumer.
        rows: positions of the result to solve on, of all batches together; whole samples are used.
        rounds: of Gauss-Newton.
        held_out: samples that are not solved on.

    Attributes:
        refused: why they could not be solved together; empty if they could.
    """

    def __init__(self, graph: ChannelGraph, producers: Producers, rows: int, rounds: int, held_out: HeldOut) -> None:
        self._graph, self._in_trace, self._rows, self._rounds = graph, producers, rows, rounds
        self._held_out = held_out
        nodes = graph.trace.nodes
        self._producers = [_Producer(layer, nodes[layer.node].meta["name"]) for layer in producers.layers]
        self.refused = ""

    @property
    def layers(self) -> tuple[str, ...]:
        """Paths of the producers' modules."""
        return tuple(producer.layer.layer for producer in self._producers)

    @property
    def events(self) -> list[Event]:
        """Where the batches have to pause."""
        return [(producer.layer.node, Side.BEFORE) for producer in self._producers]

    def observe(self, event: Event, pauses: list[Pause]) -> bool:
        """Store what goes into a producer; whether the event is one of a producer."""
        for producer in self._producers:
            if producer.layer.node == event[0]:
                producer.pauses = list(pauses)
                return True
        return False

    def forget(self) -> None:
        """Forget what was stored."""
        for producer in self._producers:
            producer.pauses = []

    def solve(self, state: ConsumerState, tensors: Mapping[str, Tensor]) -> tuple[ChainFit, Callable[[], None]] | None:
        """Solve producers and consumer together on whole samples.

        Args:
            state: the consumer; where the fit helps, its `hidden` and `ours` are corrected.
            tensors: those of the pruned model, by name; not changed yet.

        Returns:
            The fit, and what writes it into the producers; None if it cannot be done, and `refused` says why.
        """
        maps = [producer.map() for producer in self._producers]
        scales = [self._norm_scale(producer, tensors) for producer in self._producers]
        self.refused = agreed(self._obstacle(state, maps, scales))
        if self.refused:
            return None
        chain = Chain(
            tuple(m for m in maps if m is not None),
            elementwise_between(self._graph, self._in_trace, tensors),
            state.map,
            activation_behind(self._graph, state.target),
        )
        start = self._start(state)
        if not self._agrees_with_forward(chain, start, state):
            self.refused = "what is in front of it differs when it is repeated: something is drawn, or written over"
            return None
        train, held_out = self._samples(state)
        # The last round uses the held-out samples too; it is not worth its time where the others gained nothing.
        fit = fit_chain(chain, train, held_out, start, max(1, self._rounds - 1), ridge=state.ridge)
        if fit.gain >= MIN_GAIN and self._rounds > 1:
            fit = final_step(chain, [*train, *held_out], start, fit, ridge=state.ridge)
        if fit.helps:
            self._correct(chain, fit.weights, state)
        return fit, lambda: self._write(start, fit.weights, scales, tensors)

    # -- what is solved --------------------------------------------------------------------------------------------

    def _obstacle(self, state: ConsumerState, maps: Sequence[LinearMap | None], scales: Sequence[Tensor | None]) -> str:
        """Why the layers cannot be solved together; empty if they can."""
        if any(layer is None for layer in maps):
            return "a producer has a form that is not solved for"
        if any(scale is None for scale in scales):
            return "a batch norm behind a producer takes its statistics from the batch"
        for producer in self._producers:
            if producer.held("bias") is not None and producer.layer.bias is None:
                return "the bias of a producer is used elsewhere too"
        sizes = {t.shape[0] for p in self._producers for t in (p.input(0), state.hidden[0], state.ours[0])}
        return "" if len(sizes) == 1 else "the first dimension of its result does not count samples"

    def _norm_scale(self, producer: _Producer, tensors: Mapping[str, Tensor]) -> Tensor | None:
        """The factor of the norms behind a producer, shape ``(channels,)``, or ``()`` without norms.

        None where a norm has no fixed statistics. With variance 4 and weight 3 a channel is scaled by 3 / 2.
        """
        weight: Tensor = producer.held("weight")
        scale = torch.ones((), dtype=torch.float64, device=weight.device)
        for number in producer.layer.norms:
            given = arguments(self._graph.trace.nodes[number])
            variance, eps, factor = given["running_var"], given["eps"], given["weight"]
            if variance is None:
                return None
            learnt = None if factor is None else tensors[str(factor.target)]
            scale = scale * norm_scale(tensors[str(variance.target)], eps, learnt)
        return scale

    def _start(self, state: ConsumerState) -> ChainWeights:
        """The current weights of producers and consumer; shifts are zero where a parameter elsewhere can take them."""
        weights = [*(producer.held("weight") for producer in self._producers), state.weight]
        shift = state.weight.new_zeros(state.map.channels) if state.has_shift else None
        return ChainWeights(weights, [*(self._shift(producer) for producer in self._producers), shift])

    def _shift(self, producer: _Producer) -> Tensor | None:
        """The bias of a producer; zeros of shape ``(channels,)`` if only a norm behind it has one."""
        bias: Tensor | None = producer.held("bias")
        if bias is not None or producer.layer.bias is None:
            return bias
        weight: Tensor = producer.held("weight")
        layer = producer.map()
        assert layer is not None
        return weight.new_zeros(layer.channels)

    def _agrees_with_forward(self, chain: Chain, start: ChainWeights, state: ConsumerState) -> bool:
        """Whether the chain gives the consumer's input of the forward, on some samples; the same on all ranks.

        A forward may write over a tensor through a view, or draw at random, which the trace alone does not tell.
        """
        sums = torch.zeros(2, dtype=torch.float64, device=state.weight.device)
        for number, hidden in enumerate(state.hidden):
            inputs = tuple(p.input(number)[:COMPARED_SAMPLES] for p in self._producers)
            expected = hidden[:COMPARED_SAMPLES].double()
            difference = chain.hidden(Samples(inputs, expected, expected), start).double() - expected
            sums += torch.stack([difference.square().sum(), expected.square().sum()])
        difference, power = all_reduced(sums).tolist()
        return difference <= power * max(TOLERANCE, 4 * torch.finfo(state.weight.dtype).eps) ** 2

    # -- samples ---------------------------------------------------------------------------------------------------

    def _batch(self, number: int, state: ConsumerState, which: slice = slice(None)) -> Samples:
        """Samples of one batch, all or some."""
        rest = state.ours[number][which] - state.map(state.hidden[number][which], state.weight)
        inputs = tuple(p.input(number)[which] for p in self._producers)
        return Samples(inputs, rest, state.goal[number][which], self._held_out.turns.places[number])

    def _samples(self, state: ConsumerState) -> tuple[list[Samples], list[Samples]]:
        """Samples to solve on and samples held out: some of the first and of the last ones of each batch.

        With 20 samples of 49 positions in each of 3 batches, and 1000 rows, ceil(1000 / (49 * 3)) = 7 samples of a
        batch are used: 6 of the first 16, and 1 of the last 4. They start elsewhere in each batch, since batches may
        hold the same samples in the same places, changed a little.
        """
        train: list[Samples] = []
        held_out: list[Samples] = []
        turns = self._held_out.turns
        rows = min(self._rows, MAX_ENTRIES // state.hidden[0].shape[state.map.channel_dim])
        for number, result in enumerate(state.ours):
            per_sample = max(1, state.map.positions(result) // result.shape[0])
            count = self._held_out.solved_on(number, result.shape[0])
            if not count:
                continue
            used = min(count, max(2, -(-rows // (per_sample * turns.count))))
            split = max(1, count - max(1, count // HELD_OUT)) if count > 1 else 1
            place = turns.places[number]
            first = max(1, used - max(1, used // HELD_OUT))
            for part, samples in (
                (_rotated(place, first, 0, split), train),
                (_rotated(place, used - first, split, count), held_out),
            ):
                if part.start < part.stop:
                    batch = self._batch(number, state, part)
                    # Results that come from spectra have their steps next to each other.
                    samples.append(batch if state.map.spectra(state.hidden[number]) else _channels_last(batch))
        # A rank whose samples are all held out adds nothing to the sums of the others, but has to take part in them.
        train, held_out = (joined(samples, JOINED, MAX_STRIDE) for samples in (train, held_out))
        return train or [self._batch(0, state, slice(0))], held_out

    # -- what is changed -------------------------------------------------------------------------------------------

    def _correct(self, chain: Chain, weights: ChainWeights, state: ConsumerState) -> None:
        """Change the consumer's inputs and results at hand to those of the new weights.

        No other operation uses its input, but the consumer may be a producer of the next layer, which is solved on it.
        """
        for number, result in enumerate(state.ours):
            batch = self._batch(number, state)
            hidden = chain.hidden(batch, weights)
            result.copy_(chain.from_hidden(batch, hidden, weights))
            state.hidden[number].copy_(hidden)

    def _write(
        self,
        start: ChainWeights,
        weights: ChainWeights,
        scales: Sequence[Tensor | None],
        tensors: Mapping[str, Tensor],
    ) -> None:
        """Write the producers' weights and shifts into the model; a shift in front of norms is scaled by them."""
        for place, producer in enumerate(self._producers):
            _assign(tensors[producer.layer.weight], weights.weights[place])
            before, after, scale = start.shifts[place], weights.shifts[place], scales[place]
            if before is not None and after is not None and producer.layer.bias is not None and scale is not None:
                moved = (after - before).double()
                bias = tensors[producer.layer.bias]
                _assign(bias, bias.double() + (moved if producer.layer.own_bias else moved * scale))


def _rotated(number: int, count: int, start: int, stop: int) -> slice:
    """`count` neighbours in the range from `start` to `stop`, at another place for each `number`.

    Two places in ``range(10, 16)`` begin at ``10 + (2 * number) % 5``: at 10, 12, 14, then at 11, 13.
    """
    count = min(count, stop - start)
    first = start + number * count % (stop - start - count + 1)
    return slice(first, first + count)


def _channels_last(samples: Samples) -> Samples:
    """With channels last in memory: convolutions of few channels are two to four times as fast so."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    *inputs, rest, goal = (
        x.contiguous(memory_format=formats.get(x.dim(), torch.contiguous_format))
        for x in (*samples.inputs, samples.rest, samples.goal)
    )
    return Samples(tuple(inputs), rest, goal, samples.place)


def _assign(tensor: Tensor, value: Tensor) -> None:
    tensor.data.copy_(value.reshape(tensor.shape))
