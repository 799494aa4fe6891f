"""Numbers of branches that were tried: which is the best, and which is to be tried next."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from structprune.planning.plan import Plan


@dataclass(frozen=True)
class Candidate:
    """What comes of a number of branches.

    Attributes:
        plan: of branches and channels; None if the target cannot be met so.
        lost: what the network loses.
        reason: why there is no plan.
    """

    plan: Plan | None
    lost: float | None = None
    reason: str = ""


def best_of(tried: Mapping[int, Candidate]) -> int | None:
    """The number of branches with which least is lost."""
    found = [(each.lost, count) for count, each in tried.items() if each.lost is not None]
    return min(found)[1] if found else None


def between(tried: Mapping[int, Candidate]) -> int | None:
    """The number in the middle of the widest gap beside the best one; None if there is no gap.

    Where no number meets the target, that is beside the largest one.

    Example:
        >>> between({0: Candidate(None), 4: Candidate(None, 0.2), 8: Candidate(None, 0.1)})
        6
    """
    best = best_of(tried)
    known = sorted(tried)
    at = known.index(max(known) if best is None else best)
    gaps = [(known[i + 1] - known[i], known[i]) for i in (at - 1, at) if 0 <= i < len(known) - 1]
    width, start = max(gaps, default=(0, 0))
    return start + width // 2 if width > 1 else None
