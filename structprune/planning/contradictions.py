"""Options that contradict each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from structprune.errors import PlanError
from structprune.planning.scopes import Curves
from structprune.planning.targets import TARGETS

if TYPE_CHECKING:
    from structprune.planning.options import PlanOptions


def _check_scope_without_target(options: PlanOptions) -> None:
    if isinstance(options.scope, Curves):
        raise PlanError(
            "Curves as a scope say what removing channels costs, not how much is to go: give a target as well."
        )
    if options.scope == "per_cost":
        raise PlanError("scope='per_cost' weighs importance against what is saved: give a target, not a ratio.")


def refuse_contradictions(options: PlanOptions) -> None:
    """Check what single options cannot tell.

    Raises:
        PlanError: two of them cannot hold together, or one asks for another that is missing.
    """
    if options.ratio is not None and options.target is not None:
        raise PlanError("Both ratio and target are given. A ratio says what each group loses, a target what remains.")
    if options.target is None:
        _check_scope_without_target(options)
    if options.dimensions and (
        len(options.dimensions) < len(options.target or {}) or options.axes is not None or options.scope
    ):
        named = ", ".join(options.dimensions)
        raise PlanError(
            f"target gives exact sizes ({named}), which decide about all channels: give no amounts beside them, no "
            f"axes and no scope. Amounts are {', '.join(TARGETS)}."
        )
    if options.latency is not None and not options.times:
        raise PlanError("latency says how time is measured, but no target asks for it: target={'latency': 0.5}, say.")
    if options.scope == "per_cost" and "kv_cache" in (options.target or ()):
        raise PlanError("scope='per_cost' does not know what a channel saves of the kv_cache; use another scope.")
    _check_allocation(options)
    _check_depth(options)


def _check_allocation(options: PlanOptions) -> None:
    """An exact choice has a target, and all groups compete for it."""
    if options.allocation != "exact":
        return
    if options.target is None:
        raise PlanError("allocation='exact' chooses widths for a target, and none is given: target={'macs': 0.5}.")
    if not options.all_compete:
        raise PlanError(
            "allocation='exact' lets all groups compete for the target, and scope says that they do not: give "
            "scope='global' or 'per_cost'."
        )


def _check_depth(options: PlanOptions) -> None:
    """What names or describes layers of the whole model says nothing of what is left without some blocks."""
    if not options.depth:
        if options.branch_score is not None:
            raise PlanError(f"branch_score is {options.branch_score!r}, but axes names no 'blocks' and no 'branches'.")
        return
    if callable(options.ratio):
        raise PlanError("ratio is a function of groups of channels; for blocks give a share, or shares by name.")
    if isinstance(options.ratio, Mapping) and options.width_axes != ():
        raise PlanError(
            "ratio names layers, and axes names blocks beside channels: without the blocks layers have other "
            "names. Remove the blocks first, then plan the channels of what is left."
        )
    if isinstance(options.scope, Curves) or isinstance(options.importance, Curves):
        raise PlanError(
            "Curves were measured on the whole model, and without some blocks its groups are others. Remove the "
            "blocks first, or give a criterion that is not fitted yet, such as structprune.Reconstruction()."
        )
    if options.scope is not None and not isinstance(options.scope, str):
        raise PlanError("scope names layers, which have other names once blocks are gone. Use another scope.")
