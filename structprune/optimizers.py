"""`remap_optimizer`: an optimizer goes on with the state of the channels kept."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from structprune.checking import MODEL, OPTIMIZER, Check, require, shown
from structprune.errors import SurgeryError
from structprune.surgery.edits import Edits, RemovedSlice, Rescale, SectionedSlice
from structprune.surgery.slicing import kept, take, taken
from structprune.tracing.containers import leaves_of
from structprune.tracing.state import held_tensors
from structprune.wrapping import unwrapped

O = TypeVar("O", bound=Optimizer)  # noqa: E741, O as in Optimizer

# A weight times f has a gradient divided by f: the power of the gradient's unit in which a state entry is measured.
_GRADIENT_POWER = {
    "momentum_buffer": 1, "exp_avg": 1, "exp_inf": 1, "grad_avg": 1, "prev": 1, "exp_avg_diff": 1, "momentum": 1,
    "exp_avg_sq": 2, "max_exp_avg_sq": 2, "square_avg": 2, "sum": 2, "variance": 2, "row_var": 2, "col_var": 2,
    "exp_avg_sq_row": 2, "exp_avg_sq_col": 2, "acc_delta": -2, "ax": -1, "z": -1, "step_size": -1,
    "lookahead_slow_buff": -1,
}  # fmt: skip
# Optimizers whose row and column statistics are known: the dimension, from the back, that each averages over, and
# whether it stays as one of size 1. Those that choose the dimensions by their sizes, as timm's do, would choose others
# for the smaller parameter.
_FACTORED = {
    "torch.optim.Adafactor": {"row_var": (1, True), "col_var": (2, True)},
    "transformers.optimization.Adafactor": {"exp_avg_sq_row": (1, False), "exp_avg_sq_col": (2, False)},
}


class Renaming(Protocol):
    """What was done to a model if it was something else than slicing tensors."""

    @property
    def names(self) -> Mapping[str, str | None]:
        """The new name of each tensor that has another one now; None if it went."""
        ...

    @property
    def slices(self) -> tuple[RemovedSlice, ...]:
        """What was removed: nothing."""
        ...

    @property
    def rescales(self) -> tuple[Rescale, ...]:
        """What was scaled: nothing."""
        ...


@dataclass(slots=True)
class _Change:
    """What the plan did to one parameter."""

    name: str
    old: Tensor
    new: Tensor | None  # None for one that went with a branch
    shape: tuple[int, ...]
    slices: list[RemovedSlice] = field(default_factory=list)
    rescales: list[Rescale] = field(default_factory=list)


def remap_optimizer(
    optimizer: O, plan: Edits | Renaming, model: nn.Module | None = None, slim: nn.Module | None = None
) -> O:
    """Let `optimizer` go on with the pruned model, keeping momentum and moving averages of what is kept.

    The optimizer is changed in place, and returned: schedulers, hooks and gradient scalers that hold it keep working.
    Each state tensor of its parameter's shape is sliced like the parameter, steps and other single numbers stay, and
    groups keep their options and order. Parameters that the plan does not touch keep their state as it is; those that
    are in no model of the call stay what they are. Where a plan scales weights, so that a changed head size leaves the
    function as it was, their gradients' statistics are scaled along. Factored second moments (Adafactor) keep the rows
    and columns that are left, each the average that it was; later steps average over the channels kept.

    After ``slim = plan.apply(model)`` the parameters are new ones::

        slim = plan.apply(model)
        structprune.remap_optimizer(optimizer, plan, model, slim)

    In place they stay the same objects::

        plan.apply(model, inplace=True)
        structprune.remap_optimizer(optimizer, plan, model)

    Args:
        optimizer: any ``torch.optim.Optimizer`` over parameters of `model`.
        plan: the plan that was applied, or the `structprune.Removal` of branches; after one in place, parameters that
            are gone stay in the optimizer, without gradients.
        model: the model that the optimizer was made for, wrapped or not. It may be left out after pruning in place if
            the optimizer was made from ``named_parameters()``.
        slim: what ``plan.apply(model)`` returned; None if the model was pruned in place.

    Raises:
        SurgeryError: the optimizer keeps state that cannot be told apart by channel (LBFGS, Shampoo, sharded
            optimizers), or does not fit model and plan. It is then as it was.

    Example:
        >>> import torch, structprune
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> optimizer = torch.optim.Adam(model.parameters())
        >>> model(torch.randn(3, 4)).sum().backward()
        >>> optimizer.step()
        >>> plan = structprune.plan(model, torch.randn(1, 4), ratio=0.5)
        >>> slim = plan.apply(model)
        >>> optimizer = structprune.remap_optimizer(optimizer, plan, model, slim)
        >>> optimizer.state[slim[0].weight]["exp_avg"].shape
        torch.Size([4, 4])
    """
    removed = Check(lambda value: isinstance(value, Edits) or hasattr(value, "names"), "give the plan that was applied")
    models = {"model": MODEL.or_none, "slim": MODEL.or_none}
    require(locals(), SurgeryError, plan=removed, **models)
    if not hasattr(optimizer, "param_groups") or isinstance(optimizer, type):
        raise SurgeryError(f"optimizer is {shown(optimizer)}; {OPTIMIZER.allowed}.")
    used = _innermost(optimizer)
    _check_kind(used)
    inplace = slim is None or slim is model
    names: Mapping[str, str | None] = getattr(plan, "names", {})
    changes = _changes(plan, *_models(used, model, slim), inplace, names)
    if not changes:
        return optimizer
    mine = {id(p) for group in used.param_groups for p in group["params"]}
    if mine.isdisjoint(changes):
        raise SurgeryError(
            "None of the optimizer's parameters belongs to this model. Give the model that the optimizer was made for, "
            "then the one that plan.apply returned."
        )
    state: dict[Any, Any] = used.state
    factored = _FACTORED.get(f"{type(used).__module__}.{type(used).__qualname__}", {})
    with torch.no_grad():
        sliced = {
            parameter: _sliced_state(changes[id(parameter)], entries, factored)
            for parameter, entries in state.items()
            if isinstance(parameter, Tensor) and id(parameter) in changes
        }
    for parameter, entries in sliced.items():
        del state[parameter]
        if (new := changes[id(parameter)].new) is not None:
            state[new] = entries
    for group in used.param_groups:
        _regroup(group, changes, names)
    return optimizer


def _regroup(group: dict[str, Any], changes: Mapping[int, _Change], names: Mapping[str, str | None]) -> None:
    """Put the new parameters into a group, in place: LBFGS and wrappers of optimizers hold the very list."""
    kept = [changes[id(p)].new if id(p) in changes else p for p in group["params"]]
    if "param_names" in group:
        named = zip(group["param_names"], kept, strict=True)
        group["param_names"][:] = [names.get(name) or name for name, p in named if p is not None]
    group["params"][:] = [p for p in kept if p is not None]


def _innermost(optimizer: Optimizer) -> Optimizer:
    """The optimizer that keeps the state: timm's Lookahead and accelerate's wrapper hold it."""
    for name in ("_base_optimizer", "optimizer"):
        inner = getattr(optimizer, name, None)
        if isinstance(inner, Optimizer):
            return _innermost(inner)
    return optimizer


def _check_kind(optimizer: Optimizer) -> None:
    names = {kind.__name__ for kind in type(optimizer).__mro__}
    if "ZeroRedundancyOptimizer" in names:
        raise SurgeryError(
            "ZeroRedundancyOptimizer spreads its state over processes, so it cannot be remapped here. Make a new one "
            "for the pruned model."
        )
    if "LBFGS" in names and optimizer.state:
        raise SurgeryError(
            "LBFGS keeps flat histories of steps in the space of all weights, which mean nothing in the smaller space. "
            "Make a new LBFGS for the pruned model."
        )


Tensors = dict[str, Tensor]


def _tensors(model: nn.Module) -> Tensors:
    return {name: held.tensor for name, held in held_tensors(unwrapped(model)).items()}


def _models(optimizer: Optimizer, model: nn.Module | None, slim: nn.Module | None) -> tuple[Tensors, Tensors]:
    """Tensors by name before and after; the same ones if the model was pruned in place."""
    if model is not None:
        return _tensors(model), _tensors(model if slim is None else slim)
    if slim is not None:
        raise SurgeryError("remap_optimizer was given the pruned model alone; give the original one before it.")
    named: Tensors = {}
    for group in optimizer.param_groups:
        names: Iterable[str] | None = group.get("param_names")
        if names is None:
            raise SurgeryError(
                "The optimizer does not know its parameters' names. Give the model: remap_optimizer(optimizer, plan, "
                "model), or make the optimizer from model.named_parameters()."
            )
        named |= dict(zip(names, group["params"], strict=True))
    return named, named


def _changes(
    plan: Edits | Renaming, old: Tensors, new: Tensors, inplace: bool, names: Mapping[str, str | None]
) -> dict[int, _Change]:
    """What became of each parameter, by the ``id`` of the old one."""
    changes: dict[int, _Change] = {}
    for name, tensor in old.items():
        now = name if inplace else names.get(name, name)
        if now is None:
            changes.setdefault(id(tensor), _Change(name, tensor, None, tuple(tensor.shape)))
            continue
        if now not in new:
            raise SurgeryError(f"slim has no tensor {name!r}. Give the model that plan.apply returned.")
        changes.setdefault(id(tensor), _Change(name, tensor, new[now], tuple(tensor.shape)))
    # A plan that removes branches first names what it slices as it is called without them.
    before = {} if inplace else {now: name for name, now in names.items() if now is not None}
    for sliced in plan.slices:
        if (tensor := old.get(before.get(sliced.tensor, sliced.tensor))) is not None:
            changes[id(tensor)].slices.append(sliced)
    for rescale in plan.rescales:
        if not isinstance(rescale, Rescale):
            continue
        if (tensor := old.get(before.get(rescale.tensor, rescale.tensor))) is not None:
            changes[id(tensor)].rescales.append(rescale)
    for change in changes.values():
        _check_shapes(change, inplace)
    return changes


def _check_shapes(change: _Change, inplace: bool) -> None:
    """The plan fits both; `change.shape` becomes the shape before."""
    if change.new is None:
        return
    before, after = list(change.old.shape), list(change.old.shape)
    for sliced in change.slices:
        before[sliced.dim], after[sliced.dim] = sliced.size, sliced.size - len(sliced.removed)
    old = after if inplace else before
    if list(change.old.shape) != old or list(change.new.shape) != after:
        raise SurgeryError(
            f"The plan takes {change.name!r} from {before} to {after}, but it has the shape {list(change.old.shape)} "
            f"in the model given and {list(change.new.shape)} in the pruned one. Give the plan, and the models "
            "before and after it; after pruning in place, the model alone."
        )
    change.shape = tuple(before)


# -- one parameter's state ---------------------------------------------------------------------------------------------


Factored = dict[str, tuple[int, bool]]


def _sliced_state(change: _Change, entries: dict[str, Any], factored: Factored) -> dict[str, Any]:
    if not (change.slices or change.rescales):
        return entries
    return {name: _sliced(change, str(name), value, factored) for name, value in entries.items()}


def _sliced(change: _Change, name: str, value: Any, factored: Factored) -> Any:
    """One entry of the state of one parameter."""
    if not isinstance(value, Tensor):
        if any(True for _ in leaves_of(value, Tensor)):
            raise _unknown(change, name, f"a {type(value).__name__} of tensors")
        return value
    # Dimension of the parameter -> where the value has it.
    places = {dim: dim for dim in range(len(change.shape))}
    sizes = list(change.shape)
    if name in factored and len(sizes) > 1:
        back, stays = factored[name]
        gone = len(sizes) - back
        sizes[gone : gone + 1] = [1] if stays else []
        places = {dim: dim - (dim > gone and not stays) for dim in places if dim != gone}
    elif value.numel() == 1:
        return value
    if list(value.shape) != sizes:
        raise _unknown(change, name, f"a tensor of shape {list(value.shape)}")
    result = _thinned(change, name, value, places)
    if result is not value:
        result = result.clone(memory_format=torch.contiguous_format)
    for rescale in change.rescales:
        result = _rescaled(result, change, places, rescale, rescale.factor ** -_GRADIENT_POWER.get(name, 0))
    return result


def _thinned(change: _Change, name: str, value: Tensor, places: dict[int, int]) -> Tensor:
    """What stays of an entry that has the dimensions of its parameter at `places`."""
    if len(places) == len(change.shape):
        return taken(value, change.slices)
    if any(isinstance(sliced, SectionedSlice) for sliced in change.slices):
        raise _unknown(change, name, "averages over dimensions of which each group lost other entries")
    for sliced in change.slices:
        if sliced.dim in places:
            value = take(value, places[sliced.dim], kept(sliced))
    return value


def _rescaled(value: Tensor, change: _Change, places: dict[int, int], rescale: Rescale, factor: float) -> Tensor:
    """`value` with the statistics of rescaled weights in their new unit; an average over them stays as it is."""
    if rescale.positions is None:
        return value * factor
    if rescale.dim not in places:
        return value
    left = next((kept(t) for t in change.slices if t.dim == rescale.dim), np.arange(change.shape[rescale.dim]))
    factors = torch.from_numpy(np.where(np.isin(left, rescale.positions), factor, 1.0))
    at = places[rescale.dim]
    return value * factors.to(value.device, value.dtype).view([-1 if dim == at else 1 for dim in range(value.dim())])


def _unknown(change: _Change, name: str, what: str) -> SurgeryError:
    assert change.new is not None
    again = " (Was the optimizer remapped before?)" if what.endswith(str(list(change.new.shape))) else ""
    return SurgeryError(
        f"The optimizer keeps {name!r} of {change.name!r} as {what}, where the parameter had the shape "
        f"{list(change.shape)}, so which of it belongs to the channels that went is not known{again}. Make a new "
        "optimizer for the pruned model."
    )
