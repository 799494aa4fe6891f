"""The attributes by which standard layers describe their own shape: a table, no code for each layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from structprune.surgery.derived import resting


def _first(*names: str) -> Callable[[Any], Any]:
    """The first of these tensors that the module has."""

    def find(module: Any) -> Any:
        return next((t for t in (getattr(module, name, None) for name in names) if t is not None), None)

    return find


_weight = _first("weight")
_norm = _first("weight", "running_mean")

# class -> tensor that shows the shape, attribute -> what it must be
DESCRIPTIONS: dict[type[nn.Module], tuple[Callable[[Any], Any], dict[str, Callable[[Any, Any], Any]]]] = {
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
    undo.append(lambda: setattr(owner, name, old))
    setattr(owner, name, value)


def describe_layers(model: nn.Module, paths: Iterable[str], undo: list[Callable[[], None]]) -> None:
    """Make the standard layers at `paths` describe the shapes that their tensors have now."""
    for path in sorted(paths):
        module = model.get_submodule(path) if path else model
        known = next((entry for kind, entry in DESCRIPTIONS.items() if isinstance(module, kind)), None)
        if known is not None:
            with resting(module):
                _describe(module, *known, undo)


def _describe(
    module: nn.Module,
    tensor: Callable[[Any], Any],
    attributes: dict[str, Callable[[Any, Any], Any]],
    undo: list[Callable[[], None]],
) -> None:
    found = tensor(module)
    if found is None:
        return
    for name, shape in attributes.items():
        value = shape(module, found)
        if getattr(module, name) != value:
            set_attribute(module, name, value, undo)
