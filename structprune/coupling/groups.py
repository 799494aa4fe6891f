"""Coupled groups: channels that are alike, with the slices of parameters that each of them takes along."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from structprune.coupling.solve import Components
from structprune.ops.relations import Axis, Ids

if TYPE_CHECKING:
    from scipy.sparse import csr_array


@dataclass(frozen=True, slots=True)
class Slot:
    """A dimension of a tensor that the model holds."""

    tensor: str
    dim: int
    axis: Axis


@dataclass(frozen=True, slots=True)
class Member:
    """A dimension of a tensor as a group sees it: index `positions[i]` of it goes when channel `channels[i]` goes.

    See `structprune.Group` for an example.

    Attributes:
        tensor: dotted name of the parameter or buffer.
        dim: its dimension.
        positions: indices along that dimension, shape ``(n,)``.
        channels: the channel of the group that each belongs to, shape ``(n,)``.
    """

    tensor: str
    dim: int
    positions: Ids
    channels: Ids


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """Channels that may be removed one by one, each with everything that is coupled to it.

    Attributes:
        name: the first layer whose channels they are.
        channels: how many there are.
        components: for each channel, its number in the solved algebra; shape ``(channels,)``.
        members: the slices that go with them.
        axis: what they are to the network, one of `structprune.coupling.roles.AXES`.

    Example:
        >>> import torch, structprune
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> (group,) = structprune.DependencyGraph(model, torch.randn(1, 4)).groups()
        >>> group.name, group.channels, [(member.tensor, member.dim) for member in group.members]
        ('0', 8, [('0.weight', 0), ('0.bias', 0), ('2.weight', 1)])
    """

    name: str
    components: Ids
    members: tuple[Member, ...]
    axis: str = "channels"

    @property
    def channels(self) -> int:
        """Number of channels."""
        return len(self.components)

    def __str__(self) -> str:
        """One line for the group, one for each member."""
        lines = [f"{self.name}: {self.channels} channels"]
        for member in self.members:
            each = len(member.positions) / max(1, self.channels)
            lines.append(f"  {member.tensor}, dim {member.dim}: {each:g} a channel")
        return "\n".join(lines)


@dataclass(frozen=True, slots=True, eq=False)
class BalancedGroups:
    """Groups whose numbers of channels depend on each other.

    Attributes:
        groups: their numbers in `ChannelGraph.groups`.
        counts: each line says how many channels of each of them may be kept together, shape ``(choices, groups)``;
            from the fewest to all.
    """

    groups: tuple[int, ...]
    counts: Ids


class Roots:
    """For every component, the roots that it lives by: itself, or the factors of the products that it is a cell of."""

    def __init__(self, components: Components) -> None:
        self._components = components
        n = components.count
        self.is_cell = np.zeros(n, dtype=bool)
        left: list[Ids] = []
        right: list[Ids] = []
        for factored in components.factored_axes:
            cells = factored.cells
            self.is_cell[cells.ravel()] = True
            for dim, part in zip(factored.dims, factored.factors, strict=True):
                along = part.reshape([-1 if i == dim else 1 for i in range(cells.ndim)])
                left.append(cells.ravel())
                right.append(np.broadcast_to(along, cells.shape).ravel())
        self._matrix: csr_array | None = None
        if left:
            # Here, as in `connected_components`.
            from scipy.sparse import csr_array

            pairs = np.concatenate(left), np.concatenate(right)
            step = csr_array((np.ones(len(pairs[0]), dtype=np.int32), pairs), shape=(n, n))
            itself = np.flatnonzero(~self.is_cell)
            total = csr_array((np.ones(len(itself), dtype=np.int32), (itself, itself)), shape=(n, n))
            power = total
            while (power := csr_array(step @ power)).nnz:
                total = csr_array(total + power)
            self._matrix = total

    def of(self, components: Ids) -> tuple[Ids, Ids]:
        """Positions in `components`, and a root for each: a cell appears once for each of its factors."""
        if self._matrix is None or not self.is_cell[components].any():
            return np.arange(len(components)), components
        axes = self._matrix[components]
        counts = np.diff(axes.indptr)
        return np.repeat(np.arange(len(components)), counts), axes.indices.astype(np.int64)

    def taking(self, components: Ids, picked: Ids) -> tuple[Ids, Ids]:
        """Roots that take none but the positions `picked` of `components` along, and those that none of them takes.

        Of 2 groups of 2 channels, positions 0 and 2 are the first channel of each group; 0 and 3 are no whole factor.
        """
        positions, found = self.of(components)
        mask = np.zeros(len(components), dtype=bool)
        mask[picked] = True
        size = np.bincount(found)
        whole = (size > 0) & (size == np.bincount(found[mask[positions]], minlength=len(size)))
        return np.flatnonzero(whole), np.setdiff1d(picked, positions[whole[found]])


def coupled_groups(components: Components, slots: list[Slot]) -> list[Group]:
    """The prunable channels of `slots`, those with the same slices in one group; in the order of the model."""
    roots = Roots(components)
    spans: dict[object, tuple[Ids, Ids, list[Slot]]] = {}
    for slot in slots:
        parts = components.of(slot.axis)
        key = parts.tobytes()
        if key not in spans:
            spans[key] = (*roots.of(parts), [])
        spans[key][2].append(slot)
    signature = _signatures(components, spans)
    prunable = components.roots & (signature != 0)
    chosen = np.flatnonzero(prunable)
    if not len(chosen):
        return []
    _, first, group_of_chosen = np.unique(signature[chosen], return_index=True, return_inverse=True)
    rank = np.argsort(np.argsort(first))
    group = np.full(components.count, -1, dtype=np.int64)
    group[chosen] = rank[group_of_chosen]
    place = np.full(components.count, -1, dtype=np.int64)
    order = np.argsort(group[chosen], kind="stable")
    counts = np.bincount(group[chosen])
    place[chosen[order]] = np.arange(len(chosen)) - np.repeat(np.cumsum(counts) - counts, counts)
    members: list[list[Member]] = [[] for _ in counts]
    for positions, found, attached in spans.values():
        mine = group[found]
        for number in np.unique(mine[mine >= 0]):
            hit = mine == number
            at, channels = positions[hit], place[found[hit]]
            members[number] += [Member(slot.tensor, slot.dim, at, channels) for slot in attached]
    pieces = np.split(chosen[order], np.cumsum(counts)[:-1])
    return [Group(_name(parts), piece, tuple(parts)) for piece, parts in zip(pieces, members, strict=True)]


def restricted(group: Group, chosen: Ids) -> Iterable[Member]:
    """Members of `group` for the chosen components only, numbered as chosen."""
    place = {int(component): number for number, component in enumerate(chosen)}
    wanted = np.array([place.get(int(component), -1) for component in group.components])
    if (wanted < 0).all():
        return
    for member in group.members:
        channels = wanted[member.channels]
        hit = channels >= 0
        yield Member(member.tensor, member.dim, member.positions[hit], channels[hit])


def _signatures(components: Components, spans: dict[object, tuple[Ids, Ids, list[Slot]]]) -> Ids:
    """A number for each component that depends on the slots that it reaches and how; 0 if it reaches none."""
    generator = np.random.default_rng(0)
    signature = np.zeros(components.count, dtype=np.int64)
    for _, found, _ in spans.values():
        signature[found] ^= generator.integers(1, 2**62)  # once, however often a component is found
    reached = signature != 0
    for factored in components.factored_axes:
        for part in factored.factors:
            signature[part] ^= generator.integers(1, 2**62)
    for split_group in components.splits.split_groups:
        for ids in split_group.classes:
            signature[ids] ^= generator.integers(1, 2**62)
    return np.where(reached, signature, 0)


def _name(members: list[Member]) -> str:
    """The layer whose output channels these are: that of the first member that makes them."""
    makers = [member for member in members if member.dim == 0] or members
    return makers[0].tensor.rpartition(".")[0] or makers[0].tensor
