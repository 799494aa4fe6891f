"""Which groups are thinned: those of the axes asked for, and of each grid one factor."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import numpy as np

from structprune.allocation.rounding import nearest
from structprune.axes import AXES
from structprune.errors import PlanError
from structprune.graph import ChannelGraph
from structprune.groups import Group

FEW = 4


def check_axes(axes: Iterable[str] | None) -> frozenset[str] | None:
    """`axes` as a set, after checking the names.

    Raises:
        PlanError: there is no axis of such a name.
    """
    if axes is None:
        return None
    found = frozenset([axes] if isinstance(axes, str) else axes)
    if unknown := found - set(AXES):
        raise PlanError(f"axes names {', '.join(sorted(unknown))}; known are {', '.join(AXES)}.")
    return found


def thinned_groups(
    graph: ChannelGraph,
    ratio: Callable[[Group], float],
    feasible: Mapping[Group, np.ndarray],
    axes: Collection[str] | None,
) -> Sequence[Group]:
    """The groups to thin; of a grid (heads x head size, groups x channels in a group) one factor only.

    The factor is chosen whose nearest feasible number of channels misses the ratio least; whole heads or groups before
    positions inside them where both come as near, if there are at least four of them. A factor of which nothing is to
    go is chosen last. Where `axes` names the axes of both factors, both are thinned.
    """
    groups = graph.groups()
    number = np.full(graph.components.count, -1, dtype=np.int64)
    for i, group in enumerate(groups):
        if axes is None or group.axis in axes:
            number[group.components] = i
    chosen: set[int] = set()
    blocked: set[int] = set()

    def miss(i: int) -> tuple[bool, float, bool, bool, int]:
        size, share = groups[i].channels, ratio(groups[i])
        wanted = size * (1 - share)
        missed = abs(wanted - nearest(feasible[groups[i]], wanted)) / size
        return share <= 0, missed, size < FEW, groups[i].axis == "head_size", i

    for lattice in graph.components.lattices:
        factors: list[list[int]] = []
        for part in lattice.factors:
            found = np.unique(number[np.unique(graph.roots.of(part)[1])])
            factors.append([int(i) for i in found if i >= 0])
        candidates = [i for factor in factors for i in factor if i not in blocked]
        if not candidates:
            continue
        taken = [i for i in candidates if i in chosen]
        best = min(taken, key=lambda i: ratio(groups[i]) <= 0) if taken else min(candidates, key=miss)
        chosen.add(best)
        for i in candidates:
            asked_for = axes is not None and groups[i].axis != groups[best].axis
            if i != best and not asked_for and not _together(i, best, factors):
                blocked.add(i)
    taken_up = np.unique(number[number >= 0])
    return [groups[i] for i in taken_up.tolist() if i not in blocked]


def _together(a: int, b: int, factors: list[list[int]]) -> bool:
    """Whether two groups stand in the same factor of a grid, and in that one only, side by side."""
    return all((a in factor) == (b in factor) for factor in factors)
