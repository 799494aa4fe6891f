"""`rotate_residual`: residual streams turned to their principal axes, by weights alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from structprune.checking import DATA, INPUTS, MODEL, ON_BATCH, require
from structprune.coupling.graph import ChannelGraph
from structprune.coupling.streams import Stream, stream_of
from structprune.distributed import all_reduced, failing_together
from structprune.errors import PlanError, VerificationError
from structprune.importance.data import Batches
from structprune.importance.observe import on_swapped_tensors
from structprune.surgery.apply import _memo
from structprune.surgery.verify import TOLERANCE
from structprune.tracing.replay import Replay, ReplayedCall
from structprune.tracing.state import held_tensors
from structprune.tracing.trace import ExampleInputs, run_once, tensors_in
from structprune.wrapping import prunable, rewrapped


def rotate_residual(
    model: nn.Module, example_inputs: ExampleInputs, data: Iterable[Any], *, forward: Callable[..., Any] | None = None
) -> nn.Module:
    """A model that computes the same, and whose residual streams hold their principal axes as channels.

    Channels of a residual stream are seldom worth much less than others: what matters lies in directions. Behind this
    the first channel is the direction in which the stream varies most, as the layers read it (each position over its
    root mean square), and the last the one in which it varies least, so the width of the stream can be pruned by
    ``importance="activation_l2"``.

    Gains of norms go into the layers behind them and become ones; then all that writes to the stream is multiplied by
    one orthogonal matrix, and what reads it by its inverse. That is exact where nothing in the forward looks at single
    channels of it: embeddings and linear layers, sums, norms by the root mean square. A layer norm subtracts the mean
    of the channels, and is refused, as are outputs that hold the stream, and an embedding that is the last layer too.

    Ashkboos et al., SliceGPT: Compress Large Language Models by Deleting Rows and Columns, 2024: sections 3.1 to 3.3.
    There each block has a rotation of its own, with a matrix on each residual connection; here all share one, so
    nothing is added to the forward, and the class and its configuration stay as they are.

    Where ``torch.distributed`` is in use, every rank gives its share of the data, and all get the same model.

    Args:
        model: the trained model; it stays as it was.
        example_inputs: a tensor, a tuple (positional) or a dict (keyword), as for `structprune.plan`.
        data: batches as for `structprune.plan`, without labels.
        forward: called with the model and a batch, as for `structprune.plan`.

    Returns:
        A new model with the same shapes.

    Raises:
        PlanError: there is no residual stream, or none that can be rotated; the message names the operation.
        TraceError: the model does not run on `example_inputs`.
        VerificationError: the result does not compute what the model computes.

    Example:
        >>> import structprune
        >>> class Block(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.norm, self.up, self.down = nn.RMSNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)
        ...     def forward(self, x):
        ...         return x + self.down(self.up(self.norm(x)).relu())
        >>> model = nn.Sequential(nn.Linear(4, 8), Block(), Block(), nn.Linear(8, 2))
        >>> x = torch.randn(64, 4)
        >>> rotated = structprune.rotate_residual(model, x, [x])
        >>> torch.allclose(rotated(x), model(x), atol=1e-5), rotated[1].norm.weight.unique().item()
        (True, 1.0)
    """
    require(locals(), model=MODEL, example_inputs=INPUTS, data=DATA, forward=ON_BATCH.or_none)
    inner = prunable(model)
    graph = ChannelGraph(inner, example_inputs)
    streams, reasons = _streams(graph)
    if not streams:
        none = "The model has no residual stream that could be rotated. Prune its channels as they are."
        raise PlanError(reasons[0] if reasons else none)
    with failing_together(PlanError, "rotate_residual"):
        moments = _moments(graph, streams, Batches(data, forward))
    made = copy.deepcopy(inner, _memo(held_tensors(inner), {}))
    with torch.no_grad():
        for stream, moment in zip(streams, moments, strict=True):
            _rotate(made, stream, torch.linalg.eigh(moment).eigenvectors.flip(1))
    _compare(made, graph)
    return rewrapped(model, made)


def _streams(graph: ChannelGraph) -> tuple[list[Stream], list[str]]:
    """The residual streams that can be rotated, and why the others cannot."""
    streams, reasons = list[Stream](), list[str]()
    for group in graph.groups():
        if group.axis == "hidden":
            try:
                streams.append(stream_of(graph, group))
            except PlanError as refused:
                reasons.append(str(refused))
    return streams, reasons


def _moments(graph: ChannelGraph, streams: list[Stream], batches: Batches) -> list[Tensor]:
    """The second moments of each stream where it is read, shape ``(channels, channels)``, in float64.

    Each position counts alike, whatever its size: norms divide by that.
    """
    device = next(graph.model.parameters()).device
    sums = [torch.zeros(s.channels, s.channels, dtype=torch.float64, device=device) for s in streams]

    def see(place: int | str, total: Tensor) -> Callable[[ReplayedCall], Any]:
        def hook(operation: ReplayedCall) -> Any:
            x: Tensor = operation.args[place] if isinstance(place, int) else operation.kwargs[place]
            rows = x.detach().reshape(-1, x.shape[-1]).double()
            rows = rows / rows.square().mean(1, keepdim=True).sqrt().clamp_min(torch.finfo(torch.float64).tiny)
            total.addmm_(rows.T.to(total.device), rows.to(total.device))
            return operation()

        return hook

    hooks = {
        number: see(place, total)
        for stream, total in zip(streams, sums, strict=True)
        for number, place in stream.seen.items()
    }
    replay = Replay(graph.trace, hooks, error=PlanError)
    with on_swapped_tensors(graph.model), torch.no_grad(), replay.over(graph.model):
        for batch in batches.once("looking at residual streams", graph.model):
            batches.forward(graph.model, batch)
    if not replay.forwards:
        raise PlanError("forward= did not call the model that it was given, so there was nothing to look at.")
    return [all_reduced(total) for total in sums]


def _rotate(model: nn.Module, stream: Stream, axes: Tensor) -> None:
    """Turn a stream in place, so that channel i of it is what column i of `axes` (channels, channels) holds."""
    tensors = {name: held.tensor for name, held in held_tensors(model).items()}
    folded: dict[str, Tensor] = {
        name: tensors[name].double() * tensors[gain].double() if gain else tensors[name].double()
        for name, gain in stream.read.items()
    }
    for name, weight in folded.items():
        tensors[name].data.copy_(weight @ axes.to(weight.device))
    # A square layer both reads and writes, and an embedding without a gain may read too: their columns are done.
    for name, dim in stream.written:
        if not (name in folded and dim == 1):
            along = tensors[name].data.double().movedim(dim, -1)
            tensors[name].data.copy_((along @ axes.to(along.device)).movedim(-1, dim))
    for name in stream.gains:
        tensors[name].data.fill_(1.0)


def _compare(made: nn.Module, graph: ChannelGraph) -> None:
    """Whether the rotated model computes what the graph's model does, up to the roundings of its narrowest operation.

    Raises:
        VerificationError: it does not.
    """
    kinds = {node.meta.get("dtype") for node in graph.trace.nodes}
    tolerance = max(TOLERANCE.get(kind, 5e-2) for kind in kinds if kind is not None and kind.is_floating_point)
    ours, theirs = (list(tensors_in(run_once(one, graph.example_inputs))) for one in (made, graph.model))
    for one, other in zip(ours, theirs, strict=True):
        if not one.is_floating_point() or not one.numel():
            continue
        error = float((one.double() - other.double()).abs().max()) / max(float(other.double().abs().max()), 1e-12)
        if not error <= tolerance:
            raise VerificationError(
                f"The rotated model differs by {error:.2e} of the largest output, where {tolerance:g} is allowed. "
                "Please report the model."
            )
