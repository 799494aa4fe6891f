"""Densities found by Bayesian optimisation: the best objective among those that keep the accuracy."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from structprune.extras import require as require_extra
from structprune.search.objectives import Objective
from structprune.search.sampling import constrain, constraints, quiet

# So many proposals are made for each one that is trained; the others are known not to be worth it.
PROPOSALS = 5
# Two densities this close are the same for a search.
CLOSE = 0.01

TRAINED, ENDED_EARLY = "trained", "ended early"
KNOWN_INFEASIBLE, NO_BETTER = "denser was infeasible", "no better than the best"


@dataclass(frozen=True)
class Trial:
    """Densities that were tried.

    Attributes:
        densities: of the parts of the scheme that had none.
        value: of the objective: of the network that came of it, or if that was not trained, of the one compressed
            without training.
        score: on the validation data; None if it was not trained.
        outcome: ``"trained"``; ``"ended early"``, training was given up; ``"denser was infeasible"`` or
            ``"no better than the best"``, it was not begun.
        feasible: whether the score is within what is allowed.
        seconds: that it took.
    """

    densities: tuple[float, ...]
    value: float
    score: float | None
    outcome: str
    feasible: bool
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How densities are searched for.

    Attributes:
        trials: at most so many are trained.
        sampler: ``"gp"``, a Gaussian process, or ``"tpe"``.
        bounds: lowest and highest density.
        seed: of the sampler.
    """

    trials: int
    sampler: str
    bounds: tuple[float, float]
    seed: int


class DensitySearch:
    """A constrained search, in the manner of Joseph et al., Condensa, 2020 (section 4).

    The paper finds the density at which accuracy meets its threshold, and then the best objective in the domain that is
    left, on the assumption that a denser network is no less accurate. Here one Gaussian process over objective and
    constraint (Optuna) proposes densities, and the same assumption says which are not worth training: those below one
    that was infeasible, and those whose objective, which is known without training, is no better than the best.

    Args:
        objective: which values are better.
        settings: how to search.
        count: how many densities.
        lacking: of a score, how much it is below what is allowed, in units of what may be lost; at most 0 if it is
            within.
    """

    def __init__(self, objective: Objective, settings: Settings, count: int, lacking: Callable[[float], float]) -> None:
        self._objective, self._settings, self._count, self._lacking = objective, settings, count, lacking
        self.trials: list[Trial] = []
        self.best: Trial | None = None
        self._violations: list[tuple[tuple[float, ...], float]] = []

    def run(
        self, value: Callable[[tuple[float, ...]], float], train: Callable[[tuple[float, ...]], Trial]
    ) -> Trial | None:
        """The best feasible trial; None if there is none.

        Args:
            value: of the network compressed to these densities without training.
            train: makes the trial of these densities.
        """
        optuna = require_extra("optuna", "The search for a density", "search")
        with quiet(optuna):
            study = optuna.create_study(direction=self._objective.direction, sampler=self._sampler(optuna))
            low, high = self._settings.bounds
            study.enqueue_trial({f"density{i}": (low + high) / 2 for i in range(self._count)})
            for _ in range(PROPOSALS * self._settings.trials):
                if self._trained() >= self._settings.trials or self._narrow():
                    break
                asked = study.ask()
                densities = tuple(asked.suggest_float(f"density{i}", low, high) for i in range(self._count))
                trial, lacking = self._tried(densities, value, train)
                # Scores that are far off are all alike: the process is to be fine near the limit.
                constrain(asked, math.asinh(lacking))
                study.tell(asked, trial.value)
        return self.best

    def _tried(
        self,
        densities: tuple[float, ...],
        value: Callable[[tuple[float, ...]], float],
        train: Callable[[tuple[float, ...]], Trial],
    ) -> tuple[Trial, float]:
        """A trial, and how much its score lacks: known, or assumed where it was not trained."""
        begin = time.perf_counter()
        at_once = value(densities)
        below = [lacking for other, lacking in self._violations if _all_at_most(densities, other)]
        if below:
            trial, lacking = self._untrained(densities, at_once, KNOWN_INFEASIBLE, begin), max(below)
        elif self.best is not None and not self._objective.better(at_once, self.best.value):
            assert self.best.score is not None
            trial, lacking = self._untrained(densities, at_once, NO_BETTER, begin), self._lacking(self.best.score)
        else:
            trial = train(densities)
            assert trial.score is not None
            lacking = self._lacking(trial.score)
            if lacking > 0:
                self._violations.append((densities, lacking))
        self.trials.append(trial)
        if trial.feasible and (self.best is None or self._objective.better(trial.value, self.best.value)):
            self.best = trial
        return trial, lacking

    def _untrained(self, densities: tuple[float, ...], value: float, outcome: str, begin: float) -> Trial:
        return Trial(densities, value, None, outcome, False, time.perf_counter() - begin)

    def _trained(self) -> int:
        return sum(trial.score is not None for trial in self.trials)

    def _narrow(self) -> bool:
        """Whether the only density is known: between one that is infeasible and the best there is nothing left."""
        if self._count > 1 or self.best is None:
            return False
        low = max((densities[0] for densities, _ in self._violations), default=self._settings.bounds[0])
        return self.best.densities[0] - low < CLOSE

    def _sampler(self, optuna: Any) -> Any:
        given = {"seed": self._settings.seed, **constraints(optuna)}
        if self._settings.sampler == "tpe":
            return optuna.samplers.TPESampler(n_startup_trials=3, **given)
        return optuna.samplers.GPSampler(n_startup_trials=2, **given)


def _all_at_most(densities: tuple[float, ...], others: tuple[float, ...]) -> bool:
    return all(mine <= other for mine, other in zip(densities, others, strict=True))
