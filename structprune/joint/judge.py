"""What a smaller network has lost, measured on data: one scale for branches that are gone and channels that are."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from structprune.depth.scoring import divergence, floating, mean, squared_error
from structprune.errors import PlanError, RecoveryError
from structprune.importance.data import Batches, size_of
from structprune.planning.options import PlanOptions
from structprune.recovery.recalibrate import recalibrate
from structprune.recovery.recover import recover
from structprune.recovery.selection import Reconstruction
from structprune.tracing.state import copy_buffer, held_tensors, swapped_tensors
from structprune.tracing.trace import ExampleInputs, Trace, as_call, preserved_random_state

# On so many positions layers are solved again before networks are judged.
ROWS = 4096

# Of the batches: all, those that layers are solved on, those between.
ALL, EVEN, ODD = slice(None), slice(0, None, 2), slice(1, None, 2)


def batches_for(options: PlanOptions, example_inputs: ExampleInputs) -> Batches:
    """The data that branches and smaller networks are judged on: the example inputs where there is none."""
    if isinstance(options.data, Batches):
        return options.data
    if options.data is not None:
        return Batches(options.data, options.forward, options.loss)
    if options.loss is not None:
        raise PlanError("loss is given, and no data to compute it on: pass data=, an iterable of batches.")

    def run(model: nn.Module, inputs: Any) -> Any:
        args, kwargs = as_call(inputs)
        return model(*args, **kwargs)

    return Batches([example_inputs], run)


class Judge:
    """Measures what smaller networks lose against the original.

    A network whose channels are gone feeds its batch norms something else than their statistics say, which hides what
    it can still do. So the statistics are taken anew on the same data first (Li et al., EagleEye, 2020, section 3.3).
    Solving layers again tells more, and takes longer: what it can make up for differs between channels and blocks.

    Args:
        original: the network as it is.
        recorded: its trace.
        batches: the data.
        measure: ``"loss"``, ``"kl"`` or ``"error"``.
        solve: whether layers are solved again by least squares first (`structprune.recover`).
    """

    def __init__(self, original: nn.Module, recorded: Trace, batches: Batches, measure: str, solve: bool) -> None:
        self._original, self._batches, self._measure, self._solve = original, batches, measure, solve
        self._data = list(batches.once("judging", original))
        self._calibrated = self._has_statistics(recorded) and not solve
        self._whole = None if measure == "loss" else [floating(each) for each in self._run(original)]

    def _has_statistics(self, recorded: Trace) -> bool:
        """Whether there are batch norms whose statistics can be taken on this data."""
        if all(node.meta["name"] != "batch_norm" for node in recorded.nodes):
            return False
        try:
            recalibrate(self._original, self._data, forward=self._batches.forward)
        except RecoveryError:  # a single value of each channel, say: all networks are judged as they are
            return False
        return True

    def _run(self, model: nn.Module, of: slice = ALL) -> Iterable[Any]:
        with preserved_random_state(), torch.no_grad(), swapped_tensors(model, copy_buffer, track=False):
            model.eval()
            for batch in self._data[of]:
                yield self._batches.forward(model, batch)

    @property
    def solves(self) -> bool:
        """Whether every network is judged with its layers solved again."""
        return self._solve

    def lost(self, slim: nn.Module) -> float:
        """What `slim` loses: rise of the loss, divergence in nats for each position, or relative squared error."""
        if self._solve:
            slim = self._recovered(slim, ALL)
        elif self._calibrated:
            slim = recalibrate(slim, self._data, forward=self._batches.forward)
        return self._difference(slim, ALL)

    def lost_when_recovered(self, slim: nn.Module) -> float:
        """The same once the layers of `slim` are solved again on every other batch, measured on the batches between.

        With a single batch both are done on that one.

        Raises:
            RecoveryError: its layers cannot be solved on this data.
        """
        apart = len(self._data) > 1
        return self._difference(self._recovered(slim, EVEN if apart else ALL), ODD if apart else ALL)

    def _recovered(self, slim: nn.Module, of: slice) -> nn.Module:
        return recover(slim, self._original, self._data[of], rows=ROWS, rounds=0, forward=self._batches.forward)

    def _difference(self, slim: nn.Module, of: slice) -> float:
        if self._measure == "loss":
            return self._loss(slim, of) - self._loss(self._original, of)
        assert self._whole is not None
        between = divergence if self._measure == "kl" else squared_error
        pairs = zip(self._whole[of], self._run(slim, of), strict=True)
        return mean([between(dense, floating(now)) for dense, now in pairs])

    def _loss(self, model: nn.Module, of: slice) -> float:
        with preserved_random_state(), torch.no_grad(), swapped_tensors(model, copy_buffer, track=False):
            model.eval()
            return mean([(float(self._batches.value(model, b)) * size_of(b), size_of(b)) for b in self._data[of]])


def judge_of(original: nn.Module, recorded: Trace, batches: Batches, options: PlanOptions, score: str) -> Judge:
    """The judge that fits what is asked for: the loss where there is one, the divergence where branches go by it.

    Raises:
        PlanError: the weights have no values.
    """
    if any(_is_meta(held.tensor) for held in held_tensors(original).values()):
        raise PlanError("The weights are on the meta device, so that no branch can be judged. Give real ones.")
    measure = "loss" if options.loss is not None else "kl" if score == "kl" else "error"
    return Judge(original, recorded, batches, measure, isinstance(options.importance, Reconstruction))


def _is_meta(tensor: Tensor) -> bool:
    return tensor.is_meta
