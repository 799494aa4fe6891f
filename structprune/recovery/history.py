"""What was done to a model to make the smaller one, by the records that this one carries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from structprune.depth.removal import Removal, shell_of
from structprune.errors import RecoveryError
from structprune.planning.plan import plans_of
from structprune.surgery.edits import Edits, RemovedSlice
from structprune.surgery.history import first_shapes, kept
from structprune.tracing.state import held_tensors
from structprune.wrapping import unwrapped


def plans_between(slim: nn.Module, original: nn.Module) -> tuple[Any, ...]:
    """What was done to `original` to get `slim`."""
    return plans_of(slim)[len(plans_of(original)) :]


def stages(slim: nn.Module, original: nn.Module) -> list[tuple[Any, ...]]:
    """What was done to `original` to get `slim`, cut where branches were removed: each part is recovered by itself.

    Raises:
        RecoveryError: there are several parts, and the weights of `slim` are no longer those that they make of the
            original's, so that those in between are not known.
    """
    parts: list[tuple[Any, ...]] = []
    for plan in plans_between(slim, original):
        if parts and not isinstance(plan, Removal) and not isinstance(parts[-1][-1], Removal):
            parts[-1] = (*parts[-1], plan)
        else:
            parts.append((plan,))
    if len(parts) > 1:
        again = shell_of(unwrapped(original))
        for plan in (plan for stage in parts for plan in stage):
            again = plan.apply(again, inplace=isinstance(plan, Removal))
        here = held_tensors(unwrapped(slim))
        made = held_tensors(again)
        same = made.keys() == here.keys() and all(
            torch.equal(held.tensor, here[name].tensor) for name, held in made.items()
        )
        if not same:
            raise RecoveryError(
                "Branches were removed from this model and more was done to it since or before, and its weights are no "
                "longer the original's. Recover after each step, from the model before that step."
            )
    return parts


def removed_between(slim: nn.Module, original: nn.Module, names: Mapping[str, str | None] | None = None) -> Edits:
    """What was removed from `original` to make `slim`, by the record that `slim` carries.

    A weight (8, 3) whose kept indices in dimension 0 are 0, 2, 3, 5, 7 has lost 1, 4 and 6.

    Args:
        slim: the smaller model.
        original: what it was made of.
        names: what tensors of the original are called in `slim`, if that is something else; None for those that went.

    Raises:
        RecoveryError: by that record it was made of another model.
    """
    kept_indices, first = kept(slim), first_shapes(slim)
    now = {name: held.tensor.shape for name, held in held_tensors(slim).items()}
    removed: list[RemovedSlice] = []
    for name, held in held_tensors(original).items():
        here, shape = (names or {}).get(name, name), tuple(held.tensor.shape)
        if here is None:
            continue
        if isinstance(held.tensor, nn.Parameter) and first.get(here) != shape:
            before = f"of shape {list(first[here])}" if here in first else "missing"
            raise RecoveryError(
                f"{name!r} has shape {list(shape)} in the original, but in the model that was pruned it was {before}. "
                "Give the pruned model as structprune made it, and the model that it was made of."
            )
        dims = kept_indices.get(here, {})
        if here in now and any(
            before != after and dim not in dims
            for dim, (before, after) in enumerate(zip(shape, now[here], strict=True))
        ):
            raise RecoveryError(
                f"Each group of the convolution with {name!r} lost other inputs, for which no layer is solved again. "
                "Remove the same positions of each group, or fine-tune."
            )
        for dim, indices in dims.items():
            lost = np.setdiff1d(np.arange(shape[dim]), indices)
            if len(lost):
                removed.append(RemovedSlice(name, dim, shape[dim], tuple(lost.tolist())))
    return Edits(tuple(removed), (), (), (), (), None, None)
