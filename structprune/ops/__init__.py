"""What is known of each operation: one record each, one file a family."""

from structprune.ops import (
    along,
    contraction,
    cutting,
    elementwise,
    indexing,
    linear_algebra,
    movement,
    normalisation,
    opaque,
    products,
    rearranging,
    recurrent,
    routing,
    spatial,
)
from structprune.ops.context import Context, Operand
from structprune.ops.op import OPS, Op, has_rule, kind_of, layer_of, op_of, register_op

__all__ = [
    "OPS",
    "Context",
    "Op",
    "Operand",
    "along",
    "contraction",
    "cutting",
    "elementwise",
    "has_rule",
    "indexing",
    "kind_of",
    "layer_of",
    "linear_algebra",
    "movement",
    "normalisation",
    "op_of",
    "opaque",
    "products",
    "rearranging",
    "recurrent",
    "register_op",
    "routing",
    "spatial",
]
