"""Tensors that a layer computes from its parameters: kept up to date.

The older `weight_norm` and `spectral_norm`, and ``torch.nn.utils.prune``, compute a layer's weight in a hook before
each forward and leave the result on the module as a plain attribute; parametrizations compute it whenever it is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from structprune.tracing.state import module_finder

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
