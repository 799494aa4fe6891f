"""Masks and zeros: networks full of zeros made smaller, plans as masks, and saliency and masks as plain values."""

from structprune.masks.compacting import Compaction, LayerReport, compact, compaction
from structprune.masks.connections import ConnectionRound, Connections, learn_connections, weight_penalty
from structprune.masks.engine import PruningEngine, gradual
from structprune.masks.mask import Comparison, Mask, TensorComparison
from structprune.masks.saliency import Saliency
from structprune.masks.sparsity_report import Gain, Sparsity, TensorSparsity, sparsity
from structprune.masks.thresholds import standard_deviations
from structprune.masks.tickets import Draw, Lottery, lottery
from structprune.masks.torch_masks import from_plan, remove
from structprune.masks.two_of_four import TwoOfFour, fits_blocks, semi_structured, two_of_four_layers

__all__ = [
    "Compaction",
    "Comparison",
    "ConnectionRound",
    "Connections",
    "Draw",
    "Gain",
    "LayerReport",
    "Lottery",
    "Mask",
    "PruningEngine",
    "Saliency",
    "Sparsity",
    "TensorComparison",
    "TensorSparsity",
    "TwoOfFour",
    "compact",
    "compaction",
    "fits_blocks",
    "from_plan",
    "gradual",
    "learn_connections",
    "lottery",
    "remove",
    "semi_structured",
    "sparsity",
    "standard_deviations",
    "two_of_four_layers",
    "weight_penalty",
]
