"""What a branch is worth: how much a network loses without it, on data. `SCORES` has one entry for each measure.

Every score is a function of a `Scorer`, of branches and of those that are off already, and gives one number a branch:
the lower, the sooner it goes.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from math import pi
from typing import Any

import torch
from torch import Tensor, fx, nn

from structprune.coupling.propagate import Channels, propagate
from structprune.depth.gates import gated, operands
from structprune.depth.records import PlacedBranch
from structprune.depth.reference import branches_off, passing
from structprune.depth.sums import stacked
from structprune.distributed import all_reduced
from structprune.errors import PlanError
from structprune.importance.data import Batches, size_of
from structprune.planning.checks import BRANCH_SCORES
from structprune.tracing.replay import Hook, ReplayedCall
from structprune.tracing.state import copy_buffer, swapped_tensors
from structprune.tracing.trace import Trace, preserved_random_state, tensors_in

# Called with the number of a branch, the last operation of it, and the stream before and behind it.
See = Callable[[int, fx.Node, Tensor, Tensor], None]


class Scorer:
    """Runs one model on data, with branches of it off, watched or gated.

    Args:
        model: the model, without wrappers.
        recorded: its trace.
        batches: the data.
    """

    def __init__(self, model: nn.Module, recorded: Trace, batches: Batches) -> None:
        self.model, self.trace, self.batches = model, recorded, batches
        self.channels: Channels = propagate(recorded)
        self._data: list[Any] | None = None
        self._whole: list[Any] | None = None
        self._known: dict[tuple[str, ...], float] = {}

    def data(self) -> list[Any]:
        """The batches, kept: each branch is looked at on all of them."""
        if self._data is None:
            self._data = list(self.batches.once("branches", self.model))
        return self._data

    @contextmanager
    def running(self, grad: bool = False) -> Generator[None]:
        """The model in evaluation mode, as it is afterwards."""
        with (
            preserved_random_state(),
            torch.set_grad_enabled(grad),
            swapped_tensors(self.model, copy_buffer, track=False),
        ):
            self.model.eval()
            yield

    def outputs(self, off: Sequence[PlacedBranch]) -> Iterator[list[Tensor]]:
        """The floating outputs for each batch with some branches off."""
        with self.running(), branches_off(self.model, self.trace, off):
            for batch in self.data():
                yield floating(self.batches.forward(self.model, batch))

    def rise(
        self,
        name: str,
        measure: Callable[[Sequence[PlacedBranch]], float],
        branches: Sequence[PlacedBranch],
        off: Sequence[PlacedBranch],
    ) -> list[float]:
        """How much a measure of the network, which has this name, rises once each branch is off as well."""

        def known(chosen: Sequence[PlacedBranch]) -> float:
            key = (name, *sorted(item.branch.name for item in chosen))
            if key not in self._known:
                self._known[key] = measure(chosen)
            return self._known[key]

        before = known(off)
        return [known([*off, item]) - before for item in branches]

    def distance(
        self, of: Callable[[list[Tensor], list[Tensor]], tuple[float, float]], off: Sequence[PlacedBranch]
    ) -> float:
        """How far the outputs with some branches off are from those of the whole model, over all batches.

        Args:
            of: from the outputs of the whole and of the changed model, a sum and what it is to be divided by.
            off: the branches.
        """
        if self._whole is None:
            self._whole = list(self.outputs(()))
        return mean([of(dense, now) for dense, now in zip(self._whole, self.outputs(off), strict=True)])

    def loss(self, off: Sequence[PlacedBranch]) -> float:
        """The mean loss with some branches off."""
        with self.running(), branches_off(self.model, self.trace, off):
            return mean([(float(self.batches.value(self.model, b)) * size_of(b), size_of(b)) for b in self.data()])

    # -- the stream before and behind each branch ----------------------------------------------------------------

    def watched(self, branches: Sequence[PlacedBranch], off: Sequence[PlacedBranch], see: See) -> Iterator[Any]:
        """Run each batch, show `see` the stream before and behind each branch, and give the batch.

        A branch goes from what its first sum gets beside it to what its last sum gives.
        """
        sums: dict[int, list[tuple[int, int, bool]]] = {}
        held: dict[int, Tensor] = {}
        for which, item in enumerate(branches):
            for number, position, last in _sums_of(item):
                sums.setdefault(number, []).append((which, position, last))

        def note(node: fx.Node, operation: ReplayedCall) -> Any:
            before = operands(operation)
            result = operation()
            for which, position, last in sums[node.meta["index"]]:
                held.setdefault(which, _beside(node, position, before, result))
                if last:
                    see(which, node, held.pop(which), result)
            return result

        def through(which: int, given: Tensor, result: Tensor) -> Tensor:
            see(which, self.trace.nodes[branches[which].skipped[0][0]], given, result)
            return result

        hooks: dict[int, Hook] = {number: partial(note, self.trace.nodes[number]) for number in sums}
        with self.running(), branches_off(self.model, self.trace, off, hooks), ExitStack() as stack:
            for which, item in enumerate(branches):
                if item.skipped:
                    stack.enter_context(passing(self.model, self.trace, item, partial(through, which)))
            for batch in self.data():
                held.clear()
                self.batches.forward(self.model, batch)
                yield batch

    def cosine(self, node: fx.Node, before: Tensor, after: Tensor) -> Tensor:
        """The cosine over the channels of two tensors in the place of `node`, one for each position."""
        axes = self.channels.axes[node.meta["index"]]
        dims = [dim for dim, axis in enumerate(axes) if axis.free] if isinstance(axes, tuple) else []
        dims = dims or list(range(1, before.dim()))
        before, after = before.double(), after.double()
        norms = before.pow(2).sum(dims).sqrt() * after.pow(2).sum(dims).sqrt()
        return (before * after).sum(dims) / norms.clamp_min(1e-30)

    # -- gates ---------------------------------------------------------------------------------------------------

    def gradients(self, branches: Sequence[PlacedBranch], off: Sequence[PlacedBranch]) -> Iterator[list[Tensor]]:
        """For each batch and branch, the gradient of each sample's loss with respect to the branch's gate.

        Shape ``(samples,)``; where the sum that the branch goes into has no dimension for the samples, the gradient of
        the mean for each of them.
        """
        made: list[tuple[int, Tensor]] = []
        size = 0

        def gate(which: int, result: Tensor) -> Tensor:
            samples = size if result.dim() and result.shape[0] == size else 1
            one = result.new_ones([samples, *[1] * (result.dim() - 1)] if result.dim() else [], requires_grad=True)
            made.append((which, one))
            return one

        with self.running(grad=True), gated(self.model, self.trace, branches, gate, off):
            for batch in self.data():
                made, size = [], size_of(batch)
                loss = self.batches.loss(self.model, batch)
                each: Any = torch.autograd.grad(loss, [one for _, one in made], allow_unused=True)
                totals = [torch.zeros(size, dtype=torch.float64) for _ in branches]
                for (which, one), gradient in zip(made, each, strict=True):
                    if gradient is not None:
                        mean = self.batches.reduction == "mean" and one.numel() == size
                        totals[which] += gradient.double().flatten().cpu() * (size if mean else 1)
                yield totals


def _beside(node: fx.Node, position: int, before: dict[int, Tensor], result: Tensor) -> Tensor:
    """A sum without the term at `position`, from the terms that it took."""
    rest = before.get(1 - position)
    if rest is not None and stacked(node) is None:
        return rest
    return result - before[position] if position in before else result


def _sums_of(item: PlacedBranch) -> list[tuple[int, int, bool]]:
    """The sums that a branch goes into: number, position of its term, and whether what it does ends there."""
    edges = sorted(item.off)
    return [(number, at, item.branch.kind == "branch" or number == edges[-1][0]) for number, at in edges]


def mean(parts: Sequence[tuple[float, float]]) -> float:
    """The sum of the first numbers over that of the second ones, over the data of all ranks of `torch.distributed`."""
    sums = torch.tensor([sum(part for part, _ in parts), sum(count for _, count in parts)], dtype=torch.float64)
    total, count = all_reduced(sums).tolist()
    return total / max(count, 1e-30)


def floating(outputs: Any) -> list[Tensor]:
    """The floating tensors of nested outputs."""
    return [tensor for tensor in tensors_in(outputs) if tensor.is_floating_point()]


# -- how far outputs are from each other ------------------------------------------------------------------------------


def divergence(dense: list[Tensor], changed: list[Tensor]) -> tuple[float, float]:
    """Sum over all positions of the divergence between softmaxes of the first output, and how many there are."""
    if not dense or not dense[0].dim():
        raise PlanError("The model's output holds no scores to compare; choose with score='influence'.")
    before, now = (tensors[0].double().log_softmax(-1).flatten(0, -2) for tensors in (dense, changed))
    return float((before.exp() * (before - now)).sum()), float(len(before))


def squared_error(dense: list[Tensor], changed: list[Tensor]) -> tuple[float, float]:
    """Sum of the squared differences of all outputs, and the sum of the squares before."""
    pairs = list(zip(dense, changed, strict=True))
    error = sum(float((before.double() - now.double()).square().sum()) for before, now in pairs)
    return error, sum(float(before.double().square().sum()) for before, _ in pairs)


# -- scores -----------------------------------------------------------------------------------------------------------


def influence(scorer: Scorer, branches: Sequence[PlacedBranch], off: Sequence[PlacedBranch]) -> list[float]:
    """One minus the cosine of what stands before and behind a branch (Men et al., ShortGPT, 2024, equation 1)."""
    totals, counts = [0.0] * len(branches), [0] * len(branches)

    def see(which: int, node: fx.Node, before: Tensor, after: Tensor) -> None:
        cosine = scorer.cosine(node, before, after)
        totals[which] += float(cosine.sum())
        counts[which] += cosine.numel()

    for _ in scorer.watched(branches, off, see):
        pass
    return [1 - mean([part]) for part in zip(totals, counts, strict=True)]


def angular(scorer: Scorer, branches: Sequence[PlacedBranch], off: Sequence[PlacedBranch]) -> list[float]:
    """The angle between what stands before and behind a branch, over pi (Gromov et al., 2024, equation 7).

    `structprune.depth.ordering` chooses consecutive blocks by the angle that they make together.
    """
    totals, counts = [0.0] * len(branches), [0] * len(branches)

    def see(which: int, node: fx.Node, before: Tensor, after: Tensor) -> None:
        angle = scorer.cosine(node, before, after).clamp(-1, 1).arccos() / pi
        totals[which] += float(angle.sum())
        counts[which] += angle.numel()

    for _ in scorer.watched(branches, off, see):
        pass
    return [mean([part]) for part in zip(totals, counts, strict=True)]


def kl(scorer: Scorer, branches: Sequence[PlacedBranch], off: Sequence[PlacedBranch]) -> list[float]:
    """Rise of the divergence of the output from that of the whole model, in nats for each position."""
    return scorer.rise("kl", partial(scorer.distance, divergence), branches, off)


def error(scorer: Scorer, branches: Sequence[PlacedBranch], off: Sequence[PlacedBranch]) -> list[float]:
    """Rise of the squared error of all outputs, over their square."""
    return scorer.rise("error", partial(scorer.distance, squared_error), branches, off)


def loss(scorer: Scorer, branches: Sequence[PlacedBranch], off: Sequence[PlacedBranch]) -> list[float]:
    """Rise of the loss."""
    return scorer.rise("loss", scorer.loss, branches, off)


def taylor(scorer: Scorer, branches: Sequence[PlacedBranch], off: Sequence[PlacedBranch]) -> list[float]:
    """The absolute mean gradient of the loss by the branch's gate: its rise without the branch, to first order.

    Molchanov et al., Importance Estimation for Neural Network Pruning, 2019, section 3.1, for a gate on a branch.
    """
    sums = [torch.stack([gradient.sum() for gradient in each]) for each in scorer.gradients(branches, off)]
    samples = sum(size_of(batch) for batch in scorer.data())
    return [abs(mean([(total, samples)])) for total in torch.stack(sums).sum(0).tolist()]


def fisher(scorer: Scorer, branches: Sequence[PlacedBranch], off: Sequence[PlacedBranch]) -> list[float]:
    """Half the mean square of each sample's gradient by the gate: the rise of the loss, to second order.

    Theis et al., Faster gaze prediction with dense networks and Fisher pruning, 2018, equation 7.
    """
    sums = [torch.stack([gradient.square().sum() for gradient in each]) for each in scorer.gradients(branches, off)]
    samples = sum(size_of(batch) for batch in scorer.data())
    return [mean([(total, samples)]) / 2 for total in torch.stack(sums).sum(0).tolist()]


Score = Callable[[Scorer, Sequence[PlacedBranch], Sequence[PlacedBranch]], list[float]]
_BY_NAME: dict[str, Score] = {each.__name__: each for each in (angular, error, fisher, influence, kl, loss, taylor)}
SCORES: dict[str, Score] = {name: _BY_NAME[name] for name in BRANCH_SCORES}
