"""Search: from what each layer loses at several widths, and from trials, to the best network within limits."""

from structprune.search.scheme import Scheme
from structprune.search.schemes import (
    BlockPrune,
    Compose,
    FilterPrune,
    NeuronPrune,
    Prune,
    Quantize,
    StructurePrune,
)

__all__ = [
    "BlockPrune",
    "Compose",
    "FilterPrune",
    "NeuronPrune",
    "Prune",
    "Quantize",
    "Scheme",
    "StructurePrune",
]
