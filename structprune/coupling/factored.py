"""Products of axes while they are solved: what the cells and the indices of one, or of two alike, say of each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from structprune.ops.relations import Ids

T = TypeVar("T", bound=np.generic)

Edges = list[tuple[Ids, Ids]]
"""Pairs of arrays of one length: entry i of the one is the same channel as entry i of the other."""


@dataclass(frozen=True, slots=True, eq=False)
class FactoredAxis:
    """A product whose cells follow from its factors.

    With 2 heads of 3 channels, whose components are 6, 7 and 8, 9, 10: cells [[0, 1, 2], [3, 4, 5]], factors [6, 7] and
    [8, 9, 10], dims 0 and 1. Were the heads pinned, there would be no such product: 0 and 3 would be one component.

    Attributes:
        cells: their components, shaped like the product.
        factors: the components of each prunable factor.
        dims: the dimension of `cells` that each factor numbers.
        product: its number among the products of the relations.
    """

    cells: Ids
    factors: tuple[Ids, ...]
    dims: tuple[int, ...]
    product: int


def along(values: NDArray[T], dim: int, dims: int) -> NDArray[T]:
    """`values`, one for each index of dimension `dim`, so that they broadcast over `dims` dimensions: (1, n, 1)."""
    return values.reshape([-1 if i == dim else 1 for i in range(dims)])


def followed(products: Sequence[FactoredAxis]) -> Edges:
    """A product of a single prunable factor is a tie: each cell is the same as its index.

    Of 2 heads of 3 channels whose heads are pinned, cells [[0, 1, 2], [3, 4, 5]] equal [[8, 9, 10], [8, 9, 10]].
    """
    edges: Edges = []
    for product in products:
        if len(product.factors) == 1:
            index = np.broadcast_to(along(product.factors[0], product.dims[0], product.cells.ndim), product.cells.shape)
            if not np.array_equal(index, product.cells):
                edges.append((product.cells.ravel(), index.ravel()))
    return edges


def twins(products: Sequence[FactoredAxis]) -> tuple[Edges, list[FactoredAxis]]:
    """Products of the same cells have the same factors, and the other way round; the first of each stays."""
    edges: Edges = []
    first: list[FactoredAxis] = []
    by_cells: dict[object, FactoredAxis] = {}
    by_factors: dict[object, FactoredAxis] = {}
    for product in products:
        shape = product.cells.shape
        twin = by_cells.setdefault((shape, product.cells.tobytes()), product)
        if twin is not product and twin.dims == product.dims:
            pairs = zip(product.factors, twin.factors, strict=True)
            edges += [(a, b) for a, b in pairs if not np.array_equal(a, b)]
            continue
        twin = by_factors.setdefault((shape, tuple(part.tobytes() for part in product.factors)), product)
        if twin is not product and twin.dims == product.dims:
            if not np.array_equal(twin.cells, product.cells):
                edges.append((product.cells.ravel(), twin.cells.ravel()))
            continue
        first.append(product)
    return edges, first


def distinct(product: FactoredAxis) -> tuple[FactoredAxis, Edges]:
    """The product with each index of a factor once; cells of equal indices are to be joined.

    With indices [8, 9, 8] along dimension 1 of cells [[0, 1, 2], [3, 4, 5]], cells 0 and 2, and 3 and 5, are the same:
    cells [[0, 1], [3, 4]] and indices [8, 9] are left.
    """
    edges: Edges = []
    cells, factors = product.cells, list[Ids]()
    for dim, part in zip(product.dims, product.factors, strict=True):
        _, first, inverse = np.unique(part, return_index=True, return_inverse=True)
        if len(first) < len(part):
            rank = np.argsort(np.argsort(first))  # [8, 9, 8]: first [0, 1], inverse [0, 1, 0]
            kept = cells.take(np.sort(first), dim)
            again = kept.take(rank[inverse], dim)
            if not np.array_equal(again, cells):
                edges.append((again.ravel(), cells.ravel()))
            cells, part = kept, part[np.sort(first)]
        factors.append(part)
    return FactoredAxis(cells, tuple(factors), product.dims, product.product), edges
