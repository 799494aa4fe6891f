"""What a recorder writes down, and by what its operations are found again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import fx, nn


@dataclass(slots=True)
class ModuleCall:
    """One call of a module: where it stands, what went in and came out, and which nodes ran directly inside it."""

    path: str
    module: nn.Module
    first: int
    last: int = -1
    args: Any = ()
    kwargs: Any = field(default_factory=dict)
    output: Any = None
    mapping: type | None = None  # of the output, if it is one: `output` is a plain dict
    parent: int = -1


@dataclass(slots=True)
class Recording:
    """Everything that was seen: operations as nodes, in order, and the calls of modules around them.

    `graph` is what the nodes belong to; it has no list of them. `answers` are the values of tensors that Python was
    told, in order, and `asked` are those tensors.
    """

    graph: fx.Graph = field(default_factory=fx.Graph)
    nodes: list[fx.Node] = field(default_factory=list)
    calls: list[ModuleCall] = field(default_factory=list)
    answers: list[Any] = field(default_factory=list)
    asked: list[fx.Node] = field(default_factory=list)


Group = tuple[str, int, str, tuple[str, ...]]  # of a `CallKey`: what only the order in which they run tells apart


class CallKey(NamedTuple):
    """What an operation is found again by, in any run of the model, of a copy or of a pruned copy.

    The numbers count equal things only. So other sizes, labels, a loss, or what other modules do do not shift them.

    Attributes:
        module: path of the module that runs the operation itself.
        call: which call of that module, in the order of the forward.
        name: canonical name of the operation.
        held: names of the model's tensors among its arguments, in order.
        occurrence: how many of the same four come before it.
    """

    module: str
    call: int
    name: str
    held: tuple[str, ...]
    occurrence: int

    @property
    def group(self) -> Group:
        """All but the occurrence."""
        return self[:4]


def operands(node: fx.Node) -> list[fx.Node]:
    """The tensor arguments of an operation in order, with repeats."""
    found: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), found.append)
    return found


def equal_calls(nodes: Sequence[fx.Node], calls: Sequence[ModuleCall]) -> dict[Group, list[int]]:
    """The numbers of the operations among `nodes` that run inside modules, by what they have in common."""
    counts: Counter[str] = Counter()
    places: list[tuple[str, int]] = []
    for call in calls:
        places.append((call.path, counts[call.path]))
        counts[call.path] += 1
    found: dict[Group, list[int]] = {}
    for node in nodes:
        if node.op.startswith("call_") and node.meta["name"] != "part" and node.meta["call"] >= 0:
            held = tuple(str(n.target) for n in operands(node) if n.meta["name"] == "parameter")
            group = (*places[node.meta["call"]], node.meta["name"], held)
            found.setdefault(group, []).append(node.meta["index"])
    return found
