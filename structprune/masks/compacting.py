"""`compact`: a network full of zeros as a smaller one that computes the same."""

from __future__ import annotations

import copy
import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Column, Table
from torch import nn

from structprune.dependency_graph import DependencyGraph
from structprune.errors import PlanError, VerificationError
from structprune.masks.constants import Constants
from structprune.masks.folding import Fold, all_by_channel
from structprune.masks.removable import RemovableChannels
from structprune.masks.torch_masks import remove
from structprune.planning.build import plan_removal
from structprune.planning.plan import Plan, Settings
from structprune.surgery.verify import TOLERANCE
from structprune.tracing.state import collection_paused, held_tensors
from structprune.tracing.trace import ExampleInputs, run_once, tensors_in
from structprune.wrapping import prunable, rewrapped, unwrapped


@dataclass(frozen=True, slots=True)
class LayerReport:
    """What became of the output channels of a layer.

    Attributes:
        layer: its path.
        channels: how many it had.
        off: those that its zeros switch off: constant, whatever the inputs are.
        removed: those that went, constant or read by nothing.
        folded: how many constant channels of its input it took into its bias.
        stays: of the channels that are off, those that stayed, by the reason.
    """

    layer: str
    channels: int
    off: tuple[int, ...]
    removed: tuple[int, ...]
    folded: int
    stays: dict[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True, eq=False)
class Compaction:
    """A network without the channels that its zeros switch off, and what was done for it.

    Attributes:
        model: the smaller network; masks are gone, their zeros are in the weights.
        plan: what was removed; None if nothing could be.
        layers: what became of each layer.
    """

    model: nn.Module
    plan: Plan | None
    layers: tuple[LayerReport, ...]

    def __str__(self) -> str:
        """A table: a line for each layer, and the reasons for what stayed."""
        table = Table(Column("layer", overflow="fold"), "channels", "off", "gone", "constants folded in", title=None)
        for layer in self.layers:
            numbers = (layer.channels, len(layer.off), len(layer.removed), layer.folded)
            table.add_row(layer.layer, *map(str, numbers))
        text = io.StringIO()
        console = Console(file=text, width=100)
        console.print(table)
        for layer in self.layers:
            for why, which in layer.stays.items():
                line = f"{layer.layer}: {len(which)} of those that are off stay: {why}"
                console.print(line, highlight=False, markup=False, soft_wrap=True)
        return text.getvalue().rstrip()


def compact(model: nn.Module, example_inputs: ExampleInputs) -> nn.Module:
    """A smaller network that computes in eval mode what `model`, with its masks and zeros, computes.

    A channel goes where it is a constant on every input (its weights are zero; bias, batch norm and activation may make
    it any number) and the layers behind can take that constant into their biases, or where every weight that reads it
    is zero. Masks of ``torch.nn.utils.prune`` are made permanent in the result. The model itself is left as it was.

    Args:
        model: masked by ``torch.nn.utils.prune``, or holding zeros.
        example_inputs: a tensor, a tuple (positional) or a dict (keyword) that the model accepts.

    Raises:
        PlanError: the model's weights are on ``meta``, so that no zeros can be seen.
        TraceError: the forward cannot be recorded.
        VerificationError: the result does not compute the same on the example inputs.

    Example:
        >>> import torch
        >>> from torch.nn.utils import prune
        >>> from structprune import masks
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> model = model.eval()
        >>> prune.ln_structured(model[0], "weight", amount=0.5, n=2, dim=0)
        Linear(in_features=4, out_features=8, bias=True)
        >>> masks.compact(model, torch.randn(1, 4))[0]
        Linear(in_features=4, out_features=4, bias=True)
    """
    return compaction(model, example_inputs).model


def compaction(model: nn.Module, example_inputs: ExampleInputs) -> Compaction:
    """The same as `compact`, with a report: for each layer what went, what was folded, what stayed and why."""
    for name, held in held_tensors(prunable(model)).items():
        if held.tensor.is_meta:
            raise PlanError(f"{name!r} is on the meta device: its zeros cannot be seen. Load its weights first.")
    slim = permanent(unwrapped(model))
    with collection_paused():
        graph, removable, constants = _settled(slim, example_inputs)
        for compensation in removable.compensations:
            if compensation.tensor is None:
                _give_bias(slim, compensation)
        if any(compensation.tensor is None for compensation in removable.compensations):
            graph, removable, constants = _settled(slim, example_inputs)
        layers = _reports(graph, removable, constants)
        if len(removable.chosen):
            plan = plan_removal(graph, removable.chosen, Settings(asked={"compact": True}))
            _add(slim, removable.compensations)
            plan.apply(slim, inplace=True)
        else:
            plan = None
    _compare(model, slim, example_inputs)
    return Compaction(rewrapped(model, slim), plan, layers)


def _settled(model: nn.Module, example_inputs: ExampleInputs) -> tuple[DependencyGraph, RemovableChannels, Constants]:
    """What may go, once the forward is known to run without it."""
    graph = DependencyGraph(model, example_inputs)
    while True:
        constants = Constants(graph)
        removable = RemovableChannels(graph, constants)
        if not len(removable.chosen) or graph.settle(removable.removed):
            return graph, removable, constants


def permanent(model: nn.Module) -> nn.Module:
    """A copy of which the masks of ``torch.nn.utils.prune`` are multiplied into the weights and gone."""
    memo: dict[int, Any] = {}
    for held in held_tensors(model).values():
        if not held.tensor.is_leaf:  # deepcopy refuses these; a mask makes them anew
            memo[id(held.tensor)] = held.tensor.detach().clone()
    result = copy.deepcopy(model, memo)
    return remove(result)


def _give_bias(model: nn.Module, compensation: Fold) -> None:
    module = model.get_submodule(compensation.layer)
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    bias = torch.zeros(len(compensation.amount), dtype=weight.dtype, device=weight.device)
    module.register_parameter("bias", nn.Parameter(bias, requires_grad=weight.requires_grad))


def _add(model: nn.Module, compensations: list[Fold]) -> None:
    held = held_tensors(model)
    with torch.no_grad():
        for compensation in compensations:
            assert compensation.tensor is not None
            tensor = held[compensation.tensor].tensor
            tensor.copy_((tensor.double().cpu() + compensation.amount).to(tensor.dtype))


def _reports(graph: DependencyGraph, removable: RemovableChannels, constants: Constants) -> tuple[LayerReport, ...]:
    folded = {compensation.layer: compensation.channels for compensation in removable.compensations}
    reports: dict[str, LayerReport] = {}
    for node, layer in constants.layers.items():
        axis = constants.axes(node)[layer.result_dim]
        path = str(layer.weight.target).rpartition(".")[0] or str(layer.weight.target)
        if not axis.free or path in reports:
            continue
        known = all_by_channel(constants.made[node].known, layer.result_dim, axis.size).numpy()
        gone = removable.off(axis)
        parts = graph.components.of(axis)
        stays: dict[str, list[int]] = {}
        for index in np.flatnonzero(known & ~gone).tolist():
            stays.setdefault(_why(graph, removable, int(parts[index])), []).append(index)
        reports[path] = LayerReport(
            path,
            axis.size,
            tuple(np.flatnonzero(known).tolist()),
            tuple(np.flatnonzero(gone).tolist()),
            folded.get(path, 0),
            {why: tuple(which) for why, which in stays.items()},
        )
    return tuple(reports.values())


def _why(graph: DependencyGraph, removable: RemovableChannels, component: int) -> str:
    if component in removable.reasons:
        return removable.reasons[component]
    number = int(graph.components.reason[component])
    return graph.components.reasons[number] if number >= 0 else "other channels that stay are coupled to it"


def _compare(model: nn.Module, slim: nn.Module, example_inputs: ExampleInputs) -> None:
    """Both on the example inputs.

    Raises:
        VerificationError: they differ by more than rounding.
    """
    outputs = [list(tensors_in(run_once(m, example_inputs))) for m in (unwrapped(model), slim)]
    for wanted, got in zip(*outputs, strict=True):
        tolerance = TOLERANCE.get(wanted.dtype)
        if tolerance is None or not wanted.numel() or not bool(wanted.isfinite().all()):
            continue
        error = float((wanted - got).abs().max() / wanted.abs().max().clamp(min=1e-12))
        if error > tolerance:
            raise VerificationError(
                f"The compacted {type(slim).__name__} differs from the masked one by {error:.1e} of the largest output "
                "on the example inputs. The model is as it was; please report the network."
            )
