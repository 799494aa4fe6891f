"""Masks in the form of ``torch.nn.utils.prune``: read, put on, made permanent."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from structprune.checking import MODEL, instance, require
from structprune.errors import PlanError, SurgeryError
from structprune.planning.plan import Plan
from structprune.tracing.state import join
from structprune.wrapping import prunable, unwrapped


def hooks_of(module: nn.Module) -> list[torch_prune.BasePruningMethod]:
    """The hooks by which a module's tensors are masked."""
    return [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, torch_prune.BasePruningMethod)]


def masked_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The parameters of a model by name; a masked one under the name and with the zeros that its layer uses."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for path, module in model.named_modules():
        hooks = {f"{hook._tensor_name}_orig": hook for hook in hooks_of(module)}
        for key, parameter in module._parameters.items():
            if parameter is None or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            hook = hooks.get(key)
            used = parameter.detach() if hook is None else hook.apply_mask(module).detach()
            found[join(path, key if hook is None else hook._tensor_name)] = used
    return found


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
    require(locals(), plan=instance(Plan, "give a structprune.Plan"), model=MODEL)
    inner = prunable(model, inplace=True)
    put_on(inner, _masks(plan, inner))
    return model


def _masks(plan: Plan, model: nn.Module) -> dict[str, Tensor]:
    """The mask of each parameter that The plan slices: one where an entry stays."""
    parameters = masked_tensors(model)
    buffers = dict(model.named_buffers())
    found: dict[str, Tensor] = {}
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
        mask = found.setdefault(name, torch.ones_like(tensor))
        mask.index_fill_(sliced.dim, torch.tensor(sliced.removed, device=tensor.device), 0.0)
    return found


def put_on(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Mask parameters by ``torch.nn.utils.prune``, in place; all of them are checked first.

    Args:
        model: it is changed.
        masks: by name of the parameter, of its shape; zero where an entry goes.

    Raises:
        PlanError: a name is no parameter of the model, or a mask has another shape; the model is as it was.
    """
    parameters = masked_tensors(model)
    for name, mask in masks.items():
        if name not in parameters:
            raise PlanError(f"The model has no parameter {name!r} that could be masked.")
        if mask.shape != parameters[name].shape:
            raise PlanError(
                f"The mask of {name!r} has the shape {list(mask.shape)}, the tensor {list(parameters[name].shape)}."
            )
    for name, mask in masks.items():
        path, _, key = name.rpartition(".")
        torch_prune.custom_from_mask(model.get_submodule(path), key, mask.to(parameters[name].device))


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
