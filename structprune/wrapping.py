"""Models that are already wrapped or converted: what is pruned through the wrapper, and what is refused by name.

A wrapper (``torch.compile``, DataParallel, DistributedDataParallel, an average of weights) holds the model as its only
child. Analysis and surgery work on that model, under its own layer names; the result gets a wrapper of the same kind.
Of a model whose weights hooks of accelerate keep elsewhere they work on a double (`structprune.offloading`).
Classes are known by their full names, so that nothing has to be imported to recognise them.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from structprune.errors import UnsupportedModelError
from structprune.offloading import at_hand, hooked, is_placed

_COMPILED = "torch._dynamo.eval_frame.OptimizedModule"
_DISTRIBUTED = "torch.nn.parallel.distributed.DistributedDataParallel"

# Wrapper class -> the name under which it holds the model.
WRAPPERS: dict[str, str] = {
    _COMPILED: "_orig_mod",
    _DISTRIBUTED: "module",
    "torch.nn.parallel.data_parallel.DataParallel": "module",
    "torch.optim.swa_utils.AveragedModel": "module",
    "timm.utils.model_ema.ModelEma": "ema",
    "timm.utils.model_ema.ModelEmaV2": "module",
    "timm.utils.model_ema.ModelEmaV3": "module",
}

_SHARDED = "its parameters are spread over processes; prune the model before it is sharded, and shard the result"
_PACKED = "its weights are packed; prune the model in floating point first, then quantize the result"
_OFFLOADED = (
    "hooks of accelerate keep its weights elsewhere, so that it cannot be changed in place here; take the hooks off "
    "with accelerate.hooks.remove_hook_from_submodules(model), or use structprune.prune or Plan.apply"
)

REFUSED: dict[str, str] = {
    "torch.distributed.fsdp.fully_sharded_data_parallel.FullyShardedDataParallel": _SHARDED,
    "torch.distributed.fsdp.FSDPModule": _SHARDED,
    "torch.jit._script.ScriptModule": "its forward is compiled TorchScript; prune the nn.Module that it was made from",
    "torch._export.exported_program.ExportedProgram": "prune the nn.Module that it was exported from",
}
REFUSED_PACKAGES: dict[str, str] = dict.fromkeys(
    (
        "torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized", "torch.ao.nn.sparse.quantized", "bitsandbytes",
        "auto_gptq", "gptqmodel", "awq", "hqq", "optimum.quanto",
    ),
    _PACKED,
)  # fmt: skip
# They sit among the quantized modules, but compute in floating point.
_FLOATING = frozenset({"FloatFunctional", "FXFloatFunctional"})


def class_names(module: object) -> Iterator[str]:
    """Full names of the classes that `module` is an instance of."""
    return (f"{kind.__module__}.{kind.__qualname__}" for kind in type(module).__mro__)


def _holds_under(module: object) -> str | None:
    """The name under which a wrapper holds its model, or None if `module` is no wrapper."""
    return next((WRAPPERS[name] for name in class_names(module) if name in WRAPPERS), None)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside all wrappers; itself if there is none.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> unwrapped(nn.DataParallel(model)) is model
        True
    """
    while (name := _holds_under(model)) is not None:
        model = getattr(model, name)
    return model


def prunable(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """The model inside all wrappers, after checking that it is of a kind that can be pruned.

    Of one whose weights hooks of accelerate keep elsewhere, a double that holds them.

    Args:
        model: any ``nn.Module``, wrapped or not.
        inplace: whether the model itself is to be changed.

    Raises:
        UnsupportedModelError: it is sharded, scripted, packed or not initialised; the message says what to do.
    """
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(f"model is a {type(model).__name__}; give an nn.Module.")
    if inplace:
        for path, module in model.named_modules():
            if _DISTRIBUTED in class_names(module):
                raise _refusal(
                    module,
                    path,
                    "its reducer holds buckets for gradients of the old sizes; prune without inplace (the result is a "
                    "new DistributedDataParallel), or prune its .module in place and wrap that again",
                )
    inner = unwrapped(model)
    kinds: dict[type, str | None] = {}
    for path, module in inner.named_modules():
        if path and isinstance(module, torch.jit.ScriptModule):
            continue  # one in a model is taken as a whole
        kind = type(module)
        if kind not in kinds:
            kinds[kind] = _reason_of_kind(module)
        reason = kinds[kind] or _reason_of_tensors(module)
        if reason is not None:
            raise _refusal(module, path, reason)
    if inplace and is_placed(inner):
        raise _refusal(inner, "", _OFFLOADED)
    return at_hand(inner)


def _refusal(module: nn.Module, path: str, reason: str) -> UnsupportedModelError:
    where = f"{path!r}, a {type(module).__name__}," if path else f"This {type(module).__name__}"
    return UnsupportedModelError(f"{where} cannot be pruned: {reason}.")


def _reason_of_kind(module: nn.Module) -> str | None:
    """Why modules of this class cannot be pruned, if they can't."""
    for name in class_names(module):
        if name in REFUSED:
            return REFUSED[name]
        for package, reason in REFUSED_PACKAGES.items():
            if name.startswith(f"{package}.") and type(module).__name__ not in _FLOATING:
                return reason
    return None


def _reason_of_tensors(module: nn.Module) -> str | None:
    """Why the tensors that a module itself holds cannot be sliced, if they can't."""
    for store in (module._parameters, module._buffers):
        for name, tensor in store.items():
            if tensor is not None and (reason := _reason_of_tensor(name, tensor)) is not None:
                return reason
    return None


def _reason_of_tensor(name: str, tensor: Tensor) -> str | None:
    if type(tensor) in (nn.Parameter, Tensor) and tensor.layout is torch.strided and not tensor.is_quantized:
        return None
    if is_lazy(tensor):
        return f"its {name} has no shape yet; run the model once on example inputs first"
    if type(tensor) is not nn.Parameter and is_traceable_wrapper_subclass(tensor):
        kind = type(tensor).__name__
        return f"its {name} is a {kind}: {_SHARDED if kind == 'DTensor' else _PACKED}"
    if tensor.is_quantized or tensor.layout is not torch.strided:
        kind = tensor.dtype if tensor.is_quantized else tensor.layout
        return f"its {name} is of {kind}: {_PACKED}"
    return None


def rewrapped(wrapper: nn.Module, inner: nn.Module) -> nn.Module:
    """`inner` in wrappers of the kinds and with the options of those around ``unwrapped(wrapper)``, hooks included.

    A compiled model is compiled again on its first call. A new DistributedDataParallel is a collective call: every
    process must make it, and it raises where the processes did not prune alike.
    """
    held = _holds_under(wrapper)
    if held is None:
        return hooked(inner) if is_placed(wrapper) else inner
    inner = rewrapped(getattr(wrapper, held), inner)
    names = set(class_names(wrapper))
    if _COMPILED in names:
        compiled: Any = wrapper
        return compiled.dynamo_ctx(inner)
    if _DISTRIBUTED in names:
        return _distributed(wrapper, inner)
    result = wrapper.__class__.__new__(wrapper.__class__)
    vars(result).update({key: _copied(value) for key, value in vars(wrapper).items()})
    result._buffers = {key: copy.deepcopy(value) for key, value in wrapper._buffers.items()}
    setattr(result, held, inner)
    return result


def _copied(value: Any) -> Any:
    """A wrapper's attribute for another wrapper: containers and generators are its own, the rest is shared."""
    if isinstance(value, torch.Generator):
        return value.clone_state()
    return copy.copy(value) if isinstance(value, (dict, list, set)) else value


def _distributed(wrapper: Any, inner: nn.Module) -> nn.Module:
    """A new DistributedDataParallel with the options of another."""
    # Buffers that each process keeps for itself must not be overwritten when the new one starts. Releases that
    # deprecate this option have no other for it yet.
    buffers = {} if wrapper.broadcast_buffers else {"broadcast_buffers": False}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*broadcast_buffers.* is deprecated", FutureWarning)
        return _with_options(wrapper, inner, buffers)


def _with_options(wrapper: Any, inner: nn.Module, buffers: dict[str, bool]) -> nn.Module:
    made: Any = type(wrapper)(
        inner,
        **buffers,
        device_ids=wrapper.device_ids,
        output_device=wrapper.output_device,
        dim=wrapper.dim,
        process_group=wrapper.process_group,
        bucket_cap_mb=None if wrapper.bucket_bytes_cap_default else wrapper.bucket_bytes_cap / 2**20,
        find_unused_parameters=wrapper.find_unused_parameters,
        gradient_as_bucket_view=wrapper.gradient_as_bucket_view,
        static_graph=wrapper.static_graph,
        mixed_precision=wrapper.mixed_precision,
    )
    for hook, state in wrapper._comm_hooks:
        made.register_comm_hook(state, hook)
    made.training = wrapper.training  # of the wrapper alone: the layers inside have modes of their own
    return made
