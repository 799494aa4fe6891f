"""Weights and inputs that tell channels apart: float64, random, no two entries equal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def floating_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every floating parameter, buffer and plain tensor attribute, by dotted name, tied ones once under each name."""
    found = dict(model.named_parameters(remove_duplicate=False))
    found |= dict(model.named_buffers(remove_duplicate=False))
    for path, module in model.named_modules(remove_duplicate=False):
        for key, value in vars(module).items():
            # What a hook computes anew before each forward is no tensor of its own.
            derived = f"{key}_orig" in module._parameters or f"{key}_v" in module._parameters
            if isinstance(value, Tensor) and not derived:
                found[f"{path}.{key}" if path else key] = value
    return {name: tensor for name, tensor in found.items() if tensor.is_floating_point()}


def jitter(model: nn.Module, seed: int, dtype: torch.dtype = torch.float64, skip: Sequence[Tensor] = ()) -> nn.Module:
    """Give ``model`` distinct random entries of one type everywhere, in place, and set it to evaluation.

    Weights are scaled by their fan-in so that deep networks stay tame. A buffer that is positive stays positive; one
    that holds a pattern (rotary frequencies, a mask, a table) keeps it, each entry scaled by up to 5%. The tensors in
    `skip` are left as they are.
    """
    model.to(dtype).eval()
    for module in model.modules():
        for key, value in vars(module).items():
            if isinstance(value, Tensor) and value.is_floating_point():
                setattr(module, key, value.to(dtype))
    generator = torch.Generator().manual_seed(seed)
    done = {id(tensor) for tensor in skip}
    with torch.no_grad():
        for tensor in floating_tensors(model).values():
            if id(tensor) in done or tensor.numel() == 0:
                continue
            done.add(id(tensor))
            noise = _noise(tensor.shape, generator, dtype)
            if isinstance(tensor, nn.Parameter):
                ones = bool((tensor == 1).all())
                fan_in = max(tensor.numel() // tensor.shape[0], 1) if tensor.ndim > 1 else 8
                tensor.copy_(1 + 0.25 * noise if ones else noise / math.sqrt(fan_in))
            elif bool((tensor == tensor.flatten()[0]).all()):
                tensor.copy_(0.5 + noise.abs() if tensor.flatten()[0] > 0 else 0.5 * noise)
            else:
                tensor.mul_(1 + 0.05 * torch.rand(tensor.shape, generator=generator, dtype=dtype))
    return model


_LARGE = 1 << 16


def _noise(shape: torch.Size, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """Random numbers of unit variance; uniform ones where there are many, as they cost a fifth of normal ones."""
    if shape.numel() < _LARGE:
        return torch.randn(shape, generator=generator, dtype=dtype)
    return torch.empty(shape, dtype=dtype).uniform_(-math.sqrt(3), math.sqrt(3), generator=generator)


def exchanged(model: nn.Module, seed: int, dtype: torch.dtype) -> nn.Module:
    """Give a jittered ``model`` other values everywhere, in place; large parameters trade theirs among themselves."""
    kept = [p for p in model.parameters() if p.numel() >= _LARGE]
    with torch.no_grad():
        for parameter in kept:
            parameter.copy_(parameter.flatten().roll(7919).view_as(parameter))
    return jitter(model, seed, dtype, kept)


def double(inputs: Any, dtype: torch.dtype = torch.float64) -> Any:
    """The same nest of inputs with every floating tensor in float64 or another type, copied."""
    return map_tensors(inputs, lambda t: t.detach().clone().to(dtype) if t.is_floating_point() else t.clone())


def perturbed(inputs: Any, seed: int) -> Any:
    """The same nest of inputs with noise on every floating entry."""
    generator = torch.Generator().manual_seed(seed)

    def move(t: Tensor) -> Tensor:
        if not t.is_floating_point():
            return t.clone()
        return t + 0.3 * torch.randn(t.shape, generator=generator, dtype=t.dtype)

    return map_tensors(inputs, move)


def map_tensors(tree: Any, function: Any) -> Any:
    """The same nest with `function` applied to every tensor."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, Mapping):
        return {key: map_tensors(value, function) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(map_tensors(value, function) for value in tree)
    return tree
