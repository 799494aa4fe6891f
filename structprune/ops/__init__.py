"""What is known of each operation: one record each, one file a family."""

from structprune.ops import (
    attention,
    contraction,
    creation,
    cutting,
    einsum,
    elementwise,
    indexing,
    movement,
    normalisation,
    quantization,
    rearranging,
    recurrent,
    routing,
    scattering,
    spatial,
)
from structprune.ops.context import Context, Operand
from structprune.ops.op import OPS, Op, has_rule, layer_of, op_of, register_op

__all__ = [
    "OPS",
    "Context",
    "Op",
    "Operand",
    "attention",
    "contraction",
    "creation",
    "cutting",
    "einsum",
    "elementwise",
    "has_rule",
    "indexing",
    "layer_of",
    "movement",
    "normalisation",
    "op_of",
    "quantization",
    "rearranging",
    "recurrent",
    "register_op",
    "routing",
    "scattering",
    "spatial",
]
