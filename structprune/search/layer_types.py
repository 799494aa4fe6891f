"""Linear layers and convolutions: which are named, and layers that are held and computed in another type."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from structprune.errors import PlanError, UnknownLayerError

# Of these classes and no others: a class derived from one may use its weight in a way of its own.
LAYERS = (
    nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip


def names_layer(name: str, path: str) -> bool:
    """Whether a name or pattern means the layer of this path, or a block that it is in."""
    steps = path.split(".")
    return any(fnmatchcase(".".join(steps[:end]), name) for end in range(1, len(steps) + 1))


def is_chosen(path: str, layers: Iterable[str], ignore: Iterable[str]) -> bool:
    """Whether a layer is among those named, if any are, and not among those left out."""
    wanted = tuple(layers)
    named = not wanted or any(names_layer(name, path) for name in wanted)
    return named and not any(names_layer(name, path) for name in ignore)


def require_matches(model: nn.Module, layers: Iterable[str], ignore: Iterable[str]) -> None:
    """Check that each name or pattern matches something.

    Raises:
        UnknownLayerError: one matches no module of the model.
    """
    paths = [path for path, _ in model.named_modules() if path]
    for argument, names in (("layers", layers), ("ignore", ignore)):
        for name in names:
            if not any(fnmatchcase(path, name) for path in paths):
                raise UnknownLayerError(f"{argument} names {name!r}, which matches no layer or block of the model.")


def chosen_layers(model: nn.Module, layers: Iterable[str], ignore: Iterable[str]) -> dict[str, nn.Module]:
    """The linear layers and convolutions that are named and not left out, by path.

    Raises:
        UnknownLayerError: a name matches no module of the model.
        PlanError: there are none.
    """
    layers, ignore = tuple(layers), tuple(ignore)
    require_matches(model, layers, ignore)
    chosen = {
        path: module
        for path, module in model.named_modules()
        # A computed weight is no parameter of its layer.
        if type(module) in LAYERS and "weight" in module._parameters and (not path or is_chosen(path, layers, ignore))
    }
    if not chosen:
        raise PlanError("layers and ignore leave no linear layer and no convolution to compress.")
    return chosen


# -- layers in another type --------------------------------------------------------------------------------------------


class _Rounded:
    """Before the forward of a layer: what goes in, in the layer's type."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __call__(self, _module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(arg.to(self.dtype) if isinstance(arg, Tensor) else arg for arg in args)


class _Widened:
    """After the forward of a layer: what comes out, in the type that the layer had."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __call__(self, _module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> Tensor:
        return output.to(self.dtype)


def cast_layers(model: nn.Module, paths: Iterable[str], dtype: torch.dtype) -> nn.Module:
    """Hold layers in another type and compute them in it, in place; what goes in and comes out keeps its type."""
    for path in paths:
        layer = model.get_submodule(path)
        before = layer.get_parameter("weight").dtype
        layer.to(dtype)
        layer.register_forward_pre_hook(_Rounded(dtype))
        layer.register_forward_hook(_Widened(before))
    return model


def restored_layers(model: nn.Module) -> nn.Module:
    """Give layers that `cast_layers` changed the type that they had, in place."""
    for module in model.modules():
        after = {number: hook for number, hook in module._forward_hooks.items() if isinstance(hook, _Widened)}
        for number in reversed(after):
            module.to(after[number].dtype)
            del module._forward_hooks[number]
        for number in [number for number, hook in module._forward_pre_hooks.items() if isinstance(hook, _Rounded)]:
            del module._forward_pre_hooks[number]
    return model
