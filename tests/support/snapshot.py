"""What a model is, bit for bit, to show that it was left as it was."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def _plain(value: Any) -> Any:
    """A comparable form of an attribute; objects that are not values are compared by identity."""
    if isinstance(value, bool | int | float | str | type(None)):
        return (type(value), value)
    if isinstance(value, tuple | list):
        return (type(value), [_plain(item) for item in value])
    if isinstance(value, dict):
        return (type(value), [(key, _plain(item)) for key, item in value.items()])
    if isinstance(value, Tensor):
        return ("tensor", id(value))
    return (type(value), id(value))


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Every tensor's identity, bits, dtype, device and ``requires_grad``, and every attribute of every module."""
    found: dict[str, Any] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for key, value in vars(module).items():
            found[f"{path}.{key}"] = _plain(value)
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in tensors:
        bits = None if tensor.is_meta else tensor.detach().clone()
        gradient = None if tensor.grad is None else tensor.grad.clone()
        found[name] = (id(tensor), tensor.dtype, tensor.device, tensor.requires_grad, tensor.shape, bits, gradient)
    found["random state"] = torch.get_rng_state()
    found["grad mode"] = (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
    found["default dtype"] = torch.get_default_dtype()
    return found


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, tuple | list) and isinstance(b, tuple | list):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and a == b


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Names of what is no longer as it was."""
    return [
        name
        for name in before | after
        if name not in before or name not in after or not _same(before[name], after[name])
    ]


def assert_untouched(model: nn.Module, before: dict[str, Any]) -> None:
    """Assert that ``model`` and the surroundings are bit for bit what they were."""
    changed = differences(before, snapshot(model))
    assert not changed, f"changed: {changed}"
