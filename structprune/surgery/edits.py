"""The single changes that surgery makes, as plain data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from structprune.ops.gains import Gain


@dataclass(frozen=True, slots=True)
class RemovedSlice:
    """Indices `removed` of dimension `dim`, of `size` entries, of the tensor named `tensor` go.

    `order` holds the indices that stay as the smaller tensor has them; None where they keep their order.
    """

    tensor: str
    dim: int
    size: int
    removed: tuple[int, ...]
    order: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class SectionedSlice(RemovedSlice):
    """Equal sections of dimension 0 lose equally many, but other indices of dimension `dim`.

    `sections` are the indices that stay in each of them. `removed` are the last indices, as many as each section loses,
    so that ``size - len(removed)`` stay here too. The weight ``(out, in / groups, ...)`` of a grouped convolution is
    such a tensor: of 2 groups of 3 channels, ``sections=((0, 2), (1, 2))`` and ``removed=(2,)`` keep channels 0, 2, 4
    and 5.
    """

    sections: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class AttributeEdit:
    """The attribute at `chain` of the module `module` becomes `new`."""

    module: str
    chain: tuple[str | int, ...]
    old: int
    new: int


@dataclass(frozen=True, slots=True)
class Rescale:
    """Entries at the original `positions` (all, if None) of dimension `dim` of `tensor` are multiplied by `factor`."""

    tensor: str
    dim: int
    positions: tuple[int, ...] | None
    factor: float


@dataclass(frozen=True, slots=True)
class LiteralEdit:
    """Literal `old`, at `place` in the arguments of operation number `operation` run directly by `module`, is `new`."""

    module: str
    operation: int
    place: tuple[int | str, ...]
    old: int
    new: int


@dataclass(frozen=True)
class Edits:
    """All that is to change, and what the example inputs looked like (see `structprune.tracing.specification`).

    `caches` names the dicts (module, attribute) in which the forward keeps results of the old shape: they are emptied.
    `outputs` names the outputs that keep their shape; None if all do.
    """

    slices: tuple[RemovedSlice, ...]
    attribute_edits: tuple[AttributeEdit, ...]
    rescales: tuple[Rescale | Gain, ...]
    literal_edits: tuple[LiteralEdit, ...]
    caches: tuple[tuple[str, str], ...]
    inputs: Any
    outputs: tuple[str, ...] | None

    @property
    def thinnings(self) -> tuple[RemovedSlice, ...]:
        """The former name of `slices`."""
        return self.slices

    @property
    def repairs(self) -> tuple[AttributeEdit, ...]:
        """The former name of `attribute_edits`."""
        return self.attribute_edits

    @property
    def rewrites(self) -> tuple[LiteralEdit, ...]:
        """The former name of `literal_edits`."""
        return self.literal_edits
