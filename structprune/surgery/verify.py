"""`verify`: does the pruned network compute what the original computes with those channels switched off?"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from structprune.channels.solver import Mask
from structprune.errors import VerificationError
from structprune.graph import ChannelGraph
from structprune.ops.relations import Survivors
from structprune.surgery.edits import Edits
from structprune.surgery.quantization import fake_quantization_off
from structprune.tracing.replay import Hook, Operation, Replay
from structprune.tracing.state import held_tensors, lent, shield
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

_WITH_SHAPE = frozenset({"layer_norm", "rms_norm"})
_SAME_SHAPE = _WITH_SHAPE | {"_weight_norm", "batch_norm", "instance_norm", "softmax", "_softmax", "python.softmax"}
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}


@dataclass(frozen=True, slots=True)
class Report:
    """What `verify` found. See `structprune.verify` for an example.

    Attributes:
        max_relative_error: largest difference of an output tensor over the largest entry of the reference; 0 on the
            ``meta`` device, where only shapes are compared.
        errors: the same for each output tensor, in order.
        shapes: shapes of the outputs.
        tolerance: what counts as equal in the precision that was used.
        numbers: whether numbers were compared, or shapes only.
    """

    max_relative_error: float
    errors: tuple[float, ...]
    shapes: tuple[tuple[int, ...], ...]
    tolerance: float
    numbers: bool = True

    @property
    def ok(self) -> bool:
        """Whether the largest error is within the tolerance."""
        return self.max_relative_error <= self.tolerance

    def __str__(self) -> str:
        what = f"max relative error {self.max_relative_error:.2e}" if self.numbers else "shapes equal"
        return (
            f"{'equal' if self.ok else 'DIFFERENT'}: {what}, {len(self.errors)} outputs, tolerance {self.tolerance:g}"
        )

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


def _over_survivors(dims: tuple[int, ...], masks: list[Mask], operation: Operation) -> Any:
    """Run a norm, a mean or a sum over the survivors of thinned axes."""
    args, kwargs, name = operation.args, operation.kwargs, operation.call.name
    x: Tensor = args[0] if args else kwargs["input"]
    keep = [torch.from_numpy(np.flatnonzero(mask)).to(x.device) for mask in masks]
    rest: list[Any] = list(args[1:])
    if name == "group_norm":
        return _group_norm(operation.func, x, rest, kwargs, keep[0])
    small = _selected(x, dims, keep)
    if name in _WITH_SHAPE:
        first = x.dim() - len(rest[0])
        rest[0] = tuple(small.shape[first:])
        inner = [dim - first for dim in dims]
        rest[1:3] = [_selected(t, inner, keep) if isinstance(t, Tensor) else t for t in rest[1:3]]
    if name == "_weight_norm":
        length: Tensor = args[1]
        rest[0] = _selected(length, *_present(length, dims, keep))
    result = operation.func(small, *rest, **{key: value for key, value in kwargs.items() if key != "input"})
    if name == "topk":  # the choices are numbered as the original numbers them
        return torch.return_types.topk((result[0], keep[0][result[1]]))
    same = isinstance(result, Tensor) and result.dim() == x.dim() and name in _SAME_SHAPE
    return _scattered(result, x, dims, keep) if same else result


def _group_norm(func: Any, x: Tensor, rest: list[Any], kwargs: dict[str, Any], keep: Tensor) -> Tensor:
    size = x.shape[1] // int(rest[0])
    rest[0] = len(torch.unique(keep // size))
    rest[1:3] = [t.index_select(0, keep) if isinstance(t, Tensor) else t for t in rest[1:3]]
    return _scattered(func(x.index_select(1, keep), *rest, **kwargs), x, (1,), [keep])


def _off_over_off(operation: Operation) -> Any:
    """A quotient in which nothing over nothing is nothing: both belong to a channel that is off."""
    result, operands = operation(), operation.args
    if operation.call.inplace or len(operands) < 2 or not all(isinstance(operand, Tensor) for operand in operands[:2]):
        return result
    return torch.where((operands[0] == 0) & (operands[1] == 0), 0, result)


def _present(x: Tensor, dims: Sequence[int], keep: list[Tensor]) -> tuple[list[int], list[Tensor]]:
    """Those of `dims` in which `x` is not broadcast."""
    pairs = [(dim, index) for dim, index in zip(dims, keep, strict=True) if x.shape[dim] != 1]
    return [dim for dim, _ in pairs], [index for _, index in pairs]


def _selected(x: Tensor, dims: Sequence[int], keep: list[Tensor]) -> Tensor:
    for dim, index in zip(dims, keep, strict=True):
        x = x.index_select(dim, index)
    return x


def _scattered(small: Tensor, like: Tensor, dims: Sequence[int], keep: list[Tensor]) -> Tensor:
    for dim, index in zip(dims, keep, strict=True):
        shape = list(small.shape)
        shape[dim] = like.shape[dim]
        small = small.new_zeros(shape).index_copy(dim, index, small)
    return small


def dead_components(graph: ChannelGraph, edits: Edits) -> Mask:
    """The components of `graph` that the edits remove."""
    dead = np.zeros(graph.components.count, dtype=bool)
    removed = {(t.tensor, t.dim): t.removed for t in edits.thinnings}
    for slot in graph.slots:
        indices = removed.get((slot.tensor, slot.dim))
        if indices is not None:
            dead[graph.components.of(slot.row)[list(indices)]] = True
    for lattice in graph.components.lattices:
        cells = dead[lattice.cells]
        for axis, part in zip(lattice.axes, lattice.factors, strict=True):
            dead[part[cells.all(axis=tuple(i for i in range(cells.ndim) if i != axis))]] = True
    return graph.components.closure(dead)


def _thinned(graph: ChannelGraph, dead: Mask) -> Iterator[tuple[Survivors, list[Mask]]]:
    for survivors in graph.channels.relations.survivors:
        masks = [~dead[graph.components.of(row)] for row in survivors.rows]
        if not all(mask.all() for mask in masks):
            yield survivors, masks


def switched_off(original: nn.Module, edits: Edits, example_inputs: ExampleInputs) -> Any:
    """Outputs of `original` with the channels that `edits` removes switched off; the model is left as it was.

    Every removed slice of a parameter or buffer is zero; norms, means and sums over thinned axes run over the
    survivors.
    """
    graph = ChannelGraph(original, example_inputs, outputs=edits.outputs)
    hooks: dict[int | str, Hook] = {"div": _off_over_off}
    for s, masks in _thinned(graph, dead_components(graph, edits)):
        if s.node in graph.trace.keys:  # not those of training
            hooks[s.node] = partial(_over_survivors, s.dims, masks)
    zeroed: dict[int, Any] = {}
    for name, held in held_tensors(original).items():
        zeroed.setdefault(id(held.tensor), _zeroed(name, held.tensor, edits))  # a plan names a tied tensor once
    off = copy.deepcopy(original, zeroed)
    args, kwargs = map_tensors(lambda tensor: tensor.detach().clone(), as_call(example_inputs))
    # Which experts run, or how often a loop does, may depend on what is switched off.
    replay = Replay(graph.trace, hooks, required=False, error=VerificationError)
    with preserved_random_state(), torch.no_grad(), lent(off, shield, track=False), replay.over(off):
        off.eval()
        return off(*args, **kwargs)


def _zeroed(name: str, tensor: Tensor, edits: Edits) -> Tensor:
    result = tensor.detach().clone()
    for thinning in edits.thinnings:
        if thinning.tensor == name and (result.is_floating_point() or result.is_complex()):
            index = torch.tensor(thinning.removed, device=result.device)
            result.index_fill_(thinning.dim, index, 0)
    return nn.Parameter(result, requires_grad=False) if isinstance(tensor, nn.Parameter) else result


def relative_errors(ours: Any, reference: Any) -> tuple[float, ...]:
    """Largest difference over the largest entry of the reference, for each tensor of two nested outputs.

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
        a, b = a.detach().double(), b.detach().double()
        difference = float((a - b).abs().max())
        scale = float(b.abs().max())
        finite = np.isfinite(difference)
        errors.append(difference / scale if finite and scale else difference if finite else float("inf"))
    return tuple(errors)


def verify(original: nn.Module, slim: nn.Module, plan: Edits, example_inputs: ExampleInputs) -> Report:
    """Compare `slim` with `original` whose removed channels are switched off.

    Half-precision models are compared in float32 copies, models on the ``meta`` device by shape alone. Fake
    quantization is off meanwhile.

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
    original, slim = prunable(original), prunable(slim)
    held = [h.tensor for h in held_tensors(original).values()]
    types = {t.dtype for t in held if t.is_floating_point()} or {torch.float32}
    if any(t.is_meta for t in held):
        example_inputs = _mapped(example_inputs, lambda t: t.to("meta"))
        ours = _kept_outputs(run_once(slim, example_inputs), plan)
        errors = relative_errors(ours, _kept_outputs(run_once(original, example_inputs), plan))
        return Report(0.0, errors, _shapes(ours), 0.0, numbers=False)
    if types & {torch.float16, torch.bfloat16}:
        original, slim = copy.deepcopy(original).float(), copy.deepcopy(slim).float()
        example_inputs = _mapped(example_inputs, lambda t: t.float() if t.is_floating_point() else t)
        types = {torch.float32}
    with fake_quantization_off(original, slim):
        ours = _kept_outputs(run_once(slim, example_inputs), plan)
        errors = relative_errors(ours, _kept_outputs(switched_off(original, plan, example_inputs), plan))
    tolerance = max(TOLERANCE.get(kind, 1e-3) for kind in types)
    return Report(max(errors, default=0.0), errors, _shapes(ours), tolerance)


def _mapped(example_inputs: ExampleInputs, function: Any) -> ExampleInputs:
    return map_tensors(function, example_inputs)


def _kept_outputs(outputs: Any, plan: Edits) -> list[Tensor]:
    """The tensors among `outputs` that keep their shape."""
    named = dict(named_tensors(outputs))
    return [named[name] for name in chosen_names(named, plan.outputs)]


def _shapes(outputs: Any) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(t.shape) for t in tensors_in(outputs))
