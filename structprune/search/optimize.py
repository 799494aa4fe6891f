"""`optimize`: the cheapest network that is still good enough, found by trials."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import nn

from structprune.api import plan as make_plan
from structprune.checking import (
    DATA,
    INPUTS,
    MODEL,
    ON_BATCH,
    PATH,
    SEED,
    TEXT,
    Check,
    function,
    instance,
    one_of,
    real,
    require,
    whole,
)
from structprune.distributed import apart, failing_together, nobody_failed, rank_and_count, several
from structprune.errors import PlanError, RecoveryError
from structprune.forwards.batches import Forward
from structprune.forwards.turns import in_turns
from structprune.latency.measure import Latency
from structprune.planning.plan import Plan
from structprune.recovery.recalibrate import recalibrate
from structprune.recovery.recover import recover
from structprune.search.library import Library, library
from structprune.search.network_costs import COUNTED, Costs, Evaluate, number_of
from structprune.search.outputs import Outputs
from structprune.search.result import Optimized
from structprune.search.solving import Stream
from structprune.search.space import (
    AXES,
    CRITERION,
    LEVEL,
    LIBRARY,
    RECOVERY,
    REMAINING,
    SCOPE,
    Point,
    Space,
    Trial,
    best_of,
    dimensions,
)
from structprune.search.strategies import STRATEGIES, Setting
from structprune.search.study import Study
from structprune.tracing.trace import ExampleInputs
from structprune.wrapping import prunable

# A network whose output is so many times farther off than that of one that was not good enough is not evaluated.
HOPELESS = 1.5


@dataclass(frozen=True, kw_only=True)
class Searching:
    """How `optimize` searches. See `structprune.optimize` for an example.

    Attributes:
        strategy: ``"tpe"``, ``"gp"`` or ``"nsga2"`` of Optuna, ``"bisection"``, ``"evolution"`` or ``"netadapt"``.
        warm: how many trials come first by bisection on what the library says, whatever the strategy.
        seed: of the draws.
        timeout: seconds after which no trial is begun.
        patience: seconds without a sign of life after which another process does a trial again.
        space: what is chosen in each trial.
        latency: how time is measured, for ``latency`` and ``throughput``.
        rounds: how often `structprune.recover` solves a layer with its producers.
        rows: positions that layers are solved on.
    """

    strategy: str = "tpe"
    warm: int = 5
    seed: int = 0
    timeout: float | None = None
    patience: float = 60.0
    space: Space = field(default_factory=Space)
    latency: Latency = field(default_factory=Latency)
    rounds: int = 3
    rows: int = 65536

    def __post_init__(self) -> None:
        """Check what was given."""
        require(
            vars(self), strategy=one_of(STRATEGIES), warm=whole(0), seed=SEED, timeout=real(above=0).or_none,
            patience=real(above=0), space=instance(Space, "give a structprune.search.space.Space"),
            latency=instance(Latency, "give a structprune.Latency"), rounds=whole(0), rows=whole(1),
        )  # fmt: skip
        if self.strategy == "netadapt" and not self.space.per_group:
            raise PlanError("netadapt makes one group narrower after the other: give Space(per_group=True).")


def optimize(
    model: nn.Module,
    example_inputs: ExampleInputs,
    data: Iterable[Any],
    evaluate: Evaluate,
    *,
    eps: float = 0.01,
    maximize: str | None = None,
    minimize: str | Evaluate | None = None,
    trials: int = 20,
    storage: str | os.PathLike[str] | None = None,
    study_name: str | None = None,
    using: Library | None = None,
    how: Searching | None = None,
    forward: Forward | None = None,
    **options: Any,
) -> Optimized:
    """The fastest, or smallest, network that loses no more than `eps` of what `evaluate` says of the whole one.

    A `Library` is made first, if none is given. Each trial plans a network, prunes it and recovers it. It ends early
    where nothing can be planned, where the network is no cheaper than the best that is good enough, and where its
    output on calibration samples is much farther off than that of one that was not good enough. Only then is `evaluate`
    asked.
    The first trials are a bisection on the share of the multiply-accumulates that remain, so that a few evaluations
    lead to a network that is good enough; then the strategy goes on from all that is known.

    With a `storage`, any number of processes that call this with the same arguments work on one study: what one of them
    was doing when it was killed is done again, and a run that was cut short goes on. Each needs the data.

    So do the ranks of ``torch.distributed``, where it is in use: the library is made together, each rank giving its
    share of the data; then each gets the data of all and does trials of its own, so that `evaluate` must not talk to
    other ranks. All return the same network. If one fails, all raise, once they have done their trials.

    Akiba et al., Optuna, 2019; Yang et al., NetAdapt, 2018, for the strategy of that name.

    Args:
        model: any ``nn.Module`` whose forward can be traced; it is left as it was.
        example_inputs: a tensor, a tuple (positional) or a dict (keyword) that the model accepts; time is taken on it.
        data: batches without labels, as for `structprune.recover`. They are held.
        evaluate: called with a model, in eval mode and without gradients; a number, the greater the better.
        eps: how much of it may be lost, in its own unit.
        maximize: ``"throughput"``.
        minimize: ``"latency"``, ``"macs"``, ``"params"``, ``"memory"``, or a function of a model (its energy, say) that
            gives a number above 0. By default the latency.
        trials: how many there are in all, by all processes.
        storage: where the study is kept: a path (SQLite; a journal if it ends in ``.journal`` or ``.log``, for network
            drives), the URL of a database, or None for memory.
        study_name: of the study in the storage; by default made of what is asked for.
        using: a library of the model, if there is one.
        how: the strategy, what is chosen among, and how time is measured.
        forward: called with the model and a batch, where batches are something else.
        options: ``axes``, ``round_to``, ``ignore`` and others of `structprune.plan` that say what may go.

    Raises:
        PlanError: an argument is none that can be, `evaluate` gives no number, the study is another, or another rank
            has failed.
        RecoveryError: the data do not fit the model.
        MissingExtraError: Optuna is not installed.

    Example:
        >>> import torch, structprune
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
        >>> x = torch.randn(256, 4)
        >>> goal = model(x).argmax(1)
        >>> def accuracy(model):
        ...     return float((model(x).argmax(1) == goal).float().mean())
        >>> result = structprune.optimize(model, x[:1], [x], accuracy, eps=0.05, minimize="macs", trials=6, round_to=1)
        >>> result.gain > 1.2 and result.best.quality >= 0.95
        True
    """
    objective = Check(lambda v: v in (*COUNTED, "latency") if isinstance(v, str) else function("model").fits(v),
                      f"give one of {', '.join((*COUNTED, 'latency'))}, or a function of a model").or_none  # fmt: skip
    where = Check(lambda v: v is None or PATH.fits(v), "give a path, a URL or None")
    require(
        locals(), model=MODEL, example_inputs=INPUTS, data=DATA, evaluate=function("model"), eps=real(least=0),
        maximize=one_of(("throughput",)).or_none, minimize=objective, trials=whole(1), storage=where,
        study_name=TEXT.or_none, using=instance(Library, "give what structprune.library returned").or_none,
        how=instance(Searching, "give a structprune.search.optimize.Searching").or_none, forward=ON_BATCH.or_none,
    )  # fmt: skip
    if maximize is not None and minimize is not None:
        raise PlanError("Give maximize or minimize, not both: one of them is made as good as it goes.")
    how = how or Searching()
    if using is not None and options:
        raise PlanError(f"{sorted(options)[0]} is an option of the library; give it there.")
    if several() and storage is None:
        raise PlanError("storage is None, and there are several ranks: name one that all of them see.")
    where = None if storage is None else os.fspath(storage)
    with failing_together(PlanError, "optimize"), ExitStack() as stack:
        batches = list(data)
        if using is None:
            using = library(model, example_inputs, batches, seed=how.seed, rows=how.rows, forward=forward, **options)
        batches = in_turns(batches)  # the trials of a rank are its own, on all data
        with apart():
            costs = Costs(prunable(model), example_inputs, maximize or minimize or "latency", how.latency, stack)
            work = _Work(prunable(model), example_inputs, batches, forward, evaluate, costs, using, how)
        with work.opened_in_turn(eps, where, study_name):
            with apart():
                work.search(trials)
            nobody_failed("the end of the trials")
            with apart():
                return work.result()


class _Work:
    """Trials of one search in this process."""

    def __init__(
        self, model: nn.Module, inputs: ExampleInputs, batches: list[Any], forward: Forward | None, evaluate: Evaluate,
        costs: Costs, using: Library, how: Searching,
    ) -> None:  # fmt: skip
        self._model, self._inputs, self._batches, self._forward = model, inputs, batches, forward
        self._evaluate, self._costs, self._library, self._how = evaluate, costs, using, how
        self._outputs = Outputs(model, Stream(model, batches, forward).probes(256), using.distance)
        self._widths = using.widths({"target": {"macs": 1.0}})
        self._dense = self._whole_cost = 0.0
        self._least = float("-inf")
        self._kept: tuple[int, nn.Module, Plan] | None = None
        self._study: Study

    @contextmanager
    def opened_in_turn(self, eps: float, storage: str | None, name: str | None) -> Generator[None]:
        """Begin the study, or take it up: one rank, then the others, since only one may make the storage."""
        first = rank_and_count()[0] == 0
        with ExitStack() as opened:
            for turn in (True, False):
                if first is turn:
                    self._open(eps, storage, name, opened)
                nobody_failed("the study")
            yield

    def _open(self, eps: float, storage: str | None, name: str | None, opened: ExitStack) -> None:
        how, space = self._how, self._how.space
        setting = Setting(dimensions(space, self._widths.levels), space.remaining, self._at_share, how.warm)
        about = json.loads(json.dumps({"space": asdict(space), "objective": self._costs.name, "eps": eps}))
        about["strategy"] = how.strategy
        made = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:8]
        self._study = Study(storage, name or f"structprune-{made}", setting, how.strategy, how.seed, how.patience)
        opened.callback(self._study.close)
        self._study.remember(about)
        with apart():
            self._dense = self._study.recall("dense", lambda: number_of(self._evaluate, self._model, "evaluate"))
            self._whole_cost = self._study.recall("whole", self._costs.whole)
        self._least = self._dense - eps

    def search(self, trials: int) -> None:
        """Do trials until there are enough, whoever does them."""
        timeout = self._how.timeout
        self._study.run(self._tried, trials, float("inf") if timeout is None else time.monotonic() + timeout)

    def result(self) -> Optimized:
        """Gather what came of the trials."""
        known = tuple(trial for trial in self._study.trials if trial.state != "running")
        best = best_of(known)
        slim, plan = (None, None) if best is None else self._of(best)
        return Optimized(slim, plan, self._costs.name, self._dense, self._least, self._whole_cost, known)

    def _of(self, best: Trial) -> tuple[nn.Module, Plan]:
        """The network of a trial: kept, if it was done here, or made again, as it was made there."""
        if self._kept is not None and self._kept[0] == best.number:
            return self._kept[1:]
        plan = self._planned(best.point)
        return self._recovered(best.point, plan), plan

    # -- one trial -------------------------------------------------------------------------------------------------

    def _tried(self, trial: Trial) -> Trial:
        begun = time.perf_counter()
        ended = self._steps(trial)
        return replace(ended, seconds=time.perf_counter() - begun)

    def _steps(self, trial: Trial) -> Trial:
        """What is known of a trial once it was evaluated, or ended early."""
        try:
            plan = self._planned(trial.point)
        except PlanError as error:
            return replace(trial, state="ended early", why=f"no plan: {error}")
        share = plan.after.macs / plan.before.macs
        trial = replace(trial, share=share, cost=self._costs.share(plan.apply(self._model), plan))
        trial = replace(trial, network=f"{plan.digest[:16]} {trial.point.get(RECOVERY, '')}")
        known = self._study.trials
        if (ended := self._not_worth_building(trial, known)) is not None:
            return ended
        try:
            slim = self._recovered(trial.point, plan)
        except RecoveryError as error:
            return replace(trial, state="ended early", why=f"not recovered: {error}")
        error = self._outputs.lost(slim)
        trial = replace(trial, error=error)
        missed = [t.error for t in known if t.state == "infeasible" and t.error is not None]
        if missed and error > HOPELESS * min(missed):
            return replace(trial, state="ended early", why="its output is too far off", missed=True)
        quality = number_of(self._evaluate, slim, "evaluate")
        if quality < self._least:
            return replace(trial, state="infeasible", missed=True, quality=quality)
        self._kept = trial.number, slim, plan
        return replace(trial, state="feasible", quality=quality)

    def _not_worth_building(self, trial: Trial, known: Sequence[Trial]) -> Trial | None:
        """A trial that ends since its network is known, or is no cheaper than the best; None if it goes on."""
        same = next((t for t in known if t.network == trial.network and (t.evaluated or t.error is not None)), None)
        if same is not None:
            why = f"as trial {same.number}"
            return replace(trial, state="ended early", why=why, missed=same.missed, error=same.error)
        best = best_of(known)
        if self._how.strategy != "nsga2" and best is not None and (trial.cost or 0.0) >= (best.cost or 0.0):
            return replace(trial, state="ended early", why=f"no cheaper than trial {best.number}")
        return None

    def _planned(self, point: Mapping[str, Any]) -> Plan:
        """The plan at a point.

        Raises:
            PlanError: there is none.
        """
        space = self._how.space
        if space.per_group:
            states = tuple(point[f"{LEVEL}/{name}"] for name in self._widths.levels)
            plan = self._widths.plan(states)
            if plan is None:
                raise PlanError("the forward does not allow these widths")
            return plan
        target = {"macs": float(point[REMAINING])}
        criterion = point.get(CRITERION, space.criteria[0])
        if criterion == LIBRARY:
            return self._library.plan(target=target)
        axes = {"+".join(each) if each else "default": each for each in space.axes}
        chosen = axes[point[AXES]] if AXES in point else space.axes[0]
        given: dict[str, Any] = {**self._library.made_with, "target": target, "importance": criterion}
        given |= {"scope": point.get(SCOPE, space.scopes[0]), "data": self._batches}
        given |= {} if chosen is None else {"axes": chosen}
        return make_plan(self._model, self._inputs, **given)

    def _recovered(self, point: Mapping[str, Any], plan: Plan) -> nn.Module:
        space = self._how.space
        recovery = point.get(RECOVERY, space.recoveries[0])
        if recovery == "recover":  # which solves all layers itself, and does no better from those of the library
            how: dict[str, Any] = {"rows": self._how.rows, "rounds": self._how.rounds, "seed": self._how.seed}
            return recover(plan.apply(self._model), self._model, self._batches, forward=self._forward, **how)
        solved = space.per_group or point.get(CRITERION, space.criteria[0]) == LIBRARY
        slim = self._library.assemble(plan) if solved else plan.apply(self._model)
        return recalibrate(slim, self._batches, forward=self._forward) if recovery == "recalibrate" else slim

    def _at_share(self, share: float) -> Point:
        """The point of the library's own choice that keeps about this share of the multiply-accumulates."""
        point: Point = {RECOVERY: self._how.space.recoveries[-1], CRITERION: self._how.space.criteria[0]}
        if not self._how.space.per_group:
            return {**point, REMAINING: share}
        states = self._library.widths({"target": {"macs": share}}).start
        return {**point, **{f"{LEVEL}/{name}": state for name, state in zip(self._widths.levels, states, strict=True)}}
