"""How the next network to try is chosen: pure functions of what was tried, or a sampler of Optuna.

A strategy here looks at the trials of a study and proposes a point. It holds nothing of its own, so that any number of
processes can work on one study, and one that was killed is taken up where it was. The samplers of Optuna read the same
study.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import numpy as np

from structprune.search.space import LEVEL, REMAINING, Dimension, Point, Trial, best_of

# Of so many evaluated trials evolution draws parents.
PARENTS = 4
# Bisection ends where shares are so near to each other.
NARROW = 2e-3


@dataclass(frozen=True, slots=True)
class Setting:
    """What a strategy chooses in.

    Attributes:
        dimensions: what is chosen.
        shares: the least and the greatest share of the multiply-accumulates that remain.
        at_share: the point by the library that keeps about such a share.
        warm: how many trials come first, by bisection, whatever the strategy.
    """

    dimensions: Sequence[Dimension]
    shares: tuple[float, float]
    at_share: Callable[[float], Point]
    warm: int = 0


class Strategy(Protocol):
    """Proposes the next point."""

    def __call__(self, trials: Sequence[Trial], setting: Setting, random: np.random.Generator) -> Point:
        """The next point to try.

        Args:
            trials: those that were tried or are being tried, by number.
            setting: what is chosen in.
            random: seeded by the study's seed and the number of the trial.
        """
        ...


def bisection(trials: Sequence[Trial], setting: Setting, random: np.random.Generator) -> Point:
    """Between the smallest share that was feasible and the greatest below it that was not, in the widest gap.

    Networks that keep more are taken to be better, which they mostly are. Trials that still run divide gaps too, so
    that workers do not try the same. Where no gap is left, it goes on as `evolution`.

    Example:
        With shares from 0.2 to 1.0, 0.6 infeasible and 0.8 feasible, the next is 0.7:

        >>> tried = [Trial(0, state="infeasible", missed=True, share=0.6), Trial(1, state="feasible", share=0.8)]
        >>> setting = Setting([], (0.2, 1.0), lambda share: {"remaining": round(share, 3)})
        >>> bisection(tried, setting, np.random.default_rng(0))
        {'remaining': 0.7}
    """
    low, high = _bracket(trials, setting)
    known = [t.share for t in trials if t.share is not None]
    known += [t.point[REMAINING] for t in trials if REMAINING in t.point]
    between = (share for share in known if low < share < high)
    gaps = [(after - before, before, after) for before, after in pairwise(sorted({low, high, *between}))]
    width, before, after = max(gaps, default=(0.0, high, high))
    if width < NARROW and trials:
        return evolution(trials, setting, random)
    return setting.at_share((before + after) / 2)


def _bracket(trials: Sequence[Trial], setting: Setting) -> tuple[float, float]:
    """The greatest share that was infeasible, and the smallest above it that was feasible."""
    known = [(t.share, t) for t in trials if t.share is not None]
    low, high = setting.shares
    high = min((share for share, t in known if t.feasible), default=high)
    return max([low, *(share for share, t in known if t.missed and share < high)]), high


def evolution(trials: Sequence[Trial], setting: Setting, random: np.random.Generator) -> Point:
    """A mutation of one of the best trials: the cheapest feasible ones first, then those that miss by least."""
    done = [t for t in trials if t.evaluated and t.cost is not None]
    if not done:
        return drawn(setting.dimensions, random)
    ranked = sorted(done, key=lambda t: (not t.feasible, t.cost if t.feasible else -(t.quality or 0.0)))
    parent = ranked[int(random.integers(min(PARENTS, len(ranked))))].point
    tried = [dict(t.point) for t in trials]
    for _ in range(16):
        child = _mutated(parent, setting.dimensions, random)
        if child not in tried:
            return child
    return drawn(setting.dimensions, random)


def _mutated(parent: Mapping[str, Any], dimensions: Sequence[Dimension], random: np.random.Generator) -> Point:
    """Each value moves with a chance, one at least."""
    moved = random.random(len(dimensions)) < max(1 / len(dimensions), 0.2)
    moved[int(random.integers(len(dimensions)))] = True
    child = dict(parent)
    for dimension, moves in zip(dimensions, moved, strict=True):
        if not moves:
            continue
        if dimension.bounds is None:
            child[dimension.name] = dimension.words[int(random.integers(len(dimension.words)))]
            continue
        low, high = dimension.bounds
        step = random.choice([-1, 1]) if dimension.whole else random.normal(0, 0.1 * (high - low))
        value = min(high, max(low, parent[dimension.name] + step))
        child[dimension.name] = int(value) if dimension.whole else float(value)
    return child


def netadapt(trials: Sequence[Trial], setting: Setting, random: np.random.Generator) -> Point:
    """From the cheapest feasible network, the one group narrower that costs least quality for what it saves.

    Each group in turn is tried one width narrower; once all were, the feasible one that lost least quality for the cost
    that it saved is the next to begin from (Yang et al., NetAdapt, 2018, algorithm 1; there each is trained shortly,
    here each is recovered). It needs a width for each group.
    """
    levels = [dimension for dimension in setting.dimensions if dimension.name.startswith(f"{LEVEL}/")]
    start = best_of([t for t in trials if t.number < setting.warm]) or best_of(trials)
    if start is None or not levels:
        return bisection(trials, setting, random)
    tried = {_key(t.point): t for t in trials}
    while start is not None:
        children = list(_narrower(start.point, levels))
        untried = [child for child in children if _key(child) not in tried]
        if untried:
            return untried[0]
        start = _cheapest(start, [tried[_key(child)] for child in children])
    return evolution(trials, setting, random)


def _cheapest(start: Trial, children: Sequence[Trial]) -> Trial | None:
    """The feasible trial that costs least quality for what it saves; None if none is feasible."""
    feasible = [trial for trial in children if trial.feasible]
    return min(feasible, key=lambda trial: (_price(start, trial), trial.number), default=None)


def _price(start: Trial, narrower: Trial) -> float:
    """The quality that a narrower network loses for each unit of cost that it saves."""
    saved = max((start.cost or 0.0) - (narrower.cost or 0.0), 1e-9)
    return ((start.quality or 0.0) - (narrower.quality or 0.0)) / saved


def _narrower(point: Mapping[str, Any], levels: Sequence[Dimension]) -> Sequence[Point]:
    """The points at which one group is one width narrower; level 0 is the narrowest."""
    return [{**point, d.name: point[d.name] - 1} for d in levels if point[d.name] > (d.bounds or (0, 0))[0]]


def _key(point: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted(point.items()))


def drawn(dimensions: Sequence[Dimension], random: np.random.Generator) -> Point:
    """A point at random."""
    point: Point = {}
    for dimension in dimensions:
        if dimension.bounds is None:
            point[dimension.name] = dimension.words[int(random.integers(len(dimension.words)))]
        elif dimension.whole:
            point[dimension.name] = int(random.integers(int(dimension.bounds[0]), int(dimension.bounds[1]) + 1))
        else:
            point[dimension.name] = float(random.uniform(*dimension.bounds))
    return point


# Our own by name; the others are Optuna's (see `structprune.search.study`).
OWN: dict[str, Strategy] = {"bisection": bisection, "evolution": evolution, "netadapt": netadapt}
OPTUNA = ("tpe", "gp", "nsga2")
STRATEGIES = (*OPTUNA, *OWN)
