"""One layer solved while the batches pass: its input is stored when it runs, and it is solved at its target.

A convolution ``(4, 8, 3, 3)`` with a bias has 8 * 9 = 72 features and the intercept. At each drawn position of its
result, ``x`` of shape (73,) holds its features in the pruned network, and ``y`` of shape (4,) the original's result at
its target less the pruned network's. Least squares gives a matrix (73, 4) that is added to weight and bias. Where a
norm behind the layer scales its result, the weight changes by the matrix over that scale.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from structprune.coupling.graph import ChannelGraph
from structprune.coupling.solve import Mask
from structprune.distributed import agreed, all_reduced
from structprune.equations.least_squares import Equations, NormalEquations, Solution, fit, intercept
from structprune.equations.linear_maps import LinearMap, argument, linear_map, with_intercept
from structprune.equations.window_moments import has_window_moments
from structprune.equations.windows import has_window_sums
from structprune.forwards.parallel_forward import Event, Pause, Side
from structprune.ops import op_of
from structprune.ops.relations import Axis
from structprune.recovery.candidates import HeldOut, drawn_positions
from structprune.recovery.chain import producers_of
from structprune.recovery.joint_solver import ConsumerState, JointSolver
from structprune.recovery.layers import Consumer, KeptParts, kept_indices
from structprune.recovery.norms import NormsBehind
from structprune.recovery.report import LayerRecovery
from structprune.recovery.whole_samples import exact_equations, iterative_equations, whole_samples

UNFOLDED = 1536  # features: with more of them sums over windows are computed without unfolding them
# Products in float32 leave an error of about this size, relative to the result; where hardly more is left than that,
# they are computed again in float64.
NEARLY_EXACT, EXACT_EPS = 3e-3, 1e-9
JOINT_ROWS = 4  # times the rows that a layer alone is solved on
CHUNK = 1 << 22  # entries of features that are unfolded at a time


class LayerSolver:
    """Solves one layer: alone, then together with its producers.

    Args:
        graph: of the original.
        removed: mask of the removed components.
        consumer: the layer.
        rows: positions of all batches together to solve on.
        seed: of the draw of positions.
        held_out: samples that are not solved on.
        given: the tensors that the pruned model was given with, by name; its norms may have new statistics since.
        rounds: of solving the layer together with its producers; none with 0.
        weights: whether weights may change, or its bias alone; there are no rounds then.

    Attributes:
        consumer: the layer.
        refused: why it could not be solved; empty if it could.
    """

    def __init__(
        self,
        graph: ChannelGraph,
        removed: Mask,
        consumer: Consumer,
        rows: int,
        seed: int,
        held_out: HeldOut,
        given: Mapping[str, Tensor],
        rounds: int = 0,
        weights: bool = True,
    ) -> None:
        self.consumer = consumer
        self._weights = weights
        self.refused = "" if weights or self._has_bias else "it has no bias, and its weight is to stay"
        producers = producers_of(graph, consumer) if rounds else "not asked for"
        self._no_producers = producers if isinstance(producers, str) else ""
        self._joint = None
        if not isinstance(producers, str):
            self._joint = JointSolver(graph, producers, JOINT_ROWS * rows, rounds, held_out)
        self._name: str = graph.trace.nodes[consumer.node].meta["name"]
        self._target_name: str = graph.trace.nodes[consumer.target].meta["name"]
        dims = graph.channels.axes[consumer.target]
        self._kept = [kept_indices(graph, removed, row) for row in dims if isinstance(row, Axis)]
        self._rows = rows
        self._held_out = held_out
        self._random = torch.Generator().manual_seed(seed + consumer.node)
        self._pauses: list[Pause] = []
        self._map: LinearMap | None = None
        self._norms = NormsBehind([graph.trace.nodes[number] for number in consumer.norms], given)
        self._iterative = False  # whether it has been solved by conjugate gradients

    @property
    def target(self) -> Event:
        """Where it is solved."""
        return self.consumer.target, Side.AFTER

    @property
    def observed(self) -> list[Event]:
        """Where the batches have to pause before the target."""
        layer = [] if self.consumer.diagonal else [(self.consumer.node, Side.BEFORE)]
        producers = self._joint.events if self._joint is not None else []
        return [*producers, *layer, *((norm, Side.BEFORE) for norm in self.consumer.norms)]

    def observe(self, event: Event, pauses: list[Pause]) -> None:
        """Store what goes into the layer or its producers, or the scale of a norm behind it."""
        if self._joint is not None and self._joint.observe(event, pauses):
            return
        if event[0] != self.consumer.node:
            self._norms.observe(event[0], pauses[0])
            self.refused = self.refused or self._norms.refused
            return
        self._pauses = list(pauses)
        self._map = linear_map(self._name, pauses[0].args, pauses[0].kwargs)
        if self._map is None:
            self.refused = "its input or its weight has a number of dimensions that is not solved for"

    def solve(self, pauses: list[Pause], goals: list[Pause], tensors: Mapping[str, Tensor]) -> LayerRecovery | None:
        """Solve the layer, change its weight and correct the results at hand.

        Args:
            pauses: the target on the pruned network, one for each batch; its results are corrected in place.
            goals: on the original, with all its channels.
            tensors: the tensors of the pruned model by name.

        Returns:
            The report on the layer; None if it could not be solved, and `refused` says why.
        """
        ours: list[Tensor] = [pause.result for pause in pauses]
        goal = KeptParts([pause.result for pause in goals], self._kept)
        if not self.refused and any(list(a.shape) != goal.shape(n) for n, a in enumerate(ours)):
            self.refused = f"its result has shape {list(ours[0].shape)}, the original's {goal.shape(0)}"
        self.refused = agreed(self.refused)
        if self.refused:
            return None
        eps = torch.finfo(ours[0].dtype).eps
        solution, power = self._fitted(ours, goal, exact=False)
        rounded = eps > EXACT_EPS or self._iterative
        if rounded and power * (4 * eps) ** 2 < solution.before and solution.after <= power * NEARLY_EXACT**2:
            solution, power = self._fitted(ours, goal, exact=True)
        if solution.helps:
            self._change(solution, ours, tensors)
        only_noise = solution.after <= power * (1e3 * eps) ** 2
        factor = 1.0 if only_noise else self._solve_jointly(ours, goal, tensors, solution.ridge)
        self._pauses = []
        if self._joint is not None:
            self._joint.forget()
        return self._report(solution, power, factor)

    def _fitted(self, ours: list[Tensor], goal: Sequence[Tensor], exact: bool) -> tuple[Solution, float]:
        """The solution, and the power of the goal held out; where `exact`, products are computed in float64."""
        train, held_out, power = self._equations(ours, goal, exact)
        noise = power * (4 * torch.finfo(ours[0].dtype).eps) ** 2
        if not self._weights and isinstance(train, NormalEquations) and isinstance(held_out, NormalEquations):
            return intercept(train, held_out, noise), power
        return fit(train, held_out, int(self._has_bias), noise, self._back_to_given()), power

    def _back_to_given(self) -> Tensor | None:
        """Another change for the ridge to pull towards: see `NormsBehind.back_to_given`."""
        if self._map is None or not self._has_bias:
            return None
        first = self._pauses[0]
        weight, bias = (argument(self._name, which, first.args, first.kwargs) for which in ("weight", "bias"))
        return self._norms.back_to_given(self._map.matrix_of(weight), bias)

    def _report(self, solution: Solution, power: float, factor: float) -> LayerRecovery:
        """The report: `factor` is by how much the error fell once the producers were solved too."""
        size = max(power, torch.finfo(torch.float64).tiny)
        return LayerRecovery(
            layer=self.consumer.layer,
            operation=self._name,
            target=self._target_name,
            before=(solution.before / size) ** 0.5,
            after=(solution.after / size) ** 0.5 * factor,
            changed=solution.helps or factor < 1,
            ridge=solution.ridge,
            producers=self._joint.layers if self._joint is not None and factor < 1 else (),
            alone=self._no_producers if self._joint is None else self._joint.refused,
        )

    def _solve_jointly(
        self, ours: list[Tensor], goal: Sequence[Tensor], tensors: Mapping[str, Tensor], ridge: float
    ) -> float:
        """Solve the layer again with its producers; the new held-out error over the old one, 1 if it is left."""
        layer = self._map
        if self._joint is None or layer is None or not layer.has_adjoints:
            return 1.0
        matrix = layer.matrix_of(tensors[self.consumer.weight])
        if (scale := self._norms.scale) is not None:
            matrix = matrix * scale.to(matrix.dtype).reshape(matrix.shape[0], 1, -1)
        hidden = [argument(self._name, "input", pause.args, pause.kwargs) for pause in self._pauses]
        weight = layer.weight_of(matrix)
        state = ConsumerState(self.consumer.target, layer, weight, self._has_bias, hidden, ours, goal, ridge)
        answer = self._joint.solve(state, tensors)
        if answer is None or not answer[0].helps:
            return 1.0
        chain_fit, write_producers = answer
        write_producers()
        new_weight, shift = chain_fit.weights.weights[-1], chain_fit.weights.shifts[-1]
        change = (layer.matrix_of(new_weight) - matrix).double()
        self._change_parameters(layer, change, None if shift is None else shift.double(), tensors)
        return (chain_fit.after / chain_fit.before) ** 0.5

    # -- rows of features and targets ------------------------------------------------------------------------------

    @property
    def _has_bias(self) -> bool:
        return self.consumer.bias is not None

    @property
    def _channel_dim(self) -> int:
        """The dimension of the target's channels."""
        if self._map is not None:
            return self._map.channel_dim
        known = op_of(self._name)
        return -1 if known is None or known.norm is None else known.channel_dim

    def _equations(self, ours: list[Tensor], goal: Sequence[Tensor], exact: bool) -> tuple[Equations, Equations, float]:
        """The sums over the rows to solve on and over those held out, and the power of the goal on the latter."""
        layer = self._map
        if layer is not None and layer.features > UNFOLDED and has_window_sums(layer):
            return self._window_equations(layer, ours, goal, exact)
        sums = [self._no_rows(ours[0]) for _ in range(2)]
        power = torch.zeros(1, dtype=torch.float64, device=ours[0].device)
        dtype = torch.float64 if exact else ours[0].dtype
        for number, positions in enumerate(self._positions(ours)):
            result, expected = ours[number], goal[number]
            for part, at in enumerate(positions):
                # What is empty would still be split into one part.
                for some in at.to(result.device).split(self._chunk(result)) if len(at) else ():
                    x, y, size = self._rows_at(number, (result, expected), some, dtype)
                    sums[part].add(with_intercept(x) if self._has_bias else x, y)
                    power += size if part else 0
        for each in sums:
            each.reduce()
        return sums[0], sums[1], float(all_reduced(power))

    def _window_equations(
        self, layer: LinearMap, ours: list[Tensor], goal: Sequence[Tensor], exact: bool
    ) -> tuple[Equations, Equations, float]:
        """The same of a layer with many features, over whole samples."""
        inputs = [argument(self._name, "input", pause.args, pause.kwargs) for pause in self._pauses]
        *pairs, power = whole_samples(layer, self._rows, self._held_out, inputs, ours, goal)
        self._iterative = self._weights and not exact and has_window_moments(layer, inputs)
        make = iterative_equations if self._iterative else exact_equations
        train, held_out = (make(layer, each, self._has_bias) for each in pairs)
        return train, held_out, power

    def _no_rows(self, result: Tensor) -> NormalEquations:
        """Sums of no rows, of a layer whose target has such a result."""
        if self._map is None:
            groups, features, outputs = result.shape[self._channel_dim], 1, 1
        else:
            groups, features, outputs = self._map.groups, self._map.features, self._map.outputs
        return NormalEquations.zeros(groups, features + self._has_bias, outputs, result.device)

    def _positions(self, results: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """For each batch flat positions to solve on, and to choose the ridge by: the last fifth; samples stay whole.

        A result (11, 4, 5, 5) has 275 positions. If one sample is held out from all solving, 250 are left; those below
        200, in the first eight samples, are solved on.
        """
        totals = [
            self._held_out.solved_on(number, result.numel() // result.shape[self._channel_dim])
            for number, result in enumerate(results)
        ]
        return drawn_positions(totals, self._rows, self._held_out, self._random)

    def _chunk(self, result: Tensor) -> int:
        """How many positions are unfolded at a time."""
        features = 2 if self._map is None else self._map.features * self._map.groups
        return max(1, CHUNK // max(features, result.shape[self._channel_dim]))

    def _rows_at(
        self, number: int, results: tuple[Tensor, Tensor], at: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Features, what the result lacks of the goal, and the squared size of the goal, at some positions.

        Args:
            number: of the batch.
            results: the target's on the pruned network, and the original's with the kept channels.
            at: flat positions.
            dtype: of what is returned.

        Returns:
            Shapes ``(groups, positions, features)``, ``(groups, positions, outputs)`` and ``()``. A layer that scales
            its channels has one group for each, with one feature and one output.
        """
        if self._map is None:
            dim = self._channel_dim
            # From (batch, channels, height, width) to (positions, channels).
            x, goal = (t.movedim(dim, -1).reshape(-1, t.shape[dim])[at].to(dtype) for t in results)
            return x.T[..., None], (goal - x).T[..., None], goal.square().sum(dtype=torch.float64)
        pause = self._pauses[number]
        result, goal = (self._map.outputs_at(each, at, dtype) for each in results)
        x = self._map.features_at(argument(self._name, "input", pause.args, pause.kwargs), at, dtype)
        return x, goal - result, goal.square().sum(dtype=torch.float64)

    # -- what is changed -------------------------------------------------------------------------------------------

    def _change(self, solution: Solution, ours: list[Tensor], tensors: Mapping[str, Tensor]) -> None:
        """Change the layer by a solution, and correct the results at hand."""
        matrix = solution.matrix[:, :-1] if self._has_bias else solution.matrix
        shift = solution.matrix[:, -1].flatten() if self._has_bias else None
        if self._map is None:
            self._change_diagonal(matrix.flatten(), shift, ours, tensors)
            return
        matrix, shift = self._change_parameters(self._map, matrix, shift, tensors)
        for pause, result in zip(self._pauses, ours, strict=True):
            x: Tensor = argument(self._name, "input", pause.args, pause.kwargs)
            own_shift = None if shift is None else shift.to(x.dtype)
            result.add_(self._map(x, self._map.weight_of(matrix).to(x.dtype), own_shift))

    def _change_parameters(
        self, layer: LinearMap, matrix: Tensor, shift: Tensor | None, tensors: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """Change the weight and the bias so that the result behind the norms changes by a matrix and a shift.

        Args:
            layer: its linear map.
            matrix: shape ``(groups, features, outputs)``.
            shift: shape ``(channels,)``, or None.
            tensors: those of the pruned model, by name.

        Returns:
            The change that could be made: a channel that its norm scales by zero cannot be changed through it.
        """
        weight, own_shift, scale = matrix, shift, self._norms.scale
        if scale is not None:
            nonzero = scale.abs() > 1e-6 * scale.abs().max()
            matrix = matrix * nonzero.reshape(matrix.shape[0], 1, -1)
            divisor = torch.where(nonzero, scale, 1.0)
            weight = matrix / divisor.reshape(matrix.shape[0], 1, -1)
            own_shift = None if shift is None else torch.where(nonzero, shift, 0.0) / divisor
        _add(tensors[self.consumer.weight], layer.weight_of(weight))
        if shift is not None and own_shift is not None and self.consumer.bias is not None:
            shift = own_shift if self.consumer.own_bias else shift
            _add(tensors[self.consumer.bias], shift)
            if self.consumer.own_bias and scale is not None:
                shift = shift * scale
        return matrix, shift

    def _change_diagonal(
        self, factor: Tensor, shift: Tensor | None, ours: list[Tensor], tensors: Mapping[str, Tensor]
    ) -> None:
        """Change a layer that scales its channels: its result ``r`` becomes ``r + factor * r + shift``.

        Both have shape ``(channels,)``.
        """
        weight = tensors[self.consumer.weight]
        _add(weight, weight.double().flatten() * factor)
        if shift is not None and self.consumer.bias is not None:
            bias = tensors[self.consumer.bias]
            _add(bias, bias.double() * factor + shift)
        for result in ours:
            along_channels = [1] * result.dim()
            along_channels[self._channel_dim] = -1
            moved = 0 if shift is None else shift.view(along_channels)
            result.add_((result.double() * factor.view(along_channels) + moved).to(result.dtype))


def _add(tensor: Tensor, change: Tensor) -> None:
    """Add to a parameter; the sum is computed in float64."""
    tensor.data.copy_((tensor.data.double() + change.reshape(tensor.shape)).to(tensor.dtype))
