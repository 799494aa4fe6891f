"""`verify`: does the pruned network compute what the original computes with those channels switched off?"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from html import escape
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from structprune.checking import INPUTS, MODEL, instance, require
from structprune.coupling.graph import ChannelGraph
from structprune.coupling.solve import Mask
from structprune.errors import VerificationError
from structprune.surgery.apply import fake_quantization_off
from structprune.surgery.edits import Edits, Rescale, SectionedSlice
from structprune.surgery.reference import (
    norms_over_kept,
    over_kept_channels,
    weight_kept,
    weights_kept,
    zero_over_zero,
    zero_weight_over_zero_norm,
)
from structprune.surgery.streamed import streamed
from structprune.tracing.replay import Hook, Replay
from structprune.tracing.state import held_tensors
from structprune.tracing.trace import (
    ExampleInputs,
    as_call,
    chosen_names,
    map_tensors,
    named_tensors,
    preserved_random_state,
    run_once,
    tensors_in,
)
from structprune.wrapping import prunable

TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}
PIECE = 1 << 20  # entries of outputs that are compared at a time


@dataclass(frozen=True, slots=True)
class Report:
    """The result of `verify`. See `structprune.verify` for an example.

    Attributes:
        max_relative_error: largest difference of an output tensor over the largest entry of the reference; 0 on the
            ``meta`` device, where only shapes are compared.
        errors: the same for each output tensor, in order.
        shapes: shapes of the outputs.
        tolerance: what counts as equal in the precision that was used.
        numbers: whether numbers were compared, or shapes only.
        drawn: operations by which the forward draws random numbers in eval mode. Networks of different width cannot
            draw the same ones, so each gave one number for all channels, dropout passed on what it got, and a coin gave
            its probability.
    """

    max_relative_error: float
    errors: tuple[float, ...]
    shapes: tuple[tuple[int, ...], ...]
    tolerance: float
    numbers: bool = True
    drawn: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether the largest error is within the tolerance."""
        return self.max_relative_error <= self.tolerance

    def _repr_html_(self) -> str:
        """The same line for notebooks."""
        return f"<p>{escape(str(self))}</p>"

    def __str__(self) -> str:
        what = f"max relative error {self.max_relative_error:.2e}" if self.numbers else "shapes equal"
        random = f", with {', '.join(self.drawn)} held still" if self.drawn else ""
        equal = "equal" if self.ok else "DIFFERENT"
        return f"{equal}: {what}, {len(self.errors)} outputs, tolerance {self.tolerance:g}{random}"

    def raise_for_error(self) -> None:
        """Raise unless the outputs are equal.

        Raises:
            VerificationError: they are not.
        """
        if not self.ok:
            raise VerificationError(
                f"The pruned network differs from the original with the removed channels switched off: {self}. "
                "Please report the model; name layers in ignore= to find the one that is wrong."
            )


def removed_components(graph: ChannelGraph, edits: Edits) -> Mask:
    """The components of `graph` that the edits remove."""
    removed = np.zeros(graph.components.count, dtype=bool)
    # Sections lose other indices each; what they belong to goes with the channels themselves.
    by_tensor = {(t.tensor, t.dim): t.removed for t in edits.slices if not isinstance(t, SectionedSlice)}
    for slot in graph.slots:
        indices = by_tensor.get((slot.tensor, slot.dim))
        if indices is not None:
            removed[graph.components.of(slot.axis)[list(indices)]] = True
    for factored in graph.components.factored_axes:
        cells = removed[factored.cells]
        for dim, part in zip(factored.dims, factored.factors, strict=True):
            removed[part[cells.all(axis=tuple(i for i in range(cells.ndim) if i != dim))]] = True
    return graph.components.closure(removed)


def _switched_off(
    graph: ChannelGraph, edits: Edits, removed: Mask | None, kind: torch.dtype | None
) -> tuple[Any, set[str]]:
    """Outputs of the graph's model with the channels that `edits` removes switched off, and what drew random numbers.

    In half precision, what was multiplied to make up for a changed factor is rounded as it is there. Every removed
    slice of a parameter or buffer is zero; norms of activations over axes that lose channels run over the
    channels kept, and weights that are normalised over their inputs are what they were.
    """
    inputs = _inputs(graph.example_inputs, kind)
    factors = [rescale for rescale in edits.rescales if isinstance(rescale, Rescale)]
    off, mode = streamed(graph.model, edits.slices, kind, factors)
    tensors = {name: held.tensor for name, held in held_tensors(graph.model).items()}
    with preserved_random_state(), torch.no_grad(), mode:
        if kind is not None:
            # What a forward does may depend on the precision: operations are found in a trace of this one.
            graph, removed = ChannelGraph(off, inputs, outputs=edits.outputs), None
        hooks: dict[int | str, Hook] = {"div": zero_over_zero, "_weight_norm": zero_weight_over_zero_norm}
        removed = removed_components(graph, edits) if removed is None else removed
        for number, normalised, gone in weights_kept(graph, removed):
            if number in graph.trace.keys:
                hooks[number] = partial(weight_kept, normalised.gain, tensors, gone)
        for reduction, masks in norms_over_kept(graph, removed):
            if reduction.node in graph.trace.keys:  # those of the forward in training mode have none
                hooks[reduction.node] = over_kept_channels(graph, reduction, masks)
        # Which experts run, or how often a loop does, may depend on what is switched off.
        replay = Replay(graph.trace, hooks, required=False, error=VerificationError)
        with replay.over(off):
            return _run(off, inputs), mode.drawn


def _outputs(model: nn.Module, example_inputs: ExampleInputs, kind: torch.dtype | None) -> Any:
    """Outputs of a model as it is, in the type `kind`, with random draws held still."""
    same, mode = streamed(model, (), kind)
    with preserved_random_state(), torch.no_grad(), mode:
        return _run(same, _inputs(example_inputs, kind))


def _run(model: nn.Module, example_inputs: ExampleInputs) -> Any:
    args, kwargs = map_tensors(lambda tensor: tensor.detach().clone(), as_call(example_inputs))
    return model.eval()(*args, **kwargs)


def _inputs(example_inputs: ExampleInputs, kind: torch.dtype | None) -> ExampleInputs:
    if kind is None:
        return example_inputs
    return map_tensors(lambda tensor: tensor.to(kind) if tensor.is_floating_point() else tensor, example_inputs)


def relative_errors(ours: Any, reference: Any) -> tuple[float, ...]:
    """Largest difference over the largest entry of the reference, for each tensor of two nested outputs.

    Real and imaginary parts are entries of their own.

    Raises:
        VerificationError: the outputs differ in number, shape or type.
    """
    left, right = list(tensors_in(ours)), list(tensors_in(reference))
    if [(t.shape, t.dtype) for t in left] != [(t.shape, t.dtype) for t in right]:
        raise VerificationError(
            f"The pruned network's outputs have the shapes {[list(t.shape) for t in left]}, the original's "
            f"{[list(t.shape) for t in right]}."
        )
    errors: list[float] = []
    for a, b in zip(left, right, strict=True):
        if not a.numel() or a.is_meta:
            errors.append(0.0)
            continue
        difference, scale = _largest(_entries(a), _entries(b))
        finite = np.isfinite(difference)
        errors.append(difference / scale if finite and scale else difference if finite else float("inf"))
    return tuple(errors)


def _entries(tensor: Tensor) -> Tensor:
    """All numbers of a tensor in a row; of 1 + 2j both 1 and 2."""
    tensor = tensor.detach().resolve_conj()
    return (torch.view_as_real(tensor) if tensor.is_complex() else tensor).flatten()


def _largest(ours: Tensor, reference: Tensor) -> tuple[float, float]:
    """The largest difference and the largest entry of the reference, in float64, a piece at a time; NaN if any is."""
    parts = zip(ours.split(PIECE), reference.split(PIECE), strict=True)
    largest = [torch.stack([(a.double() - b.double()).abs().max(), b.double().abs().max()]) for a, b in parts]
    difference, scale = torch.stack(largest).amax(0).tolist()
    return difference, scale


@runtime_checkable
class Verifies(Protocol):
    """A record of what was done to a model that knows what the result must compute."""

    def verified(self, original: nn.Module, slim: nn.Module, example_inputs: ExampleInputs) -> Report:
        """What `verify` finds."""
        ...


def verify(original: nn.Module, slim: nn.Module, plan: Edits | Verifies, example_inputs: ExampleInputs) -> Report:
    """Compare `slim` with `original` whose removed channels are switched off, and whose removed branches give zero.

    Neither model is copied: weights are switched off one at a time, as the forward comes to them. A model in half
    precision is compared in float32, one on the ``meta`` device by shape alone. Fake quantization is off meanwhile.
    Random numbers that the forward draws are held still (see `Report.drawn`).

    Args:
        original: the model that `plan` was made for, unchanged.
        slim: what ``plan.apply`` returned.
        plan: the plan.
        example_inputs: a tensor, a tuple (positional) or a dict (keyword); real values make a better check.

    Raises:
        VerificationError: the outputs differ in number, shape or type.

    Example:
        >>> import torch, structprune
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> x = torch.randn(3, 4)
        >>> plan = structprune.plan(model, x, ratio=0.5)
        >>> structprune.verify(model, plan.apply(model), plan, x).ok
        True
    """
    if isinstance(plan, Verifies):
        return plan.verified(original, slim, example_inputs)
    planned = instance(Edits, "give the plan that slim was made by")
    require(locals(), original=MODEL, slim=MODEL, plan=planned, example_inputs=INPUTS)
    return verify_removal(ChannelGraph(prunable(original), example_inputs, outputs=plan.outputs), slim, plan)


def verify_runs(
    original: nn.Module,
    slim: nn.Module,
    example_inputs: ExampleInputs,
    switched: Callable[[nn.Module, ExampleInputs], AbstractContextManager[Any]],
) -> Report:
    """Compare all outputs of `slim` with those of `original` as it computes inside of a context.

    Args:
        original: the model before.
        slim: the model after.
        example_inputs: a tensor, a tuple (positional) or a dict (keyword).
        switched: from a model that computes what the original does, and its inputs, what switches parts of it off.

    Raises:
        VerificationError: the outputs differ in number, shape or type.
    """
    types = _types(original)
    if any(held.tensor.is_meta for held in held_tensors(original).values()):
        inputs = map_tensors(lambda tensor: tensor.to("meta"), example_inputs)
        ours, theirs = run_once(slim, inputs), run_once(original, inputs)
        return Report(0.0, relative_errors(ours, theirs), _shapes(ours), 0.0, numbers=False)
    kind = torch.float32 if types & {torch.float16, torch.bfloat16} else None
    with fake_quantization_off(original, slim):
        ours = _outputs(slim, example_inputs, kind)
        same, mode = streamed(original, (), kind)
        inputs = _inputs(example_inputs, kind)
        with preserved_random_state(), torch.no_grad(), mode, switched(same, inputs):
            reference = _run(same, inputs)
    errors = relative_errors(ours, reference)
    tolerance = max(TOLERANCE.get(kind or held_kind, 1e-3) for held_kind in types)
    return Report(max(errors, default=0.0), errors, _shapes(ours), tolerance, drawn=tuple(sorted(mode.drawn)))


def _types(model: nn.Module) -> set[torch.dtype]:
    """The floating types of what a model holds."""
    held = [each.tensor.dtype for each in held_tensors(model).values()]
    return {kind for kind in held if kind.is_floating_point} or {torch.float32}


def verify_removal(graph: ChannelGraph, slim: nn.Module, plan: Edits, removed: Mask | None = None) -> Report:
    """`verify` for a model whose channels are known.

    Args:
        graph: the coupled channels of the original.
        slim: what ``plan.apply`` returned.
        plan: the plan.
        removed: the components of the graph that the plan removes; by default they are read off the plan.

    Raises:
        VerificationError: the outputs differ in number, shape or type.
    """
    original, slim = graph.model, prunable(slim)
    held = [h.tensor for h in held_tensors(original).values()]
    types = _types(original)
    if any(t.is_meta for t in held):
        inputs = map_tensors(lambda tensor: tensor.to("meta"), graph.example_inputs)
        ours = _kept_outputs(run_once(slim, inputs), plan)
        errors = relative_errors(ours, _kept_outputs(run_once(original, inputs), plan))
        return Report(0.0, errors, _shapes(ours), 0.0, numbers=False)
    kind = torch.float32 if types & {torch.float16, torch.bfloat16} else None
    with fake_quantization_off(original, slim):
        ours = _kept_outputs(_outputs(slim, graph.example_inputs, kind), plan)
        reference, drawn = _switched_off(graph, plan, removed, kind)
    errors = relative_errors(ours, _kept_outputs(reference, plan))
    tolerance = max(TOLERANCE.get(kind or held_kind, 1e-3) for held_kind in types)
    return Report(max(errors, default=0.0), errors, _shapes(ours), tolerance, drawn=tuple(sorted(drawn)))


def _kept_outputs(outputs: Any, plan: Edits) -> list[Tensor]:
    """The tensors among `outputs` that keep their shape."""
    named = dict(named_tensors(outputs))
    return [named[name] for name in chosen_names(named, plan.outputs)]


def _shapes(outputs: Any) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(t.shape) for t in tensors_in(outputs))
