"""Where a number came from that lost its origin: ``int(c) ** -0.5`` reaches a product as a plain float.

A rehearsal says what such a number is at two widths. If at both it is the same power of a number of channels, it is
taken for that, and is compensated like a number whose origin is known; the next rehearsal proves or refutes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import isclose
from operator import pow as power
from typing import Any

from torch import fx

from structprune.ops.relations import Axis
from structprune.tracing.comparing import is_number
from structprune.tracing.provenance import Arithmetic, Constant, Dim, Expression, SizeFloat, SizeInt, evaluated, leaves
from structprune.tracing.rehearsal import Deviation
from structprune.tracing.trace import Trace

_POWERS = (-0.5, 0.5, -1.0, 1.0)


def trace_back(trace: Trace, axes: Sequence[Any], count: Callable[[Axis], int], found: Deviation) -> bool:
    """Give a factor in a product or quotient back its origin, in `trace`; whether that was possible.

    Args:
        trace: what was recorded.
        axes: the axes of its nodes.
        count: the kept channels of an axis in the rehearsal.
        found: what the rehearsal found.
    """
    if found.numbers is None or len(found.place) != 3 or found.place[1] != "args":
        return False
    node, position = trace.all_nodes[int(found.place[0])], int(found.place[2])
    args = list(node.args)
    if node.meta["name"] not in ("mul", "div") or len(args) != 2 or not isinstance(args[1 - position], fx.Node):
        return False
    if not is_number(args[position]) or isinstance(args[position], (SizeInt, SizeFloat)):
        return False
    for dim, axis in _counted(axes, node.meta["index"]):
        for exponent in _POWERS:
            sizes = axis.size**exponent, count(axis) ** exponent
            if all(isclose(a, b, rel_tol=1e-9) for a, b in zip(sizes, found.numbers, strict=True)):
                origin = Arithmetic("**", power, dim, Constant(exponent))
                args[position] = number = SizeFloat(found.numbers[0], origin)
                node.args = tuple(args)
                node.meta["tracked"] = [*node.meta.get("tracked", ()), number]
                return True
    return False


def _counted(axes: Sequence[Any], end: int) -> Iterator[tuple[Dim, Axis]]:
    """The dimensions whose channels may go of the tensors before node number `end`, the last ones first."""
    seen: set[object] = set()
    for number in range(end - 1, -1, -1):
        made = axes[number]
        for dim, axis in enumerate(made if isinstance(made, tuple) else ()):
            if axis.free and axis.key not in seen:
                seen.add(axis.key)
                yield Dim(number, dim), axis


def follows_inputs(expression: Expression, axes: Sequence[Any]) -> bool:
    """Whether what a factor becomes when channels go depends on the sizes of the inputs too: ``(tokens + c) ** -0.5``.

    Then no weight can make up for it. ``(tokens * c) ** -0.5`` is the same factor for all numbers of tokens.
    """
    fixed = {leaf for leaf in leaves(expression) if isinstance(leaf, Dim) and not axes[leaf.node][leaf.dim].free}
    if not fixed:
        return False

    def at(channels: int, tokens: int) -> float:
        return evaluated(expression, lambda leaf: tokens if leaf in fixed else channels)

    # Any numbers will do that are no powers of one another.
    return not all(isclose(at(48, tokens) * at(20, 7), at(20, tokens) * at(48, 7), rel_tol=1e-9) for tokens in (11, 30))
