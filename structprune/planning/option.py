"""What is known of an option beside its type and default; the entries are in `structprune.planning.options`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from structprune.coupling.graph import ChannelGraph, Layer
from structprune.importance.base import Importance

# How an option is written on the command line; `structprune.cli.options` reads each form.
Form = Literal[
    "shares",
    "amounts",
    "scope",
    "words",
    "names",
    "word",
    "step",
    "count",
    "devices",
    "share",
    "criterion",
    "maker",
    "function",
    "latency",
    "flag",
]


@dataclass(frozen=True, kw_only=True)
class Option:
    """What is known of an option beside its type and default.

    Attributes:
        check: gives the value as it is kept, from the option's name and what was given; raises PlanError.
        form: how it is written on the command line.
        help: what the command line says of it.
        words: what completes it there.
        plain: the value as plain data for ``plan.settings.asked``; None if it is not recorded.
    """

    check: Callable[[str, Any], Any]
    form: Form
    help: str
    words: Iterable[str] = ()
    plain: Callable[[Any, ChannelGraph], Any] | None = None


def as_is(value: Any, _graph: ChannelGraph) -> Any:
    """The value itself; a tuple as a list."""
    return list(value) if isinstance(value, tuple) else value


def importance_as_json(importance: str | Importance, _graph: ChannelGraph) -> str:
    """The name of a criterion, or how it is made."""
    return importance if isinstance(importance, str) else repr(importance)


def layers_as_json(layers: Iterable[Layer], graph: ChannelGraph) -> list[str] | None:
    """The names of layers; None if there are none."""
    return [graph.path_of(layer) for layer in layers] or None
