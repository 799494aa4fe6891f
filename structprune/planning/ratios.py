"""Which share of its channels each group is to lose: one number, or one for each layer, block or name pattern."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from numbers import Real

from torch import nn

from structprune.coupling.graph import ChannelGraph, Layer
from structprune.coupling.groups import Group
from structprune.errors import PinnedError, PlanError, UnknownLayerError

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

    In a mapping, a key is a layer or a block (module or dotted name), or a pattern with ``*`` for names of either; of
    several keys that match a layer the longest name counts, and names count before patterns. A layer that no key
    matches stays whole. A group that several layers make takes the smallest of their ratios, so that none loses a
    greater share than asked.
    A block or a pattern acts on those of its layers that can follow, and is refused if none of them can.

    Raises:
        PlanError: a ratio is out of range, or a key names channels that cannot go without those of other layers.
        PinnedError: a key names channels that may not be removed, or layers that make none.
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
        self._known: dict[str, str | None] = {}
        for key, share in ratio.items():
            pattern = isinstance(key, str) and any(c in key for c in "*?[")
            name = str(key) if pattern else graph.path_of(key)
            (self._patterns if pattern else self._names)[name] = check_ratio(share, f"ratio[{key!r}]")
        self._held = dict.fromkeys(
            str(node.target) for node in graph.trace.all_nodes if node.meta["name"] == "parameter"
        )

    def of(self, group: Group) -> float:
        """The smallest ratio of the layers that make the channels of `group`."""
        return min((self._share(tensor) for tensor in self._graph.roles.makers(group)), default=0.0)

    def _share(self, tensor: str) -> float:
        key = self._key_of(tensor)
        return 0.0 if key is None else {**self._patterns, **self._names}[key]

    def _key_of(self, tensor: str) -> str | None:
        """The key that decides about a tensor's layer."""
        if tensor not in self._known:
            self._known[tensor] = self._look_up(tensor)
        return self._known[tensor]

    def _look_up(self, tensor: str) -> str | None:
        parts = tensor.split(".")
        for length in range(len(parts), -1, -1):
            name = ".".join(parts[:length])
            if name in self._names:
                return name
        matching = [pattern for pattern in self._patterns if _matches(tensor, pattern)]
        return max(matching, key=len) if matching else None

    # -- keys that would quietly do nothing ----------------------------------------------------------------------

    def check(self) -> None:
        """Refuse keys that ask for something where nothing can follow."""
        for pattern in self._patterns:
            if not any(_matches(tensor, pattern) for tensor in self._held):
                raise UnknownLayerError(f"The pattern {pattern!r} in ratio matches no layer that the forward uses.")
        mine: dict[str, list[str]] = {}
        for tensor in self._held:
            key = self._key_of(tensor)
            if key is not None:
                mine.setdefault(key, []).append(tensor)
        for key, share in (self._names | self._patterns).items():
            if share and key in mine:
                self._check_key(key, share, mine[key])

    def _check_key(self, key: str, share: float, tensors: list[str]) -> None:
        """A layer that is named loses that share of all its channels; a block or a pattern, of some at least."""
        makers = self._graph.roles.makers
        groups = [group for group in self._graph.groups() if not set(tensors).isdisjoint(makers(group))]
        if not groups:
            raise self._nothing(key, tensors)
        together = [sorted({_layer(t) for t in makers(group) if not self._share(t)}) for group in groups]
        follows = [group for group, others in zip(groups, together, strict=True) if not others]
        is_layer = key in self._names and all(_layer(tensor) in (key, tensor) for tensor in tensors)
        if not follows or (is_layer and not _places(groups, tensors) <= _places(follows, tensors)):
            others = max(together, key=len)
            raise PlanError(
                f"ratio asks for {share} of {key!r}, whose channels go together with those of "
                f"{', '.join(others[:5])}, for which it asks for none. Give them a ratio too, or use '*'."
            )

    def _nothing(self, key: str, tensors: list[str]) -> PlanError:
        """Why no channels are made by these tensors."""
        pinned = self._graph.pinned()
        made = [(t, dim) for t, dim in sorted(self._graph.roles.producers) if t in tensors]
        for tensor, dim in made:
            if reason := pinned.get(f"{tensor}, dim {dim}"):
                return PinnedError(
                    f"ratio names {key!r}, but the channels of {_layer(tensor)} may not be removed: {reason}."
                )
        seen = [group for group in self._graph.groups() if any(m.tensor in tensors for m in group.members)]
        layers = {_layer(tensor) for group in seen for tensor in self._graph.roles.makers(group)}
        others = f": they are those of {', '.join(sorted(layers)[:5])}. Name these" if layers else ""
        return PinnedError(f"ratio names {key!r}, which makes no channels of its own that could go{others}.")


def _matches(tensor: str, pattern: str) -> bool:
    """Whether a pattern is that of a tensor, of its layer or of a block around it.

    Example:
        >>> _matches("layers.3.attention.query.weight", "layers.*.attention")
        True
    """
    parts = _layer(tensor).split(".")
    around = (".".join(parts[:length]) for length in range(1, len(parts) + 1))
    return fnmatchcase(tensor, pattern) or any(fnmatchcase(path, pattern) for path in around)


def _places(groups: list[Group], tensors: list[str]) -> set[tuple[str, int, int]]:
    """Where these tensors are sliced: of a product (key-value heads x their query heads) one factor is enough."""
    members = [member for group in groups for member in group.members if member.tensor in tensors and member.dim == 0]
    return {(m.tensor, m.dim, position) for m in members for position in m.positions.tolist()}


def _layer(tensor: str) -> str:
    """The layer that holds a tensor, also where the tensor is computed by a parametrization."""
    if ".parametrizations." in tensor:
        return tensor.partition(".parametrizations.")[0]
    return tensor.rpartition(".")[0] or tensor


def ratio_as_json(ratio: Ratio, graph: ChannelGraph) -> float | str | dict[str, float]:
    """`ratio` with names in place of modules."""
    if callable(ratio):
        return "a function of the group"
    if not isinstance(ratio, Mapping):
        return check_ratio(ratio)
    return {graph.path_of(key) if isinstance(key, nn.Module) else key: float(share) for key, share in ratio.items()}
