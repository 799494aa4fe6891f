"""Recovery of a model that lost branches: on a double of the original in which they are zero.

A residual network of blocks 0, 1 and 2 lost block 1, and then channels inside of block 2, which is its block 1 now.
The double has all three: block 0 as it is, block 1 with weights of zero, and block 2 with the channels that are left.
Each of its operations is found in the original by the same number, so its layers are solved to meet the original's.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from structprune.coupling.graph import ChannelGraph
from structprune.depth.cut import Cut
from structprune.depth.finding import find
from structprune.depth.removal import Removal, chosen_of, cut_of
from structprune.errors import PlanError, RecoveryError
from structprune.planning.build import plan_removal
from structprune.recovery.history import plans_between, removed_between
from structprune.surgery.apply import _memo
from structprune.surgery.edits import Edits
from structprune.surgery.verify import relative_errors, removed_components
from structprune.tracing.state import held_tensors
from structprune.tracing.trace import Trace, run_once, tensors_in

NO_EDITS = Edits((), (), (), (), (), None, None)


@dataclass(frozen=True)
class Shorter:
    """A model that lost branches, and perhaps channels of what is left, beside the model that it was made of.

    Attributes:
        aligned: a model of the original's form that computes what the shorter one does: its weights, and zeros for
            those that are gone. Operations of both are found by the same keys.
        removal: the branches.
        edits: the channels, by the names of the original.
    """

    aligned: nn.Module
    removal: Removal
    edits: Edits

    @classmethod
    def of(cls, slim: nn.Module, original: nn.Module, batch: Any) -> Shorter | None:
        """The pair, if `slim` lost branches, and channels at most after that; else None.

        None also if channels went that the original cannot lose: a branch that was removed held them.

        Raises:
            RecoveryError: the branches are not zero without weights.
        """
        done = plans_between(slim, original)
        if not done or not isinstance(done[0], Removal) or any(isinstance(plan, Removal) for plan in done[1:]):
            return None
        removal = done[0]
        edits = removed_between(slim, original, removal.names) if len(done) > 1 else NO_EDITS
        aligned = _thinned(original, edits, batch)
        if aligned is None or not _filled(aligned, held_tensors(slim), removal.names):
            return None
        if _compute_the_same(slim, aligned, batch):
            return cls(aligned, removal, edits)
        if edits.slices:
            return None
        raise RecoveryError(
            "A branch of this model is not zero when its weights are, so that what is left cannot be solved beside the "
            "original. Fine-tune it instead."
        )

    def places(self, original: nn.Module, recorded: Trace) -> tuple[Collection[fx.Node], Collection[fx.Node]]:
        """The operations at which the models begin to differ, and those that are gone."""
        chosen = chosen_of(find(original, recorded), self.removal.branches)
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


def _thinned(original: nn.Module, edits: Edits, batch: Any) -> nn.Module | None:
    """A copy of the original without these channels; None if it cannot lose them, or not them alone."""
    if not edits.slices:
        return copy.deepcopy(original, _memo(held_tensors(original), {}))
    graph = ChannelGraph(original, batch)
    removed = removed_components(graph, edits)
    if graph.components.pinned[removed].any():
        return None
    try:
        return plan_removal(graph, np.flatnonzero(removed), config=False).apply(original)
    except PlanError:  # an int of the forward could not follow
        return None


def _filled(aligned: nn.Module, here: Mapping[str, Any], names: Mapping[str, str | None]) -> bool:
    """Give a model the tensors of the shorter one, and zeros for parameters that are gone; whether their shapes fit.

    Raises:
        RecoveryError: the shorter one lacks a tensor that should be there.
    """
    with torch.no_grad():
        for name, held in held_tensors(aligned).items():
            now = names.get(name, name)
            if now is not None and now not in here:
                raise RecoveryError(f"{name!r} of the original is not in the model. Give the model it was made of.")
            if now is not None and held.tensor.shape != here[now].tensor.shape:
                return False
            if now is not None:
                held.tensor.data.copy_(here[now].tensor)
            elif isinstance(held.tensor, nn.Parameter):
                held.tensor.data.zero_()
    return True


def _compute_the_same(slim: nn.Module, aligned: nn.Module, batch: Any) -> bool:
    """Whether both do, but for rounding: to a thousandth, and 16 roundings of numbers of less precision."""
    ours, theirs = run_once(slim, batch), run_once(aligned, batch)
    precisions = [torch.finfo(t.dtype).eps if t.is_floating_point() else 0.0 for t in tensors_in(ours)]
    errors = relative_errors(ours, theirs)
    return all(error <= max(1e-3, 16 * eps) for error, eps in zip(errors, precisions, strict=True))
