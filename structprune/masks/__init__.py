"""Masks and zeros: networks full of zeros made smaller, plans as masks, and saliency and masks as plain values."""

from structprune.masks.compacting import Compaction, LayerReport, compact, compaction
from structprune.masks.sparsity_report import Sparsity, TensorSparsity, sparsity
from structprune.masks.torch_masks import from_plan, remove
from structprune.masks.values import Mask, Saliency

__all__ = [
    "Compaction",
    "LayerReport",
    "Mask",
    "Saliency",
    "Sparsity",
    "TensorSparsity",
    "compact",
    "compaction",
    "from_plan",
    "remove",
    "sparsity",
]
