"""What is known of each operation: one record each, one file a family."""

from structprune.ops import (
    attention,
    contraction,
    creation,
    elementwise,
    indexing,
    movement,
    normalisation,
    quantization,
    recurrent,
    routing,
    spatial,
)
from structprune.ops.context import RULES, Context, Operand, Rule, rule

__all__ = [
    "RULES",
    "Context",
    "Operand",
    "Rule",
    "attention",
    "contraction",
    "creation",
    "elementwise",
    "indexing",
    "movement",
    "normalisation",
    "quantization",
    "recurrent",
    "routing",
    "rule",
    "spatial",
]
