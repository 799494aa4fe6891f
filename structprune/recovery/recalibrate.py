"""`recalibrate`: the statistics of batch norms computed again, exactly, over all of the data."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from structprune.checking import MODEL, ON_BATCH, PATH, require
from structprune.distributed import all_reduced, failing_together, nobody_failed
from structprune.errors import RecoveryError
from structprune.forwards.activation_files import runs_of
from structprune.forwards.batches import Forward, batches_of
from structprune.forwards.parallel_forward import BatchRun, Pause, Side, parallel_runs
from structprune.forwards.widened import wide
from structprune.ops import op_of
from structprune.ops.arguments import arguments
from structprune.surgery.apply import _memo
from structprune.tracing.state import copy_buffer, held_tensors, swapped_tensors
from structprune.tracing.trace import Trace, preserved_random_state, trace


def recalibrate(
    model: nn.Module,
    data: Iterable[Any],
    *,
    forward: Forward | None = None,
    offload: str | os.PathLike[str] | None = None,
) -> nn.Module:
    """A copy of `model` whose batch norms hold the mean and the variance of their input over all of `data`.

    All batches go through the model side by side, and each norm is set when all have reached it. So its statistics are
    those of the data as a whole, computed with the new statistics of all norms in front. There is no running average
    and no momentum, and the order and the size of the batches do not matter. The variance is the unbiased one, as
    PyTorch keeps it. Modes of modules and weights are not touched. A norm that is used at several places, or that holds
    no statistics, is left.

    Where ``torch.distributed`` is in use, every rank gives its share of the data, and all get the same model. If one
    fails, all raise.

    Args:
        model: any model that can be traced, pruned or not; it stays as it was.
        data: batches as for `structprune.recover`.
        forward: as for `structprune.recover`.
        offload: as for `structprune.recover`: a folder for what batches hold between norms.

    Raises:
        RecoveryError: there is no data, or a norm gets a single value of each channel, or NaN; or the folder of
            `offload` is full or cannot be used; or another rank has failed.

    Example:
        >>> import torch, structprune
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8))
        >>> x = torch.randn(64, 4)
        >>> torch.allclose(structprune.recalibrate(model, [x])[1].running_mean, model[0](x).mean(0), atol=1e-6)
        True
    """
    with failing_together(RecoveryError, "recalibrate"):
        require(locals(), RecoveryError, model=MODEL, forward=ON_BATCH.or_none, offload=PATH.or_none)
        return _recalibrated(model, batches_of(model, data, forward, "are no statistics to take"), offload)


def _recalibrated(model: nn.Module, batches: list[Any], offload: str | os.PathLike[str] | None) -> nn.Module:
    nobody_failed()
    result = copy.deepcopy(model, _memo(held_tensors(model), {}))
    traced = trace(result, batches[0], op_of)
    with preserved_random_state(), torch.no_grad():
        set_statistics(result, batches, traced, offload)
    return result


def set_statistics(
    model: nn.Module, batches: Sequence[Any], traced: Trace, offload: str | os.PathLike[str] | None = None
) -> dict[str, Tensor]:
    """Give the batch norms of a model their statistics on the batches, in place; the new ones, by name.

    Args:
        model: its mode stays as it was.
        batches: what goes into it.
        traced: of this model, or of one with the same operations.
        offload: a folder for what batches hold between norms; None for memory.

    Raises:
        RecoveryError: a norm gets a single value of each channel, or NaN.
    """
    norms = {(node.meta["index"], Side.BEFORE): node for node in _norms(traced)}
    own = {name: held.tensor for name, held in held_tensors(model).items()}
    statistics: dict[str, Tensor] = {}
    with (
        swapped_tensors(model, copy_buffer, track=False),
        runs_of(BatchRun, offload, model) as kind,
        parallel_runs(kind, model.eval(), batches if norms else (), traced, set(norms)) as runs,
    ):
        # The model runs on copies of its buffers.
        tensors = {name: held.tensor for name, held in held_tensors(model).items()}
        for event, node in norms.items():
            values = _statistics([run.run_to(event) for run in runs])
            if not all(bool(torch.isfinite(value).all()) for value in values):
                norm = str(arguments(node)["running_mean"].target).rpartition(".")[0]
                raise RecoveryError(
                    f"The batch norm {norm!r} gets NaN or infinite values on data, and so would its statistics be. "
                    "Check the data and the weights."
                )
            for key, value in zip(_STATISTICS, values, strict=True):
                name = str(arguments(node)[key].target)
                tensors[name].copy_(value)
                own[name].data.copy_(value)
                statistics[name] = value
    return statistics


_STATISTICS = ("running_mean", "running_var")


def _norms(traced: Trace) -> list[fx.Node]:
    """Batch norms that hold statistics which no other operation uses."""
    norms = [node for node in traced.nodes if node.meta["name"] == "batch_norm"]
    statistics = {node: [arguments(node).get(key) for key in _STATISTICS] for node in norms}
    return [
        node
        for node, parts in statistics.items()
        if all(isinstance(part, fx.Node) and len(part.users) == 1 for part in parts)
    ]


def _statistics(pauses: list[Pause]) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance of each channel over the batches of all ranks, both of shape ``(channels,)``.

    A batch (20, 4, 8, 7) is taken as 4 channels of 20 * 8 * 7 = 1120 values.
    """
    parts = [_sums(pause.args[0]) for pause in pauses]
    counts, means, squares = (torch.stack(each) for each in zip(*parts, strict=True))
    count = all_reduced(counts.sum())
    if float(count) < 2:
        raise RecoveryError("A batch norm gets one value of each channel in all of data; give more samples.")
    mean = all_reduced((counts[:, None] * means).sum(0)) / count
    # Each batch's squares are about its own mean (Chan, Golub and LeVeque, 1983).
    about_mean = squares + counts[:, None] * (means - mean).square()
    return mean, all_reduced(about_mean.sum(0)) / (count - 1)


def _sums(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of one batch the number of values of a channel, their mean, and their squared distances from it, in float64.

    Of (20, 4, 8, 7) the shapes are ``()``, ``(4,)`` and ``(4,)``. About the mean of the batch, sums in the type of `x`,
    or in float32 where it has half of it, are as good as those in float64 of all data.
    """
    x = wide(x)
    dims = [dim for dim in range(x.dim()) if dim != 1]
    mean = x.mean(dims, keepdim=True)
    squares = (x - mean).square_().sum(dims)
    return mean.new_tensor(x.numel() / x.shape[1], dtype=torch.float64), mean.flatten().double(), squares.double()
