"""Which share of the branches is to go: one number, or one for each block or name pattern."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from structprune.coupling.graph import ChannelGraph
from structprune.depth.records import PlacedBranch
from structprune.errors import PlanError


def shares_of(units: Sequence[PlacedBranch], graph: ChannelGraph, ratio: Any) -> dict[float, list[PlacedBranch]]:
    """The branches by the share of them that is to go; those that no key of a mapping matches are left out.

    A key is a module or its dotted name, the name of a branch, or a pattern; the longest name counts, and names count
    before patterns, as for channels.

    Raises:
        PlanError: a key matches no branch that may go.
        UnknownLayerError: it is the name of nothing.
    """
    if not isinstance(ratio, Mapping):
        return {ratio: list(units)}
    branches = {item.branch.name for item in units}
    given: Mapping[Any, float] = ratio
    shares = {
        key if isinstance(key, str) and (_is_pattern(key) or key in branches) else graph.path_of(key): share
        for key, share in given.items()
    }
    by_share: dict[float, list[PlacedBranch]] = {}
    used: set[str] = set()
    for item in units:
        matching = [key for key in shares if _matches(item, key)]
        if matching:
            key = max(matching, key=lambda each: (not _is_pattern(each), len(each)))
            used.add(key)
            by_share.setdefault(shares[key], []).append(item)
    if unused := [key for key in shares if key not in used]:
        raise PlanError(f"ratio names {unused[0]!r}, in which there is no block or branch that may go.")
    return by_share


def _is_pattern(key: str) -> bool:
    return any(sign in key for sign in "*?[")


def _matches(item: PlacedBranch, key: str) -> bool:
    """Whether a branch has this name or pattern, or is in a module that has it."""
    module, name = item.branch.module, item.branch.name
    return key in (module, name) or module.startswith(f"{key}.") or fnmatchcase(module, key) or fnmatchcase(name, key)
