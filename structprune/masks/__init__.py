"""Masks and zeros: networks full of zeros made smaller, and plans as masks."""

from structprune.masks.compacting import Compaction, LayerReport, compact, compaction
from structprune.masks.sparsity import Sparsity, TensorSparsity, sparsity
from structprune.masks.torch_masks import from_plan, remove

__all__ = [
    "Compaction",
    "LayerReport",
    "Sparsity",
    "TensorSparsity",
    "compact",
    "compaction",
    "from_plan",
    "remove",
    "sparsity",
]
