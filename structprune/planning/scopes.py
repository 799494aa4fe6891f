"""In which order channels go: those of a group, of the whole network, or of groups of like structure compete."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from torch import Tensor, nn

from structprune.axes import Roles
from structprune.errors import PlanError
from structprune.graph import ChannelGraph
from structprune.groups import Group
from structprune.importance.compose import macs_of_channels


@runtime_checkable
class Curves(Protocol):
    """Knows what thinning a group costs, in a unit that is the same for all groups."""

    def depth(self, group: Group, kept: np.ndarray) -> np.ndarray:
        """What is lost when `group` keeps so many channels: never less for fewer; the shape of `kept`."""
        ...


Scope = Literal["local", "global", "isomorphic", "per_cost"] | Sequence[Iterable[str]] | Curves
SCOPES = ("local", "global", "isomorphic", "per_cost")


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


@dataclass(frozen=True, slots=True, eq=False)
class Unit:
    """Groups whose numbers of channels are chosen together: mostly a single one.

    Attributes:
        groups: the groups.
        counts: the numbers of channels that they may keep, ascending; the last are all of them; ``(states, groups)``.
    """

    groups: tuple[Group, ...]
    counts: np.ndarray

    @property
    def channels(self) -> int:
        """Number of channels of all its groups."""
        return int(self.counts[-1].sum())

    @property
    def going(self) -> np.ndarray:
        """How many channels of each group each step takes, the first step first; shape ``(steps, groups)``."""
        return np.diff(self.counts, axis=0)[::-1]


@dataclass(frozen=True, slots=True)
class Worth:
    """How the scores of groups that compete are compared.

    Attributes:
        relative: divide the scores of a group by their mean.
        saved: what one channel of each group saves; if given, what is lost counts over what is saved.
    """

    relative: bool = True
    saved: Mapping[Group, float] | None = None

    def of(self, unit: Unit, scores: Mapping[Group, np.ndarray]) -> np.ndarray:
        """What each step of a unit is worth: scores lost by the channels that go, or by what they save."""
        going = unit.going
        loss = sum((lost(scores[g], going[:, i], self.relative) for i, g in enumerate(unit.groups)), np.zeros(1))
        price = [1.0 if self.saved is None else self.saved[group] for group in unit.groups]
        return loss / np.maximum(going @ price, 1e-30)


@dataclass(frozen=True, slots=True)
class Steps:
    """Every step of a unit from one state to the next smaller one.

    Attributes:
        units: the units that may be thinned.
        owner: for each step, the number of its unit; shape ``(steps,)``.
        depth: the share of the channels of all that compete that is gone once the step is half done; within a unit it
            rises from step to step.
    """

    units: Sequence[Unit]
    owner: np.ndarray
    depth: np.ndarray

    def kept(self, taken: np.ndarray) -> dict[Group, int]:
        """How many channels each group keeps once the steps marked in `taken` are done; shape ``(steps,)``."""
        done = np.bincount(self.owner[taken], minlength=len(self.units)).tolist()
        return {
            group: int(count)
            for unit, steps in zip(self.units, done, strict=True)
            for group, count in zip(unit.groups, unit.counts[-1 - steps], strict=True)
        }

    def kept_at(self, ratio: Callable[[Group], float]) -> dict[Group, int]:
        """How many channels each group keeps when the share `ratio` of what competes goes."""
        share = np.array([min(ratio(group) for group in unit.groups) for unit in self.units])
        return self.kept(self.depth < share[self.owner] - 1e-12)


def steps_of(
    units: Sequence[Unit],
    scores: Mapping[Group, np.ndarray],
    scope: Scope,
    roles: Roles,
    apart: Callable[[Group], Hashable] = lambda _: None,
    worth: Worth | None = None,
) -> Steps:
    """The order in which channels go.

    Local: each group by itself. Global: all groups compete, and the channels with the lowest scores go, wherever they
    are; a group's scores are divided by their mean first, since their scale differs from group to group (`Worth` says
    otherwise). Per cost: all groups compete by their scores as they are, over what a channel saves. Isomorphic:
    groups of the same structure compete, by their scores as they are (Fang et al., Isomorphic Pruning for Vision
    Models, 2024, section 3.2). Sets of layer names (or patterns): the groups that those layers make compete as in the
    global scope, set by set, and all others in one more set; a group belongs to the first set that names one of its
    layers. Curves (`structprune.Sensitivity`): the steps that lose least go first, wherever they are; they need a
    target.

    Args:
        units: those that may be thinned.
        scores: the scores of each group; not needed for the local scope.
        scope: one of `SCOPES`, sets of names, or curves.
        roles: what channels are to the network.
        apart: groups for which this differs never compete.
        worth: how scores of different groups compare; by default as the scope says.
    """
    worth = worth or Worth(relative=scope != "isomorphic")
    if isinstance(scope, Curves):
        falls = [
            np.sum([scope.depth(g, unit.counts[-2::-1, i]) for i, g in enumerate(unit.groups)], axis=0)
            for unit in units
        ]
        return _steps(units, [np.full(len(fall), i) for i, fall in enumerate(falls)], falls)
    sets: dict[Hashable, list[int]] = {}
    for number, unit in enumerate(units):
        group = unit.groups[0]
        sets.setdefault((apart(group), _set_of(group, number, scope, roles)), []).append(number)
    owner: list[np.ndarray] = []
    depth: list[np.ndarray] = []
    for members in sets.values():
        mine, deep = _ranked([units[i] for i in members], scores, worth)
        owner.append(np.asarray(members)[mine])
        depth.append(deep)
    return _steps(units, owner, depth)


def _steps(units: Sequence[Unit], owner: list[np.ndarray], depth: list[np.ndarray]) -> Steps:
    owners = np.concatenate([np.zeros(0, dtype=np.int64), *owner])
    return Steps(units, owners, np.concatenate([np.zeros(0), *depth]))


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


def _ranked(units: list[Unit], scores: Mapping[Group, np.ndarray], worth: Worth) -> tuple[np.ndarray, np.ndarray]:
    """The steps of units that compete, in the order in which they go: their units and depths."""
    sizes = [unit.going.sum(axis=1) for unit in units]
    found = [np.arange(len(sizes[0]), dtype=float)] if len(units) == 1 else [worth.of(unit, scores) for unit in units]
    order = np.argsort(np.concatenate(found), kind="stable")
    taken = np.concatenate(sizes)[order]
    share = (np.cumsum(taken) - taken / 2) / sum(unit.channels for unit in units)
    owner = np.repeat(np.arange(len(units)), [len(size) for size in sizes])
    return owner[order], share


def lost(scores: np.ndarray, going: np.ndarray, relative: bool) -> np.ndarray:
    """The sum of the scores of the channels that each step takes, the least important ones first."""
    ordered = np.sort(scores)
    if relative and (mean := float(ordered.mean())):
        ordered = ordered / mean
    ends = np.cumsum(going)
    total = np.concatenate([[0.0], np.cumsum(ordered)])
    return total[ends] - total[ends - going]


# -- what a channel saves ---------------------------------------------------------------------------------------------


def savings(graph: ChannelGraph, kinds: Iterable[str], tensors: Mapping[str, Tensor]) -> dict[Group, float]:
    """For each group, what one of its channels saves alone, on average over its channels and over `kinds`.

    Args:
        graph: the coupled channels.
        kinds: of ``"macs"``, ``"params"``, ``"memory"`` (that of the weights) and ``"channels"``; shares of the
            model's amounts, so that several kinds can be added.
        tensors: the tensors of the model by name.
    """
    groups = graph.groups()
    found = np.zeros(len(groups))
    for kind in kinds:
        if kind == "macs":
            macs = macs_of_channels(graph).numpy()
            found += [macs[group.components].mean() for group in groups]
        elif kind == "channels":
            found += 1 / sum(group.channels for group in groups)
        else:
            total = sum(tensor.numel() for tensor in tensors.values() if isinstance(tensor, nn.Parameter))
            found += [_entries(group, tensors) / max(1, total) for group in groups]
    return dict(zip(groups, found.tolist(), strict=True))


def _entries(group: Group, tensors: Mapping[str, Tensor]) -> float:
    """Entries of parameters that go with one channel; those in several dimensions of the group count once for each."""
    held = [(m, tensors[m.tensor]) for m in group.members if isinstance(tensors[m.tensor], nn.Parameter)]
    return sum(len(m.positions) * t.numel() / max(1, t.shape[m.dim]) for m, t in held) / max(1, group.channels)
