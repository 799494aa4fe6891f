"""One layer on its way: its features are gathered when it is reached, and it is solved where its target is."""

from __future__ import annotations

import torch
from torch import Tensor

from structprune.channels.solver import Mask
from structprune.graph import ChannelGraph
from structprune.ops.arguments import bind
from structprune.ops.relations import Row
from structprune.ranks import all_reduced
from structprune.recovery.consumers import Consumer, by_batch, kept_of
from structprune.recovery.contraction import Contraction, apply_matrix, argument, contraction
from structprune.recovery.least_squares import Solution, Sums, fit
from structprune.recovery.linear_maps import linear_map
from structprune.recovery.lockstep import Event, Side, Stop
from structprune.recovery.pieces import piece_of
from structprune.recovery.refitting import Producers, Seen
from structprune.recovery.report import LayerRecovery

HELD_OUT = 5  # every so many-th part of the positions of a batch
PIECE_ROWS = 4  # times the rows that a layer alone is solved on
CHUNK = 1 << 25  # entries of features that are unfolded at a time


class Layer:
    """A consumer with what is known of it while the batches pass.

    Args:
        graph: of the original.
        dead: the components that are gone.
        consumer: the layer.
        rows: positions of all batches together to solve on.
        seed: of the draw of positions.
        rounds: of solving the layer together with its producers; none with 0.
    """

    def __init__(
        self, graph: ChannelGraph, dead: Mask, consumer: Consumer, rows: int, seed: int, rounds: int = 0
    ) -> None:
        self.consumer = consumer
        piece = piece_of(graph, consumer) if rounds else "not asked for"
        self._alone = piece if isinstance(piece, str) else ""
        self._producers = None if isinstance(piece, str) else Producers(graph, piece, PIECE_ROWS * rows, rounds)
        self.refused = ""
        self._node = graph.trace.nodes[consumer.node]
        self._target = graph.trace.nodes[consumer.target]
        self._kept = [kept_of(graph, dead, row) for row in graph.channels.rows[consumer.target] if isinstance(row, Row)]
        self._rows = rows
        self._random = torch.Generator().manual_seed(seed + consumer.node)
        self._calls: list[Stop] = []
        self._form: Contraction | None = None
        self._scale: Tensor | None = None

    @property
    def _name(self) -> str:
        return self._node.meta["name"]

    @property
    def events(self) -> list[Event]:
        """Where to look before the target is there."""
        own = [] if self.consumer.diagonal else [(self.consumer.node, Side.BEFORE)]
        more = self._producers.events if self._producers is not None else []
        return [*more, *own, *((norm, Side.BEFORE) for norm in self.consumer.norms)]

    def look(self, event: Event, stops: list[Stop]) -> None:
        """Remember what goes into the layer or its producers, or the scale of a norm behind it."""
        if self._producers is not None and self._producers.look(event, stops):
            return
        if event[0] == self.consumer.node:
            self._calls = list(stops)
            self._form = contraction(self._name, stops[0].args, stops[0].kwargs)
            if self._form is None:
                self.refused = "its input or its weight has a number of dimensions that is not solved for"
            return
        given = bind("batch_norm", None, stops[0].args, stops[0].kwargs)
        assert given is not None
        weight, variance, training, eps = (given[key] for key in ("weight", "running_var", "training", "eps"))
        if by_batch(training, variance):
            self.refused = "the batch norm behind it takes its statistics from the batch"
            return
        scale = (variance.double() + (1e-5 if eps is None else eps)).rsqrt()
        scale = scale if weight is None else scale * weight.double()
        self._scale = scale if self._scale is None else self._scale * scale

    # -- solving -------------------------------------------------------------------------------------------------

    def solve(self, ours: list[Tensor], wanted: list[Tensor], tensors: dict[str, Tensor]) -> LayerRecovery | None:
        """Solve the layer, change its weight and correct the results at hand.

        Args:
            ours: results of the target on the pruned network, one a batch; corrected in place.
            wanted: the original's.
            tensors: the tensors of the pruned model by name.
        """
        if self.refused:
            return None
        if self.consumer.diagonal:
            self._form = Contraction(1, (1, 1), "out_in")
        wanted = [self._restricted(tensor) for tensor in wanted]
        if any(a.shape != b.shape for a, b in zip(ours, wanted, strict=True)):
            self.refused = f"its result has shape {list(ours[0].shape)}, the original's {list(wanted[0].shape)}"
            return None
        intercept = self.consumer.bias is not None
        train, held, power = self._sums(ours, wanted, intercept)
        found = fit(train, held, int(intercept), noise=power * (4 * torch.finfo(ours[0].dtype).eps) ** 2)
        if found.helps:
            self._change(found, intercept, ours, tensors)
        size = max(power, torch.finfo(torch.float64).tiny)
        noisy = found.after <= power * (1e3 * torch.finfo(ours[0].dtype).eps) ** 2
        gain = 1.0 if noisy else self._refit(ours, wanted, tensors, found.ridge)
        self._calls = []
        if self._producers is not None:
            self._producers.forget()
        return LayerRecovery(
            self.consumer.layer,
            self._name,
            self._target.meta["name"],
            (found.before / size) ** 0.5,
            (found.after / size) ** 0.5 * gain,
            found.helps or gain < 1,
            found.ridge,
            self._producers.layers if self._producers is not None and gain < 1 else (),
            self._alone if self._producers is None else self._producers.refused,
        )

    def _refit(self, ours: list[Tensor], wanted: list[Tensor], tensors: dict[str, Tensor], ridge: float) -> float:
        """Solve the layer again with its producers; by which factor the held-out error falls."""
        call = self._calls[0] if self._calls else None
        found = linear_map(self._name, call.args, call.kwargs) if call is not None else None
        if self._producers is None or found is None:
            return 1.0
        weight = found.form.matrix(tensors[self.consumer.weight])
        if self._scale is not None:
            weight = weight * self._scale.to(weight.dtype).reshape(weight.shape[0], 1, -1)
        hidden = [argument(self._name, "input", stop.args, stop.kwargs) for stop in self._calls]
        intercept = self.consumer.bias is not None
        seen = Seen(self.consumer.target, found, found.form.weight(weight), intercept, hidden, ours, wanted, ridge)
        answer = self._producers.solve(seen, tensors)
        if answer is None or not answer[0].helps:
            return 1.0
        solved, write = answer
        write()
        new, shift = solved.weights.weights[-1], solved.weights.shifts[-1]
        self._absorb((found.form.matrix(new) - weight).double(), None if shift is None else shift.double(), tensors)
        return (solved.after / solved.before) ** 0.5

    def _restricted(self, tensor: Tensor) -> Tensor:
        """The part of the original's result that survives."""
        for dim, index in enumerate(self._kept):
            if index is not None:
                tensor = tensor.index_select(dim, torch.from_numpy(index).to(tensor.device))
        return tensor

    def _sums(self, ours: list[Tensor], wanted: list[Tensor], intercept: bool) -> tuple[Sums, Sums, float]:
        """Sums over the rows to solve on and over those held out, and the power of the target on the latter."""
        sums: list[Sums] = []
        power = torch.zeros(1, dtype=torch.float64, device=ours[0].device)
        quota = max(1, self._rows // len(ours))
        for number, (mine, theirs) in enumerate(zip(ours, wanted, strict=True)):
            for part, positions in enumerate(self._positions(mine, quota)):
                # What is empty would still be split into one part.
                for some in positions.to(mine.device).split(self._chunk(mine)) if len(positions) else ():
                    x, y, size = self._rows_at(number, mine, theirs, some)
                    if intercept:
                        x = torch.cat([x, x.new_ones(*x.shape[:2], 1)], 2)
                    if not sums:
                        sums = [Sums.zeros(x.shape[0], x.shape[2], y.shape[2], x.device) for _ in range(2)]
                    sums[part].add(x, y)
                    power += size if part else 0
        for each in sums:
            each.reduce()
        return sums[0], sums[1], float(all_reduced(power))

    def _channel_dim(self) -> int:
        if not self.consumer.diagonal:
            assert self._form is not None
            return self._form.channel_dim
        last = self._name in ("layer_norm", "rms_norm", "mul")
        return -1 if last else 1

    def _positions(self, result: Tensor, quota: int) -> tuple[Tensor, Tensor]:
        """Flat positions to solve on, and those held out: the last part of the batch, so that samples stay whole."""
        total = result.numel() // result.shape[self._channel_dim()]
        drawn = torch.arange(total)
        if quota < total:
            drawn = torch.randint(total, (quota,), generator=self._random).sort().values
        split = total - total // HELD_OUT if total >= 2 * HELD_OUT else total - 1
        return drawn[drawn < split], drawn[drawn >= split]

    def _chunk(self, result: Tensor) -> int:
        features = 2 if self.consumer.diagonal or self._form is None else self._form.features * self._form.groups
        channels = result.shape[self._channel_dim()]
        return max(1, CHUNK // max(features, channels))

    def _rows_at(self, number: int, mine: Tensor, theirs: Tensor, at: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features, the part of the target that is missing, and the squared size of the target, at some positions."""
        assert self._form is not None
        if self.consumer.diagonal:
            dim = self._channel_dim()
            flat, goal = (t.movedim(dim, -1).reshape(-1, t.shape[dim])[at].double() for t in (mine, theirs))
            return flat.T[..., None], (goal - flat).T[..., None], goal.square().sum()
        call = self._calls[number]
        goal = self._form.outputs(theirs, at)
        x = self._form.rows(argument(self._name, "input", call.args, call.kwargs), at)
        return x, goal - self._form.outputs(mine, at), goal.square().sum()

    # -- changing ------------------------------------------------------------------------------------------------

    def _change(self, found: Solution, intercept: bool, ours: list[Tensor], tensors: dict[str, Tensor]) -> None:
        matrix = found.matrix[:, :-1] if intercept else found.matrix
        shift = found.matrix[:, -1].flatten() if intercept else None
        if self.consumer.diagonal:
            self._change_diagonal(matrix.flatten(), shift, ours, tensors)
            return
        assert self._form is not None
        matrix, shift = self._absorb(matrix, shift, tensors)
        for call, result in zip(self._calls, ours, strict=True):
            delta = apply_matrix(self._name, self._form, matrix, call.args, call.kwargs)
            if shift is not None:
                delta = delta + shift.to(delta.dtype).reshape(-1, *[1] * (-1 - self._form.channel_dim))
            result.add_(delta)

    def _absorb(self, matrix: Tensor, shift: Tensor | None, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Change the weight and the bias so that the result behind the norms changes by this much, where it can be."""
        assert self._form is not None
        scale = self._scale
        if scale is not None:
            # A channel that its norm switches off cannot be changed through it.
            live = scale.abs() > 1e-6 * scale.abs().max()
            matrix = matrix * live.reshape(matrix.shape[0], 1, -1)
            safe = torch.where(live, scale, 1.0)
            weight = matrix / safe.reshape(matrix.shape[0], 1, -1)
            own_shift = None if shift is None else torch.where(live, shift, 0.0) / safe
        else:
            weight, own_shift = matrix, shift
        parameter = tensors[self.consumer.weight]
        _add(parameter, self._form.weight(weight))
        if shift is not None and self.consumer.bias is not None:
            shift = own_shift if self.consumer.own_bias else shift
            assert shift is not None
            _add(tensors[self.consumer.bias], shift)
            if self.consumer.own_bias and scale is not None:
                shift = shift * scale
        return matrix, shift

    def _change_diagonal(
        self, factor: Tensor, shift: Tensor | None, ours: list[Tensor], tensors: dict[str, Tensor]
    ) -> None:
        weight = tensors[self.consumer.weight]
        _add(weight, weight.double().flatten() * factor)
        if shift is not None and self.consumer.bias is not None:
            bias = tensors[self.consumer.bias]
            _add(bias, bias.double() * factor + shift)
        for result in ours:
            wide = [1] * result.dim()
            wide[self._channel_dim()] = -1
            change = result.double() * factor.view(wide) + (0 if shift is None else shift.view(wide))
            result.add_(change.to(result.dtype))


def _add(tensor: Tensor, change: Tensor) -> None:
    """Add to a parameter; the sum is taken in float64."""
    tensor.data.copy_((tensor.data.double() + change.reshape(tensor.shape)).to(tensor.dtype))
