"""How many channels of each group go."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from structprune.channels.relations import Ids
from structprune.errors import PlanError
from structprune.graph import ChannelGraph
from structprune.groups import Group


@dataclass(frozen=True, slots=True)
class Share:
    """How many of the channels of a group are kept."""

    group: Group
    keep: int


def kept_count(channels: int, ratio: float) -> int:
    """Channels left of `channels` when the share `ratio` goes: the nearest number, and at least one."""
    return max(1, int(np.floor(channels * (1 - ratio) + 0.5)))


def check_ratio(ratio: float) -> float:
    """`ratio`, after checking that it is a share.

    Raises:
        PlanError: it is not in [0, 1).
    """
    if not 0 <= ratio < 1:
        raise PlanError(f"ratio is {ratio}; it is the share of channels to remove, from 0 to below 1.")
    return float(ratio)


def one_factor_each(graph: ChannelGraph, ratio: Callable[[Group], float]) -> Sequence[Group]:
    """The groups to thin when of each grid (heads x head size) only one factor is.

    Of the factors of a grid the one whose feasible number of channels comes nearest to the ratio is chosen; whole
    heads or groups before positions inside them where both come as near, if there are at least four of them.
    """
    groups = graph.groups()
    number = np.full(graph.components.count, -1, dtype=np.int64)
    for i, group in enumerate(groups):
        number[group.components] = i
    chosen: set[int] = set()
    blocked: set[int] = set()

    def miss(i: int) -> tuple[float, bool, int]:
        size = groups[i].channels
        share = ratio(groups[i])
        return abs(1 - share - kept_count(size, share) / size), size < 4, i

    for lattice in graph.components.lattices:
        factors: list[list[int]] = []
        for part in lattice.factors:
            found = np.unique(number[np.unique(graph.roots.of(part)[1])])
            factors.append([int(i) for i in found if i >= 0])
        candidates = [i for factor in factors for i in factor if i not in blocked]
        if not candidates:
            continue
        taken = [i for i in candidates if i in chosen]
        best = taken[0] if taken else min(candidates, key=miss)
        chosen.add(best)
        blocked |= {i for i in candidates if i != best and not _together(i, best, factors)}
    return [group for i, group in enumerate(groups) if i not in blocked]


def _together(a: int, b: int, factors: list[list[int]]) -> bool:
    """Whether two groups stand in the same factor of a grid, and in that one only, side by side."""
    return all((a in factor) == (b in factor) for factor in factors)


def local_shares(graph: ChannelGraph, ratio: float) -> list[Share]:
    """The same share of every group goes."""
    return [Share(group, kept_count(group.channels, ratio)) for group in one_factor_each(graph, lambda _: ratio)]


def lowest(scores: np.ndarray, count: int) -> Ids:
    """Positions of the `count` lowest scores; ties go to the later channel, so that the result is stable."""
    order = np.lexsort((-np.arange(len(scores)), scores))
    return np.sort(order[:count])
