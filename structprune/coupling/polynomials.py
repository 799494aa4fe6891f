"""Counts that are not known yet: polynomials in numbers of kept channels, and many of them evaluated at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

# A product of unknowns by their numbers, in ascending order; one that is squared stands twice.
Monomial = tuple[int, ...]


class Polynomial:
    """A sum of products of unknown whole numbers; it can be multiplied, added and compared as an ``int`` can.

    Comparisons are those of the values at full width: which of several broadcast sizes is the larger.

    Attributes:
        terms: the coefficient of each product.
        full: the value at full width.

    Example:
        >>> width = Polynomial({(0,): 1}, full=8)
        >>> (9 * width * width + width).terms, (9 * width * width + width).full
        ({(0, 0): 9, (0,): 1}, 584)
    """

    __slots__ = ("full", "terms")

    def __init__(self, terms: Mapping[Monomial, int], full: int) -> None:
        self.terms = terms
        self.full = full

    def __mul__(self, other: int | Polynomial) -> Polynomial:
        if isinstance(other, int):
            return Polynomial({product: other * number for product, number in self.terms.items()}, self.full * other)
        terms: dict[Monomial, int] = {}
        for left, a in self.terms.items():
            for right, b in other.terms.items():
                product = tuple(sorted(left + right))
                terms[product] = terms.get(product, 0) + a * b
        return Polynomial(terms, self.full * other.full)

    def __add__(self, other: int | Polynomial) -> Polynomial:
        return total([self, other])

    __rmul__ = __mul__
    __radd__ = __add__

    def __bool__(self) -> bool:
        return self.full != 0

    def __gt__(self, other: int | Polynomial) -> bool:
        return self.full > full(other)

    def __lt__(self, other: int | Polynomial) -> bool:
        return self.full < full(other)


def full(value: int | Polynomial) -> int:
    """The value at full width."""
    return value if isinstance(value, int) else value.full


def total(values: Iterable[int | Polynomial]) -> Polynomial:
    """The sum of all `values`, with equal products taken together."""
    terms: dict[Monomial, int] = {}
    whole = 0
    for value in values:
        whole += full(value)
        for product, number in ({(): value} if isinstance(value, int) else value.terms).items():
            terms[product] = terms.get(product, 0) + number
    return Polynomial(terms, whole)


class Evaluator:
    """The values of several polynomials at once, by arrays.

    Args:
        values: the polynomials.
        unknowns: how many unknowns there are.

    Example:
        >>> width = Polynomial({(0,): 1}, full=8)
        >>> Evaluator([9 * width * width, 5], unknowns=1)([4]).tolist()
        [144, 5]
    """

    def __init__(self, values: Sequence[int | Polynomial], unknowns: int) -> None:
        terms = [({(): value} if isinstance(value, int) else value.terms) for value in values]
        longest = max((len(product) for by_product in terms for product in by_product), default=0)
        # A product of fewer factors is filled up with a last unknown, which is always 1: x0 * x1 of at most three
        # factors among two unknowns are the factors 0, 1, 2.
        factors = [[*p, *[unknowns] * (longest - len(p))] for by_product in terms for p in by_product]
        self._factors = np.array(factors, dtype=np.int64).reshape(len(factors), longest)
        # Whole numbers of Python where those of 64 bits could overflow.
        large = sum(abs(full(value)) for value in values) >= 2**62
        self._kind: type = object if large else np.int64
        self._coefficients = np.array(
            [number for by_product in terms for number in by_product.values()], dtype=self._kind
        )
        self._owner = np.repeat(np.arange(len(values)), [len(by_product) for by_product in terms])
        self._count = len(values)

    def __call__(self, numbers: Sequence[int]) -> NDArray[np.int64]:
        """The value of each polynomial, shape ``(values,)``, when the unknowns are `numbers`."""
        powers = np.array([*numbers, 1], dtype=self._kind)[self._factors]
        result = np.zeros(self._count, dtype=self._kind)
        np.add.at(result, self._owner, self._coefficients * powers.prod(axis=1))
        return result
