"""Among which channels the ratio is met: in each group, in the whole network, or in all groups of like structure."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence

import numpy as np

from structprune.allocation.rounding import nearest
from structprune.axes import Roles
from structprune.errors import PlanError
from structprune.groups import Group

SCOPES = ("local", "global", "isomorphic")
Scores = Mapping[Group, np.ndarray]
Feasible = Mapping[Group, np.ndarray]


def check_scope(scope: str) -> str:
    """`scope`, after checking that there is such a one.

    Raises:
        PlanError: there is not.
    """
    if scope not in SCOPES:
        raise PlanError(f"scope is {scope!r}; it is one of {', '.join(map(repr, SCOPES))}.")
    return scope


def kept_counts(
    groups: Sequence[Group],
    ratio: Callable[[Group], float],
    feasible: Feasible,
    scores: Scores,
    scope: str,
    roles: Roles,
) -> dict[Group, int]:
    """How many channels each group keeps.

    Local: each loses its ratio. Global: groups of the same ratio compete, and the channels with the lowest scores go,
    wherever they are; a group's scores are divided by their mean first, since their scale differs from group to group.
    Isomorphic: only groups of the same structure compete, by their scores as they are (Fang et al., Isomorphic Pruning
    for Vision Models, 2024, section 3.2).
    """
    if scope == "local":
        return {group: nearest(feasible[group], group.channels * (1 - ratio(group))) for group in groups}
    sets: dict[tuple[float, Hashable], list[Group]] = {}
    for group in groups:
        structure = _structure(group, roles) if scope == "isomorphic" else None
        sets.setdefault((ratio(group), structure), []).append(group)
    found: dict[Group, int] = {}
    for (share, _), members in sets.items():
        found |= _compete(members, share, feasible, scores, relative=scope == "global")
    return {group: found[group] for group in groups}


def _structure(group: Group, roles: Roles) -> Hashable:
    """What two groups have in common that differ in their place and width only."""
    return group.axis, tuple(sorted((roles.ranks[m.tensor], m.dim) for m in group.members))


def _compete(groups: list[Group], ratio: float, feasible: Feasible, scores: Scores, relative: bool) -> dict[Group, int]:
    """Remove the share `ratio` of the channels of all `groups`, those with the lowest scores first."""
    pool: list[np.ndarray] = []
    owner: list[np.ndarray] = []
    for number, group in enumerate(groups):
        ordered = np.sort(scores[group])
        if relative:
            mean = ordered.mean()
            ordered = ordered / mean if mean else ordered
        pool.append(ordered[: group.channels - int(feasible[group][0])])
        owner.append(np.full(len(pool[-1]), number))
    order = np.argsort(np.concatenate(pool), kind="stable")
    wanted = round(ratio * sum(group.channels for group in groups))
    gone = np.bincount(np.concatenate(owner)[order][:wanted], minlength=len(groups))
    return {g: nearest(feasible[g], g.channels - int(n)) for g, n in zip(groups, gone, strict=True)}
