"""The record of an operation: all that the library knows of it stands here, in one place.

A walk over a trace asks the record, never the name. What an operation does to channels is `Op.coupling`; all else has a
default that is safe: an operation about which nothing more is said is not zero where its inputs are, costs nothing, is
no layer, and carries no factor along.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum, auto
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, fx

from structprune.errors import RuleError
from structprune.ops.kept import OverKept, entries_kept
from structprune.ops.relations import Axes, Axis
from structprune.ops.zeros import ZeroRule, unknown
from structprune.tracing.vocabulary import canonical

Result = Axes | list[Axes | None] | None
Coupling = Callable[..., Result]
Count = Callable[[Axis], int]
AxesOf = Callable[[fx.Node], Axes]
Macs = Callable[[fx.Node, AxesOf, Count], int]
Shape = Callable[..., Tensor | tuple[Tensor, ...] | None]


def like(x: Tensor) -> Tensor:
    """What ``torch.empty_like`` gives; that takes 20 times as long on ``meta``."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device) if x.is_contiguous() else torch.empty_like(x)


class Scaling(Enum):
    """How a factor on the result of an operation can be made of factors on what goes into it."""

    NONE = auto()
    """It cannot."""
    MOVES = auto()
    """By the factor on the entries that land there: a movement."""
    HOMOGENEOUS = auto()
    """By the same factor on the first argument, if it is positive: a ReLU, a change of type."""
    SUM = auto()
    """By the same factor on every term."""
    PRODUCT = auto()
    """By the factor on one of two factors."""
    CONTRACTION = auto()
    """By the same factor on all of the first argument."""
    LAYER = auto()
    """By the factor on the weights and biases that make the channels of dimension `Op.channel_dim`."""


class Indices(Enum):
    """What an operation does to a tensor whose values are the numbers of channels (the choices of a top-k)."""

    USED = auto()
    """It computes with them, so the channels that they number must stay."""
    PASSED = auto()
    """The result holds the same numbers."""
    PASSED_FIRST = auto()
    """The first of several results does."""
    ORDERED = auto()
    """Only their order or their number matters."""


@dataclass(frozen=True, slots=True)
class Pair:
    """Dimension `dim` of tensor argument `operand` is summed away against `weight_dim` of tensor argument `weight`.

    Tensor arguments are counted in the order of the call; dimensions count from the end, or from the front where they
    are not negative.
    """

    operand: int
    dim: int
    weight: int
    weight_dim: int


@dataclass(frozen=True, slots=True)
class Contraction:
    """An operation that sums products over dimensions of its arguments.

    Attributes:
        kind: ``"convolution"``, ``"transposed"``, ``"linear"``, ``"product"``, ``"attention"``, ``"bilinear"``,
            ``"einsum"``, ``"grouped"``, ``"embedding"`` or ``"recurrent"``.
        pairs: the dimensions that a call sums away, both ways round where neither side is the weight as such.
        input, weight, bias: names of its arguments in torch's signature. `input` is empty where the operation is no
            layer: two activations, or a form that no layer has.
    """

    kind: str
    pairs: Callable[[fx.Node], Iterable[Pair]]
    input: str = ""
    weight: str = ""
    bias: str = ""


@dataclass(frozen=True, slots=True)
class Norm:
    """A normalisation with learnt scales and shifts; names of its arguments in torch's signature.

    Attributes:
        weight, bias: the scale and the shift; empty where there is none.
        shape: the shape that it normalises over, if it is told one.
        statistics: running mean and variance.
    """

    weight: str = ""
    bias: str = ""
    shape: str = ""
    statistics: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Op:
    """All that is known of one operation.

    Attributes:
        name: canonical name: ``"add"`` for ``x + y``, ``x.add_(y)``, ``torch.add`` and ``aten.add``;
            ``"python.einsum"`` for a function written in Python that is taken as a whole; ``"mylib::gate"`` for one of
            the user's own.
        coupling: ``coupling(context, *arguments)`` relates the channels of the arguments, and gives the axes of the
            result.
        zeros: where the result is zero once channels are removed.
        macs: multiply-accumulates of a call; None for none.
        contraction: what it sums over, if it sums products.
        norm: its scales and shifts, if it is a normalisation with such.
        elementwise: whether each entry of the result is made of the entries at that place alone.
        moves: whether the result holds the entries of the first argument, none of them computed.
        views: whether the result shares the memory of the first argument.
        converts: whether it gives the first argument in another type or layout, and itself where it has that already.
        training_only: whether it gives the first argument as it is but in training mode: dropout.
        selects: whether each entry of the result is one of the first argument: a maximum.
        scaling: how a factor on the result can be had.
        channel_dim: the dimension of the result that holds a layer's channels.
        indices: what it does to the numbers of channels.
        over_kept: what runs a call over the channels that are kept alone, as the smaller network does, where its rule
            says that it reduces or normalises over some (`Context.reduces_over`); None where the others at zero change
            nothing, as in a sum.
        random: whether its result is drawn at random.
        creates: whether it makes a tensor from sizes, so that it takes a device.
        shape: the result on the ``meta`` device without running the operation; None where the operation has to say.
    """

    name: str
    coupling: Coupling
    zeros: ZeroRule = unknown
    macs: Macs | None = None
    contraction: Contraction | None = None
    norm: Norm | None = None
    elementwise: bool = False
    moves: bool = False
    views: bool = False
    converts: bool = False
    training_only: bool = False
    selects: bool = False
    scaling: Scaling = Scaling.NONE
    channel_dim: int = 1
    indices: Indices = Indices.USED
    over_kept: OverKept | None = entries_kept
    random: bool = False
    creates: bool = False
    shape: Shape | None = None

    @property
    def own(self) -> bool:
        """Whether the record is the library's own, not a user's."""
        return self.coupling.__module__.startswith("structprune.")


OPS: dict[str, Op] = {}
_make_pointwise: list[Callable[[str], Op]] = []


def default_for_pointwise(make: Callable[[str], Op]) -> Callable[[str], Op]:
    """Decorate the function that makes the record of an operation that torch tags as pointwise."""
    _make_pointwise[:] = [make]
    return make


def register_op(*names: str, **facts: Any) -> Callable[[Coupling], Coupling]:
    """Register the decorated function as the coupling of these operations, with what else is known of them.

    Args:
        names: canonical names of torch operations (``"conv2d"``), ``"namespace::name"`` of custom ones, or
            ``"python.name"`` of a function written in Python that is to be taken as a whole.
        facts: further fields of `structprune.ops.Op`. Left out, a field has a default that is safe.

    Returns:
        A decorator for ``coupling(c, *arguments)``: tensors are operands with one axis for each dimension (``x.axes``),
        and it returns the axes of the result, or a list of them for a tuple of results.

    Raises:
        RuleError: an operation has a record already, a name can never match, a field is unknown, or the decorated
            object cannot be called.

    Example::

        @structprune.register_op("mylib::scale_shift")
        def scale_shift(c, x, scale, shift):
            return c.broadcast([x, scale, shift])  # channels of the same place are kept or removed together
    """
    unknown_facts = facts.keys() - {field for field in Op.__dataclass_fields__ if field not in ("name", "coupling")}
    if unknown_facts:
        fields = ", ".join(Op.__dataclass_fields__)
        raise RuleError(f"An operation has no field {sorted(unknown_facts)[0]!r}. The fields are {fields}.")

    if not names:
        raise RuleError("names is empty: name the operations whose rule this is.")

    def register(function: Coupling) -> Coupling:
        if not callable(function):
            raise RuleError(f"A rule must be a function, not {type(function).__name__}.")
        for name in names:
            _refuse(name)
            OPS[name] = Op(name=name, coupling=function, **facts)
        return function

    return register


def _refuse(name: str) -> None:
    known = OPS.get(name) if isinstance(cast("object", name), str) else None
    if known is not None:
        raise RuleError(
            f"The operation {name!r} has a rule already ({known.coupling.__module__}.{known.coupling.__qualname__}). "
            "An operation has one rule: change that one, or unregister it first."
        )
    if not isinstance(cast("object", name), str) or not name:
        raise RuleError(f"names holds {name!r}; give canonical names, or namespace::name of operations of your own.")
    if name.startswith(("aten::", "prims::")):
        bare = name.partition("::")[2]
        raise RuleError(f"No operation is ever called {name!r}: torch's own have no namespace. Register {bare!r}.")
    if "::" in name or name.startswith(("python.", "module.")):
        return
    spelled, _ = canonical(name)
    if spelled != name:
        raise RuleError(f"No operation is ever called {name!r}: its canonical name is {spelled!r}. Register that one.")


def op_of(name: str) -> Op | None:
    """The record of an operation by its canonical name; None if nothing is known of it.

    Operations that torch itself tags as pointwise need no record of their own.
    """
    known = OPS.get(name)
    if known is None and _make_pointwise and _is_pointwise(name):
        known = OPS[name] = _make_pointwise[0](name)
    return known


@cache
def _is_pointwise(name: str) -> bool:
    """Whether torch tags an overload of this operator as pointwise."""
    packet = getattr(torch.ops.aten, name, None) if name.isidentifier() else None
    if not isinstance(packet, torch._ops.OpOverloadPacket):
        return False
    return any(torch.Tag.pointwise in getattr(packet, overload).tags for overload in packet.overloads())


def has_rule(name: str) -> bool:
    """Whether anything is known of an operation of this name."""
    return op_of(name) is not None


def layer_of(name: str) -> Contraction | None:
    """How an operation contracts its input with a weight, if it is one that a layer has; else None."""
    known = op_of(name)
    return (
        known.contraction if known is not None and known.contraction is not None and known.contraction.input else None
    )


# Kinds of contractions that are layers of an image.
CONVOLUTIONS = frozenset({"convolution", "transposed"})


def kind_of(name: str) -> str:
    """The kind of an operation's contraction (see `Contraction`); empty if it is none."""
    known = op_of(name)
    return "" if known is None or known.contraction is None else known.contraction.kind
