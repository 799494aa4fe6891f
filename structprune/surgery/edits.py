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
