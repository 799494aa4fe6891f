"""Criteria: what a channel is worth, one file a family. Importing this registers them all by name."""

from structprune.importance import (
    activation,
    compose,
    curvature,
    gradient,
    layer_curvature,
    redundancy,
    separability,
    weight,
)

__all__ = ["activation", "compose", "curvature", "gradient", "layer_curvature", "redundancy", "separability", "weight"]
