"""What a change of some layers does to a model's output, measured by forwards that share what is before them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, fx

from structprune.errors import RecoveryError
from structprune.graph import ChannelGraph
from structprune.recovery.contraction import Contraction, apply_matrix, contraction
from structprune.recovery.lockstep import Event, Lane, Side, Stop
from structprune.recovery.restart import KeepingLane, handed_over, restartable, restarted
from structprune.tracing.replay import Hook
from structprune.tracing.trace import tensors_in

Edits = Mapping[int, tuple[fx.Node, Tensor]]


def changed_output(graph: ChannelGraph, edits: Edits, batch: Any, kept: KeepingLane) -> Tensor:
    """The model's output when the matrices of some operations change.

    Args:
        graph: of the model.
        edits: by the number of an operation: the operation, and what is added to its matrix, the intercept last.
        batch: what goes in.
        kept: a forward of the same batch that stands before the first of these operations.
    """
    start = min(edits)
    hooks: dict[int, Hook] = {}
    if not kept.replay.asked and restartable(graph.trace):
        hooks = restarted(graph.trace, start, handed_over(graph.trace, start, kept.results))
    events = [(number, Side.AFTER) for number in sorted(edits)]
    lane = Lane(graph.model, batch, graph.trace, set(events), hooks)
    return finished(lane, events, edits)


def finished(lane: Lane, events: Sequence[Event] = (), edits: Edits | None = None) -> Tensor:
    """The first tensor of the model's output, with the matrices of some operations changed on the way."""
    try:
        for event in events:
            stop = lane.until(event)
            node, change = (edits or {})[event[0]]
            form = form_of(node.meta["name"], stop)
            delta = apply_matrix(node.meta["name"], form, change[None, :-1], stop.args, stop.kwargs)
            shift = change[-1].to(delta.dtype).reshape(-1, *[1] * (-1 - form.channel_dim))
            stop.result.add_(delta).add_(shift)
        return next(tensors_in(lane.finish()))
    finally:
        lane.cancel()


def form_of(name: str, stop: Stop) -> Contraction:
    """How the operation contracts what a batch brings.

    Raises:
        RecoveryError: it is not what it was for the example inputs.
    """
    form = contraction(name, stop.args, stop.kwargs)
    if form is None:
        raise RecoveryError(f"A batch reaches {name} with another number of dimensions than the example inputs.")
    return form
