"""What a change of some layers does to a model's output, measured by forwards that share what is before them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor

from structprune.errors import RecoveryError
from structprune.graph import ChannelGraph
from structprune.recovery.contraction import Contraction, apply_matrix, contraction
from structprune.recovery.lockstep import Stop
from structprune.recovery.restart import KeepingLane, handed_over, restartable, restarted
from structprune.tracing.replay import FoundCall, Hook, Replay
from structprune.tracing.trace import as_call, tensors_in


def changed_output(graph: ChannelGraph, changes: Mapping[int, Tensor], batch: Any, kept: KeepingLane) -> Tensor:
    """The model's output when the matrices of some operations change.

    Args:
        graph: of the model.
        changes: what is added to the matrix of an operation, by its number; the intercept last.
        batch: what goes in.
        kept: a forward of the same batch that stands before the first of these operations.
    """
    start = min(changes)
    hooks: dict[int, Hook] = {number: partial(_changed, change) for number, change in changes.items()}
    if not kept.replay.asked and restartable(graph.trace):
        hooks |= restarted(graph.trace, start, handed_over(graph.trace, start, kept.results))
    return output_of(graph, batch, hooks)


def output_of(graph: ChannelGraph, batch: Any, hooks: Mapping[int, Hook]) -> Tensor:
    """The first tensor of the model's output, with hooks at some operations."""
    args, kwargs = as_call(batch)
    with Replay(graph.trace, hooks, whole=True, error=RecoveryError).over(graph.model):
        return next(tensors_in(graph.model(*args, **kwargs)))


def _changed(change: Tensor, call: FoundCall) -> Tensor:
    """The result of a contraction whose matrix has changed."""
    name = call.call.name
    form = form_of(name, call)
    delta = apply_matrix(name, form, change[None, :-1], call.args, call.kwargs)
    shift = change[-1].to(delta.dtype).reshape(-1, *[1] * (-1 - form.channel_dim))
    return call().add_(delta).add_(shift)


def form_of(name: str, call: Stop | FoundCall) -> Contraction:
    """How the operation contracts what a batch brings.

    Raises:
        RecoveryError: it is not what it was for the example inputs.
    """
    form = contraction(name, call.args, call.kwargs)
    if form is None:
        raise RecoveryError(f"A batch reaches {name} with another number of dimensions than the example inputs.")
    return form
