"""Rules: what each operation does to channels, one function a kind of operation, one table for all."""

from structprune.channels.rules import (
    attention,
    contraction,
    creation,
    elementwise,
    experts,
    indexing,
    normalization,
    quantization,
    recurrent,
    shapes,
    spatial,
)
from structprune.channels.rules.table import RULES, Context, Operand, Rule, rule

__all__ = [
    "RULES",
    "Context",
    "Operand",
    "Rule",
    "attention",
    "contraction",
    "creation",
    "elementwise",
    "experts",
    "indexing",
    "normalization",
    "quantization",
    "recurrent",
    "rule",
    "shapes",
    "spatial",
]
