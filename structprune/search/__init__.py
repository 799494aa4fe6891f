"""Search: from what each layer loses at several widths, and from trials, to the best network within limits."""

from structprune.search.compressor import Compressor
from structprune.search.direct import Direct, Recover
from structprune.search.lc import LC
from structprune.search.objectives import Maximize, Minimize
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
    "LC",
    "BlockPrune",
    "Compose",
    "Compressor",
    "Direct",
    "FilterPrune",
    "Maximize",
    "Minimize",
    "NeuronPrune",
    "Prune",
    "Quantize",
    "Recover",
    "Scheme",
    "StructurePrune",
]
