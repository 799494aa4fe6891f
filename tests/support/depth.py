"""What removing branches is judged by: the original on the same input, with the branches at zero."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

import structprune
from structprune.depth.finding import find
from structprune.depth.reference import branches_off
from structprune.depth.removal import chosen_of, cut_of
from structprune.errors import PlanError
from structprune.ops import op_of
from structprune.tracing.trace import trace
from support import oracle


def with_branches_off(model: nn.Module, inputs: Any, names: Iterable[str]) -> Any:
    """Outputs of `model`, which takes these branches as zero, and the inputs of these blocks as their results."""
    recorded = trace(model, inputs, operations=op_of)
    with torch.no_grad(), branches_off(model, recorded, chosen_of(find(model, recorded), names)):
        return oracle.call(model, inputs)


def error_without(model: nn.Module, inputs: Any, names: list[str]) -> tuple[nn.Module, float]:
    """The model without these branches, and its relative error against the original with them at zero."""
    slim = structprune.remove_branches(model, inputs, names)
    with torch.no_grad():
        got = oracle.call(slim, inputs)
    return slim, oracle.relative_error(got, with_branches_off(model, inputs, names))


def removable(model: nn.Module, inputs: Any, names: Iterable[str]) -> list[str]:
    """Those of `names`, in order, without which something is left of every sum."""
    recorded = trace(model, inputs, operations=op_of)
    chosen: list[Any] = []
    for item in chosen_of(find(model, recorded), names):
        try:
            cut_of(recorded, [*chosen, item])
        except PlanError:
            continue
        chosen.append(item)
    return [item.branch.name for item in chosen]
