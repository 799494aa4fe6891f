"""What a recorder writes down."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

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
    parent: int = -1


@dataclass(slots=True)
class Recording:
    """Everything that was seen: the graph, its nodes in order, and the calls of modules around them."""

    graph: fx.Graph = field(default_factory=fx.Graph)
    nodes: list[fx.Node] = field(default_factory=list)
    calls: list[ModuleCall] = field(default_factory=list)
