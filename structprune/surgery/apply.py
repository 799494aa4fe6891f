"""Applying a plan: either it succeeds whole or the model is what it was."""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.jit import ScriptModule
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from structprune.errors import SurgeryError
from structprune.offloading import held_in_place
from structprune.surgery.edits import AttributeEdit, Edits, Rewritten, install, rewritten_classes
from structprune.surgery.history import record_kept
from structprune.surgery.slicing import smaller_tensors
from structprune.tracing.describe import describe_layers, owner, set_attribute
from structprune.tracing.opaque import copied_module
from structprune.tracing.provenance import SizeInt
from structprune.tracing.state import INTERNAL, Held, collection_paused, held_tensors, is_config, module_finder
from structprune.wrapping import class_names, prunable, rewrapped, unwrapped


def apply(model: nn.Module, plan: Edits, *, inplace: bool) -> nn.Module:
    """Carry out `plan` on a copy of `model`, or on the model itself.

    Args:
        model: the model that the plan was made for, or another of the same shapes; wrapped or not.
        plan: what to remove, repair and rewrite.
        inplace: change `model` itself; its parameters keep their identity, so an optimizer still holds them.

    Raises:
        SurgeryError: the plan does not fit the model, which is then as it was.
        UnsupportedModelError: a model of this kind cannot be pruned.
    """
    _check_numbers(plan)
    with held_in_place(unwrapped(model)) if inplace else nullcontext():
        inner = prunable(model, inplace=inplace)
        with collection_paused():
            slim = _apply(inner, plan, inplace)
    return model if inplace else rewrapped(model, slim)


def _apply(model: nn.Module, plan: Edits, inplace: bool) -> nn.Module:
    tensors = held_tensors(model)
    with torch.no_grad():
        new = smaller_tensors(plan, tensors)
    classes = rewritten_classes(model, plan)
    if inplace:
        _change(model, plan, tensors, new, classes)
        return model
    memo = _memo(tensors, new)
    _copy_scripted(model, memo)
    slim = copy.deepcopy(model, memo)
    _finish(slim, plan, tensors, classes, [])
    return slim


def _memo(tensors: dict[str, Held], new: dict[int, Tensor]) -> dict[int, Any]:
    """For ``deepcopy``: changed tensors come from `new`, so that what is removed is never copied."""
    memo: dict[int, Any] = {}
    for held in tensors.values():
        old = held.tensor
        changed = new.get(id(old))
        if changed is None:
            if not old.is_leaf:  # deepcopy refuses these; a forward makes them anew
                memo[id(old)] = old.detach().clone()
            continue
        if isinstance(old, nn.Parameter):
            changed = nn.Parameter(changed, requires_grad=old.requires_grad)
            vars(changed).update(vars(old))
            if old.grad is not None:
                changed.grad = new[id(old.grad)]
        memo[id(old)] = changed
    return memo


def _copy_scripted(model: nn.Module, memo: dict[int, Any]) -> None:
    """For ``deepcopy``, which would leave no leaves in scripted modules; tensors tied to them stay tied."""
    for module in model.modules():
        if isinstance(module, ScriptModule) and id(module) not in memo:
            made = copied_module(module, lambda tensor: copy.deepcopy(tensor, memo))
            memo.update((id(old), new) for old, new in zip(module.modules(), made.modules(), strict=True))


Classes = dict[str, Rewritten]


def _change(model: nn.Module, plan: Edits, tensors: dict[str, Held], new: dict[int, Tensor], classes: Classes) -> None:
    undo: list[Callable[[], None]] = []
    try:
        done: set[int] = set()
        for held in tensors.values():
            old = held.tensor
            if id(old) in new and id(old) not in done:
                done.add(id(old))
                _swap(old, new, undo)
        _finish(model, plan, tensors, classes, undo)
    except BaseException:  # an interrupt too must leave the model as it was; raised again below
        for step in reversed(undo):
            step()
        raise


def _swap(tensor: Tensor, new: dict[int, Tensor], undo: list[Callable[[], None]]) -> None:
    data, grad = tensor.data, tensor.grad if tensor.is_leaf else None

    def restore() -> None:
        tensor.grad = None
        _set_data(tensor, data)
        tensor.grad = grad

    undo.append(restore)
    if grad is not None:
        tensor.grad = None
    _set_data(tensor, new[id(tensor)])
    if grad is not None:
        tensor.grad = new[id(grad)]


def _set_data(tensor: Tensor, data: Tensor) -> None:
    """Give a tensor other data, in the next backward too.

    While an older graph exists (a loop's last ``loss`` holds one), autograd goes on with the node that gathers this
    parameter's gradient, which knows its old shape. Torch makes a new one only where the dtype changes.
    """
    if tensor.is_leaf and tensor.requires_grad:
        other = torch.float32 if data.dtype == torch.float16 else torch.float16
        tensor.data = torch.empty(0, dtype=other, device=data.device)
    tensor.data = data


def _finish(
    model: nn.Module, plan: Edits, tensors: dict[str, Held], classes: Classes, undo: list[Callable[[], None]]
) -> None:
    """Everything but the tensors: attributes by provenance, descriptions of standard layers, literals, the record."""
    changed = {owner(sliced.tensor.rpartition(".")[0]) for sliced in plan.slices}
    for edit in plan.attribute_edits:
        _set_attribute(model, edit, undo)
    for path, name in plan.caches:
        _empty(model, path, name, undo)
    refresh(model, changed, undo)
    describe_layers(model, changed | {edit.module for edit in plan.attribute_edits}, undo)
    for path, new_class in classes.items():
        install(model.get_submodule(path), new_class, undo)
    record_kept(model, tensors, plan, undo)


def _empty(model: nn.Module, path: str, name: str, undo: list[Callable[[], None]]) -> None:
    """Forget the tensors that a dict of a module holds."""
    try:
        module = model.get_submodule(path)
        held = vars(module)[name]
    except (AttributeError, KeyError) as error:
        raise SurgeryError(f"{path or 'The model'} has no cache {name!r}. Make a new plan for this model.") from error
    # A plan may come from a file: what torch keeps in a module is no cache of a forward.
    if not isinstance(held, dict) or name in INTERNAL:
        raise SurgeryError(f"{name!r} of {path or 'the model'} is no cache. Make a new plan for this model.")
    set_attribute(module, name, {key: value for key, value in held.items() if not isinstance(value, Tensor)}, undo)


def _check_numbers(plan: Edits) -> None:
    """Refuse numbers that count no channels: a plan may come from a file.

    A literal counts channels from the start (8 becomes 5) or from the end (-4 becomes -2), and so comes closer to 0. An
    attribute that follows from others may grow, but to no more than a dimension has. Floats are scales.
    """
    largest = max((sliced.size for sliced in plan.slices), default=0)
    for edit in (*plan.attribute_edits, *plan.literal_edits):
        old = edit.old or 0
        if isinstance(edit, AttributeEdit) and type(edit.old) is float and type(edit.new) is float:
            continue  # no size, but a scale that follows from one
        limit = max(abs(old), largest) if isinstance(edit, AttributeEdit) else abs(old)
        if abs(edit.new) > limit or (edit.new < 0) > (old < 0) or (edit.new > 0) > (old >= 0):
            what = ".".join(map(str, edit.chain)) if isinstance(edit, AttributeEdit) else "a literal"
            raise SurgeryError(
                f"The plan sets {what} of {edit.module or 'the model'} from {edit.old} to {edit.new}, which is no "
                "number of channels. Make a new plan for this model."
            )


def _set_attribute(model: nn.Module, edit: AttributeEdit, undo: list[Callable[[], None]]) -> None:
    what = f"The attribute {'.'.join(map(str, edit.chain))} of {edit.module or 'the model'!r}"
    steps = list(edit.chain)
    try:
        owner: Any = model.get_submodule(edit.module)
        while len(steps) > 1 and isinstance(steps[1], str):
            owner = _held(owner, str(steps.pop(0)))
        name = str(steps[0])
        old = _held(owner, name)
        now = _read(old, steps[1:])
    except (AttributeError, IndexError, TypeError, KeyError) as error:
        raise SurgeryError(f"{what} is not there. Make a new plan for this model.") from error
    # A plan may come from a file: it sets numbers that count channels, and nothing else.
    kinds = (float,) if type(edit.old) is float else (int, SizeInt)
    if not (now is None or type(now) in kinds) or now not in (edit.old, edit.new):
        raise SurgeryError(f"{what} is {now}, where the plan expects {edit.old}. Make a new plan for this model.")
    try:
        set_attribute(owner, name, _replaced(old, steps[1:], edit.new), undo)
    except AttributeError as error:
        raise SurgeryError(f"{what} cannot be set: {error}. Make a new plan for this model.") from error


def _held(owner: Any, name: str) -> Any:
    """An attribute of a module, or of an object of settings that one holds: a plan's numbers are nowhere else.

    Raises:
        AttributeError: there is none, or something else would hold it.
    """
    if name in INTERNAL or not (isinstance(owner, nn.Module) or is_config(owner)):
        raise AttributeError(name)
    return vars(owner)[name] if name in vars(owner) else getattr(owner, name)


def _read(value: Any, steps: list[Any]) -> Any:
    for step in steps:
        if not isinstance(value, (tuple, list)) or hasattr(value, "_fields"):
            raise TypeError("numbers stand in plain tuples and lists")
        value = value[step]
    return value


def _replaced(value: Any, steps: list[Any], new: float) -> Any:
    if not steps:
        return new
    items = list(value)
    items[steps[0]] = _replaced(items[steps[0]], steps[1:], new)
    return type(value)(items)


# -- fake quantization held still, while the functions of two models are compared ------------------------------------

_FAKE = "torch.ao.quantization.fake_quantize.FakeQuantizeBase"


@contextmanager
def fake_quantization_off(*models: nn.Module) -> Generator[None]:
    """While the block runs, modules of fake quantization pass on what they get, and observe nothing.

    They round: the last bit of a sum, which depends on how many terms it has, would become a whole step.
    """
    switches: list[tuple[Tensor, Tensor]] = []
    for model in models:
        for module in model.modules():
            if _FAKE in class_names(module):
                here = (module.get_buffer("fake_quant_enabled"), module.get_buffer("observer_enabled"))
                switches += [(switch, switch.clone()) for switch in here]
    try:
        with torch.no_grad():
            for switch, _ in switches:
                switch.zero_()
        yield
    finally:
        with torch.no_grad():
            for switch, before in switches:
                switch.copy_(before)


# -- tensors that a layer computes from its parameters: kept up to date ----------------------------------------------
# The older `weight_norm` and `spectral_norm`, and ``torch.nn.utils.prune``, compute a layer's weight in a hook before
# each forward and leave the result on the module as a plain attribute; parametrizations compute it whenever it is read.

# Class of a hook -> name of the attribute, and its value without any step of an iteration.
_HOOKS: dict[type, tuple[Callable[[Any], str], Callable[[Any, nn.Module], Any]]] = {
    BasePruningMethod: (lambda hook: hook._tensor_name, lambda hook, module: hook.apply_mask(module)),
    SpectralNorm: (lambda hook: hook.name, lambda hook, module: hook.compute_weight(module, do_power_iteration=False)),
    WeightNorm: (lambda hook: hook.name, lambda hook, module: hook.compute_weight(module)),
}


def refresh(model: nn.Module, paths: Iterable[str], undo: list[Callable[[], None]]) -> None:
    """Compute anew what hooks of the layers at `paths` left on them, from the smaller tensors."""
    find = module_finder(model)
    for path in paths:
        module = find(path)
        for hook in module._forward_pre_hooks.values():
            for kind, (name_of, compute) in _HOOKS.items():
                if isinstance(hook, kind):
                    _set(module, name_of(hook), compute, hook, undo)


def _set(
    module: nn.Module, name: str, compute: Callable[[Any, nn.Module], Any], hook: Any, undo: list[Callable[[], None]]
) -> None:
    old = module.__dict__[name]
    undo.append(lambda: module.__dict__.update({name: old}))
    with torch.no_grad():
        module.__dict__[name] = compute(hook, module)
