"""Masks and zeros: networks full of zeros made smaller, and masks and saliency as plain values."""

from structprune.masks.compacting import Compaction, LayerReport, compact, compaction

__all__ = ["Compaction", "LayerReport", "compact", "compaction"]
