"""Layers by name: what users call a part of a model."""

from __future__ import annotations

from torch import nn

from structprune.checking import LAYER, require
from structprune.errors import UnknownLayerError
from structprune.tracing.state import modules_of

Layer = str | nn.Module
Dimension = tuple[str, int]  # of a tensor, by its name


def path_of(model: nn.Module, layer: Layer) -> str:
    """The dotted name of a layer, a block or a tensor of `model`.

    Raises:
        PlanError: it is neither a module nor a name.
        UnknownLayerError: the model has none such.
    """
    require(locals(), layer=LAYER)
    modules = dict(modules_of(model))
    if isinstance(layer, nn.Module):
        for path, module in modules.items():
            if module is layer:
                return path
        raise UnknownLayerError(
            f"The {type(layer).__name__} given is not a module of this {type(model).__name__}. Give a module "
            "of the very model that the graph was built for, or its dotted name."
        )
    if layer in modules or layer in dict(model.named_parameters()) or layer in dict(model.named_buffers()):
        return layer
    near = [path for path in modules if path.endswith(layer) or layer.split(".")[-1] in path][:5]
    hint = f" Did you mean {', '.join(map(repr, near))}?" if near else ""
    raise UnknownLayerError(f"{type(model).__name__} has no layer {layer!r}.{hint}")
