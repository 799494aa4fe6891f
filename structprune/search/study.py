"""A study in Optuna's storage, on which any number of processes work; what a killed one was doing is done again."""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from structprune.errors import PlanError
from structprune.extras import require as extra
from structprune.search.sampling import constrain, constraints, quiet
from structprune.search.space import Dimension, Point, Trial
from structprune.search.strategies import OWN, Setting, bisection

# What a trial that is given up, because its process is gone, leaves behind.
GIVEN_UP, NOT_NEEDED = "its process is gone", "the study is complete"
# A worker that has nothing to do looks again after so many seconds at most.
WAIT = 0.5
POPULATION = 8


class Study:
    """Trials in a storage, asked for and told by any number of processes.

    Args:
        storage: a path (SQLite, or a journal if it ends in ``.journal`` or ``.log``), a URL, or None for memory.
        name: of the study.
        setting: what is chosen in.
        strategy: one of `structprune.search.strategies.STRATEGIES`.
        seed: of the draws.
        patience: seconds without a sign of life after which a trial is given up and done again.

    Raises:
        MissingExtraError: Optuna is not installed.
        PlanError: the study in the storage is one of other choices.
    """

    def __init__(
        self, storage: str | Path | None, name: str, setting: Setting, strategy: str, seed: int, patience: float
    ) -> None:
        self._optuna = extra("optuna", "structprune.optimize", "search")
        self._setting, self._patience = setting, patience
        self._signs: dict[int, tuple[Any, float]] = {}
        self._shared = storage is not None
        self._distributions = {dimension.name: self._distribution(dimension) for dimension in setting.dimensions}
        self._storage = _storage(self._optuna, storage)
        directions = ["minimize", "maximize"] if strategy == "nsga2" else ["minimize"]
        with quiet(self._optuna):
            sampler = _sampler(self._optuna, self._distributions, setting, strategy, seed)
            self._study = self._optuna.create_study(
                storage=self._storage, study_name=name, directions=directions, sampler=sampler,
                load_if_exists=True,
            )  # fmt: skip
        self._objectives = len(directions)
        if len(self._study.directions) != len(directions):
            self.close()
            raise PlanError(f"The study {name!r} was begun with another strategy. Name another study.")

    def close(self) -> None:
        """Give the connections to a database back; the study can be opened anew."""
        if isinstance(self._storage, self._optuna.storages.RDBStorage):
            self._storage.remove_session()
            self._storage.engine.dispose()

    def _distribution(self, dimension: Dimension) -> Any:
        kinds = self._optuna.distributions
        if dimension.bounds is None:
            return kinds.CategoricalDistribution(list(dimension.words))
        low, high = dimension.bounds
        return kinds.IntDistribution(int(low), int(high)) if dimension.whole else kinds.FloatDistribution(low, high)

    def remember(self, about: dict[str, Any]) -> None:
        """Check that the study is about the same; a new one is from now on.

        Raises:
            PlanError: it is about something else.
        """
        known = self._study.user_attrs
        for name, value in about.items():
            if name not in known:
                self._study.set_user_attr(name, value)
            elif known[name] != value:
                raise PlanError(
                    f"The study {self._study.study_name!r} has another {name}: {known[name]!r}, and not {value!r}. "
                    "Name another study or storage."
                )

    def recall(self, name: str, make: Callable[[], Any]) -> Any:
        """What is known in the study by this name; found out if nobody has yet."""
        known = self._study.user_attrs.get(name)
        if known is None:
            known = make()
            self._study.set_user_attr(name, known)
        return known

    @property
    def trials(self) -> tuple[Trial, ...]:
        """All trials by number, but those that stood in for one that was given up, or were one too many."""
        return _trials(self._study)

    # -- work --------------------------------------------------------------------------------------------------------

    def run(self, work: Callable[[Trial], Trial], count: int, until: float) -> None:
        """Do trials until the study has `count` of them, or until the time is over.

        Args:
            work: tells what is known of a trial once it was tried.
            count: of trials in all, whoever does them.
            until: by `time.monotonic`.
        """
        with quiet(self._optuna):
            while time.monotonic() < until:
                self._give_up()
                states = [trial.state.name for trial in self._study.get_trials(deepcopy=False)]
                done = states.count("COMPLETE") + states.count("PRUNED")
                if done >= count:
                    return
                if done + states.count("RUNNING") >= count:  # one of those may be given up yet
                    time.sleep(min(WAIT, self._patience / 4))
                    continue
                self._work(work, count)

    def _work(self, work: Callable[[Trial], Trial], count: int) -> None:
        trial = self._study.ask(self._distributions)
        earlier = (t for t in self._study.get_trials(deepcopy=False) if t.number < trial.number)
        if sum(t.state.name in ("COMPLETE", "PRUNED", "RUNNING") for t in earlier) >= count:
            self._fail(trial.number, NOT_NEEDED)
            return
        with self._signs_of_life(trial):
            try:
                done = work(Trial(trial.number, dict(trial.params)))
            except BaseException as error:  # an interrupt too must not leave the trial running; raised again
                self._fail(trial.number, f"{type(error).__name__}: {error}")
                raise
            self._tell(trial, done)

    def _tell(self, trial: Any, done: Trial) -> None:
        facts = {name: value for name, value in asdict(done).items() if name not in ("number", "point")}
        for name, value in facts.items():
            trial.set_user_attr(name, value)
        constrain(trial, float(done.missed))
        states = self._optuna.trial.TrialState
        try:
            values = [done.cost] if self._objectives == 1 else [done.cost, done.quality]
            if None in values:
                self._study.tell(trial.number, state=states.PRUNED)
            else:  # also of one that ended early: a sampler that knows the cost does not ask for it again
                self._study.tell(trial.number, values)
        except ValueError:
            # Others gave it up, since it showed no sign of life for long, and it is done again.
            if self._study.get_trials(deepcopy=False)[trial.number].state != states.FAIL:
                raise

    def _fail(self, number: int, why: str) -> bool:
        """End a trial without a result; False if another process did."""
        trial_id = self._study.get_trials(deepcopy=False)[number]._trial_id
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                self._study._storage.set_trial_user_attr(trial_id, "why", why)
                self._study.tell(number, state=self._optuna.trial.TrialState.FAIL)
            except (ValueError, RuntimeError):  # it is finished
                return False
        return True

    @contextmanager
    def _signs_of_life(self, trial: Any) -> Generator[None]:
        """A thread writes to the storage now and then, so that others know that this process lives."""
        if not self._shared:
            yield
            return
        over, gone = threading.Event(), self._optuna.exceptions

        def beat() -> None:
            number = 0
            while not over.wait(self._patience / 5):
                number += 1
                # It may have been given up meanwhile, or the storage be busy for long: then others do it again.
                with suppress(gone.UpdateFinishedTrialError, gone.StorageInternalError):
                    trial.set_user_attr("beat", number)

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def _give_up(self) -> None:
        """Give up trials whose process shows no sign of life, and put what they were to try first in the queue."""
        if not self._shared:
            return
        now = time.monotonic()
        for trial in self._study.get_trials(deepcopy=False):
            if trial.state.name != "RUNNING":
                continue
            beat = trial.user_attrs.get("beat")
            known, since = self._signs.get(trial.number, (object(), now))
            if beat != known:
                self._signs[trial.number] = beat, now
            elif now - since > self._patience and self._fail(trial.number, GIVEN_UP) and trial.params:
                self._study.enqueue_trial(dict(trial.params), user_attrs={"again": trial.number})


# -- Optuna's side -----------------------------------------------------------------------------------------------------


def _storage(optuna: Any, where: str | Path | None) -> Any:
    """The storage at a path or a URL; None for memory."""
    if where is None:
        return None
    if isinstance(where, str) and "://" in where:
        return optuna.storages.RDBStorage(where)
    path = Path(where)
    if path.suffix in (".journal", ".log"):
        journal = extra("optuna.storages.journal", "structprune.optimize", "search")
        return optuna.storages.JournalStorage(journal.JournalFileBackend(str(path)))
    return optuna.storages.RDBStorage(
        f"sqlite:///{path}", engine_kwargs={"connect_args": {"timeout": 60}}, skip_compatibility_check=False
    )


def _trials(study: Any) -> tuple[Trial, ...]:
    trials: list[Trial] = []
    for trial in study.get_trials(deepcopy=False):
        if trial.state.name in ("FAIL", "WAITING"):
            continue
        facts = {name: trial.user_attrs[name] for name in Trial.__dataclass_fields__ if name in trial.user_attrs}
        if trial.state.name == "RUNNING":
            facts = {}
        trials.append(Trial(trial.number, dict(trial.params), **facts))
    return tuple(trials)


def _inner(optuna: Any, strategy: str, seed: int) -> Any:
    """One of Optuna's samplers."""
    samplers = optuna.samplers
    given = constraints(optuna)
    if strategy == "gp":
        return samplers.GPSampler(seed=seed, n_startup_trials=1, **given)
    if strategy == "nsga2":
        return samplers.NSGAIISampler(population_size=POPULATION, seed=seed, **given)
    return samplers.TPESampler(seed=seed, n_startup_trials=1, multivariate=True, **given)


def _sampler(optuna: Any, distributions: dict[str, Any], setting: Setting, strategy: str, seed: int) -> Any:
    """A sampler that depends on the seed, the number of the trial and the trials before it alone.

    So a study that was taken up again, or is shared, needs no state of a generator.
    """

    class Seeded(optuna.samplers.BaseSampler):
        def _random(self, trial: Any) -> np.random.Generator:
            return np.random.default_rng([seed, trial.number])

        def _of(self, trial: Any) -> Any:
            known = OWN.keys() | {""}
            name = "tpe" if strategy in known else strategy
            return _inner(optuna, name, int(self._random(trial).integers(2**31)))

        def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, Any]:
            return distributions

        def sample_relative(self, study: Any, trial: Any, search_space: Any) -> Point:
            others = [t for t in _trials(study) if t.number != trial.number]
            own = bisection if trial.number < setting.warm else OWN.get(strategy)
            if own is not None:
                return own(others, setting, self._random(trial))
            inner = self._of(trial)
            return inner.sample_relative(study, trial, inner.infer_relative_search_space(study, trial))

        def sample_independent(self, study: Any, trial: Any, param_name: str, param_distribution: Any) -> Any:
            return self._of(trial).sample_independent(study, trial, param_name, param_distribution)

        def before_trial(self, study: Any, trial: Any) -> None:
            self._of(trial).before_trial(study, trial)

        def after_trial(self, study: Any, trial: Any, state: Any, values: Any) -> None:
            self._of(trial).after_trial(study, trial, state, values)

    return Seeded()
