"""In which order channels go: those of a group, of the whole network, or of groups of like structure compete."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from torch import Tensor, nn

from structprune.coupling.graph import ChannelGraph
from structprune.coupling.groups import Group
from structprune.coupling.roles import Roles
from structprune.errors import UnknownLayerError
from structprune.importance.compose import macs_of_channels


@runtime_checkable
class Curves(Protocol):
    """Knows what removing channels of a group costs, in a unit that is the same for all groups."""

    def depth(self, group: Group, kept: np.ndarray) -> np.ndarray:
        """What is lost when `group` keeps so many channels: never less for fewer; the shape of `kept`."""
        ...


@runtime_checkable
class AddedCurves(Curves, Protocol):
    """Curves whose `depth` is that of the last channel that goes, over what it saves; `total` is of all that go."""

    def total(self, group: Group, kept: np.ndarray) -> np.ndarray:
        """What is lost when `group` keeps so many channels, to be added up over groups; the shape of `kept`."""
        ...


@runtime_checkable
class KnownCounts(Curves, Protocol):
    """Curves that allow only some numbers of channels: those that were measured, say."""

    def known(self, group: Group, feasible: np.ndarray) -> np.ndarray:
        """Those of the feasible numbers of channels that `group` may keep, ascending, the last one always."""
        ...


Rivals = Callable[[Group], Hashable]  # groups for which it gives the same compete
Scope = Literal["local", "global", "isomorphic", "per_cost"] | Sequence[Iterable[str]] | Curves | Rivals
SCOPES = ("local", "global", "isomorphic", "per_cost")


def scope_as_json(scope: Scope, _graph: ChannelGraph) -> object:
    """`scope` as plain data."""
    if isinstance(scope, str):
        return scope
    if isinstance(scope, Curves):
        return type(scope).__name__.lower()
    if callable(scope):
        return "a function of the group"
    return [[names] if isinstance(names, str) else list(names) for names in scope]


@dataclass(frozen=True, slots=True, eq=False)
class CoupledGroups:
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

    def held(self, kept: Mapping[Group, int]) -> CoupledGroups:
        """The same groups, of which each keeps so many channels and loses none of these."""
        return CoupledGroups(self.groups, np.array([[kept[group] for group in self.groups]]))


@dataclass(frozen=True, slots=True)
class ScoreNormalisation:
    """How the scores of groups that compete are compared.

    Attributes:
        relative: divide the scores of a group by their mean.
        saved: what one channel of each group saves; if given, what is lost counts over what is saved.
    """

    relative: bool = True
    saved: Mapping[Group, float] | None = None

    def loss(self, coupled: CoupledGroups, scores: Mapping[Group, np.ndarray]) -> np.ndarray:
        """What each step loses: the scores of the channels that go, or those over what they save."""
        going = coupled.going
        loss = sum((lost(scores[g], going[:, i], self.relative) for i, g in enumerate(coupled.groups)), np.zeros(1))
        price = [1.0 if self.saved is None else self.saved[group] for group in coupled.groups]
        return loss / np.maximum(going @ price, 1e-30)


@dataclass(frozen=True, slots=True)
class Steps:
    """Every step of coupled groups from one state to the next smaller one.

    Attributes:
        all_coupled: the groups that may lose channels, those that go together as one.
        owner: for each step, the number of its coupled groups; shape ``(steps,)``.
        priority: when each step is taken, the lowest first: the share of the channels of all that compete that is gone
            once the step is half done; for the same coupled groups it rises from step to step.
    """

    all_coupled: Sequence[CoupledGroups]
    owner: np.ndarray
    priority: np.ndarray

    def kept(self, taken: np.ndarray) -> dict[Group, int]:
        """How many channels each group keeps once the steps marked in `taken` are done; shape ``(steps,)``."""
        done = np.bincount(self.owner[taken], minlength=len(self.all_coupled)).tolist()
        return {
            group: int(count)
            for coupled, steps in zip(self.all_coupled, done, strict=True)
            for group, count in zip(coupled.groups, coupled.counts[-1 - steps], strict=True)
        }

    def kept_at(self, ratio: Callable[[Group], float]) -> dict[Group, int]:
        """How many channels each group keeps when the share `ratio` of what competes goes."""
        share = np.array([min(ratio(group) for group in coupled.groups) for coupled in self.all_coupled])
        return self.kept(self.priority < share[self.owner] - 1e-12)


def ordered_steps(
    all_coupled: Sequence[CoupledGroups],
    scores: Mapping[Group, np.ndarray],
    scope: Scope,
    roles: Roles,
    apart: Callable[[Group], Hashable] = lambda _: None,
    normalisation: ScoreNormalisation | None = None,
) -> Steps:
    """The order in which channels go.

    Local: each group by itself. Global: all groups compete, and the channels with the lowest scores go, wherever they
    are; a group's scores are divided by their mean first, since their scale differs from group to group
    (`ScoreNormalisation` says otherwise). Per cost: all groups compete by their scores as they are, over what a channel
    saves. Isomorphic: groups of the same structure compete, by their scores as they are (Fang et al., Isomorphic
    Pruning for Vision Models, 2024, section 3.2). Sets of layer names (or patterns): the groups that those layers make
    compete as in the global scope, set by set, and all others in one more set; a group belongs to the first set that
    names one of its layers. A function of the group: groups for which it gives the same compete as in the global scope.
    Curves (`structprune.Sensitivity`): the steps that lose least go first, wherever they are; they need a target.

    Args:
        all_coupled: the groups that may lose channels, those that go together as one.
        scores: the scores of each group; not needed for the local scope.
        scope: one of `SCOPES`, sets of names, a function of the group, or curves.
        roles: what channels are to the network.
        apart: groups for which this differs never compete.
        normalisation: how scores of different groups compare; by default as the scope says.
    """
    normalisation = normalisation or ScoreNormalisation(relative=scope != "isomorphic")
    if isinstance(scope, Curves):
        falls = [
            np.sum([scope.depth(g, coupled.counts[-2::-1, i]) for i, g in enumerate(coupled.groups)], axis=0)
            for coupled in all_coupled
        ]
        return _joined(all_coupled, [np.full(len(fall), i) for i, fall in enumerate(falls)], falls)
    sets: dict[Hashable, list[int]] = {}
    for number, coupled in enumerate(all_coupled):
        group = coupled.groups[0]
        sets.setdefault((apart(group), _set_of(group, number, scope, roles)), []).append(number)
    owner: list[np.ndarray] = []
    priority: list[np.ndarray] = []
    for members in sets.values():
        owners, priorities = _ranked([all_coupled[i] for i in members], scores, normalisation)
        owner.append(np.asarray(members)[owners])
        priority.append(priorities)
    return _joined(all_coupled, owner, priority)


def _joined(all_coupled: Sequence[CoupledGroups], owner: list[np.ndarray], priority: list[np.ndarray]) -> Steps:
    owners = np.concatenate([np.zeros(0, dtype=np.int64), *owner])
    return Steps(all_coupled, owners, np.concatenate([np.zeros(0), *priority]))


def _set_of(group: Group, number: int, scope: str | Sequence[Iterable[str]] | Rivals, roles: Roles) -> Hashable:
    """What is equal for the groups that compete."""
    if callable(scope):
        return scope(group)
    if scope == "local":
        return number
    if scope == "isomorphic":
        return group.axis, tuple(sorted((roles.ranks[m.tensor], m.dim) for m in group.members))
    if isinstance(scope, str):
        return 0
    names = {tensor.rpartition(".")[0] or tensor for tensor in roles.makers(group)}
    for position, patterns in enumerate(scope):
        listed = [patterns] if isinstance(patterns, str) else patterns
        if any(_matches(name, pattern) for pattern in listed for name in names):
            return position
    return -1


def _matches(layer: str, pattern: str) -> bool:
    """Whether a layer has this name or pattern, or is in a block that has this name."""
    return layer == pattern or layer.startswith(f"{pattern}.") or fnmatchcase(layer, pattern)


def check_names(scope: Scope, graph: ChannelGraph) -> None:
    """Refuse names in sets that would quietly do nothing.

    Raises:
        UnknownLayerError: a name or pattern matches no layer that the forward uses.
    """
    if isinstance(scope, (str, Curves)) or callable(scope):
        return
    held = (str(node.target) for node in graph.trace.all_nodes if node.meta["name"] == "parameter")
    layers = {name.rpartition(".")[0] or name for name in held}
    for names in scope:
        for pattern in [names] if isinstance(names, str) else names:
            if not any(_matches(layer, pattern) for layer in layers):
                raise UnknownLayerError(f"scope names {pattern!r}, which matches no layer that the forward uses.")


def _ranked(
    all_coupled: list[CoupledGroups], scores: Mapping[Group, np.ndarray], normalisation: ScoreNormalisation
) -> tuple[np.ndarray, np.ndarray]:
    """The steps of groups that compete, in the order in which they go: whose they are, and their priorities."""
    sizes = [coupled.going.sum(axis=1) for coupled in all_coupled]
    if len(all_coupled) == 1:
        losses = [np.arange(len(sizes[0]), dtype=float)]
    else:
        losses = [normalisation.loss(coupled, scores) for coupled in all_coupled]
    order = np.argsort(np.concatenate(losses), kind="stable")
    taken = np.concatenate(sizes)[order]
    share = (np.cumsum(taken) - taken / 2) / sum(coupled.channels for coupled in all_coupled)
    owner = np.repeat(np.arange(len(all_coupled)), [len(size) for size in sizes])
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
    saved = np.zeros(len(groups))
    for kind in kinds:
        if kind == "macs":
            macs = macs_of_channels(graph).numpy()
            saved += [macs[group.components].mean() for group in groups]
        elif kind == "channels":
            saved += 1 / sum(group.channels for group in groups)
        else:
            total = sum(tensor.numel() for tensor in tensors.values() if isinstance(tensor, nn.Parameter))
            saved += [_entries(group, tensors) / max(1, total) for group in groups]
    return dict(zip(groups, saved.tolist(), strict=True))


def _entries(group: Group, tensors: Mapping[str, Tensor]) -> float:
    """Entries of parameters that go with one channel; those in several dimensions of the group count once for each."""
    held = [(m, tensors[m.tensor]) for m in group.members if isinstance(tensors[m.tensor], nn.Parameter)]
    return sum(len(m.positions) * t.numel() / max(1, t.shape[m.dim]) for m, t in held) / max(1, group.channels)
