"""Masks in the form of ``torch.nn.utils.prune``: read, put on, made permanent."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from structprune.checking import MODEL, instance, require
from structprune.depth.plan import DepthPlan
from structprune.errors import PlanError, SurgeryError
from structprune.planning.plan import Plan
from structprune.surgery.slicing import zero
from structprune.tracing.state import join
from structprune.wrapping import prunable, unwrapped


def hooks_of(module: nn.Module) -> list[torch_prune.BasePruningMethod]:
    """The hooks by which a module's tensors are masked."""
    return [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, torch_prune.BasePruningMethod)]


def masked_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The parameters of a model by name; a masked one under the name and with the zeros that its layer uses."""
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for path, module in model.named_modules():
        hooks = {f"{hook._tensor_name}_orig": hook for hook in hooks_of(module)}
        for key, parameter in module._parameters.items():
            if parameter is None or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            hook = hooks.get(key)
            used = parameter.detach() if hook is None else hook.apply_mask(module).detach()
            tensors[join(path, key if hook is None else hook._tensor_name)] = used
    return tensors


def chosen_tensors(model: nn.Module, names: Iterable[str] | None) -> dict[str, Tensor]:
    """The tensors of these names as `masked_tensors` gives them; of None, all of two dimensions or more.

    Raises:
        PlanError: a name is no parameter of the model.
    """
    tensors = masked_tensors(prunable(model))
    if names is None:
        return {name: tensor for name, tensor in tensors.items() if tensor.dim() > 1}
    wanted = list(names)
    for name in wanted:
        if name not in tensors:
            raise PlanError(f"The model has no parameter {name!r}.")
    return {name: tensors[name] for name in wanted}


def from_plan(plan: Plan, model: nn.Module) -> nn.Module:
    """Mask what a plan removes, in place, so that one can train, look, and cut later.

    Each parameter that makes a removed channel gets a mask of ``torch.nn.utils.prune``; masks that are there already
    are kept and joined. What reads a removed channel is masked as well. `structprune.masks.remove` makes the zeros
    permanent, `structprune.masks.compact` cuts them out.

    Args:
        plan: made for this model.
        model: it is changed.

    Returns:
        The model.

    Raises:
        SurgeryError: the plan does not fit the model, which is then as it was.

    Example:
        >>> import torch, structprune
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> x = torch.randn(1, 4)
        >>> model = structprune.masks.from_plan(structprune.plan(model, x, ratio=0.5), model)
        >>> int(model[0].weight_mask.sum()), structprune.masks.compact(model, x)[0]
        (16, Linear(in_features=4, out_features=4, bias=True))
    """
    if isinstance(plan, DepthPlan):
        raise SurgeryError(
            "The plan removes blocks or branches, which masks on weights cannot express. Apply plan.removal, and mask "
            "what plan.widths removes of the result."
        )
    require(locals(), plan=instance(Plan, "give a structprune.Plan"), model=MODEL)
    inner = prunable(model, inplace=True)
    put_on(inner, masks_of_plan(plan, inner))
    return model


def masks_of_plan(plan: Plan, model: nn.Module) -> dict[str, Tensor]:
    """The mask of each parameter that the plan slices: one where an entry stays."""
    parameters = masked_tensors(model)
    buffers = dict(model.named_buffers())
    masks: dict[str, Tensor] = {}
    for sliced in plan.slices:
        name = sliced.tensor.removesuffix("_orig")
        tensor = parameters.get(name)
        if tensor is None:
            if sliced.tensor in buffers:  # statistics and masks: what is off is off without them
                continue
            raise SurgeryError(f"The plan slices {sliced.tensor!r}, which is no parameter of this model.")
        if sliced.dim >= tensor.dim() or tensor.shape[sliced.dim] != sliced.size:
            raise SurgeryError(
                f"The plan slices dimension {sliced.dim} of {name!r} from {sliced.size} entries, but its shape is "
                f"{list(tensor.shape)}. Make a new plan for this model."
            )
        mask = masks.setdefault(name, torch.ones_like(tensor))
        zero(mask, sliced)
    return masks


def put_on(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Mask parameters by ``torch.nn.utils.prune``, in place; masks that are there already are joined.

    Args:
        model: it is changed.
        masks: by name of the parameter, of its shape; zero where an entry goes.

    Raises:
        PlanError: a name is no parameter of the model, or a mask has another shape; the model is as it was.
    """
    parameters = masked_tensors(model)
    _require_shapes(parameters, masks)
    for name, mask in masks.items():
        path, _, key = name.rpartition(".")
        torch_prune.custom_from_mask(model.get_submodule(path), key, mask.to(parameters[name].device))


def _require_shapes(parameters: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> None:
    for name, mask in masks.items():
        if name not in parameters:
            raise PlanError(f"The model has no parameter {name!r} that could be masked.")
        if mask.shape != parameters[name].shape:
            raise PlanError(
                f"The mask of {name!r} has the shape {list(mask.shape)}, the parameter {list(parameters[name].shape)}."
            )


def require_fitting(model: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, nn.Parameter]:
    """The parameters of a model by name, after checking that masks of these names and shapes can be put on them.

    Raises:
        PlanError: a name is no parameter of the model, is masked already, or has another shape there.
    """
    parameters = dict(model.named_parameters())
    for name in masks:
        if f"{name}_orig" in parameters and name not in parameters:
            raise PlanError(
                f"{name!r} is masked already. Take that mask off first, or make it permanent by "
                "structprune.masks.remove, or give it as default_mask= and attach the joined one."
            )
    _require_shapes(parameters, masks)
    return parameters


def attach(model: nn.Module, masks: Mapping[str, Tensor]) -> Callable[[], None]:
    """Mask parameters by ``torch.nn.utils.prune``, in place, with masks of one byte an entry.

    A parameter that several modules hold is masked in all of them.

    Args:
        model: it is changed.
        masks: bool, by name of the parameter, of its shape; False where an entry goes.

    Returns:
        A function that takes the masks off.

    Raises:
        PlanError: a name is no parameter of the model, is masked already, or has another shape there; the model is as
            it was.
    """
    parameters = require_fitting(model, masks)
    holders: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                holders.setdefault(id(parameter), []).append((module, key))
    attached: list[tuple[nn.Module, str, list[str]]] = []
    for name, mask in masks.items():
        parameter = parameters[name]
        for module, key in holders[id(parameter)]:
            attached.append((module, key, list(module._parameters)))
            torch_prune.custom_from_mask(module, key, mask.to(parameter.device))
            module.register_buffer(f"{key}_mask", mask.to(parameter.device, copy=True))

    def undo() -> None:
        for module, key, order in reversed(attached):
            _take_off(module, key, order)

    return undo


def _take_off(module: nn.Module, key: str, order: list[str]) -> None:
    """Undo the mask of one tensor: the very parameter is back in its place, with all its values."""
    number = next(
        number for number, hook in module._forward_pre_hooks.items() if getattr(hook, "_tensor_name", 0) == key
    )
    del module._forward_pre_hooks[number]
    parameter = module._parameters.pop(f"{key}_orig")
    del module._buffers[f"{key}_mask"]
    delattr(module, key)
    setattr(module, key, parameter)
    for name in order:  # what is put in again goes to the end
        module._parameters[name] = module._parameters.pop(name)


def update(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Give tensors that are masked other masks, in place.

    Raises:
        PlanError: a tensor is not masked, or has another shape.
    """
    held = {
        join(path, hook._tensor_name): (module, hook)
        for path, module in model.named_modules()
        for hook in hooks_of(module)
    }
    wanted: dict[int, Tensor] = {}
    for name, mask in masks.items():
        if name not in held:
            raise PlanError(f"{name!r} is not masked in this model.")
        original = _original(*held[name])
        if original.shape != mask.shape:
            raise PlanError(
                f"The mask of {name!r} has the shape {list(mask.shape)}, the parameter {list(original.shape)}."
            )
        wanted[id(original)] = mask
    for module, hook in held.values():
        mask = wanted.get(id(_original(module, hook)))
        if mask is not None:
            module.get_buffer(f"{hook._tensor_name}_mask").copy_(mask)
            setattr(module, hook._tensor_name, hook.apply_mask(module))


def _original(module: nn.Module, hook: torch_prune.BasePruningMethod) -> nn.Parameter:
    """The parameter behind a masked tensor."""
    return module.get_parameter(f"{hook._tensor_name}_orig")


def remove(model: nn.Module) -> nn.Module:
    """Make the masks of ``torch.nn.utils.prune`` permanent, in place: the zeros stay, the masks go.

    Parameters keep their order, so an optimizer made for a model of the same class fits.

    Args:
        model: masked or not.

    Returns:
        The model.
    """
    require(locals(), model=MODEL)
    for module in unwrapped(model).modules():
        for hook in hooks_of(module):
            name = hook._tensor_name
            order = [name if key == f"{name}_orig" else key for key in module._parameters]
            torch_prune.remove(module, name)
            for key in order:  # what is put in again goes to the end
                module._parameters[key] = module._parameters.pop(key)
    return model
