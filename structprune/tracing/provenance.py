"""Ints that remember where they came from.

While a model is traced, the sizes of its tensors and the int attributes of its modules stand as `SizeInt`: an ``int``
that carries the expression it was computed by. ``reshape(B, N, self.num_heads, C // self.num_heads)`` thus tells the
library which attributes must change, and which sizes follow by themselves, once channels have been removed.
"""

from __future__ import annotations

import math
import operator
import sys
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

TORCH_DIRECTORY = torch.__file__.rsplit("__init__", 1)[0]
OWN_DIRECTORY = __file__.rsplit("tracing", 1)[0]


@dataclass(frozen=True, slots=True)
class Constant:
    """A literal, or an int from a place that the tracer cannot see."""

    value: float

    def __str__(self) -> str:
        return str(self.value)


@dataclass(frozen=True, slots=True)
class Literal:
    """A plain int in the arguments of node number `node`, at `place`: ``(1, 0)`` is the first item of argument 1."""

    value: int
    node: int
    place: tuple[int | str, ...]

    def __str__(self) -> str:
        return str(self.value)


@dataclass(frozen=True, slots=True)
class Dim:
    """The size of dimension `dim` of the tensor that node number `node` of the trace produces."""

    node: int
    dim: int

    def __str__(self) -> str:
        return f"%{self.node}.size({self.dim})"


@dataclass(frozen=True, slots=True)
class Attribute:
    """An int attribute of the module `module`; `chain` leads through held objects: ``("config", "hidden_size")``.

    A last int in `chain` is a position in a tuple or list.
    """

    module: str
    chain: tuple[str | int, ...]

    def __str__(self) -> str:
        return ".".join([self.module or "model", *map(str, self.chain)])


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """`function` (named `symbol`) of two expressions, or of one when `right` is None."""

    symbol: str
    function: Callable[..., Any]
    left: Expression
    right: Expression | None = None

    def __str__(self) -> str:
        return f"{self.symbol}({self.left})" if self.right is None else f"({self.left} {self.symbol} {self.right})"


Expression = Constant | Literal | Dim | Attribute | Arithmetic


def evaluate(expression: Expression, leaf: Callable[[Dim | Attribute], float]) -> float:
    """Value of `expression` when each size and attribute has the value that `leaf` gives it."""
    if isinstance(expression, (Constant, Literal)):
        return expression.value
    if not isinstance(expression, Arithmetic):
        return leaf(expression)
    left = evaluate(expression.left, leaf)
    if expression.right is None:
        return expression.function(left)
    return expression.function(left, evaluate(expression.right, leaf))


def leaves(expression: Expression) -> Iterator[Dim | Attribute]:
    """The sizes and attributes that `expression` is made of, from left to right."""
    if isinstance(expression, Arithmetic):
        yield from leaves(expression.left)
        if expression.right is not None:
            yield from leaves(expression.right)
    elif not isinstance(expression, (Constant, Literal)):
        yield expression


def literals(expression: Expression) -> Iterator[Literal]:
    """The literals that stand as arguments of calls in `expression`."""
    if isinstance(expression, Arithmetic):
        yield from literals(expression.left)
        if expression.right is not None:
            yield from literals(expression.right)
    elif isinstance(expression, Literal):
        yield expression


@dataclass(frozen=True, slots=True)
class Comparison:
    """Python compared two tracked numbers: after pruning, the outcome must be the same, or another branch would run."""

    symbol: str
    function: Callable[[Any, Any], bool]
    left: Expression
    right: Expression
    outcome: bool
    where: str

    def fewest(self, size: int) -> int:
        """How many of `size` channels, whose number is all that is compared, must be left for the outcome to stay."""

        def holds(number: int) -> bool:
            try:
                left, right = (evaluate(side, lambda _: number) for side in (self.left, self.right))
            except ZeroDivisionError:
                return False
            return bool(self.function(left, right)) == self.outcome

        return next((number + 1 for number in range(size - 1, 0, -1) if not holds(number)), 1)


@dataclass(frozen=True, slots=True)
class Escape:
    """A tracked number left for plain Python (``float(n)``): what it was used for is unknown, so it must not change."""

    expression: Expression
    where: str


class Ledger:
    """What Python did with tracked numbers outside tensor operations."""

    def __init__(self) -> None:
        self.comparisons: dict[tuple[str, Expression, Expression], Comparison] = {}
        self.escapes: dict[Expression, Escape] = {}


_ledger: ContextVar[Ledger | None] = ContextVar("structprune_ledger", default=None)
# For each code object that was seen, by ``id`` since hashing one takes long: the object itself, so that no
# other gets its id, and its lines by instruction; None for torch's and the library's own.
_seen_code: dict[int, tuple[Any, dict[int, str] | None]] = {}


def source_line() -> str:
    """File and line of the innermost frame outside torch and this library."""
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        known = _seen_code.get(id(code))
        if known is None:
            own = code.co_filename.startswith((TORCH_DIRECTORY, OWN_DIRECTORY, "<"))
            known = _seen_code[id(code)] = code, None if own else {}
        lines = known[1]
        if lines is not None:
            line = lines.get(frame.f_lasti)
            if line is None:
                line = lines[frame.f_lasti] = f"{code.co_filename}:{frame.f_lineno}"
            return line
        frame = frame.f_back
    return "unknown line"


def expression_of(value: Any) -> Expression:
    """The expression that `value` carries; a plain number is a constant."""
    carried = getattr(value, "expression", None)
    return Constant(value) if carried is None else carried


def _wrap(value: Any, expression: Expression) -> Any:
    if type(value) is int:
        return SizeInt(value, expression)
    if type(value) is float:
        return SizeFloat(value, expression)
    return value


def _binary(symbol: str, function: Callable[..., Any], reflected: bool = False) -> Callable[..., Any]:
    def apply(self: Any, other: Any) -> Any:
        if not isinstance(other, (int, float)):
            return NotImplemented
        left, right = (other, self) if reflected else (self, other)
        result = function(plain(left), plain(right))
        return _wrap(result, Arithmetic(symbol, function, expression_of(left), expression_of(right)))

    return apply


def _unary(symbol: str, function: Callable[..., Any], method: str) -> Callable[..., Any]:
    def apply(self: Any) -> Any:
        return _wrap(getattr(self.base, method)(self), Arithmetic(symbol, function, self.expression))

    return apply


def _comparison(symbol: str, function: Callable[..., bool], method: str) -> Callable[..., Any]:
    def apply(self: Any, other: Any) -> Any:
        outcome = getattr(self.base, method)(self, other)
        ledger = _ledger.get()
        if outcome is not NotImplemented and ledger is not None:
            left, right = self.expression, expression_of(other)
            if isinstance(right, Constant) and sys._getframe(1).f_code.co_filename.startswith(TORCH_DIRECTORY):
                return outcome  # torch chooses between ways to compute the same, or raises
            key = (symbol, left, right)
            if key not in ledger.comparisons:
                ledger.comparisons[key] = Comparison(symbol, function, left, right, outcome, source_line())
        return outcome

    return apply


def _float(self: Any) -> float:
    ledger = _ledger.get()
    if ledger is not None and self.expression not in ledger.escapes:
        ledger.escapes[self.expression] = Escape(self.expression, source_line())
    return self.base.__float__(self)


_BINARY = {"add": "+", "sub": "-", "mul": "*", "floordiv": "//", "mod": "%", "truediv": "/", "pow": "**"}
_UNARY = {"neg": "-", "abs": "abs"}
_COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}


def _arithmetic() -> dict[str, Callable[..., Any]]:
    methods: dict[str, Callable[..., Any]] = {"__float__": _float}
    for name, symbol in _BINARY.items():
        function = getattr(operator, name)
        methods[f"__{name}__"] = _binary(symbol, function)
        methods[f"__r{name}__"] = _binary(symbol, function, reflected=True)
    for name, symbol in _UNARY.items():
        methods[f"__{name}__"] = _unary(symbol, getattr(operator, name), f"__{name}__")
    for name, symbol in _COMPARISONS.items():
        methods[f"__{name}__"] = _comparison(symbol, getattr(operator, name), f"__{name}__")
    return methods


class SizeInt(int):
    """An ``int`` that carries the `expression` it was computed by."""

    base = int
    expression: Expression

    def __new__(cls, value: int, expression: Expression) -> SizeInt:
        """An int of this value that remembers `expression`."""
        self = int.__new__(cls, value)
        self.expression = expression
        return self

    def __reduce__(self) -> Any:
        """Copies and pickles are plain ints."""
        return int, (int.__int__(self),)

    def __deepcopy__(self, memo: Any) -> SizeInt:
        """A copy made while tracing still knows where it came from."""
        return self

    def __divmod__(self, other: Any) -> Any:
        """Quotient and remainder, both tracked."""
        return self // other, self % other

    __hash__ = int.__hash__


class SizeFloat(float):
    """A ``float`` computed from tracked ints, such as ``head_dim ** -0.5``."""

    base = float
    expression: Expression

    def __new__(cls, value: float, expression: Expression) -> SizeFloat:
        """A float of this value that remembers `expression`."""
        self = float.__new__(cls, value)
        self.expression = expression
        return self

    def __reduce__(self) -> Any:
        """Copies and pickles are plain floats."""
        return float, (float.__add__(self, 0.0),)

    __hash__ = float.__hash__


for _name, _method in _arithmetic().items():
    setattr(SizeInt, _name, _method)
    setattr(SizeFloat, _name, _method)


def plain(value: Any) -> Any:
    """`value` with every tracked number in it, in tuples, lists, dicts and slices too, as a plain one."""
    if isinstance(value, SizeInt):
        return int.__add__(value, 0)
    if isinstance(value, SizeFloat):
        return float.__add__(value, 0.0)
    if isinstance(value, slice):
        return slice(plain(value.start), plain(value.stop), plain(value.step))
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(plain(item) for item in value)
    return value


_original_sqrt: Callable[[Any], float] = math.sqrt
_lock = threading.Lock()
_tracing = 0


def _sqrt(value: Any) -> Any:
    """``math.sqrt``, whose result stays tracked."""
    if isinstance(value, (SizeInt, SizeFloat)):
        return SizeFloat(_original_sqrt(plain(value)), Arithmetic("sqrt", _original_sqrt, value.expression))
    return _original_sqrt(value)


def _traces(change: int) -> None:
    """Count a trace that begins (1) or ends (-1); while there are any, in all threads, ``math.sqrt`` tracks numbers."""
    global _tracing, _original_sqrt
    with _lock:
        if not _tracing:
            _original_sqrt = math.sqrt
        _tracing += change
        math.sqrt = _sqrt if _tracing else _original_sqrt


@contextmanager
def tracked_numbers() -> Generator[Ledger]:
    """Record comparisons and escapes of tracked numbers; ``math.sqrt`` of one stays tracked meanwhile."""
    ledger = Ledger()
    token = _ledger.set(ledger)
    _traces(1)
    try:
        yield ledger
    finally:
        _traces(-1)
        _ledger.reset(token)


def evaluated(expression: Expression, value: Callable[[Dim | Attribute], float]) -> float:
    """Value of `expression`, or NaN, which equals nothing, where it has none: a quotient by 0, say."""
    try:
        number = evaluate(expression, value)
    except (ZeroDivisionError, OverflowError, ValueError):
        return math.nan
    return number if isinstance(number, (int, float)) else math.nan  # a root of a negative number is complex


def literal_for(expression: Expression, target: float) -> float:
    """The value of the literal in `expression`, which holds nothing else, for which it equals `target`."""
    if isinstance(expression, Arithmetic) and expression.symbol == "-" and expression.right is None:
        return literal_for(expression.left, -target)
    assert isinstance(expression, Literal), f"{expression} is not a literal"
    return target


def inverse(
    expression: Expression, unknown: Attribute, target: float, value: Callable[[Dim | Attribute], float]
) -> float | None:
    """The value of the attribute `unknown` for which `expression` equals `target`; None where there is no formula."""
    if expression == unknown:
        return target
    if not isinstance(expression, Arithmetic) or expression.right is None:
        return None
    in_left = unknown in set(leaves(expression.left))
    if in_left and unknown in set(leaves(expression.right)):
        return None
    known = evaluated(expression.right if in_left else expression.left, value)
    if math.isnan(known):
        return None
    undo: dict[str, Callable[[float, float], float]] = {"+": operator.sub, "*": operator.floordiv}
    if in_left:
        undo |= {"-": operator.add, "//": operator.mul}
    if expression.symbol not in undo or (expression.symbol == "*" and (not known or target % known)):
        return None
    return inverse(
        expression.left if in_left else expression.right, unknown, undo[expression.symbol](target, known), value
    )
