"""Where a channel that is switched off is zero, and where that matters.

Switching a channel off makes the parameters that belong to it zero. Its activation is then zero too after a linear
layer, a norm or a ReLU, but one half after a sigmoid. A consumer with weights of its own does not care, since its
weights for the channel go as well. A plain sum over channels, or a product of two activations, does: there a channel
may only go if it is zero when it is off. Where it is not, it is pinned.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import Any

from torch import fx

from structprune.channels.propagate import Channels
from structprune.ops.relations import Row
from structprune.tracing.trace import Trace, describe, part_of

Zeros = tuple[bool, ...]

# f(0) = 0
_PRESERVING = frozenset({
    "abs", "asin", "asinh", "atan", "atanh", "bfloat16", "ceil", "celu", "clone", "contiguous", "cpu", "cuda", "detach",
    "double", "dropout", "elu", "erf", "expm1", "feature_dropout", "float", "floor", "gelu", "half", "hardshrink",
    "hardswish", "leaky_relu", "log1p", "mish", "nan_to_num", "neg", "positive", "prelu", "relu", "relu6", "round",
    "rrelu", "selu", "sign", "silu", "sin", "sinh", "softshrink", "softsign", "sqrt", "square", "tan", "tanh",
    "tanhshrink", "trunc", "to", "type_as", "zeros_like", "alpha_dropout", "requires_grad",
})  # fmt: skip
_RESIZING = frozenset({"pad", "constant_pad_nd", "python.interpolate", "expand_as"})
_MEANS = frozenset({"mean", "var", "std", "var_mean", "std_mean"})
_SUMS = frozenset({"sum", "norm", "linalg_vector_norm", "nansum"})
_AFFINE_AT = {
    "linear": -1, "conv1d": -2, "conv2d": -3, "conv3d": -4, "conv_transpose1d": -2, "conv_transpose2d": -3,
    "conv_transpose3d": -4, "bilinear": -1,
}  # fmt: skip
_NORM_AT = {"batch_norm": 1, "instance_norm": 1, "group_norm": 1, "layer_norm": -1, "rms_norm": -1}
_PRODUCTS = frozenset({"matmul", "mm", "bmm", "mv", "dot", "baddbmm", "addmm", "cdist"})
_RECURRENT = frozenset(kind + suffix for kind in ("lstm", "gru", "rnn_tanh", "rnn_relu") for suffix in ("", "_cell"))


class ZeroPass:
    """One walk over a trace; afterwards the channels that may not go, because off is not zero, are pinned."""

    def __init__(self, trace: Trace, channels: Channels) -> None:
        self._trace = trace
        self._channels = channels
        self.zeros: list[Any] = []

    def run(self) -> None:
        """Walk, and add pins to the relations."""
        for node in self._trace.everything:
            self.zeros.append(self._node(node))

    # -- helpers -------------------------------------------------------------------------------------------------

    def _rows(self, node: fx.Node) -> tuple[Row, ...]:
        return self._channels.rows[node.meta["index"]]

    def _of(self, node: fx.Node) -> Zeros:
        return self.zeros[node.meta["index"]]

    def _pin(self, row: Row, node: fx.Node) -> None:
        if row.free:
            where = describe(node, self._trace)
            self._channels.relations.pin(row, f"a channel that is off is not zero there, and is summed over by {where}")

    def _tensors(self, node: fx.Node) -> list[fx.Node]:
        found: list[fx.Node] = []
        fx.map_arg((node.args, node.kwargs), found.append)
        return found

    # -- one node ------------------------------------------------------------------------------------------------

    def _node(self, node: fx.Node) -> Any:
        name, rows = node.meta["name"], self._channels.rows[node.meta["index"]]
        if name == "part":
            parent, position = part_of(node)
            return self.zeros[parent.meta["index"]][position]
        if isinstance(rows, list):
            parts: list[tuple[Row, ...] | None] = rows
            single = self._single(node, name, next((part for part in parts if part is not None), ()))
            return [single if part is not None and len(part) == len(single) else _none(part) for part in parts]
        return self._single(node, name, rows)

    def _single(self, node: fx.Node, name: str, rows: tuple[Row, ...]) -> Zeros:
        tensors = self._tensors(node)
        if name == "parameter":
            return tuple(bool(node.meta["dtype"].is_floating_point) for _ in rows)
        if name in ("zeros", "new_zeros"):
            return tuple(True for _ in rows)
        source = node.meta.get("keeps_zeros")
        if source is not None:
            return self._of(source)
        family = next((family for names, family in _FAMILIES if name in names), None)
        return _none(rows) if family is None or not tensors else family(self, node, tensors, rows)

    def kept(self, node: fx.Node, tensors: list[fx.Node], rows: tuple[Row, ...]) -> Zeros:
        """f(0) = 0: zeros stay where they are."""
        return self._of(tensors[0])

    def factors(self, node: fx.Node, tensors: list[fx.Node], rows: tuple[Row, ...]) -> Zeros:
        """A product is zero where one factor is."""
        factors = tensors if node.meta["name"] == "mul" else tensors[:1]
        return tuple(self._any(factors, rows, d) for d in range(len(rows)))

    def added(self, node: fx.Node, tensors: list[fx.Node], rows: tuple[Row, ...]) -> Zeros:
        """Rows of one tensor added to, or put in the place of, rows of another."""
        x, source = self._of(tensors[0]), self._of(tensors[-1])
        return tuple(z and s for z, s in zip(x, source, strict=True)) if len(x) == len(source) else _none(rows)

    def power(self, node: fx.Node, tensors: list[fx.Node], rows: tuple[Row, ...]) -> Zeros:
        """A positive power of zero is zero."""
        exponent = node.args[1] if len(node.args) > 1 else None
        return self._of(tensors[0]) if isinstance(exponent, (int, float)) and exponent > 0 else _none(rows)

    def clamped(self, node: fx.Node, tensors: list[fx.Node], rows: tuple[Row, ...]) -> Zeros:
        """Zero stays if it lies between the bounds."""
        return self._of(tensors[0]) if self._spans_zero(node) else _none(rows)

    def everywhere(self, node: fx.Node, tensors: list[fx.Node], rows: tuple[Row, ...]) -> Zeros:
        """Made of parameters alone."""
        return tuple(True for _ in rows)

    def last(self, node: fx.Node, tensors: list[fx.Node], rows: tuple[Row, ...]) -> Zeros:
        """Zero in the last dimension, whose parameters are off."""
        return (*_none(rows[:-1]), True)

    def _any(self, tensors: list[fx.Node], rows: tuple[Row, ...], dim: int) -> bool:
        """Whether one of the factors is zero at every index of `dim` that is off."""
        back = dim - len(rows)
        return any(
            -back <= len(self._rows(t)) and self._rows(t)[back].size == rows[dim].size and self._of(t)[back]
            for t in tensors
        )

    def sum_like(self, node: fx.Node, tensors: list[fx.Node], rows: tuple[Row, ...]) -> Zeros:
        """A sum is zero where all of its terms are."""
        name = node.meta["name"]
        if name == "where":
            tensors = [t for t in node.args[1:] if isinstance(t, fx.Node)]
        numbers = [a for a in node.args if isinstance(a, (int, float)) and not isinstance(a, bool) and a != 0]
        result = []
        for dim in range(len(rows)):
            back = dim - len(rows)
            whole = [t for t in tensors if len(self._rows(t)) >= -back and self._rows(t)[back].size == rows[dim].size]
            rest = [t for t in tensors if t not in whole and not (name == "sub" and self._is_mean(t, tensors[0], back))]
            result.append(not numbers and not rest and bool(whole) and all(self._of(t)[back] for t in whole))
        return tuple(result)

    def _is_mean(self, node: fx.Node, of: fx.Node, back: int) -> bool:
        """Whether `node` is a mean of `of` over dimension `back`: a centred channel takes no part when it is off."""
        if node.meta["name"] == "part":
            node, _ = part_of(node)
        if node.meta["name"] not in ("mean", "var_mean", "std_mean"):
            return False
        source = self._rows(self._tensors(node)[0])
        mine = self._rows(of)
        return len(source) >= -back and source[back].free and mine[back].free and source[back].key == mine[back].key

    def _spans_zero(self, node: fx.Node) -> bool:
        bounds = [*node.args[1:], node.kwargs.get("min"), node.kwargs.get("max")]
        low, high = (bounds[0] if len(node.args) > 1 else bounds[-2]), (bounds[1] if len(node.args) > 2 else bounds[-1])
        if node.meta["name"] == "hardtanh" and low is None:
            return True
        below = low is None or (isinstance(low, (int, float)) and low <= 0)
        above = high is None or (isinstance(high, (int, float)) and high >= 0)
        return below and above

    def affine(self, node: fx.Node, tensors: list[fx.Node], rows: tuple[Row, ...]) -> Zeros:
        """Weights and bias of an output channel that is off are zero."""
        name = node.meta["name"]
        parameters = tensors[2:] if name == "bilinear" else tensors[1:]
        weight, bias = parameters[0], parameters[1:]
        self._summed(node, name, tensors[0], weight)
        out = 1 if name.startswith("conv_transpose") else 0
        at = _AFFINE_AT[name] % len(rows)
        zero = self._of(weight)[out] and all(self._of(b)[0] for b in bias)
        x = self._of(tensors[0])
        return tuple(zero if d == at else not bias and d < len(x) and x[d] for d in range(len(rows)))

    def _summed(self, node: fx.Node, name: str, x: fx.Node, weight: fx.Node) -> None:
        """A layer sums over its input channels: off, they must be zero in the input or in the weight."""
        inputs, zero = self._rows(x), self._of(weight)
        across = 0 if name.startswith("conv_transpose") else min(1, len(zero) - 1)
        at = _AFFINE_AT[name] % len(inputs)
        if not (zero[across] or self._of(x)[at]):
            self._pin(inputs[at], node)

    def norm(self, node: fx.Node, tensors: list[fx.Node], rows: tuple[Row, ...]) -> Zeros:
        """So are those of a normalised one."""
        name = node.meta["name"]
        parameters = tensors[1:]
        at = _NORM_AT[name] % len(rows)
        x = self._of(tensors[0])
        zero = x[at] if not parameters else all(self._of(p)[-1] for p in parameters)
        keeps = name == "rms_norm" or not parameters
        return tuple(zero if d == at else keeps and x[d] for d in range(len(rows)))

    def resized(self, node: fx.Node, tensors: list[fx.Node], rows: tuple[Row, ...]) -> Zeros:
        """Padding with zeros keeps them."""
        value = node.args[3] if len(node.args) > 3 else node.kwargs.get("value")
        x = self._of(tensors[0])
        return x if not value and len(x) == len(rows) else _none(rows)

    def product(self, node: fx.Node, tensors: list[fx.Node], rows: tuple[Row, ...]) -> Zeros:
        """A matrix product; what it sums over must be zero in one of its factors."""
        a, b = tensors[-2:]
        left, right = self._of(a), self._of(b)
        if node.meta["name"] == "cdist":
            zero = left[len(left) - 1] and right[len(right) - 1]
        else:
            zero = left[len(left) - 1] or right[max(0, len(right) - 2)]
        if not zero:
            self._pin(self._rows(a)[len(left) - 1], node)
        if node.meta["name"] in ("baddbmm", "addmm", "cdist"):
            return _none(rows)
        result = [False] * len(rows)
        if len(left) > 1 and len(right) > 1:
            result[-1], result[-2] = right[len(right) - 1], left[len(left) - 2]
            for back in range(3, len(rows) + 1):
                result[-back] = any(len(z) >= back and z[-back] for z in (left, right))
        elif rows:
            result[-1] = left[len(left) - 2] if len(left) > 1 else right[len(right) - 1]
        return tuple(result)

    def routed(self, node: fx.Node, tensors: list[fx.Node], rows: tuple[Row, ...]) -> Zeros:
        """An expert that is off takes no share, and no token."""
        return tuple(row.free for row in rows)

    def softened(self, node: fx.Node, tensors: list[fx.Node], rows: tuple[Row, ...]) -> Zeros:
        """So does one that a softmax leaves out; elsewhere zero becomes a share like any other."""
        dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else -1)
        return tuple(isinstance(dim, int) and place == dim % len(rows) for place in range(len(rows)))

    def running(self, node: fx.Node, tensors: list[fx.Node], rows: tuple[Row, ...]) -> Zeros:
        """A sum up to each channel; what it runs over must be zero."""
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        zero = self._of(tensors[0])
        at = dim % len(rows) if isinstance(dim, int) else 0
        if not zero[at]:
            self._pin(rows[at], node)
        return tuple(z and place != at for place, z in enumerate(zero))

    def grouped(self, node: fx.Node, tensors: list[fx.Node], rows: tuple[Row, ...]) -> Zeros:
        """Tokens times the weights of their experts."""
        left, right = self._of(tensors[0]), self._of(tensors[1])
        if len(left) != 2 or len(right) != 3:
            return _none(rows)
        if not (left[1] or right[1]):
            self._pin(self._rows(tensors[0])[1], node)
        return (False, right[2])

    def attention(self, node: fx.Node, tensors: list[fx.Node], rows: tuple[Row, ...]) -> Zeros:
        """Scores are summed over the head's size, in which query or key must be zero."""
        query, key, value = (self._of(t) for t in tensors[:3])
        if not (query[-1] or key[-1]):
            self._pin(self._rows(tensors[0])[-1], node)
        return (*value[: len(rows) - 2], False, value[-1]) if len(value) == len(rows) else _none(rows)

    def einsum(self, node: fx.Node, tensors: list[fx.Node], rows: tuple[Row, ...]) -> Zeros:
        """A product; letters that are summed over must be zero in one of the factors."""
        equation = node.args[0]
        if not isinstance(equation, str) or "->" not in equation or "..." in equation:
            for tensor in tensors:
                for row, off in zip(self._rows(tensor), self._of(tensor), strict=True):
                    if not off:
                        self._pin(row, node)
            return _none(rows)
        inputs, _, output = equation.replace(" ", "").partition("->")
        zero: dict[str, bool] = {}
        where: dict[str, Row] = {}
        for term, tensor in zip(inputs.split(","), tensors, strict=True):
            for letter, row, off in zip(term, self._rows(tensor), self._of(tensor), strict=True):
                zero[letter] = zero.get(letter, False) or off
                where[letter] = row if letter not in where or row.free else where[letter]
        for letter, row in where.items():
            if letter not in output and not zero[letter]:
                self._pin(row, node)
        return tuple(zero[letter] for letter in output)

    def reduction(self, node: fx.Node, tensors: list[fx.Node], rows: tuple[Row, ...]) -> Zeros:
        """A sum or a mean; what it runs over must be zero."""
        source, zero = self._rows(tensors[0]), self._of(tensors[0])
        kept = {row.key for row in rows if row.free}
        for row, z in zip(source, zero, strict=True):
            if row.free and row.key not in kept and not z:
                self._pin(row, node)
        return self.moved(node, tensors[:1], rows)

    def moved(self, node: fx.Node, tensors: list[fx.Node], rows: tuple[Row, ...]) -> Zeros:
        """A movement keeps zeros where a row passes whole; a row that is made of several needs them all."""
        known: dict[object, bool] = {}
        everything = True
        for tensor in tensors:
            for row, zero in zip(self._rows(tensor), self._of(tensor), strict=True):
                if row.free:
                    known[row.key] = known.get(row.key, True) and zero
                    everything = everything and zero
        return tuple(known.get(row.key, everything) if row.free else False for row in rows)


def _none(rows: Any) -> Zeros:
    return tuple(False for _ in rows) if rows is not None else ()


_POOLS = frozenset(
    name.format(dims)
    for dims in (1, 2, 3)
    for name in (
        "avg_pool{}d", "max_pool{}d", "max_pool{}d_with_indices", "adaptive_avg_pool{}d", "adaptive_max_pool{}d",
        "upsample_nearest{}d", "_upsample_nearest_exact{}d", "reflection_pad{}d", "replication_pad{}d",
    )
) | {"upsample_linear1d", "upsample_bilinear2d", "upsample_bicubic2d", "upsample_trilinear3d"}  # fmt: skip
_MOVES = frozenset({
    "view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze", "transpose", "permute", "movedim", "T", "t",
    "mT", "flip", "roll", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "getitem", "select", "narrow",
    "unbind", "chunk", "split", "split_with_sizes", "python.split", "cat", "stack", "index_select", "gather",
    "im2col", "col2im", "unfold", "glu", "repeat_interleave", "tile", "repeat", "view_as", "reshape_as", "setitem",
    "tensor_split", "native_channel_shuffle",
})  # fmt: skip

_Family = Callable[[ZeroPass, fx.Node, list[fx.Node], tuple[Row, ...]], Zeros]
_FAMILIES: list[tuple[Container[str], _Family]] = [
    (_PRESERVING, ZeroPass.kept),
    (_RESIZING, ZeroPass.resized),
    (_MOVES, ZeroPass.moved),
    (_POOLS, ZeroPass.moved),
    (("mul", "div"), ZeroPass.factors),
    (("add", "sub", "where", "maximum", "minimum", "lerp", "copy"), ZeroPass.sum_like),
    (("index_add", "index_copy"), ZeroPass.added),
    (("pow",), ZeroPass.power),
    (("hardtanh", "clamp"), ZeroPass.clamped),
    (_AFFINE_AT, ZeroPass.affine),
    (_NORM_AT, ZeroPass.norm),
    (("_weight_norm",), ZeroPass.everywhere),
    (_RECURRENT | {"embedding", "python.embedding_bag"}, ZeroPass.last),
    (_PRODUCTS, ZeroPass.product),
    (("scaled_dot_product_attention",), ZeroPass.attention),
    (("_grouped_mm", "transformers::grouped_mm_fallback"), ZeroPass.grouped),
    (("softmax", "_softmax", "python.softmax"), ZeroPass.softened),
    (("histc", "bincount", "one_hot"), ZeroPass.routed),
    (("cumsum",), ZeroPass.running),
    (("python.einsum",), ZeroPass.einsum),
    (_MEANS | _SUMS, ZeroPass.reduction),
]
