"""Coupled groups: channels that are alike, with the slices of parameters that each of them takes along.

Example: two linear layers of 4 inputs, 3 channels and 2 outputs.
    In: slots ("0.weight", dim 0), ("0.bias", dim 0), ("2.weight", dim 1), all of axes with components [5, 6, 7], which
    are roots. ("0.weight", dim 1) and ("2.weight", dim 0) are pinned, so they take no part.
    Out: one `Group` named "0" with components [5, 6, 7] and three members, each with positions [0, 1, 2] of its
    dimension for channels [0, 1, 2]. Behind a flatten of 2 x 2 positions, "2.weight" has 12 columns: positions
    [0, 1, ..., 11] for channels [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2].
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from structprune.coupling.factored import along
from structprune.coupling.solve import Components
from structprune.html import html_table
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

    def __repr__(self) -> str:
        """Name, kind and size; the members are in ``print(group)``."""
        return f"Group({self.name!r}, {self.axis}, {self.channels} channels, {len(self.members)} slices)"

    def first_positions(self, tensor: str, dim: int) -> Ids:
        """The first index of a dimension that goes with each channel, shape ``(channels,)``; 0 where there is none."""
        first = np.zeros(self.channels, dtype=np.int64)
        for member in self.members:
            if (member.tensor, member.dim) == (tensor, dim):
                first[member.channels[::-1]] = member.positions[::-1]
        return first

    def _repr_html_(self) -> str:
        """The same for notebooks: a line for each slice."""
        each = max(1, self.channels)
        lines = [[m.tensor, str(m.dim), f"{len(m.positions) / each:g}"] for m in self.members]
        return html_table(["tensor", "dim", "a channel"], lines, f"{self.name}: {self.channels} channels, {self.axis}")

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
    """For every component, the roots that decide about it: itself, or the factors of the products that it is a cell of.

    Of 2 heads of 3 channels with cells [[0, 1, 2], [3, 4, 5]] and factors [6, 7] and [8, 9, 10], cell 4 has the roots 7
    and 9: it is removed with head 1, and with position 1 of all heads. Component 7 has the root 7.
    """

    def __init__(self, components: Components) -> None:
        self._components = components
        n = components.count
        self.is_cell = np.zeros(n, dtype=bool)
        cell_of: list[Ids] = []
        factor_of: list[Ids] = []
        for factored in components.factored_axes:
            cells = factored.cells
            self.is_cell[cells.ravel()] = True
            for dim, part in zip(factored.dims, factored.factors, strict=True):
                # Heads: cells 0 to 5 with [6, 6, 6, 7, 7, 7]; positions: cells 0 to 5 with [8, 9, 10, 8, 9, 10].
                cell_of.append(cells.ravel())
                factor_of.append(np.broadcast_to(along(part, dim, cells.ndim), cells.shape).ravel())
        self._matrix: csr_array | None = None
        if cell_of:
            # Here, as in `connected_components`.
            from scipy.sparse import csr_array

            pairs = np.concatenate(cell_of), np.concatenate(factor_of)
            step = csr_array((np.ones(len(pairs[0]), dtype=np.int32), pairs), shape=(n, n))
            itself = np.flatnonzero(~self.is_cell)
            # Row c of the sum holds the roots of component c. A factor may be a cell of another product, hence powers.
            total = csr_array((np.ones(len(itself), dtype=np.int32), (itself, itself)), shape=(n, n))
            power = total
            while (power := csr_array(step @ power)).nnz:
                total = csr_array(total + power)
            self._matrix = total

    def of(self, components: Ids) -> tuple[Ids, Ids]:
        """Positions in `components`, and a root for each: a cell appears once for each of its factors."""
        if self._matrix is None or not self.is_cell[components].any():
            return np.arange(len(components)), components
        rows = self._matrix[components]
        counts = np.diff(rows.indptr)  # of components [4, 7] with roots {7, 9} and {7}: [2, 1]
        return np.repeat(np.arange(len(components)), counts), rows.indices.astype(np.int64)  # [0, 0, 1], [7, 9, 7]

    def taking(self, components: Ids, picked: Ids) -> tuple[Ids, Ids]:
        """Roots that take none but the positions `picked` of `components` along, and those that none of them takes.

        Of 2 groups of 2 channels, positions 0 and 2 are the first channel of each group; 0 and 3 are no whole factor.
        """
        positions, roots = self.of(components)
        mask = np.zeros(len(components), dtype=bool)
        mask[picked] = True
        size = np.bincount(roots)
        whole = (size > 0) & (size == np.bincount(roots[mask[positions]], minlength=len(size)))
        return np.flatnonzero(whole), np.setdiff1d(picked, positions[whole[roots]])


def group_numbers(components: Components, groups: Sequence[Group]) -> Ids:
    """The position in `groups` of the group that each component is a channel of, -1 for none; shape ``(count,)``."""
    number = np.full(components.count, -1, dtype=np.int64)
    for position, group in enumerate(groups):
        number[group.components] = position
    return number


def coupled_groups(components: Components, slots: list[Slot]) -> list[Group]:
    """The prunable channels of `slots`, those with the same slices in one group; in the order of the model."""
    spans = _spans(components, slots)
    signature = _signatures(components, spans)
    chosen = np.flatnonzero(components.roots & (signature != 0))
    if not len(chosen):
        return []
    # Groups are numbered by their first channel. With chosen [5, 6, 7, 8] of signatures [9, 9, 4, 9], of_chosen is
    # [1, 1, 0, 1] and first [2, 0]; so rank is [1, 0], and the groups of the chosen are [0, 0, 1, 0].
    _, first, of_chosen = np.unique(signature[chosen], return_index=True, return_inverse=True)
    rank = np.argsort(np.argsort(first))
    order = np.argsort(rank[of_chosen], kind="stable")  # [0, 1, 3, 2]
    pieces = np.split(chosen[order], np.cumsum(np.bincount(of_chosen)[np.argsort(first)])[:-1])  # [5, 6, 8] and [7]
    members = _members(components, spans, pieces)
    return [Group(_name(parts), piece, tuple(parts)) for piece, parts in zip(pieces, members, strict=True)]


@dataclass(frozen=True, slots=True)
class _Span:
    """Slots with the same components: pairs of a position in them and a root that decides about it."""

    positions: Ids
    roots: Ids
    slots: list[Slot]


def _spans(components: Components, slots: list[Slot]) -> list[_Span]:
    roots = Roots(components)
    spans: dict[bytes, _Span] = {}
    for slot in slots:
        parts = components.of(slot.axis)
        key = parts.tobytes()
        if key not in spans:
            spans[key] = _Span(*roots.of(parts), [])
        spans[key].slots.append(slot)
    return [*spans.values()]


def _members(components: Components, spans: list[_Span], pieces: Sequence[Ids]) -> list[list[Member]]:
    """The members of the groups whose components are `pieces`."""
    group, place = (np.full(components.count, -1, dtype=np.int64) for _ in range(2))
    for number, piece in enumerate(pieces):
        group[piece], place[piece] = number, np.arange(len(piece))
    members: list[list[Member]] = [[] for _ in pieces]
    for span in spans:
        numbers = group[span.roots]
        for number in np.unique(numbers[numbers >= 0]):
            hit = numbers == number
            at, channels = span.positions[hit], place[span.roots[hit]]
            members[number] += [Member(slot.tensor, slot.dim, at, channels) for slot in span.slots]
    return members


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


def joined(groups: Iterable[Group], chosen: Ids) -> tuple[Member, ...]:
    """Members of all groups for the chosen components only, numbered as chosen: one for each dimension of a tensor."""
    found: dict[tuple[str, int], list[Member]] = {}
    for member in (member for group in groups for member in restricted(group, chosen)):
        found.setdefault((member.tensor, member.dim), []).append(member)
    arrays = (np.concatenate([(m.positions, m.channels) for m in members], axis=1) for members in found.values())
    return tuple(Member(*key, *both) for key, both in zip(found, arrays, strict=True))


def _signatures(components: Components, spans: list[_Span]) -> Ids:
    """A number for each component that depends on the slots in which it decides; 0 if there are none.

    Each span has a random number; the signature is the exclusive or of those of all spans that the component is in. So
    two channels have equal signatures if they are in the same spans, and by chance once in 2**62.
    """
    generator = np.random.default_rng(0)
    signature = np.zeros(components.count, dtype=np.int64)
    for span in spans:
        signature[span.roots] ^= generator.integers(1, 2**62)  # once, however often a component is found
    decides = signature != 0
    for factored in components.factored_axes:
        for part in factored.factors:
            signature[part] ^= generator.integers(1, 2**62)
    for split_group in components.splits.split_groups:
        for ids in split_group.classes:
            signature[ids] ^= generator.integers(1, 2**62)
    return np.where(decides, signature, 0)


def _name(members: list[Member]) -> str:
    """The layer whose output channels these are: that of the first member that makes them."""
    makers = [member for member in members if member.dim == 0] or members
    return makers[0].tensor.rpartition(".")[0] or makers[0].tensor
