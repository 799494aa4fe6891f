"""The attributes by which standard layers describe their own shape: a table, no code for each layer."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager, nullcontext
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from structprune.tracing.state import module_finder

PARAMETRIZATIONS = "parametrizations"


def _first(*names: str) -> Callable[[Any], Any]:
    """The first of these tensors that the module has."""

    def find(module: Any) -> Any:
        return next((t for t in (getattr(module, name, None) for name in names) if t is not None), None)

    return find


_weight = _first("weight")
_norm = _first("weight", "running_mean")

# The tensor that shows a layer's shape; attribute -> what it must be.
Description = tuple[Callable[[Any], Any], dict[str, Callable[[Any, Any], Any]]]
DESCRIPTIONS: dict[type[nn.Module], Description] = {
    nn.Linear: (_weight, {"out_features": lambda m, w: w.shape[0], "in_features": lambda m, w: w.shape[1]}),
    nn.Bilinear: (
        _weight,
        {
            "out_features": lambda m, w: w.shape[0],
            "in1_features": lambda m, w: w.shape[1],
            "in2_features": lambda m, w: w.shape[2],
        },
    ),
    nn.modules.conv._ConvTransposeNd: (
        _weight,
        {"in_channels": lambda m, w: w.shape[0], "out_channels": lambda m, w: w.shape[1] * m.groups},
    ),
    nn.modules.conv._ConvNd: (
        _weight,
        {"out_channels": lambda m, w: w.shape[0], "in_channels": lambda m, w: w.shape[1] * m.groups},
    ),
    nn.modules.batchnorm._NormBase: (_norm, {"num_features": lambda m, w: w.shape[0]}),
    nn.GroupNorm: (_weight, {"num_channels": lambda m, w: w.shape[0]}),
    nn.LayerNorm: (_weight, {"normalized_shape": lambda m, w: tuple(w.shape)}),
    nn.RMSNorm: (_weight, {"normalized_shape": lambda m, w: tuple(w.shape)}),
    nn.Embedding: (_weight, {"num_embeddings": lambda m, w: w.shape[0], "embedding_dim": lambda m, w: w.shape[1]}),
    nn.EmbeddingBag: (_weight, {"num_embeddings": lambda m, w: w.shape[0], "embedding_dim": lambda m, w: w.shape[1]}),
    nn.PReLU: (_weight, {"num_parameters": lambda m, w: w.shape[0]}),
    nn.RNNBase: (
        _first("weight_ih_l0"),
        {
            "input_size": lambda m, w: w.shape[1],
            "hidden_size": lambda m, w: w.shape[0] // _GATES[m.mode],
            "proj_size": lambda m, w: m.weight_hr_l0.shape[0] if m.proj_size else 0,
        },
    ),
    nn.RNNCellBase: (
        _first("weight_ih"),
        {"input_size": lambda m, w: w.shape[1], "hidden_size": lambda m, w: m.weight_hh.shape[1]},
    ),
    nn.MultiheadAttention: (
        _first("in_proj_weight", "q_proj_weight"),
        {
            "embed_dim": lambda m, w: w.shape[1],
            "kdim": lambda m, w: w.shape[1] if m._qkv_same_embed_dim else m.k_proj_weight.shape[1],
            "vdim": lambda m, w: w.shape[1] if m._qkv_same_embed_dim else m.v_proj_weight.shape[1],
            "head_dim": lambda m, w: w.shape[1] // m.num_heads,
        },
    ),
}
_GATES = {"LSTM": 4, "GRU": 3, "RNN_TANH": 1, "RNN_RELU": 1}


def set_attribute(owner: Any, name: str, value: Any, undo: list[Callable[[], None]]) -> None:
    """Set an attribute, and note how to take that back."""
    old = getattr(owner, name)
    setattr(owner, name, value)
    undo.append(lambda: setattr(owner, name, old))


def describe_layers(model: nn.Module, paths: Iterable[str], undo: list[Callable[[], None]]) -> None:
    """Make the standard layers at `paths` describe the shapes that their tensors have now."""
    find = module_finder(model)
    for path in sorted(paths):
        module = find(path)
        known = _description(type(module))
        if known is not None:
            with resting(module) if PARAMETRIZATIONS in module._modules else nullcontext():
                _describe(module, *known, undo)


@cache
def _description(layer: type[nn.Module]) -> Description | None:
    return next((entry for kind, entry in DESCRIPTIONS.items() if issubclass(layer, kind)), None)


def _describe(
    module: nn.Module,
    tensor: Callable[[Any], Any],
    attributes: dict[str, Callable[[Any, Any], Any]],
    undo: list[Callable[[], None]],
) -> None:
    described = tensor(module)
    if described is None:
        return
    for name, shape in attributes.items():
        value = shape(module, described)
        if getattr(module, name) != value:
            set_attribute(module, name, value, undo)


def described_dim(module: nn.Module, chain: tuple[str | int, ...]) -> tuple[str, int] | None:
    """The tensor of `module` and the dimension of it whose size the attribute at `chain` is; None if it is no such.

    Example:
        >>> described_dim(nn.Linear(2, 3), ("in_features",))
        ('weight', 1)
    """
    known = _description(type(module))
    shape = None if known is None else known[1].get(str(chain[0]))
    if known is None or shape is None:
        return None
    tensor = known[0](module)
    name = next((key for key, held in module.named_parameters(recurse=False) if held is tensor), None)
    name = name or next((key for key, held in module.named_buffers(recurse=False) if held is tensor), None)
    if name is None:
        return None
    # Dimensions stand in for sizes, so that the one that the attribute is made of shows.
    marks = tuple(_Mark(size, dim) for dim, size in enumerate(tensor.shape))
    value = shape(module, SimpleNamespace(shape=marks))
    for step in chain[1:]:
        value = value[step]
    return (name, value.dim) if isinstance(value, _Mark) else None


class _Mark(int):
    """A size that knows its dimension, and still does once it is multiplied by 1."""

    dim: int

    def __new__(cls, size: int, dim: int) -> _Mark:
        mark = int.__new__(cls, size)
        mark.dim = dim
        return mark

    def __mul__(self, other: int) -> int:
        return self if other == 1 else int(self) * other

    def __floordiv__(self, other: int) -> int:
        return self if other == 1 else int(self) // other


def owner(path: str) -> str:
    """The path of the layer that a module of its parametrizations belongs to; other paths are their own.

    Example:
        >>> owner("block.conv.parametrizations.weight.0"), owner("block.conv")
        ('block.conv', 'block.conv')
    """
    steps = path.split(".")
    return ".".join(steps[: steps.index(PARAMETRIZATIONS)]) if PARAMETRIZATIONS in steps else path


@contextmanager
def resting(module: nn.Module) -> Generator[None]:
    """While the block runs, reading a parametrized tensor makes no step of its iteration (spectral norm's)."""
    parts = list(getattr(module, PARAMETRIZATIONS, nn.ModuleDict()).modules())
    modes = [part.training for part in parts]
    for part in parts:
        part.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for part, mode in zip(parts, modes, strict=True):
            part.training = mode
