"""Thresholds under which weights go."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from structprune.errors import PlanError
from structprune.masks.choosing import grouped, require_scope
from structprune.masks.torch_masks import chosen_tensors


def standard_deviations(
    model: nn.Module,
    quality: float | Mapping[str, float] = 1.0,
    scope: str = "tensor",
    names: Iterable[str] | None = None,
) -> dict[str, float]:
    """Thresholds for absolute weights: a quality times the standard deviation of the weights.

    Han et al., Learning both Weights and Connections for Efficient Neural Networks, 2015, section 3. Of a masked tensor
    only the entries that are not zero count.

    Args:
        model: masked or not.
        quality: the factor; for all tensors, or one for each by name.
        scope: whether the deviation is that of each ``"tensor"`` (in the paper each layer has its own), of each
            ``"layer"``, its bias included where it is named, or of all weights of the ``"model"``.
        names: of parameters; None for those named in `quality`, or all of two dimensions or more.

    Returns:
        A threshold for each tensor, for `Saliency.above`.

    Raises:
        PlanError: a name is no parameter of the model, there is no such scope, or a quality is below zero or NaN.

    Example:
        >>> from structprune.masks import Saliency
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> mask = Saliency.magnitude(model).above(standard_deviations(model, 1.5))
        >>> bool(mask.kept < mask.entries)
        True
    """
    chosen = chosen_tensors(model, quality if names is None and isinstance(quality, Mapping) else names)
    require_scope(scope, None, among=("model", "layer", "tensor"))
    thresholds: dict[str, float] = {}
    for group in grouped(chosen, scope):
        weights = torch.cat([chosen[name].reshape(-1).double() for name in group])
        weights = weights[weights != 0]
        spread = float(weights.std(correction=0)) if len(weights) else 0.0
        for name in group:
            factor = quality.get(name) if isinstance(quality, Mapping) else quality
            if factor is None or not factor >= 0:
                raise PlanError(f"The quality of {name!r} is {factor}; give a number of at least 0.")
            thresholds[name] = factor * spread
    return thresholds
