"""What a criterion is, and how one is found by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from structprune.errors import PlanError
from structprune.groups import Group


@runtime_checkable
class Importance(Protocol):
    """Gives each channel of a group a score: the lower, the sooner it goes.

    A criterion sees tensors and index arrays only, so that a new kind of layer needs no change here.
    """

    def __call__(self, group: Group, tensors: Mapping[str, Tensor]) -> Tensor:
        """Scores of shape ``(group.channels,)``.

        Args:
            group: the channels; ``group.members`` says which slices of which tensors each takes along.
            tensors: the tensors of the model by name.
        """
        ...


CRITERIA: dict[str, Callable[[], Importance]] = {}


def criterion(name: str) -> Callable[[Callable[[], Importance]], Callable[[], Importance]]:
    """Register a criterion under `name`; the decorated function makes it."""

    def register(make: Callable[[], Importance]) -> Callable[[], Importance]:
        if name in CRITERIA:
            raise PlanError(f"There is a criterion named {name!r} already. Choose another name.")
        CRITERIA[name] = make
        return make

    return register


def importance_of(chosen: str | Importance) -> Importance:
    """The criterion of this name; an object that is one is returned as it is.

    Raises:
        PlanError: there is no such criterion.
    """
    if not isinstance(chosen, str):
        if not callable(chosen):
            raise PlanError(f"importance is a {type(chosen).__name__}; give a name or a callable.")
        return chosen
    if chosen not in CRITERIA:
        raise PlanError(f"There is no criterion {chosen!r}. Those known are {', '.join(sorted(CRITERIA))}.")
    return CRITERIA[chosen]()


def check_scores(scores: Tensor, group: Group) -> Tensor:
    """`scores`, after checking that they are finite and one a channel."""
    if tuple(scores.shape) != (group.channels,):
        raise PlanError(
            f"The criterion gave scores of shape {list(scores.shape)} for {group.name}, which has {group.channels} "
            "channels. It must give one score a channel."
        )
    if scores.is_meta:
        raise PlanError(
            f"The weights of {group.name} are on the meta device and have no values to rank. Load real weights, or "
            "plan with importance='random', or with a callable that needs none."
        )
    if not bool(torch.isfinite(scores).all()):
        raise PlanError(f"The criterion gave scores for {group.name} that are not finite. Are its weights?")
    return scores
