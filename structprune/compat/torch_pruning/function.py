"""The pruning functions of torch-pruning as names of what is meant: the outputs or inputs of a kind of layer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm

from structprune.checking import shown
from structprune.errors import PlanError
from structprune.surgery.one_layer import is_depthwise, remove_channels, side

_KINDS: dict[str, tuple[type, ...]] = {
    "depthwise_conv": (), "conv": (_ConvNd,), "linear": (nn.Linear,), "batchnorm": (_BatchNorm,),
    "layernorm": (nn.LayerNorm, nn.RMSNorm), "groupnorm": (nn.GroupNorm,), "instancenorm": (_InstanceNorm,),
    "prelu": (nn.PReLU,), "embedding": (nn.Embedding,), "lstm": (nn.LSTM,),
    "multihead_attention": (nn.MultiheadAttention,), "parameter": (),
}  # fmt: skip
STANDARD = tuple(kind for classes in _KINDS.values() for kind in classes)


@dataclass(frozen=True)
class PruningFunction:
    """The outputs or the inputs of a kind of layer, as in ``tp.prune_conv_out_channels``; called, it prunes a layer."""

    name: str

    def __call__(self, layer: nn.Module, idxs: Sequence[int]) -> nn.Module:
        """Remove channels from this one layer, in place: see `structprune.surgery.one_layer.remove_channels`."""
        if not self.name.startswith(f"{kind_of(layer)}_"):
            raise PlanError(f"prune_{self.name} is given {shown(layer)}, a layer of kind {kind_of(layer)}.")
        return remove_channels(layer, idxs, outputs=is_out(self))


PRUNING_FUNCTIONS = {f"prune_{name}": PruningFunction(name) for kind in _KINDS
                     for name in (f"{kind}_out_channels", f"{kind}_in_channels")}  # fmt: skip
globals().update(PRUNING_FUNCTIONS)


def kind_of(layer: Any) -> str:
    """What torch-pruning calls such a layer."""
    if is_depthwise(layer):
        return "depthwise_conv"
    return next((kind for kind, classes in _KINDS.items() if isinstance(layer, classes)), "parameter")


def side_of(layer: Any, out: bool) -> PruningFunction:
    """The outputs or the inputs of a layer."""
    return PRUNING_FUNCTIONS[f"prune_{kind_of(layer)}_{'out' if out else 'in'}_channels"]


def is_out(pruning_fn: Any) -> bool:
    """Whether outputs are meant, by a pruning function or a method of a pruner of one's own.

    Raises:
        PlanError: it is neither.
    """
    name = pruning_fn.name if isinstance(pruning_fn, PruningFunction) else getattr(pruning_fn, "__name__", "")
    if not name.endswith(("out_channels", "in_channels")):
        raise PlanError(f"pruning_fn is {shown(pruning_fn)}; give one of {', '.join([*PRUNING_FUNCTIONS][:3])} ...")
    return name.endswith("out_channels")


def dim_of(layer: Any, out: bool) -> int:
    """The dimension of a layer's weight that its outputs or inputs stand in."""
    return (side(layer, out) or (0, ""))[0]


def channels_of(layer: Any, out: bool) -> int:
    """How many outputs or inputs a layer has."""
    known = side(layer, out)
    return getattr(layer, known[1]) if known else (layer if isinstance(layer, Tensor) else layer.weight).shape[0]


class BasePruningFunc:
    """A pruner of a kind of layer of one's own, for `DependencyGraph.register_customized_layer`."""

    def prune_out_channels(self, layer: Any, idxs: Sequence[int]) -> Any:
        """Remove outputs from one layer."""
        return side_of(layer, True)(layer, idxs)

    def prune_in_channels(self, layer: Any, idxs: Sequence[int]) -> Any:
        """Remove inputs from one layer."""
        return side_of(layer, False)(layer, idxs)

    def _prune_parameter_and_grad(self, weight: nn.Parameter, keep_idxs: Iterable[int], pruning_dim: int) -> Tensor:
        keep = torch.tensor(list(keep_idxs), device=weight.device)
        kept = nn.Parameter(weight.detach().index_select(pruning_dim, keep), requires_grad=weight.requires_grad)
        kept.grad = None if weight.grad is None else weight.grad.index_select(pruning_dim, keep)
        return kept


ConvPruner = DepthwiseConvPruner = LinearPruner = BatchnormPruner = LayernormPruner = BasePruningFunc
InstanceNormPruner = PReLUPruner = EmbeddingPruner = ParameterPruner = BasePruningFunc
