"""Names of the torch API's calls, and how to look inside those that are written in Python.

A ``TorchFunctionMode`` sees each call of the torch API as a function object: a builtin, a method, a property's getter,
an operator of ``torch.ops``. Here each gets one canonical name, so that ``x + y``, ``x.add_(y)`` and ``torch.add``
share a rule. Functions written in Python (``F.multi_head_attention_forward``) are opened, so that a rule table over
builtins is enough.
"""

from __future__ import annotations

import operator
import types
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

from structprune.tracing.provenance import SizeFloat, SizeInt, plain

_OPERATORS = {
    "add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor", "lshift", "rshift",
}  # fmt: skip
_SPELLINGS = {
    "truediv": "div", "true_divide": "div", "divide": "div", "multiply": "mul", "subtract": "sub", "rsub": "sub",
    "floordiv": "floor_divide", "mod": "remainder", "and": "bitwise_and", "or": "bitwise_or", "xor": "bitwise_xor",
    "negative": "neg", "absolute": "abs", "concat": "cat", "concatenate": "cat", "swapaxes": "transpose",
    "swapdims": "transpose", "greater": "gt", "less": "lt", "less_equal": "le", "greater_equal": "ge",
    "not_equal": "ne", "clip": "clamp", "moveaxis": "movedim", "arctan": "atan", "row_stack": "vstack",
    "arctan2": "atan2", "fix": "trunc", "inner_product": "inner",
}  # fmt: skip
_METHODS = {"neg", "abs", "invert", "eq", "ne", "lt", "le", "gt", "ge", "pos"}
_SPECIAL = {
    "expit": "sigmoid", "psi": "digamma", "gammaln": "lgamma", "multigammaln": "mvlgamma", "gammainc": "igamma",
    "gammaincc": "igammac",
}  # fmt: skip

# Questions about a tensor that are answered without an operation.
QUERIES = frozenset({
    "dim", "ndim", "ndimension", "device", "dtype", "layout", "requires_grad", "is_cuda", "is_cpu", "is_meta",
    "is_leaf", "is_sparse", "is_quantized", "is_nested", "is_mps", "is_xpu", "is_floating_point", "is_complex",
    "is_contiguous", "is_conj", "is_neg", "is_inference", "is_pinned", "is_shared", "is_same_size", "is_signed",
    "is_sparse_csr", "is_mkldnn", "is_vulkan", "is_ipu", "is_xla", "is_maia", "is_mtia", "is_ort", "is_hpu",
    "is_distributed", "element_size", "itemsize", "nbytes", "stride", "storage_offset", "data_ptr", "grad", "grad_fn",
    "get_device", "name", "names", "output_nr", "retains_grad", "_version", "_is_view", "_base", "__hash__", "__len__",
    "untyped_storage", "__repr__", "__format__", "__dir__", "_has_symbolic_sizes_strides", "__dlpack_device__",
    "has_names", "result_type", "can_cast", "get_default_dtype", "_is_zerotensor", "is_coalesced",
    "__setstate__", "__reduce_ex__", "register_hook", "retain_grad", "is_storage", "is_tensor", "iscomplexobj",
    "broadcast_shapes", "promote_types", "_nested_tensor_size", "is_autocast_enabled", "_sym_size", "imag_query",
})  # fmt: skip
VALUES = frozenset({"item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__", "__array__", "equal",
                    "allclose", "__contains__", "nonzero", "unique", "is_nonzero", "__complex__"})  # fmt: skip
# These hand all entries to something that is not torch. What becomes of them is not seen, so no rule can know it.
HANDED_OUT = frozenset({"numpy", "tolist", "__array__"})
SIZES = frozenset({"shape", "size", "numel", "nelement"})


class Operation(Protocol):
    """What a recorder asks of an operation's record.

    Attributes:
        shape: the result on the ``meta`` device without running the operation; None where the operation has to say.
        random: whether its result is drawn at random.
        creates: whether it makes a tensor from sizes, so that it takes a device.
        training_only: whether it gives its first argument as it is but in training mode.
    """

    @property
    def training_only(self) -> bool:
        """See the class."""
        ...

    @property
    def shape(self) -> Callable[..., Tensor | tuple[Tensor, ...] | None] | None:
        """See the class."""
        ...

    @property
    def random(self) -> bool:
        """See the class."""
        ...

    @property
    def creates(self) -> bool:
        """See the class."""
        ...


# What is known of the operation of a canonical name, or None.
Lookup = Callable[[str], Operation | None]


def nothing_known(_: str) -> None:
    """A lookup by which every Python function is opened."""


class Kind(Enum):
    """What the recorder does with a call."""

    QUERY = auto()
    SIZE = auto()
    COMPOSITE = auto()
    OPERATION = auto()


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """A function of the torch API: its canonical name, what to do with it, how to write it into a graph."""

    name: str
    kind: Kind
    target: Callable[..., Any] | str
    method: bool
    inside: Callable[..., Any] | None = None
    inplace: bool = False


class _FloatType(type):
    """What ``float`` means inside opened functions: ``float(n)`` of a tracked number stays tracked."""

    def __call__(cls, value: Any = 0.0) -> Any:
        if isinstance(value, SizeInt):
            return SizeFloat(float(plain(value)), value.expression)
        return value if isinstance(value, SizeFloat) else float(value)

    def __instancecheck__(cls, value: Any) -> bool:
        return isinstance(value, float)


class _Float(metaclass=_FloatType):
    """Stands for ``float``."""


def _opened(function: types.FunctionType, outer: types.FunctionType | None = None) -> types.FunctionType:
    """A copy of a Python function that does not hand itself to the mode again, but runs its body."""
    names = {name: (lambda *_: False) for name in function.__globals__ if name.startswith("has_torch_function")}
    # F.max_pool2d and its like hold the functions that they choose from in their closure.
    closure = function.__closure__ and tuple(
        types.CellType(_opened(cell.cell_contents, function))
        if isinstance(cell.cell_contents, types.FunctionType) and cell.cell_contents not in (function, outer)
        else cell
        for cell in function.__closure__
    )
    scope = {**function.__globals__, **names, "float": _Float}
    copy = types.FunctionType(function.__code__, scope, function.__name__, function.__defaults__, closure)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


@cache
def _is_view(name: str) -> bool:
    """Whether torch declares that the result of an operator shares memory with its argument: ``permute``."""
    packet = getattr(torch.ops.aten, name, None) if name.isidentifier() else None
    if not isinstance(packet, torch._ops.OpOverloadPacket):
        return False
    returns = [r for overload in packet.overloads() for r in getattr(packet, overload)._schema.returns]
    return any(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def _operator(name: str) -> tuple[str, bool]:
    """The name of the operator behind a method of Python, and whether it writes: ``__iadd__`` is ``("add", True)``."""
    inner = name.strip("_")
    if inner[0] in "ir" and inner[1:] in _OPERATORS:
        return inner[1:], inner[0] == "i"
    return (inner if inner in _OPERATORS or inner in _METHODS else name), False


def canonical(name: str) -> tuple[str, bool]:
    """Canonical name, and whether the call writes into its first argument."""
    inplace = False
    if name.startswith("__") and name.endswith("__"):
        if name in ("__getitem__", "__setitem__"):
            return name.strip("_"), name == "__setitem__"
        name, inplace = _operator(name)
    elif name.endswith("_") and not name.startswith("_") and not name.endswith("__"):
        name, inplace = name[:-1], True
    name = _SPELLINGS.get(name, name)
    if name.endswith("_copy") and _is_view(name[:-5]):  # a view, and its entries copied
        name = _SPELLINGS.get(name[:-5], name[:-5])
    if name.startswith("special_"):  # torch.special has many functions under a second name
        plain = _SPECIAL.get(name[8:], name[8:])
        name = plain if hasattr(torch.ops.aten, plain) else name
    return name, inplace


_cache: dict[Any, Call] = {}


def call_of(function: Any, operations: Lookup) -> Call:
    """The `Call` for a function that the mode saw; `operations` says which Python functions are known as a whole."""
    prop = isinstance(function, types.MethodWrapperType) and function.__name__ in ("__get__", "__set__", "__delete__")
    key: Any = (getattr(function.__self__, "__name__", ""), function.__name__) if prop else function
    if isinstance(function, types.FunctionType):
        key = function, operations(f"python.{function.__name__}") is None
    call = _cache.get(key)
    if call is None:
        call = _cache[key] = _property(*key) if prop else _call(function, operations)
    return call


def _property(name: str, accessor: str) -> Call:
    if accessor != "__get__":
        return Call("set_" + name, Kind.OPERATION, setattr, False, inplace=True)
    if name in SIZES:
        return Call(name, Kind.SIZE, "size", True)
    if name in QUERIES:
        return Call(name, Kind.QUERY, name, True)
    return Call({"data": "detach"}.get(name, name), Kind.OPERATION, getattr, False)


def _call(function: Any, operations: Lookup) -> Call:
    if isinstance(function, torch._ops.OpOverload):
        space, _, name = function._schema.name.partition("::")
        if space == "aten":
            plain, inplace = canonical(name)
            return Call(plain, Kind.OPERATION, function, False, inplace=inplace)
        return Call(f"{space}::{name}", Kind.OPERATION, function, False)
    if isinstance(function, torch._ops.OpOverloadPacket):
        space, _, name = function._qualified_op_name.partition("::")
        return Call(canonical(name)[0] if space == "aten" else f"{space}::{name}", Kind.OPERATION, function, False)
    raw = getattr(function, "__name__", str(function))
    if raw in SIZES:
        return Call(raw, Kind.SIZE, raw, True)
    if raw in QUERIES:
        return Call(raw, Kind.QUERY, raw, True)
    name, inplace = canonical(raw)
    method = isinstance(function, (types.MethodDescriptorType, types.WrapperDescriptorType))
    if isinstance(function, types.FunctionType) and operations(f"python.{raw}") is None:
        return Call(name, Kind.COMPOSITE, function, False, _opened(function))
    if isinstance(function, types.FunctionType):
        return Call(f"python.{raw}", Kind.OPERATION, function, False)
    dunder = raw.startswith("__")
    target: Any = raw if method and not dunder else getattr(operator, raw, function) if dunder else function
    return Call(name, Kind.OPERATION, target, isinstance(target, str), inplace=inplace)
