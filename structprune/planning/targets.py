"""A target for the whole network: how few parameters, MACs, bytes or channels are to remain."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from structprune.coupling.costs import Cost
from structprune.coupling.groups import Group
from structprune.errors import PlanError
from structprune.planning.scopes import Steps

TARGETS = ("channels", "params", "macs", "memory", "kv_cache", "latency")
# A plan that comes so near to the target is taken as it stands, with steps of equal priority taken together.
CLOSE = 0.01
ATTEMPTS = 6
Kept = dict[Group, int]
Amounts = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Target:
    """Limits on what remains.

    Attributes:
        limits: by name of `TARGETS`, the greatest amount that may remain: parameters, multiply-accumulates, bytes of
            weights and of activations at their peak, bytes of keys and values for a token, channels over all groups,
            or milliseconds.
    """

    limits: Mapping[str, float]

    def misses(self, amounts: Amounts) -> float:
        """The largest relative excess over a limit; negative while all are met."""
        return max(amounts[name] / limit - 1 for name, limit in self.limits.items())


def amounts(cost: Cost, channels: int) -> dict[str, float]:
    """What there is of each of `TARGETS` that can be counted."""
    return {
        "channels": float(channels),
        "params": float(cost.params),
        "macs": float(cost.macs),
        "memory": float(cost.weight_bytes + cost.peak_activation_bytes),
    }


def target_of(target: Mapping[str, float], before: Amounts) -> Target:
    """Limits from fractions of what there is (up to 1) or absolute amounts (above 1).

    Raises:
        PlanError: an amount has to be measured, and was not.
    """
    limits: dict[str, float] = {}
    for name, amount in target.items():
        if name == "kv_cache" and not before.get(name):
            raise PlanError("target names 'kv_cache', and the model has no attention whose keys and values are kept.")
        if name not in before:
            raise PlanError(f"target[{name!r}] is to be measured, and no measurements are given; use structprune.plan.")
        limits[name] = amount * before[name] if amount <= 1 else float(amount)
    return Target(limits)


def kept_for(
    steps: Steps,
    target: Target,
    measure: Callable[[Kept], Amounts],
    left_whole: Callable[[], str] = str,
    lost: Callable[[Kept], float] | None = None,
) -> Kept:
    """The first state in the order of `steps` that meets every limit, or a nearer one that leaves out large steps.

    Amounts are counted on the channels that are left, with all that is coupled to them, at each of the few states that
    a bisection visits. `left_whole` says what may not go and why, for the message. With `lost`, how much importance is
    lost, no step of equal priority is taken for the sake of another: whatever the limits do not need is given back, and
    of the states found the one that loses least is returned.

    Raises:
        PlanError: the limits cannot be met.
    """
    nothing = np.zeros(len(steps.priority), dtype=bool)

    def miss(mask: np.ndarray) -> float:
        return target.misses(measure(steps.kept(mask)))

    if miss(~nothing) > 0:
        fewest = measure(steps.kept(~nothing))
        limits = target.limits.items()
        reached = ", ".join(f"{name} {_number(fewest[name])} of at most {_number(most)}" for name, most in limits)
        raise PlanError(
            f"The target cannot be met: with everything removed that may go there remain {reached}. Allow more to go."
            f"{left_whole()}"
        )
    found = _meeting(steps, miss, CLOSE if lost is None else 0.0)
    if lost is None:
        return steps.kept(max(found, key=miss))
    return min((steps.kept(_given_back(steps, mask, miss, lost)) for mask in found), key=lost)


def _meeting(steps: Steps, miss: Callable[[np.ndarray], float], close: float) -> list[np.ndarray]:
    """States that meet every limit, as marks of the steps taken; once one comes so `close`, no more are looked for."""
    order = np.argsort(steps.priority, kind="stable")

    def after(mask: np.ndarray, more: np.ndarray) -> np.ndarray:
        mask = mask.copy()
        mask[more] = True
        return mask

    priorities = np.append(-1.0, np.unique(steps.priority))
    found = [
        steps.priority <= priorities[_first(len(priorities) - 1, lambda n: miss(steps.priority <= priorities[n]) <= 0)]
    ]
    base, rest = np.zeros(len(order), dtype=bool), order
    nearest = miss(found[0])
    for _ in range(ATTEMPTS):
        if nearest >= -close or not found[0].any() or not len(rest):
            break
        count = _first(len(rest), partial(lambda base, rest, n: miss(after(base, rest[:n])) <= 0, base, rest))
        found.append(after(base, rest[:count]))
        nearest = max(nearest, miss(found[-1]))
        if not count:
            break
        # The last step went too far: leave it out, with what would follow it in its group, and take others.
        too_far = steps.owner[rest[count - 1]]
        base = after(base, rest[: count - 1])
        rest = rest[count:][steps.owner[rest[count:]] != too_far]
        if miss(after(base, rest)) > 0:
            break
    return found


def _given_back(
    steps: Steps, mask: np.ndarray, miss: Callable[[np.ndarray], float], lost: Callable[[Kept], float]
) -> np.ndarray:
    """The steps that are still taken once those are given back that no limit needs, the most important ones first."""
    while True:
        fewer = [_fewest_of(steps, mask, owner, miss) for owner in np.unique(steps.owner[mask])]
        fewer = [less for less in fewer if less.sum() < mask.sum()]
        if not fewer:
            return mask
        mask = min(fewer, key=lambda less: lost(steps.kept(less)))


def _fewest_of(steps: Steps, mask: np.ndarray, owner: int, miss: Callable[[np.ndarray], float]) -> np.ndarray:
    """The steps that are taken, of one owner only as many as it needs beside the others to meet every limit."""
    mine = np.flatnonzero(mask & (steps.owner == owner))
    mine = mine[np.argsort(steps.priority[mine], kind="stable")]

    def first_taken(count: int) -> np.ndarray:
        less = mask.copy()
        less[mine[count:]] = False
        return less

    if miss(first_taken(len(mine) - 1)) > 0:
        return mask
    return first_taken(_first(len(mine), lambda count: miss(first_taken(count)) <= 0))


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def _first(count: int, met: Callable[[int], bool]) -> int:
    """The smallest n in 0..count for which `met` holds; it holds for `count`, and once it holds it stays so."""
    low, high = 0, count
    while low < high:
        middle = (low + high) // 2
        if met(middle):
            high = middle
        else:
            low = middle + 1
    return high
