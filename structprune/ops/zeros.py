"""Where the result of an operation is zero once channels are removed.

Removing a channel is the same as making its parameters zero. Its activation is then zero too after a linear layer, a
norm or a ReLU, but one half after a sigmoid. A rule here says, for each dimension of a result, whether every entry at a
removed index of that dimension is zero. It pins what an operation sums over where that does not hold.

    x: (batch, 8) of a linear layer        zeros (False, True): a removed output channel is zero
    sigmoid(x)                             zeros (False, False): it is one half
    sigmoid(x) * x                         zeros (False, True): a product with zero
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from structprune.ops.arguments import arguments, positional
from structprune.ops.arguments import tensors as tensors_of
from structprune.ops.relations import Axes, Axis
from structprune.tracing.provenance import plain

Zeros = tuple[bool, ...]


class ZeroContext:
    """What a rule for zeros works with.

    Args:
        axes: the axes of every node, by number.
        zeros: what is known of every node before this one, by number.
        pin: called with an axis that an operation sums over where a removed channel is not zero.
        put_there: whether zeros count that the forward puts there itself, by padding or by writing into a slice.
    """

    def __init__(
        self, axes: list[Any], zeros: list[Any], pin: Callable[[Axis, fx.Node], None], *, put_there: bool = True
    ) -> None:
        self._all_axes, self._zeros, self._pin, self.put_there = axes, zeros, pin, put_there
        self.node: fx.Node
        self.axes: Axes = ()

    @property
    def tensors(self) -> list[fx.Node]:
        """The tensor arguments of the operation in order."""
        return tensors_of(self.node)

    def of(self, node: fx.Node) -> Zeros:
        """What is known of a tensor."""
        return self._zeros[node.meta["index"]]

    def axes_of(self, node: fx.Node) -> Axes:
        """The axes of a tensor."""
        return self._all_axes[node.meta["index"]]

    def summed(self, node: fx.Node, dim: int) -> None:
        """The operation sums over `dim` of `node`, whose removed channels are not zero there: they must stay."""
        axis = self.axes_of(node)[dim]
        if axis.free:
            self._pin(axis, self.node)

    def whole(self, node: fx.Node, back: int) -> bool:
        """Whether `node` has all the channels of dimension `back` (counted from the end) of the result."""
        axes = self.axes_of(node)
        return len(axes) >= -back and axes[back].size == self.axes[back].size


ZeroRule = Callable[[ZeroContext], Zeros]


def unknown(z: ZeroContext) -> Zeros:
    """Nothing is known: no entry is taken to be zero."""
    return (False,) * len(z.axes)


def everywhere(z: ZeroContext) -> Zeros:
    """All entries at removed indices are zero, whatever goes in."""
    return (True,) * len(z.axes)


def kept(z: ZeroContext) -> Zeros:
    """The zeros of the first tensor, entry by entry."""
    tensors = z.tensors
    zeros = z.of(tensors[0]) if tensors else ()
    return zeros if len(zeros) == len(z.axes) else unknown(z)


def moved(z: ZeroContext) -> Zeros:
    """A movement keeps zeros where an axis passes whole; an axis that is made of several needs them all."""
    return _moved(z, z.tensors)


def moved_first(z: ZeroContext) -> Zeros:
    """A movement of the first tensor; others say where to."""
    return _moved(z, z.tensors[:1])


def _moved(z: ZeroContext, tensors: Sequence[fx.Node]) -> Zeros:
    known: dict[object, bool] = {}
    everything = True
    for tensor in tensors:
        for axis, zero in zip(z.axes_of(tensor), z.of(tensor), strict=True):
            if axis.free:
                known[axis.key] = known.get(axis.key, True) and zero
                everything = everything and zero
    return tuple(known.get(axis.key, everything) if axis.free else False for axis in z.axes)


def repeated(z: ZeroContext) -> Zeros:
    """The first tensor repeated along dimensions: where a repeat is removed, it holds what all of them hold."""
    source = z.tensors[0]
    axes, zeros = z.axes_of(source), z.of(source)
    lead = len(z.axes) - len(axes)
    if lead < 0:
        return unknown(z)
    return (False,) * lead + tuple(
        zero and axis.size == mine.size for axis, zero, mine in zip(axes, zeros, z.axes[lead:], strict=True)
    )


def reduced(z: ZeroContext) -> Zeros:
    """A sum or a mean; what it runs over must be zero."""
    source = z.tensors[0]
    before = Counter(axis.key for axis in z.axes_of(source) if axis.free)
    # Of ``x[:, :, None] * x[:, None]`` two dimensions have the same channels, of which one may be left.
    gone = before - Counter(axis.key for axis in z.axes if axis.free)
    for dim, (axis, zero) in enumerate(zip(z.axes_of(source), z.of(source), strict=True)):
        if axis.free and axis.key in gone and not zero:
            z.summed(source, dim)
    return moved_first(z)


# Rules by which each entry of a result is one of the entries that go in, or a sum over other dimensions of such.
MOVES: frozenset[ZeroRule] = frozenset({kept, moved, moved_first, repeated, reduced})


def by_value(z: ZeroContext) -> Zeros:
    """Each entry is a function of the entries at its place: computed, with zero where an argument is zero.

    An argument without the channels of a dimension (a number, a tensor of size 1 there) may have any value.
    """
    zero_given: dict[frozenset[int], bool] = {}
    result: list[bool] = []
    tensors = z.tensors
    for dim in range(len(z.axes)):
        back = dim - len(z.axes)
        # A centred channel (``x - x.mean()``) takes no part where it is removed: norms run over the channels kept.
        off = frozenset(
            place
            for place, tensor in enumerate(tensors)
            if (z.whole(tensor, back) and z.of(tensor)[back]) or _is_mean(z, tensor, tensors[0], back)
        )
        if off not in zero_given:
            zero_given[off] = bool(off) and gives_zero(z.node, off)
        result.append(zero_given[off])
    return tuple(result)


def _is_mean(z: ZeroContext, node: fx.Node, of: fx.Node, back: int) -> bool:
    """Whether `node` is a mean of `of` over dimension `back`, subtracted from it."""
    if z.node.meta["name"] != "sub" or node is of:
        return False
    if node.meta["name"] == "part":
        parent = node.args[0]
        assert isinstance(parent, fx.Node)
        node = parent
    if node.meta["name"] not in ("mean", "var_mean", "std_mean"):
        return False
    source, mine = z.axes_of(tensors_of(node)[0]), z.axes_of(of)
    return len(source) >= -back and source[back].free and mine[back].free and source[back].key == mine[back].key


_ANY = (-2.5, -1.0, -0.25, 0.0, 0.3, 1.0, 3.5)
_zero_results: dict[object, bool] = {}


def gives_zero(node: fx.Node, off: frozenset[int], changed: Mapping[str, Any] | None = None) -> bool:
    """Whether an elementwise operation gives zero where the tensor arguments `off` are zero, whatever the others are.

    With `changed`, some of its arguments are others than in the call.

    It is run: with zeros for those, and with every combination of a few values for the others. With three tensors, of
    which the second is zero, ``addcmul(x, y, z)`` sees (x, 0, z) for 49 pairs (x, z), and gives x: not zero.
    """
    tensors = tensors_of(node)
    others = sum(place not in off for place in range(len(tensors)))
    if others > 2:
        return False
    types = tuple(str(tensor.meta.get("dtype")) for tensor in tensors)
    as_text: Any = _Tensor()
    rest = fx.map_arg((node.args, node.kwargs), lambda _: as_text)
    key = (node.meta["name"], str(node.target), off, types, str(plain(rest)), str(changed))
    if key not in _zero_results:
        _zero_results[key] = _run(node, tensors, off, others, changed or {})
    return _zero_results[key]


class _Tensor:
    """Stands for any tensor in the text of a call."""

    def __repr__(self) -> str:
        return "tensor"


def _run(node: fx.Node, tensors: list[fx.Node], off: frozenset[int], others: int, changed: Mapping[str, Any]) -> bool:
    products = iter(torch.meshgrid(*[torch.tensor(_ANY)] * others, indexing="ij")) if others else iter(())
    places = iter(range(len(tensors)))
    met_zero = torch.zeros([len(_ANY)] * others, dtype=torch.bool)

    def value(tensor: fx.Node) -> Tensor:
        nonlocal met_zero
        place = next(places)
        given = torch.zeros([len(_ANY)] * others) if place in off else next(products)
        dtype = tensor.meta["dtype"]
        given = given.to(torch.float64 if dtype.is_floating_point else dtype)
        if place not in off:
            met_zero = met_zero | (given == 0)
        return given

    given: Any = (node.args, node.kwargs)
    if changed:
        args, kwargs = positional(node.meta["name"], node.target, node.args, node.kwargs)
        for place, name in enumerate(arguments(node)):
            if name in changed:
                args[place] = changed[name]
        given = (tuple(args), kwargs)
    args, kwargs = plain(fx.map_arg(given, value))
    try:
        function: Any = getattr(args[0], str(node.target)) if node.op == "call_method" else node.target
        result = function(*(args[1:] if node.op == "call_method" else args), **kwargs)
        result = result() if callable(result) else result  # a property whose getter is a method: ``x.data``
    except (RuntimeError, TypeError, NotImplementedError, ValueError):
        return False  # it does not run on such tensors: nothing is known
    results: tuple[Any, ...] = tuple(result) if isinstance(result, (tuple, list)) else (result,)
    if any(not isinstance(r, Tensor) or r.is_meta or r.shape != met_zero.shape for r in results):
        return False
    # 0 / 0 counts as 0: both belong to channels that are removed.
    return all(bool(((r == 0) | (torch.isnan(r) & met_zero)).all()) for r in results)
