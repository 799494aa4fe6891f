"""Numbers of branches that were tried: which is to be tried next, which are to be recovered, and which is the best."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from structprune.errors import RecoveryError
from structprune.planning.plan import Plan


@dataclass(frozen=True)
class Candidate:
    """What comes of a number of branches.

    Attributes:
        plan: of branches and channels; None if the target cannot be met so.
        lost: what the network loses.
        reason: why there is no plan.
        recovered: what it still loses once its layers are solved again; None if that was not tried.
    """

    plan: Plan | None
    lost: float | None = None
    reason: str = ""
    recovered: float | None = None


# Less than this that is lost is rounding: the square of a relative difference of 1e-6.
ROUNDING = 1e-12


def best_of(tried: Mapping[int, Candidate]) -> int | None:
    """The number of branches with which least is lost: of those that were recovered, if any were.

    Where recovery leaves nothing but rounding, it is the one with which less was lost before.

    Example:
        >>> best_of({0: Candidate(None, 0.3, recovered=0.1), 4: Candidate(None, 0.2, recovered=0.15)})
        0
        >>> best_of({0: Candidate(None, 0.3, recovered=1e-14), 4: Candidate(None, 0.2, recovered=2e-14)})
        4
    """
    known = {count: each for count, each in tried.items() if each.recovered is not None} or tried
    losses = [
        (max(each.recovered or 0.0, ROUNDING), each.lost, count)
        for count, each in known.items()
        if each.lost is not None
    ]
    return min(losses)[2] if losses else None


def finalists(tried: Mapping[int, Candidate]) -> list[int]:
    """The numbers of branches whose networks are to be recovered before one is taken.

    These are the two with which least is lost, and both ends of what meets the target: most channels and fewest
    branches, and the other way round. So recovery is not left to favour a kind of network that was never compared.

    Example:
        >>> finalists({0: Candidate(None, 0.6), 2: Candidate(None, 0.3), 4: Candidate(None, 0.2), 8: Candidate(None)})
        [0, 2, 4]
    """
    met = {count: each.lost for count, each in tried.items() if each.lost is not None}
    return sorted({min(met), max(met), *sorted(met, key=met.__getitem__)[:2]}) if met else []


def with_recovered(
    tried: Mapping[int, Candidate], lost_when_recovered: Callable[[Plan], float]
) -> tuple[dict[int, Candidate], str]:
    """The same with what the finalists lose once recovered, and why that is missing, if layers cannot be solved.

    One candidate alone is not recovered: there is nothing to compare it with.
    """
    compared, chosen = dict(tried), finalists(tried)
    try:
        for count in chosen if len(chosen) > 1 else ():
            plan = tried[count].plan
            assert plan is not None
            compared[count] = replace(tried[count], recovered=lost_when_recovered(plan))
    except RecoveryError as error:
        return dict(tried), str(error)
    return compared, ""


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
