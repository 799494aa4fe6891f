"""`recover`: the layers of a pruned model solved again, so that it computes what the original computes."""

from __future__ import annotations

import copy
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from structprune.errors import RecoveryError
from structprune.graph import ChannelGraph
from structprune.inputs import device_of
from structprune.ranks import failing_together, nobody_failed
from structprune.recovery.consumers import consumers
from structprune.recovery.depth import Shorter
from structprune.recovery.lockstep import Event, Lane, Side, lanes
from structprune.recovery.report import RecoveryReport, keep_report
from structprune.recovery.solving import Layer
from structprune.surgery.apply import _memo
from structprune.surgery.edits import Edits, Thinning
from structprune.surgery.history import first_shapes, kept
from structprune.surgery.verify import dead_components
from structprune.tracing.state import held_tensors, lent, shield
from structprune.tracing.trace import map_tensors, preserved_random_state

HALF = (torch.float16, torch.bfloat16)


def inputs_of(batch: Any, device: torch.device) -> Any:
    """What the model takes of a batch: a tensor, a dict of keyword arguments, or the first of a pair with labels.

    Raises:
        RecoveryError: the batch is none of these.
    """
    if isinstance(batch, (tuple, list)) and batch:
        batch = batch[0]
    if not isinstance(batch, (Tensor, Mapping)):
        raise RecoveryError(
            f"A batch is a {type(batch).__name__}, and it is not clear how the model takes it. Let data give tensors, "
            "dicts of keyword arguments, or pairs whose first is one of them."
        )
    return map_tensors(lambda tensor: tensor.to(device), batch)


def recover(
    slim: nn.Module, original: nn.Module, data: Iterable[Any], *, rows: int = 65536, rounds: int = 3, seed: int = 0
) -> nn.Module:
    """A copy of `slim` whose layers are solved again to meet `original`: no labels, no gradients, no training.

    Each convolution, linear layer or matrix product with a held weight whose result has changed is solved by ridge
    least squares in float64, one after the other in the order of the forward, on the network as solved so far. What it
    has to meet is the original's result on the same data: that of its batch norm where one follows, and of the residual
    sum as a whole where it goes into one, so that it makes up for what was lost before it. Norms with no solved layer
    in front are scaled and shifted channel by channel. The ridge is chosen by a fifth of the data, on which the layer
    is not solved; a layer that does not get better there is left. `recovery_report` tells the errors of each layer.
    Weights that are used in several places are left.

    Then the layer is solved together with the layers that make its channels, where all that stands between them treats
    each entry alone: activations, norms with fixed statistics, gates. What the surviving channels compute may change,
    so that a few do the work of many. This is damped Gauss-Newton (`structprune.recovery.refit`): linear least squares
    by conjugate gradients, a few times over, on four fifths of the samples, taken only if the others agree.
    Where that helped, a last step sees all samples, and is taken if the error on all of them falls; the errors that the
    report gives are those before it.

    He et al., Channel Pruning for Accelerating Very Deep Neural Networks, 2017 (equation 3 and section 3.3, of single
    layers and of residual sums); the targets are corrected for all that comes before.

    A model without some of its branches (`structprune.remove_branches`) is solved where what is left meets the
    original, if that is all that was done to it; the report then names layers as the original does.

    Models in half precision run and are solved in float32, on widened copies of their weights and of the data, and the
    weights found are rounded at the end; so `recover` takes the memory of float32 models for as long as it runs.

    Where ``torch.distributed`` is in use, every rank gives its share of the data, and all get the same model. If one
    fails, all raise.

    Args:
        slim: a pruned model: what `structprune.prune` or ``plan.apply`` made of `original`, in one round or several.
        original: the model before the first pruning.
        data: batches as the model takes them: tensors, dicts of keyword arguments, or pairs of one of these and labels,
            which are ignored. All of them are held by the model at once at one layer: some hundred samples are enough.
        rows: how many positions (pixels, tokens) of all batches together a layer is solved on; drawn at random.
        rounds: how often a layer and its producers are solved together at most; with 0 the layers alone are solved.
        seed: of the draw. Random generators outside are not touched.

    Returns:
        A new model; `slim` and `original` are as they were.

    Raises:
        RecoveryError: there is no data, or it does not fit the models, or the models do not fit each other; or another
            rank has failed.

    Example:
        >>> import torch, structprune
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> x = torch.randn(64, 4)
        >>> slim = structprune.prune(model, x, ratio=0.25, round_to=1)
        >>> recovered = structprune.recover(slim, model, [x])
        >>> print([row.layer for row in structprune.recovery_report(recovered).layers])
        ['2']
    """
    with failing_together(RecoveryError, "recover"):
        return _recovered(slim, original, data, rows, rounds, seed)


def _recovered(
    slim: nn.Module, original: nn.Module, data: Iterable[Any], rows: int, rounds: int, seed: int
) -> nn.Module:
    batches = [inputs_of(batch, device_of(original)) for batch in data]
    if not batches:
        raise RecoveryError("data holds no batch, so there is nothing to solve the layers on.")
    nobody_failed()
    shorter = Shorter.of(slim, original, batches[0])
    removed = removed_between(slim, original) if shorter is None else Edits((), (), (), (), (), None, None)
    recovered = copy.deepcopy(slim, _memo(held_tensors(slim), {})) if shorter is None else shorter.aligned
    with _widened(original, recovered) as wide:
        batches = [map_tensors(_wide, batch) for batch in batches] if wide else batches
        graph = ChannelGraph(original, batches[0])
        dead = dead_components(graph, removed)
        begins, without = ((), ()) if shorter is None else shorter.places(graph.trace)
        found = consumers(graph, dead, begins, without)
        layers = [Layer(graph, dead, consumer, rows, seed, rounds) for consumer in found]
        with preserved_random_state(), torch.no_grad():
            solved = _sequential(recovered, original, batches, graph, layers)
    if shorter is not None:
        recovered = shorter.shortened(slim)
    keep_report(recovered, RecoveryReport(tuple(solved), _skipped(layers)))
    return recovered


def _wide(tensor: Tensor) -> Tensor:
    """The tensor itself; in float32 if it is in half precision."""
    if tensor.dtype not in HALF:
        return tensor
    wide = tensor.detach().float()
    return nn.Parameter(wide, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else wide


@contextmanager
def _widened(original: nn.Module, recovered: nn.Module) -> Generator[bool]:
    """Both models in float32 if any of their tensors is in half precision; yields whether one is.

    Half precision cannot tell the errors that are left from its own, nor can conjugate gradients go on in it.
    Afterwards the parameters of `recovered` are those found, rounded.
    """
    own = {name: held.tensor for name, held in held_tensors(recovered).items()}
    others = (held.tensor for held in held_tensors(original).values())
    if all(tensor.dtype not in HALF for tensor in (*own.values(), *others)):
        yield False
        return
    with lent(original, _wide, track=False), lent(recovered, _wide, track=False):
        yield True
        for name, held in held_tensors(recovered).items():
            if name in own and isinstance(own[name], nn.Parameter):
                own[name].data.copy_(held.tensor)


def removed_between(slim: nn.Module, original: nn.Module) -> Edits:
    """What was removed from `original` to make `slim`, by the record that `slim` carries.

    Raises:
        RecoveryError: by that record it was made of another model.
    """
    record, first = kept(slim), first_shapes(slim)
    found: list[Thinning] = []
    for name, held in held_tensors(original).items():
        shape = tuple(held.tensor.shape)
        if isinstance(held.tensor, nn.Parameter) and first.get(name) != shape:
            before = f"of shape {list(first[name])}" if name in first else "missing"
            raise RecoveryError(
                f"{name!r} has shape {list(shape)} in the original, but in the model that was pruned it was {before}. "
                "Give the pruned model as structprune made it, and the model that it was made of."
            )
        for dim, indices in record.get(name, {}).items():
            gone = np.setdiff1d(np.arange(shape[dim]), indices)
            if len(gone):
                found.append(Thinning(name, dim, shape[dim], tuple(gone.tolist())))
    return Edits(tuple(found), (), (), (), (), None, None)


def _skipped(layers: list[Layer]) -> dict[str, str]:
    return {layer.consumer.layer: layer.refused for layer in layers if layer.refused}


def _sequential(
    slim: nn.Module, original: nn.Module, batches: list[Any], graph: ChannelGraph, layers: list[Layer]
) -> list[Any]:
    """Solve layer after layer while all batches go through both models once."""
    events = sorted(
        ((event, number) for number, layer in enumerate(layers) for event in _events(layer)),
        key=lambda item: (item[0], item[1]),
    )
    ours = {event for event, _ in events}
    theirs = {(layer.consumer.target, Side.AFTER) for layer in layers}
    solved: list[Any] = []
    with lent(original, shield, track=False), lent(slim, shield, track=False):
        original.eval()
        slim.eval()
        tensors = {name: held.tensor for name, held in held_tensors(slim).items()}
        trace = graph.trace
        with lanes(Lane, slim, batches, trace, ours) as mine, lanes(Lane, original, batches, trace, theirs) as dense:
            for event, numbers in _grouped(events):
                stops = [lane.until(event) for lane in mine]
                for number in numbers:
                    layer = layers[number]
                    if event != (layer.consumer.target, Side.AFTER):
                        layer.look(event, stops)
                        continue
                    wanted = [lane.until(event).result for lane in dense]
                    report = layer.solve([stop.result for stop in stops], wanted, tensors)
                    solved += [report] if report is not None else []
    return solved


def _events(layer: Layer) -> list[Event]:
    return [*layer.events, (layer.consumer.target, Side.AFTER)]


def _grouped(events: list[tuple[Event, int]]) -> list[tuple[Event, list[int]]]:
    """The numbers of the layers that have something to do at each event, in order."""
    found: dict[Event, list[int]] = {}
    for event, number in events:
        found.setdefault(event, []).append(number)
    return list(found.items())
