"""`structprune.optimize`: constrained search by trials, shared by processes that may be killed."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from support.optimized import EPS, kill, optimized, task
from support.snapshot import assert_untouched, snapshot

import structprune
from structprune.errors import PlanError
from structprune.search.space import Dimension, Trial, front_of
from structprune.search.strategies import OWN, STRATEGIES, Setting, bisection, netadapt

pytest.importorskip("optuna", reason="the extra 'search' is not installed")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_ends_with_a_network_that_is_good_enough(strategy):
    found = optimized(strategy, per_group=strategy in ("netadapt", "evolution"))
    assert found.best is not None
    assert found.gain > 1.5
    assert found.evaluations <= 10
    _, _, agreement = task()
    with torch.no_grad():
        assert agreement(found.model) == found.best.quality >= found.dense - EPS == found.least
    macs = structprune.cost(found.model, torch.randn(1, 6)).macs / structprune.cost(task()[0], torch.randn(1, 6)).macs
    assert found.best.cost == pytest.approx(macs)
    assert found.plan.after.macs / found.plan.before.macs == pytest.approx(macs)
    assert found.best.cost == min(trial.cost for trial in found.trials if trial.feasible)


def test_the_same_seed_finds_the_same_and_the_model_stays_as_it_was():
    model, x, agreement = task()
    model.train()
    before = snapshot(model)
    how = structprune.Searching(warm=2, rounds=0, strategy="evolution")
    first, again = (
        structprune.optimize(
            model, x[:1], list(x.split(40)), agreement, minimize="params", trials=4, how=how, round_to=1
        )
        for _ in range(2)
    )
    assert_untouched(model, before)
    facts = [[(t.point, t.state, t.cost, t.quality) for t in found.trials] for found in (first, again)]
    assert facts[0] == facts[1]
    state, other = first.model.state_dict(), again.model.state_dict()
    assert all(torch.equal(state[name], other[name]) for name in state)


def test_what_cannot_win_ends_before_it_is_evaluated():
    asked = []
    _, _, agreement = task()

    def evaluate(slim):
        asked.append(slim)
        return agreement(slim)

    found = optimized("tpe", trials=10, evaluate=evaluate)
    early = [trial for trial in found.trials if trial.state == "ended early"]
    assert early
    assert len(asked) == 1 + found.evaluations == 1 + len(found.trials) - len(early)  # the dense one too
    best = [None]
    for trial in found.trials:
        if trial.why.startswith("no cheaper"):
            assert trial.cost >= best[-1]
        if trial.feasible:
            best.append(trial.cost)


@pytest.mark.parametrize("file", ["study.db", "study.journal"])
def test_a_study_that_was_cut_short_ends_as_one_that_was_not(tmp_path, file):
    whole = optimized(trials=6)
    _, _, agreement = task()
    calls = []

    def failing(slim):
        calls.append(slim)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return agreement(slim)

    storage = tmp_path / file
    with pytest.raises(KeyboardInterrupt):
        optimized(trials=6, evaluate=failing, storage=storage, study_name="s")
    again = optimized(trials=6, storage=storage, study_name="s")
    assert [t.state for t in again.trials].count("running") == 0
    assert len(again.trials) == 6
    known = {t.number: t for t in again.trials}
    assert [(known[n].point, known[n].quality) for n in range(2)] == [(t.point, t.quality) for t in whole.trials[:2]]
    # All is there already: nothing is evaluated, and the best network is made again.
    third = optimized(trials=6, evaluate=None, storage=storage, study_name="s")
    assert third.best == again.best
    state, other = third.model.state_dict(), again.model.state_dict()
    assert all(torch.equal(state[name], other[name]) for name in state)
    with pytest.raises(PlanError, match="has another objective"):
        optimized(trials=6, storage=storage, study_name="s", minimize="params")


def test_two_workers_that_are_killed_lose_nothing(tmp_path):
    """Two processes work on one study and are killed in the middle of trials; a third one does what they left."""
    storage, told = tmp_path / "study.db", tmp_path / "told"
    script = Path(__file__).parent / "support" / "optimized.py"
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parent.parent)])
    env = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    optimized(trials=1, storage=storage, study_name="s", patience=1.0)  # the tables are there
    command = [sys.executable, str(script), str(storage), str(told), "60"]
    workers = [subprocess.Popen(command, env=env, stderr=subprocess.PIPE) for _ in range(2)]
    draw = random.Random(0)
    try:
        until = time.monotonic() + 90
        while not told.exists() or len(told.read_text().split()) < 2:  # both are in the middle of a trial
            assert time.monotonic() < until
            assert all(worker.poll() is None for worker in workers), workers[0].stderr.read()
            time.sleep(0.02)
        for worker in workers:
            time.sleep(draw.uniform(0.0, 0.2))
            kill(worker)
    finally:
        for worker in workers:
            kill(worker)
            worker.stderr.close()
    import optuna

    database = optuna.storages.RDBStorage(f"sqlite:///{storage}")
    study = optuna.load_study(study_name="s", storage=database)
    before = {t.number: (t.state.name, t.params, t.values) for t in study.trials}
    left = [params for state, params, _ in before.values() if state == "RUNNING"]
    assert len(left) == 2
    found = optimized(trials=6, storage=storage, study_name="s", patience=0.5)
    assert len(found.trials) == 6
    assert found.best is not None
    after = {t.number: (t.state.name, t.params, t.values) for t in study.trials}
    for number, row in before.items():
        if row[0] == "COMPLETE":
            assert after[number] == row
    done = [params for state, params, _ in after.values() if state == "COMPLETE"]
    assert all(params in done for params in left)
    assert not [state for state, _, _ in after.values() if state in ("RUNNING", "WAITING")]
    database.remove_session()
    database.engine.dispose()


def test_time_and_throughput_and_functions_are_objectives():
    class Clock:
        def operations(self, points):
            return [1e-3 for _ in points]

        def networks(self, models, example_inputs):
            return [1e-3 * sum(p.numel() for p in model.parameters()) for model in models]

    model, x, agreement = task()
    how = structprune.Searching(warm=3, rounds=0, latency=structprune.Latency(timer=Clock()))
    given = {"trials": 3, "how": how, "round_to": 1, "eps": EPS}
    fast = structprune.optimize(model, x[:1], list(x.split(40)), agreement, maximize="throughput", **given)

    def energy(slim):
        return 2.0 * sum(p.numel() for p in slim.parameters())

    cheap = structprune.optimize(model, x[:1], list(x.split(40)), agreement, minimize=energy, **given)
    whole = sum(p.numel() for p in model.parameters())
    assert fast.whole == pytest.approx(1e-3 * whole)
    assert (cheap.objective, cheap.whole) == ("energy", 2.0 * whole)
    left = sum(p.numel() for p in fast.model.parameters())
    assert fast.gain == pytest.approx(whole / left)
    assert [t.cost for t in fast.trials] == pytest.approx([t.cost for t in cheap.trials])


def test_criteria_scopes_and_recoveries_are_chosen_among():
    model, x, agreement = task()
    space = structprune.Space(
        criteria=("library", "l2", "taylor"), scopes=("global", "local"), recoveries=("none", "recover"),
        axes=(None, ("mlp",)),
    )  # fmt: skip
    how = structprune.Searching(strategy="evolution", warm=2, rounds=0, space=space, seed=3)
    found = structprune.optimize(
        model, x[:1], list(x.split(40)), agreement, minimize="macs", trials=10, how=how, round_to=1, eps=EPS
    )
    assert {"remaining", "criterion", "scope", "axes", "recovery"} == set(found.trials[0].point)
    assert len({t.point["criterion"] for t in found.trials}) > 1
    # Taylor needs a loss, which is not there: such a trial ends, and the search goes on.
    assert all("no plan" in t.why for t in found.trials if t.point["criterion"] == "taylor")


def test_bisection_halves_the_gap_and_leaves_alone_what_others_try():
    setting = Setting([Dimension("remaining", (0.2, 1.0))], (0.2, 1.0), lambda share: {"remaining": share})
    draw = np.random.default_rng(0)
    assert bisection([], setting, draw) == {"remaining": pytest.approx(0.6)}
    running = [Trial(0, {"remaining": 0.6})]
    assert bisection(running, setting, draw)["remaining"] in (pytest.approx(0.4), pytest.approx(0.8))
    done = [Trial(0, {"remaining": 0.6}, state="feasible", share=0.55, cost=0.5, quality=1.0)]
    assert bisection(done, setting, draw) == {"remaining": pytest.approx(0.375)}


def test_netadapt_goes_on_from_the_child_that_loses_least_for_what_it_saves():
    dimensions = [Dimension(f"level/{name}", (0, 4), whole=True) for name in "ab"]
    setting = Setting(dimensions, (0.1, 1.0), lambda share: {"level/a": 4, "level/b": 4}, warm=1)

    def tried(number, a, b, cost, quality, state="feasible"):
        point = {"level/a": a, "level/b": b}
        return Trial(number, point, state=state, cost=cost, quality=quality, share=cost)

    draw = np.random.default_rng(0)
    root = tried(0, 4, 4, 1.0, 1.0)
    assert netadapt([root], setting, draw) == {"level/a": 3, "level/b": 4}
    children = [root, tried(1, 3, 4, 0.8, 0.98), tried(2, 4, 3, 0.9, 0.999)]
    assert netadapt(children, setting, draw) == {"level/a": 3, "level/b": 3}  # 0.01 a share against 0.1
    assert netadapt([*children, tried(3, 3, 3, 0.7, 0.9, "infeasible")], setting, draw) == {"level/a": 4, "level/b": 2}


def test_the_front_is_what_nothing_else_beats():
    trials = [Trial(n, cost=c, quality=q) for n, (c, q) in enumerate([(0.5, 0.9), (0.5, 0.8), (0.4, 0.7), (0.6, 0.9)])]
    assert [trial.number for trial in front_of([*trials, Trial(4, cost=0.1)])] == [2, 0]


def test_the_result_is_a_table_a_page_and_a_figure(tmp_path):
    found = optimized(trials=4)
    assert repr(found).startswith("Optimized(macs ")
    assert "best" in str(found)
    assert "<table" in found._repr_html_()
    found.plot(tmp_path / "front.png")
    assert (tmp_path / "front.png").read_bytes()[:4] == b"\x89PNG"
    assert found.points[0] == (found.whole, found.dense, "dense")
    assert len(found.points) == 1 + found.evaluations
    structprune.report(task()[0], torch.randn(1, 6), tmp_path / "report.html", plan=found.plan, points=found.points)


def test_nothing_good_enough_is_said():
    calls = []

    def never(slim):
        calls.append(slim)
        return 1.0 if len(calls) == 1 else 0.0

    found = optimized(trials=3, evaluate=never)
    assert (found.model, found.plan, found.best, found.gain) == (None, None, None, 1.0)
    assert "nothing of at least 0.95 was found" in repr(found)


def test_what_cannot_be_is_refused():
    with pytest.raises(PlanError, match="not both"):
        optimized(maximize="throughput")
    with pytest.raises(PlanError, match="minimize is 'speed'"):
        optimized(minimize="speed")
    with pytest.raises(PlanError, match="evaluate returned a str"):
        optimized(evaluate=lambda slim: "good")
    with pytest.raises(PlanError, match="strategy is 'luck'"):
        structprune.Searching(strategy="luck")
    with pytest.raises(PlanError, match=r"give Space\(per_group=True\)"):
        structprune.Searching(strategy="netadapt")
    with pytest.raises(PlanError, match="remaining is"):
        structprune.Space(remaining=(0.9, 0.2))
    assert OWN.keys() <= set(STRATEGIES)
