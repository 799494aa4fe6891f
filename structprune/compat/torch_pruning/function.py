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

from structprune.checking import INDICES, instance, require, shown
from structprune.errors import PlanError
from structprune.surgery.apply import apply
from structprune.surgery.edits import AttributeEdit, Edits, RemovedSlice
from structprune.tracing.state import held_tensors

# Kind of layer by torch-pruning's name: its classes, the dimensions of its weight that outputs and inputs stand in, and
# the attributes that say how many there are.
_KINDS: dict[str, tuple[tuple[type, ...], tuple[int, int], tuple[str, ...]]] = {
    "conv": ((_ConvNd,), (0, 1), ("out_channels", "in_channels")),
    "depthwise_conv": ((), (0, 0), ("out_channels in_channels groups",) * 2),
    "linear": ((nn.Linear,), (0, 1), ("out_features", "in_features")),
    "batchnorm": ((_BatchNorm,), (0, 0), ("num_features",) * 2),
    "layernorm": ((nn.LayerNorm, nn.RMSNorm), (0, 0), ("", "")),
    "groupnorm": ((nn.GroupNorm,), (0, 0), ("", "")),
    "instancenorm": ((_InstanceNorm,), (0, 0), ("num_features",) * 2),
    "prelu": ((nn.PReLU,), (0, 0), ("num_parameters",) * 2),
    "embedding": ((nn.Embedding,), (1, 1), ("embedding_dim",) * 2),
    "lstm": ((nn.LSTM,), (0, 1), ("", "")),
    "multihead_attention": ((nn.MultiheadAttention,), (0, 1), ("", "")),
    "parameter": ((), (0, 0), ("", "")),
}


@dataclass(frozen=True)
class PruningFunction:
    """The outputs or the inputs of a kind of layer, as in ``tp.prune_conv_out_channels``; called, it prunes a layer."""

    name: str

    @property
    def out(self) -> bool:
        """Whether outputs are meant."""
        return "_out_" in self.name

    def __call__(self, layer: nn.Module, idxs: Sequence[int]) -> nn.Module:
        """Remove channels from this one layer, in place; what is before and behind it must be made to fit too.

        Raises:
            PlanError: the layer is of another kind, or one whose channels cannot be removed from it alone.
        """
        require(locals(), layer=instance(nn.Module, "give a layer"), idxs=INDICES)
        kind, grouped = kind_of(layer), getattr(layer, "groups", 1) > 1
        sizes = _KINDS[kind][2][not self.out].split()
        if not self.name.startswith(f"{kind}_") or not sizes or (grouped and kind == "conv"):
            raise PlanError(
                f"prune_{self.name} is not for {shown(layer)} alone. Let a graph do it: "
                f"graph.get_pruning_group(layer, tp.prune_{self.name}, idxs).prune()."
            )
        size, gone = int(getattr(layer, sizes[0])), tuple(sorted({int(index) for index in idxs}))
        if gone and not (gone[0] >= 0 and gone[-1] < size and len(gone) < size):
            raise PlanError(f"idxs is {shown(idxs)}; give some of the channels 0 to {size - 1}, and not all.")
        outputs = self.out or dim_of(layer, True) == dim_of(layer, False)
        tensors = [(name, held.tensor) for name, held in held_tensors(layer).items() if held.tensor.dim()]
        slices = [
            RemovedSlice(name, dim_of(layer, self.out) if name == "weight" else 0, size, gone)
            for name, tensor in tensors
            if name == "weight" or (outputs and len(tensor) == size)
        ]
        edits = [AttributeEdit("", (name,), size, size - len(gone)) for name in sizes]
        edited = Edits(tuple(slices), tuple(edits), (), (), (), None, None)
        return apply(layer, edited, inplace=True) if gone else layer


PRUNING_FUNCTIONS = {
    f"prune_{kind}_{side}_channels": PruningFunction(f"{kind}_{side}_channels")
    for kind in _KINDS
    for side in ("out", "in")
}
globals().update(PRUNING_FUNCTIONS)
SCORED = frozenset(
    PRUNING_FUNCTIONS[f"prune_{kind}_channels"]
    for kind in ("conv_out", "conv_in", "linear_out", "linear_in", "batchnorm_out", "layernorm_out")
)


def kind_of(module: Any) -> str:
    """What torch-pruning calls such a layer."""
    if isinstance(module, _ConvNd) and module.groups == module.out_channels > 1:
        return "depthwise_conv"
    return next((kind for kind, (classes, _, _) in _KINDS.items() if isinstance(module, classes)), "parameter")


def side_of(module: Any, out: bool) -> PruningFunction:
    """The outputs or the inputs of a layer."""
    return PRUNING_FUNCTIONS[f"prune_{kind_of(module)}_{'out' if out else 'in'}_channels"]


def dim_of(module: Any, out: bool) -> int:
    """The dimension of a layer's weight that its outputs or inputs stand in."""
    return _KINDS[kind_of(module)][1][out == getattr(module, "transposed", False)]


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
