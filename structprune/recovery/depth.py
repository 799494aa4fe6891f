"""Recovery of a model that lost branches: on a double of the original in which they are zero."""

from __future__ import annotations

import copy
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from structprune.depth.cut import Cut
from structprune.depth.finding import find
from structprune.depth.removal import Removal, chosen_of, cut_of, shell_of
from structprune.errors import RecoveryError
from structprune.planning.plan import plans_of
from structprune.surgery.apply import _memo
from structprune.tracing.state import held_tensors
from structprune.tracing.trace import Trace, run_once, tensors_in
from structprune.wrapping import unwrapped


@dataclass(frozen=True)
class Shorter:
    """A model that lost branches, and nothing else, beside the model that it was made of.

    Attributes:
        aligned: a model of the original's form that computes what the shorter one does: its weights, and zeros for
            those that are gone. Operations of both are found by the same keys.
        removal: what was removed.
    """

    aligned: nn.Module
    removal: Removal

    @classmethod
    def of(cls, slim: nn.Module, original: nn.Module, batch: Any) -> Shorter | None:
        """The pair, if `slim` lost branches; None if it did not.

        Raises:
            RecoveryError: more was done to it than removing branches, or the branches are not zero without weights.
        """
        removals = [plan for plan in _between(slim, original) if isinstance(plan, Removal)]
        if not removals:
            return None
        aligned = copy.deepcopy(original, _memo(held_tensors(original), {}))
        here = held_tensors(slim)
        with torch.no_grad():
            for name, held in held_tensors(aligned).items():
                now = removals[0].names.get(name, name)
                if now is not None and now not in here:
                    raise RecoveryError(f"{name!r} of the original is not in the model. Give the model it was made of.")
                if now is not None:
                    held.tensor.data.copy_(here[now].tensor)
                elif isinstance(held.tensor, nn.Parameter):
                    held.tensor.data.zero_()
        _check(slim, aligned, batch)
        return cls(aligned, removals[0])

    def places(self, recorded: Trace) -> tuple[Collection[fx.Node], Collection[fx.Node]]:
        """The operations at which the models begin to differ, and those that are gone."""
        chosen = chosen_of(find(self.aligned, recorded), self.removal.branches)
        begins = {recorded.nodes[n] for item in chosen for n, _ in (*item.off, *item.skipped)}
        return begins, Cut(recorded).needed - cut_of(recorded, chosen).needed

    def shortened(self, slim: nn.Module) -> nn.Module:
        """A copy of the shorter model with the weights of `aligned`."""
        shorter = copy.deepcopy(slim, _memo(held_tensors(slim), {}))
        solved, left = held_tensors(self.aligned), held_tensors(shorter)
        with torch.no_grad():
            for name, held in solved.items():
                now = self.removal.names.get(name, name)
                if now is not None:
                    left[now].tensor.data.copy_(held.tensor)
        return shorter


def _between(slim: nn.Module, original: nn.Module) -> tuple[Any, ...]:
    """What was done to `original` to get `slim`."""
    return plans_of(slim)[len(plans_of(original)) :]


def stages(slim: nn.Module, original: nn.Module) -> list[tuple[Any, ...]]:
    """What was done to `original` to get `slim`, cut where branches were removed: each part is recovered by itself.

    Raises:
        RecoveryError: there are several parts, and the weights of `slim` are no longer those that they make of the
            original's, so that those in between are not known.
    """
    parts: list[tuple[Any, ...]] = []
    for plan in _between(slim, original):
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


def _check(slim: nn.Module, aligned: nn.Module, batch: Any) -> None:
    """Whether both compute the same."""
    ours, theirs = list(tensors_in(run_once(slim, batch))), list(tensors_in(run_once(aligned, batch)))
    for one, other in zip(ours, theirs, strict=True):
        scale = float(other.abs().max()) if other.numel() else 0.0
        if one.numel() and float((one - other).abs().max()) > 1e-3 * max(scale, 1e-12):
            raise RecoveryError(
                "A branch of this model is not zero when its weights are, so that what is left cannot be solved beside "
                "the original. Fine-tune it instead."
            )
