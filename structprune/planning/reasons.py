"""Why channels stay, for plans and messages."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np

from structprune.coupling.graph import ChannelGraph
from structprune.coupling.groups import Group
from structprune.coupling.roles import AXES
from structprune.planning.options import PlanOptions
from structprune.planning.uniform import UniformWidths

# So many of the layers that stay whole are named in a message.
_NAMED = 5


def left_whole(graph: ChannelGraph, chosen: Sequence[Group], axes: Collection[str] | None) -> str:
    """What may not go, and why: the channels that layers make, and the groups on axes that were not asked for."""
    pinned = graph.pinned()
    weights = [slot for slot in graph.slots if (slot.tensor, slot.dim) in graph.roles.producers]
    whole = [f"{name} ({pinned[name]})" for slot in weights if (name := f"{slot.tensor}, dim {slot.dim}") in pinned]
    more = [f"and {len(whole) - _NAMED} more"] if len(whole) > _NAMED else []
    present = {group.axis for group in graph.groups()}
    others = [axis for axis in AXES if axis in present and axes is not None and axis not in axes]
    parts = [*whole[:_NAMED], *more, *([f"{' and '.join(others)}, as axes= asks"] if others else [])]
    if not parts:
        return ""
    return f" {'Left whole are' if chosen else 'Nothing may go:'} {'; '.join(parts)}."


def why_nothing(
    graph: ChannelGraph, options: PlanOptions, thinned: Sequence[Group], feasible: Mapping[Group, np.ndarray]
) -> str:
    """Why no channel goes, the main reasons."""
    stuck = [group for group in thinned if len(feasible[group]) == 1]
    free = [group for group in thinned if len(feasible[group]) > 1]
    parts: list[str] = []
    if free and options.target is not None:
        parts.append("the target is met as it is")
    elif free:
        steps = ", ".join(f"{g.name} of {g.channels} goes by {g.channels - feasible[g][-2]}" for g in free[:_NAMED])
        parts.append(f"the ratio asks for less than half a step of any group: {steps}")
    if stuck:
        limits = f"round_to={options.round_to}, min_channels={options.min_channels}, max_ratio={options.max_ratio:g}"
        limits += "" if options.tensor_parallel is None else f", tensor_parallel={options.tensor_parallel}"
        parts.append(f"{', '.join(group.name for group in stuck[:_NAMED])}: no smaller width is allowed by {limits}")
    whole = left_whole(graph, thinned, None if options.axes is None else frozenset(options.axes))
    return "; ".join([*parts, *([whole.strip().removesuffix(".")] if whole else [])]) or "the model has no channels"


def not_describable(graph: ChannelGraph, widths: UniformWidths) -> str:
    """Which groups stay whole as no configuration could describe that they do not, by axis, and why."""
    groups, reasons = graph.groups(), dict[str, str]()
    for number, reason in widths.whole.items():
        reasons.setdefault(groups[number].axis, f"{groups[number].name}: {reason}")
    named = "; ".join(f"{axis} ({reason})" for axis, reason in reasons.items())
    return f"whole are {named}: no configuration could describe it; name axes to prune them nevertheless"
