"""The pruning functions of torch-pruning as names of what is meant: the outputs or inputs of a kind of layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm

from structprune.errors import PlanError


@dataclass(frozen=True)
class PruningFunction:
    """The outputs or the inputs of a kind of layer, as in ``tp.prune_conv_out_channels``."""

    name: str

    @property
    def out(self) -> bool:
        """Whether outputs are meant."""
        return "_out_" in self.name

    def __call__(self, *_: Any) -> None:
        """Refused: a layer alone would no longer fit its neighbours.

        Raises:
            PlanError: always.
        """
        raise PlanError(
            f"prune_{self.name} prunes one layer without those that are coupled to it. Let a graph do it: "
            f"graph.get_pruning_group(layer, tp.prune_{self.name}, idxs).prune()."
        )


# Kind of layer, by torch-pruning's name -> the classes, whether their inputs are channels of their own, and the
# dimensions of the weight that outputs and inputs stand in.
_KINDS: dict[str, tuple[tuple[type, ...], tuple[int, int]]] = {
    "conv": ((_ConvNd,), (0, 1)),
    "depthwise_conv": ((), (0, 0)),
    "linear": ((nn.Linear,), (0, 1)),
    "batchnorm": ((_BatchNorm,), (0, 0)),
    "layernorm": ((nn.LayerNorm, nn.RMSNorm), (0, 0)),
    "groupnorm": ((nn.GroupNorm,), (0, 0)),
    "instancenorm": ((_InstanceNorm,), (0, 0)),
    "prelu": ((nn.PReLU,), (0, 0)),
    "embedding": ((nn.Embedding,), (1, 1)),
    "lstm": ((nn.LSTM,), (0, 1)),
    "multihead_attention": ((nn.MultiheadAttention,), (0, 1)),
    "parameter": ((), (0, 0)),
}
PRUNING_FUNCTIONS = tuple(PruningFunction(f"{kind}_{side}_channels") for kind in _KINDS for side in ("out", "in"))
_BY_NAME = {function.name: function for function in PRUNING_FUNCTIONS}
CONV_OUT, CONV_IN = _BY_NAME["conv_out_channels"], _BY_NAME["conv_in_channels"]
LINEAR_OUT, LINEAR_IN = _BY_NAME["linear_out_channels"], _BY_NAME["linear_in_channels"]
NORMS = tuple(_BY_NAME[f"{kind}_out_channels"] for kind in ("batchnorm", "layernorm"))


def _kind(module: Any) -> str:
    if isinstance(module, _ConvNd) and module.groups == module.out_channels > 1:
        return "depthwise_conv"
    return next((kind for kind, (classes, _) in _KINDS.items() if isinstance(module, classes)), "parameter")


def function_of(module: Any, dim: int) -> PruningFunction:
    """What dimension `dim` of a layer's weight is."""
    kind = _kind(module)
    outputs, inputs = _KINDS[kind][1]
    if getattr(module, "transposed", False) and kind == "conv":
        outputs, inputs = inputs, outputs
    return _BY_NAME[f"{kind}_{'out' if dim == outputs or outputs == inputs else 'in'}_channels"]


def dim_of(module: Any, function: PruningFunction) -> int:
    """The dimension of a layer's weight that a function means."""
    outputs, inputs = _KINDS[_kind(module)][1]
    if getattr(module, "transposed", False):
        outputs, inputs = inputs, outputs
    return outputs if function.out else inputs


def side_of(module: Any, out: bool) -> PruningFunction:
    """The outputs or the inputs of a layer."""
    return _BY_NAME[f"{_kind(module)}_{'out' if out else 'in'}_channels"]
