"""In which order channels go: those of a group, of the whole network, or of groups of like structure compete."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, Protocol, runtime_checkable

import numpy as np

from structprune.axes import Roles
from structprune.errors import PlanError
from structprune.groups import Group


@runtime_checkable
class Curves(Protocol):
    """Knows what thinning a group costs, in a unit that is the same for all groups."""

    def depth(self, group: Group, kept: np.ndarray) -> np.ndarray:
        """What is lost when `group` keeps so many channels: never less for fewer; the shape of `kept`."""
        ...


Scope = Literal["local", "global", "isomorphic"] | Sequence[Iterable[str]] | Curves
SCOPES = ("local", "global", "isomorphic")


def check_scope(scope: Scope) -> Scope:
    """`scope`, after checking that there is such a one.

    Raises:
        PlanError: there is not.
    """
    if isinstance(scope, str) and scope not in SCOPES:
        raise PlanError(f"scope is {scope!r}; it is one of {', '.join(map(repr, SCOPES))}, or sets of layer names.")
    return scope


def as_json(scope: Scope) -> object:
    """`scope` as plain data."""
    if isinstance(scope, str):
        return scope
    if isinstance(scope, Curves):
        return type(scope).__name__.lower()
    return [[names] if isinstance(names, str) else list(names) for names in scope]


@dataclass(frozen=True, slots=True)
class Steps:
    """Every step from one feasible number of channels of a group to the next smaller one.

    Attributes:
        groups: the groups that may be thinned.
        feasible: for each, the numbers of channels that it may keep, ascending.
        owner: for each step, the number of its group; shape ``(steps,)``.
        depth: the share of the channels of all that compete that is gone once the step is half done; within a group it
            rises from step to step.
    """

    groups: Sequence[Group]
    feasible: Sequence[np.ndarray]
    owner: np.ndarray
    depth: np.ndarray

    def kept(self, taken: np.ndarray) -> dict[Group, int]:
        """How many channels each group keeps once the steps marked in `taken` are done; shape ``(steps,)``."""
        steps = np.bincount(self.owner[taken], minlength=len(self.groups))
        return {g: int(f[-1 - n]) for g, f, n in zip(self.groups, self.feasible, steps.tolist(), strict=True)}

    def kept_at(self, ratio: Callable[[Group], float]) -> dict[Group, int]:
        """How many channels each group keeps when the share `ratio` of what competes goes."""
        share = np.array([ratio(group) for group in self.groups])
        return self.kept(self.depth < share[self.owner] - 1e-12)


def steps_of(
    groups: Sequence[Group],
    feasible: Mapping[Group, np.ndarray],
    scores: Mapping[Group, np.ndarray],
    scope: Scope,
    roles: Roles,
    apart: Callable[[Group], Hashable] = lambda _: None,
) -> Steps:
    """The order in which channels go.

    Local: each group by itself. Global: all groups compete, and the channels with the lowest scores go, wherever they
    are; a group's scores are divided by their mean first, since their scale differs from group to group. Isomorphic:
    groups of the same structure compete, by their scores as they are (Fang et al., Isomorphic Pruning for Vision
    Models, 2024, section 3.2). Sets of layer names (or patterns): the groups that those layers make compete as in the
    global scope, set by set, and all others in one more set; a group belongs to the first set that names one of its
    layers. Curves (`structprune.Sensitivity`): the steps that lose least go first, wherever they are; they need a
    target.

    Args:
        groups: those that may be thinned.
        feasible: the numbers of channels that each may keep, ascending.
        scores: the scores of each group; not needed for the local scope.
        scope: one of `SCOPES`, sets of names, or curves.
        roles: what channels are to the network.
        apart: groups for which this differs never compete.
    """
    if isinstance(scope, Curves):
        falls = [scope.depth(group, feasible[group][-2::-1]) for group in groups]
        return _steps(groups, feasible, [np.full(len(fall), i) for i, fall in enumerate(falls)], falls)
    sets: dict[Hashable, list[int]] = {}
    for number, group in enumerate(groups):
        sets.setdefault((apart(group), _set_of(group, number, scope, roles)), []).append(number)
    owner: list[np.ndarray] = []
    depth: list[np.ndarray] = []
    for members in sets.values():
        mine, deep = _ranked([groups[i] for i in members], feasible, scores, scope)
        owner.append(np.asarray(members)[mine])
        depth.append(deep)
    return _steps(groups, feasible, owner, depth)


def _steps(
    groups: Sequence[Group], feasible: Mapping[Group, np.ndarray], owner: list[np.ndarray], depth: list[np.ndarray]
) -> Steps:
    owners = np.concatenate([np.zeros(0, dtype=np.int64), *owner])
    return Steps(groups, [feasible[g] for g in groups], owners, np.concatenate([np.zeros(0), *depth]))


def _set_of(group: Group, number: int, scope: str | Sequence[Iterable[str]], roles: Roles) -> Hashable:
    """What is equal for the groups that compete."""
    if scope == "local":
        return number
    if scope == "isomorphic":
        return group.axis, tuple(sorted((roles.ranks[m.tensor], m.dim) for m in group.members))
    if isinstance(scope, str):
        return 0
    names = {tensor.rpartition(".")[0] or tensor for tensor in roles.makers(group)}
    for position, patterns in enumerate(scope):
        listed = [patterns] if isinstance(patterns, str) else patterns
        if any(name == p or name.startswith(f"{p}.") or fnmatchcase(name, p) for p in listed for name in names):
            return position
    return -1


def _ranked(
    groups: list[Group], feasible: Mapping[Group, np.ndarray], scores: Mapping[Group, np.ndarray], scope: Scope
) -> tuple[np.ndarray, np.ndarray]:
    """The steps of groups that compete, in the order in which they go: their groups and depths."""
    owner: list[np.ndarray] = []
    worth: list[np.ndarray] = []
    size: list[np.ndarray] = []
    for number, group in enumerate(groups):
        going = np.diff(feasible[group])[::-1]  # channels that each step takes, the first step first
        if len(groups) == 1:
            worth.append(np.arange(len(going), dtype=float))
        else:
            ordered = np.sort(scores[group])
            if scope != "isomorphic" and (mean := float(ordered.mean())):
                ordered = ordered / mean
            ends = np.cumsum(going)
            total = np.concatenate([[0.0], np.cumsum(ordered)])
            worth.append((total[ends] - total[ends - going]) / going)
        owner.append(np.full(len(going), number))
        size.append(going)
    sizes = np.concatenate(size)
    order = np.argsort(np.concatenate(worth), kind="stable")
    taken = sizes[order]
    share = (np.cumsum(taken) - taken / 2) / sum(group.channels for group in groups)
    return np.concatenate(owner)[order], share
