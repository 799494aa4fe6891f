"""Which share of its channels each group is to lose: one number, or one for each layer, block or name pattern."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from numbers import Real

from torch import nn

from structprune.errors import PinnedError, PlanError, UnknownLayerError
from structprune.graph import ChannelGraph, Layer
from structprune.groups import Group

Ratio = float | Mapping[Layer, float] | Callable[[Group], float]


def check_ratio(ratio: float, of: str = "ratio") -> float:
    """`ratio`, after checking that it is a share.

    Raises:
        PlanError: it is not in [0, 1).
    """
    if not isinstance(ratio, Real) or isinstance(ratio, bool) or not 0 <= ratio < 1:
        raise PlanError(f"{of} is {ratio!r}; it is the share of channels to remove, from 0 to below 1.")
    return float(ratio)


def ratio_of(graph: ChannelGraph, ratio: Ratio) -> Callable[[Group], float]:
    """The ratio of each group; a function is asked for that of each.

    In a mapping, a key is a layer or a block (module or dotted name), or a pattern with ``*``; of several keys that
    match a layer the longest name counts, and names count before patterns. A layer that no key matches stays whole. A
    group that several layers make takes the smallest of their ratios, so that none loses a greater share than asked.

    Raises:
        PlanError: a ratio is out of range, or a layer is named whose channels cannot go without those of others.
        PinnedError: a layer is named whose channels may not be removed.
        UnknownLayerError: a key matches nothing.
    """
    if callable(ratio):
        return lambda group: check_ratio(ratio(group), f"ratio of {group.name}")
    if not isinstance(ratio, Mapping):
        share = check_ratio(ratio)
        return lambda _group: share
    table = _Table(graph, ratio)
    table.check()
    return table.of


class _Table:
    """A mapping of ratios, with its names looked up once."""

    def __init__(self, graph: ChannelGraph, ratio: Mapping[Layer, float]) -> None:
        self._graph = graph
        self._names: dict[str, float] = {}
        self._patterns: dict[str, float] = {}
        self._known: dict[str, float | None] = {}
        for key, share in ratio.items():
            pattern = isinstance(key, str) and any(c in key for c in "*?[")
            name = str(key) if pattern else graph.path_of(key)
            (self._patterns if pattern else self._names)[name] = check_ratio(share, f"ratio[{key!r}]")
        self._held = {str(node.target) for node in graph.trace.everything if node.meta["name"] == "parameter"}

    def of(self, group: Group) -> float:
        """The smallest ratio of the layers that make the channels of `group`."""
        return min((self._of_tensor(tensor) or 0.0 for tensor in self._graph.roles.makers(group)), default=0.0)

    def _of_tensor(self, tensor: str) -> float | None:
        if tensor not in self._known:
            self._known[tensor] = self._look_up(tensor)
        return self._known[tensor]

    def _look_up(self, tensor: str) -> float | None:
        parts = tensor.split(".")
        for length in range(len(parts), -1, -1):
            name = ".".join(parts[:length])
            if name in self._names:
                return self._names[name]
        layer = ".".join(parts[:-1]) or tensor
        matching = [p for p in self._patterns if fnmatchcase(layer, p) or fnmatchcase(tensor, p)]
        return self._patterns[max(matching, key=len)] if matching else None

    def check(self) -> None:
        """Refuse keys that would quietly do nothing."""
        layers = {tensor.rpartition(".")[0] or tensor for tensor in self._held}
        for pattern in self._patterns:
            if not any(fnmatchcase(name, pattern) for name in layers | self._held):
                raise UnknownLayerError(f"The pattern {pattern!r} in ratio matches no layer that the forward uses.")
        for name, share in self._names.items():
            if share and name in layers:
                self._check_layer(name, share)

    def _check_layer(self, name: str, share: float) -> None:
        """A single layer that is named must be able to lose that share."""
        mine = {name, f"{name}.weight"}
        groups = [g for g in self._graph.groups() if mine & set(self._graph.roles.makers(g))]
        if not groups:
            raise PinnedError(f"ratio names {name!r}, but {self._graph.explain(name)}.")
        for group in groups:
            others = {
                t.rpartition(".")[0] or t for t in self._graph.roles.makers(group) if (self._of_tensor(t) or 0) == 0
            }
            if others:
                raise PlanError(
                    f"ratio asks for {share} of {name!r}, whose channels go together with those of "
                    f"{', '.join(sorted(others)[:5])}, for which it asks for none. Give them a ratio too, or use '*'."
                )


def ratio_as_json(ratio: Ratio, graph: ChannelGraph) -> float | str | dict[str, float]:
    """`ratio` with names in place of modules."""
    if callable(ratio):
        return "a function of the group"
    if not isinstance(ratio, Mapping):
        return check_ratio(ratio)
    return {graph.path_of(key) if isinstance(key, nn.Module) else key: float(share) for key, share in ratio.items()}
