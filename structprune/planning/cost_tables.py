"""Costs of a network as sums of small tables: each over the widths of the few groups that it follows.

The multiply-accumulates of a convolution are a product of two widths, those of its inputs and its outputs. With 4
widths to choose from on one side and 3 on the other they are a table ``(4, 3)``. All that may be limited is a sum of
such tables, be it counted (parameters, multiply-accumulates, bytes) or measured (time).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from structprune.coupling.costs import KeyValueCache
from structprune.coupling.graph import ChannelGraph
from structprune.coupling.polynomials import Polynomial
from structprune.latency.predict import Moved, TimeModel
from structprune.latency.specs import Use
from structprune.latency.widths import Widths
from structprune.ops.relations import Axis
from structprune.planning.scopes import CoupledGroups

# A table over more coupled groups is not made; see `Part.tables`.
MOST_OWNERS = 4
# A number and groups whose shares multiply it; a group whose share is squared stands twice.
Products = dict[tuple[int, ...], float]
Table = tuple[tuple[int, ...], NDArray[np.float64]]
States = Sequence[NDArray[np.int64]]


class Part(ABC):
    """What a part of a cost comes to, which follows the states of some coupled groups.

    Attributes:
        owners: the numbers of these coupled groups, ascending.
    """

    owners: tuple[int, ...]

    @abstractmethod
    def values(self, states: States) -> NDArray[np.float64]:
        """Its value at each combination of the states of its owners; shape ``(states, ...)``, an axis an owner."""

    def tables(self, states: States, at: Sequence[int]) -> list[Table]:
        """Its value as tables that are added up, for the states to choose from of all coupled groups.

        Mostly that is one table, and exact. Over more than `MOST_OWNERS` it would have too many entries, so each owner
        has a table of its own: what the value becomes when this owner alone leaves the state that it is `at`.

        Args:
            states: for each coupled group, the states to choose from.
            at: the state of each coupled group from which they are seen.
        """
        mine = [states[owner] for owner in self.owners]
        if len(mine) <= MOST_OWNERS:
            return [(self.owners, self.values(mine))]
        here = [np.array([at[owner]]) for owner in self.owners]
        base = self.values(here).reshape(())
        moved = [self.values([*here[:i], mine[i], *here[i + 1 :]]).reshape(-1) for i in range(len(mine))]
        return [((), base), *(((owner,), value - base) for owner, value in zip(self.owners, moved, strict=True))]


class CountedPart(Part):
    """A sum of products of the shares that groups keep.

    Args:
        owners: the coupled groups that it follows.
        products: each a number and the groups whose shares multiply it.
        shares: for each of these groups, its owner's place in `owners` and its share in each state.
    """

    def __init__(
        self,
        owners: tuple[int, ...],
        products: Products,
        shares: Mapping[int, tuple[int, NDArray[np.float64]]],
    ) -> None:
        self.owners = owners
        self._products = products
        self._shares = shares

    def values(self, states: States) -> NDArray[np.float64]:
        """See `Part.values`."""
        total = np.zeros([len(each) for each in states])
        for groups, number in self._products.items():
            product = np.full([1] * len(states), number)
            for group in groups:
                place, share = self._shares[group]
                shape = [1] * len(states)
                shape[place] = -1
                product = product * share[states[place]].reshape(shape)
            total += product
        return total


class TimedPart(Part):
    """The time of an operation by the table of measured times, in milliseconds; looked up once for each point.

    Args:
        owners: the coupled groups that it follows.
        part: the operation, or the bytes that operations without a table move.
        time: predicts its time.
        widths: how its axes follow the groups.
        shares: for each group of one of the owners: the group, its owner's place and its share in each state.
    """

    def __init__(
        self,
        owners: tuple[int, ...],
        part: Use | Moved,
        time: TimeModel,
        widths: Widths,
        shares: Sequence[tuple[int, int, NDArray[np.float64]]],
    ) -> None:
        self.owners = owners
        self._part, self._time, self._widths, self._shares = part, time, widths, shares
        self._known: dict[tuple[int, ...], float] = {}

    def values(self, states: States) -> NDArray[np.float64]:
        """See `Part.values`."""
        points = np.stack(np.meshgrid(*states, indexing="ij"), axis=-1)
        seconds = [self._at(tuple(point)) for point in points.reshape(-1, len(states)).tolist()]
        return np.array(seconds).reshape(points.shape[:-1])

    def _at(self, point: tuple[int, ...]) -> float:
        if point not in self._known:
            shares = {group: float(share[point[place]]) for group, place, share in self._shares}
            self._known[point] = 1e3 * self._time.share(self._part, self._widths.counter(shares))
        return self._known[point]


@dataclass(frozen=True, slots=True)
class CostParts:
    """All parts of something that may be limited.

    Attributes:
        parts: those that follow widths.
        constant: the sum of all others.
    """

    parts: tuple[Part, ...]
    constant: float


class CostTables:
    """What may be limited, as parts that follow the states of coupled groups.

    Args:
        graph: the coupled channels.
        all_coupled: the groups whose widths are chosen, those that go together as one; all others stay whole.
        time: predicts the time of the network, for a target of latency.
    """

    def __init__(
        self, graph: ChannelGraph, all_coupled: Sequence[CoupledGroups], time: TimeModel | None = None
    ) -> None:
        self._graph, self._time = graph, time
        self._groups = [group for coupled in all_coupled for group in coupled.groups]
        self._owner = [number for number, coupled in enumerate(all_coupled) for _ in coupled.groups]
        self._shares = [
            coupled.counts[:, i] / coupled.counts[-1, i] for coupled in all_coupled for i in range(len(coupled.groups))
        ]
        self._widths = Widths(graph, self._groups)

    def of(self, name: str) -> CostParts:
        """The parts of one of `structprune.planning.targets.TARGETS` but memory, in the unit of its limit."""
        if name == "latency":
            return self._times()
        if name == "channels":
            others = sum(g.channels for g in self._graph.groups()) - sum(g.channels for g in self._groups)
            return self._counted({(): float(others), **{(i,): float(g.channels) for i, g in enumerate(self._groups)}})
        if name == "kv_cache":
            cache = KeyValueCache(self._graph.trace, self._graph.channels)
            return self._counted(_added(self._product(number, axes) for number, axes in cache.products()))
        return self._counted(self._expanded([self._graph.costs.totals[name]]))

    def memory(self, held: Iterable[int]) -> CostParts:
        """The bytes of the weights and of the results of these numbers; see `CostModel.results`."""
        costs = self._graph.costs
        return self._counted(self._expanded([costs.totals["weight_bytes"], *(costs.results[i] for i in held)]))

    # -- counted ---------------------------------------------------------------------------------------------------

    def _expanded(self, counts: Iterable[int | Polynomial]) -> Products:
        """Polynomials in the numbers of channels of axes, as products of the shares that groups keep."""
        axes = self._graph.costs.axes
        terms = [item for count in counts for item in ({(): count} if isinstance(count, int) else count.terms).items()]
        return _added(self._product(float(number), [axes[i] for i in product]) for product, number in terms)

    def _product(self, number: float, axes: Iterable[Axis]) -> Products:
        """`number` times the channels of `axes`, each of which is a sum: of 48 channels of group 0 and 16 of group 1.

        Times 9 and with one such axis: ``{(0,): 432, (1,): 144}``.
        """
        products: Products = {(): number}
        for axis in axes:
            terms = self._widths.terms(axis)
            products = _added(
                {tuple(sorted((*groups, *more))): value * count}
                for groups, value in products.items()
                for count, more in terms
            )
        return products

    def _counted(self, products: Products) -> CostParts:
        of_owners: dict[tuple[int, ...], Products] = {}
        for groups, number in products.items():
            of_owners.setdefault(tuple(sorted({self._owner[g] for g in groups})), {})[groups] = number
        constant = sum(of_owners.pop((), {}).values())
        return CostParts(tuple(self._counted_part(owners, held) for owners, held in of_owners.items()), constant)

    def _counted_part(self, owners: tuple[int, ...], products: Products) -> CountedPart:
        mine = {group for groups in products for group in groups}
        shares = {group: (owners.index(self._owner[group]), self._shares[group]) for group in mine}
        return CountedPart(owners, products, shares)

    # -- measured --------------------------------------------------------------------------------------------------

    def _times(self) -> CostParts:
        """The predicted time in milliseconds."""
        time = self._time
        if time is None:
            raise ValueError("nothing was measured")
        parts: list[Part] = []
        constant = time.calibration.constant
        for part in time.parts:
            axes = part.axes if isinstance(part, Moved) else [axis for held in part.channels.values() for axis in held]
            if groups := self._widths.groups_of(axes):
                owners = tuple(sorted({self._owner[group] for group in groups}))
                shares = [
                    (group, owners.index(owner), self._shares[group])
                    for group, owner in enumerate(self._owner)
                    if owner in owners
                ]
                parts.append(TimedPart(owners, part, time, self._widths, shares))
            else:
                constant += time.share(part, lambda axis: axis.size)
        return CostParts(tuple(parts), 1e3 * constant)


def _added(several: Iterable[Products]) -> Products:
    total: Products = {}
    for products in several:
        for groups, number in products.items():
            total[groups] = total.get(groups, 0.0) + number
    return total
