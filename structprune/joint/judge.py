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

# Where the criterion is the error that is left once layers are solved again, networks are judged after that.
ROWS = 4096


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

    Args:
        original: the network as it is.
        recorded: its trace.
        batches: the data.
        measure: ``"loss"``, ``"kl"`` or ``"error"``.
        solve: whether layers are solved again by least squares first (`structprune.recover`).
    """

    def __init__(self, original: nn.Module, recorded: Trace, batches: Batches, measure: str, solve: bool) -> None:
        self._original, self._batches, self._measure, self._solve = original, batches, measure, solve
        self._data = list(batches.once("judging"))
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

    def _run(self, model: nn.Module) -> Iterable[Any]:
        with preserved_random_state(), torch.no_grad(), swapped_tensors(model, copy_buffer, track=False):
            model.eval()
            for batch in self._data:
                yield self._batches.forward(model, batch)

    def lost(self, slim: nn.Module) -> float:
        """What `slim` loses: rise of the loss, divergence in nats for each position, or relative squared error."""
        if self._solve:
            slim = recover(slim, self._original, self._data, rows=ROWS, rounds=0, forward=self._batches.forward)
        elif self._calibrated:
            slim = recalibrate(slim, self._data, forward=self._batches.forward)
        if self._measure == "loss":
            return self._loss(slim) - self._loss(self._original)
        assert self._whole is not None
        of = divergence if self._measure == "kl" else squared_error
        return mean([of(dense, floating(now)) for dense, now in zip(self._whole, self._run(slim), strict=True)])

    def _loss(self, model: nn.Module) -> float:
        with preserved_random_state(), torch.no_grad(), swapped_tensors(model, copy_buffer, track=False):
            model.eval()
            return mean([(float(self._batches.value(model, b)) * size_of(b), size_of(b)) for b in self._data])


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
