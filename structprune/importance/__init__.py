"""Criteria: what a channel is worth, one file a family. Importing this registers them all by name."""

from structprune.importance.activation import FLAP, APoZ, HRank, L2Activation, MeanActivation, Wanda
from structprune.importance.base import CRITERIA, Fittable, Importance, criterion, fitted, importance_of
from structprune.importance.compose import CostPenalty, PerLayer, Product, Sum
from structprune.importance.curvature import OBD, GroupFisher
from structprune.importance.data import Batches
from structprune.importance.folding import Folding
from structprune.importance.gradient import SNIP, Taylor, WeightTaylor
from structprune.importance.layer_curvature import KFAC, OBS
from structprune.importance.redundancy import FPGM, Cosine, GeometricMedian, TVSeparability
from structprune.importance.thinet import ThiNet
from structprune.importance.weight import LAMP, LnNorm, NormScale, Random, SliceNorm

__all__ = [
    "CRITERIA",
    "FLAP",
    "FPGM",
    "KFAC",
    "LAMP",
    "OBD",
    "OBS",
    "SNIP",
    "APoZ",
    "Batches",
    "Cosine",
    "CostPenalty",
    "Fittable",
    "Folding",
    "GeometricMedian",
    "GroupFisher",
    "HRank",
    "Importance",
    "L2Activation",
    "LnNorm",
    "MeanActivation",
    "NormScale",
    "PerLayer",
    "Product",
    "Random",
    "SliceNorm",
    "Sum",
    "TVSeparability",
    "Taylor",
    "ThiNet",
    "Wanda",
    "WeightTaylor",
    "criterion",
    "fitted",
    "importance_of",
]
