"""What `structprune.optimize` chooses among, and what it knows of each trial."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from structprune.checking import FLAG, Check, require
from structprune.errors import PlanError

# The values of a trial by the names of what is chosen.
Point = dict[str, Any]
REMAINING, CRITERION, SCOPE, AXES, RECOVERY, LEVEL = "remaining", "criterion", "scope", "axes", "recovery", "level"
LIBRARY = "library"
RECOVERIES = ("none", "recalibrate", "recover")
SCOPES = ("global", "local", "isomorphic")


@dataclass(frozen=True, kw_only=True)
class Space:
    """What is chosen in each trial. See `structprune.optimize` for an example.

    Attributes:
        remaining: the least and the greatest share of the multiply-accumulates that remain.
        per_group: whether every group of channels has a width of its own to be chosen, among the levels of the
            library; `remaining` then bounds what comes of them. Else the library allocates widths for the share.
        criteria: by what channels are chosen: ``"library"``, or names of `structprune.importance.CRITERIA`.
        scopes: for criteria other than the library, as for `structprune.plan`.
        axes: for criteria other than the library, what may go, as for `structprune.plan`: ``("blocks", "widths")``,
            say. None is the default there.
        recoveries: what is done with the pruned network: ``"none"``, ``"recalibrate"``, ``"recover"``.

    Raises:
        PlanError: a value is none that can be.
    """

    remaining: tuple[float, float] = (0.15, 0.95)
    per_group: bool = False
    criteria: tuple[str, ...] = (LIBRARY,)
    scopes: tuple[str, ...] = ("global",)
    axes: tuple[tuple[str, ...] | None, ...] = (None,)
    recoveries: tuple[str, ...] = ("recover",)

    def __post_init__(self) -> None:
        """Check what was given."""
        shares = Check(
            lambda v: isinstance(v, (tuple, list)) and len(v) == 2 and 0 < v[0] < v[1] <= 1,
            "give the least and the greatest share, as in (0.2, 0.9)",
        )
        recoveries = Check(
            lambda v: isinstance(v, (tuple, list)) and bool(v) and set(v) <= set(RECOVERIES),
            f"give some of {', '.join(RECOVERIES)} in a tuple",
        )
        some = Check(lambda v: isinstance(v, (tuple, list)) and bool(v), "give a tuple with at least one choice")
        require(
            vars(self), remaining=shares, per_group=FLAG, criteria=some, scopes=some, axes=some, recoveries=recoveries
        )
        if self.per_group and tuple(self.criteria) != (LIBRARY,):
            raise PlanError(f"per_group chooses among the widths of the library, so criteria are ({LIBRARY!r},) alone.")


@dataclass(frozen=True, slots=True)
class Dimension:
    """One thing that is chosen: a share between bounds, a whole number between bounds, or one of some words.

    Attributes:
        name: of it.
        bounds: the least and the greatest value; None for words.
        words: what there is to choose from.
        whole: whether it is a whole number.
    """

    name: str
    bounds: tuple[float, float] | None = None
    words: tuple[str, ...] = ()
    whole: bool = False


def dimensions(space: Space, levels: Mapping[str, int]) -> list[Dimension]:
    """What is chosen in a space; what leaves no choice is left out.

    Args:
        space: the choices.
        levels: the number of widths of each group, without the whole one, by its name.

    Example:
        >>> [dimension.name for dimension in dimensions(Space(criteria=("library", "l2")), {})]
        ['remaining', 'criterion']
    """
    dimensions: list[Dimension] = []
    if space.per_group:
        dimensions += [Dimension(f"{LEVEL}/{name}", (0, count), whole=True) for name, count in levels.items()]
    else:
        dimensions.append(Dimension(REMAINING, space.remaining))
    axes = tuple("+".join(each) if each else "default" for each in space.axes)
    for name, words in ((CRITERION, space.criteria), (SCOPE, space.scopes), (AXES, axes), (RECOVERY, space.recoveries)):
        if len(words) > 1:
            dimensions.append(Dimension(name, words=tuple(words)))
    return dimensions


@dataclass(frozen=True, slots=True)
class Trial:
    """One network that was tried, or was going to be.

    Attributes:
        number: in the study.
        point: what was chosen.
        state: ``"feasible"``, ``"infeasible"``, ``"ended early"`` or ``"running"``.
        why: it ended early.
        missed: whether it is not good enough, or certainly not.
        cost: of the network, as a share of the whole one's; None before it is known.
        quality: what `evaluate` said; None if it was not asked.
        share: of the multiply-accumulates that remain; None before it is known.
        network: tells the pruned network from others.
        error: how far the output is from the whole network's, on calibration samples; None before it is known.
        seconds: it took.
    """

    number: int
    point: Mapping[str, Any] = field(default_factory=dict)
    state: str = "running"
    why: str = ""
    missed: bool = False
    cost: float | None = None
    quality: float | None = None
    share: float | None = None
    network: str = ""
    error: float | None = None
    seconds: float = 0.0

    @property
    def feasible(self) -> bool:
        """Whether it was evaluated and is good enough."""
        return self.state == "feasible"

    @property
    def evaluated(self) -> bool:
        """Whether `evaluate` was asked."""
        return self.quality is not None


def best_of(trials: Sequence[Trial]) -> Trial | None:
    """The cheapest feasible trial, the first of equals."""
    return min((t for t in trials if t.feasible), key=lambda t: (t.cost, t.number), default=None)


def front_of(trials: Sequence[Trial]) -> tuple[Trial, ...]:
    """The evaluated trials than which none is both cheaper and better, the cheapest first.

    Example:
        >>> trials = [Trial(0, cost=0.5, quality=0.9), Trial(1, cost=0.6, quality=0.8), Trial(2, cost=0.4, quality=0.7)]
        >>> [trial.number for trial in front_of(trials)]
        [2, 0]
    """
    front: list[Trial] = []
    evaluated = [t for t in trials if t.cost is not None and t.quality is not None]
    for trial in sorted(evaluated, key=lambda t: (t.cost, -(t.quality or 0.0))):
        if not front or (trial.quality or 0.0) > (front[-1].quality or 0.0):
            front.append(trial)
    return tuple(front)
