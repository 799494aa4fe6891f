"""Compressors: recovery behind schemes, objectives, and the search for a density."""

from __future__ import annotations

import json
import random
import warnings

import numpy as np
import pytest
import torch
from support.tiny_images import CHOOSE, TEST, TRAIN, X, Y, given, same, state_of, trained_network
from torch import nn

import structprune
from structprune import cost
from structprune.errors import PlanError
from structprune.search import (
    LC,
    Compose,
    Compressor,
    Direct,
    FilterPrune,
    Maximize,
    Minimize,
    NeuronPrune,
    Prune,
    Quantize,
    Recover,
    StructurePrune,
)
from structprune.search.objectives import Measure
from structprune.search.projections import values_of
from structprune.search.trials import ENDED_EARLY, KNOWN_INFEASIBLE, NO_BETTER


@pytest.fixture(scope="module")
def trained():
    return trained_network()


# -- the compressor ----------------------------------------------------------------------------------------------------


def test_nothing_of_the_users_is_changed(trained):
    trained.train()
    trained[2].eval()
    trained[0].weight.requires_grad_(False)
    before, modes = state_of(trained), [module.training for module in trained.modules()]
    rng = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    try:
        slim = Compressor(trained, scheme=FilterPrune(0.5), optimizer=LC(steps=3), **given(testloader=TEST)).run()
        assert same(before, state_of(trained))
        assert [module.training for module in trained.modules()] == modes
        assert [module.training for module in slim.modules()] == modes
        assert not trained[0].weight.requires_grad
        assert torch.equal(rng[0], torch.get_rng_state())
        assert rng[1] == random.getstate()
        assert (rng[2] == np.random.get_state()[1]).all()
    finally:
        trained.eval()
        trained[0].weight.requires_grad_(True)


def test_the_result_is_smaller_and_computes_what_was_scored(trained):
    compressor = Compressor(trained, scheme=StructurePrune(0.5), optimizer=LC(steps=3, lr=0.02), **given())
    slim = compressor.run()
    found = compressor.statistics
    assert slim[0].out_channels + slim[4].out_features == 12
    assert cost(slim, X[:1]).params == found["weights"]["compressed"]["entries"] < found["weights"]["dense"]["entries"]
    x, y = CHOOSE[0]
    with torch.no_grad():
        accuracy = 100 * float((slim(x).argmax(1) == y).float().mean())
    assert found["score"]["compressed"] == pytest.approx(accuracy)
    assert found["steps"][0]["loss"] is None
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_the_same_seed_gives_the_same_network(trained):
    class Shuffled:
        def __len__(self):
            return 4

        def __iter__(self):
            for picked in torch.randperm(128).split(32):
                yield X[picked], Y[picked]

    def run(seed):
        asked = given(trainloader=Shuffled(), seed=seed)
        compressor = Compressor(trained, scheme=Prune(0.2), optimizer=LC(steps=3), **asked)
        return state_of(compressor.run()), compressor.statistics["steps"]

    first, again, other = run(0), run(0), run(1)
    assert same(first[0], again[0])
    assert first[1] == again[1] != other[1]


def test_recover_solves_the_layers_that_are_left(trained):
    compressor = Compressor(trained, scheme=StructurePrune(0.5), optimizer=Recover(), **given())
    slim = compressor.run()
    steps = compressor.statistics["steps"]
    assert steps[1]["score"] >= steps[0]["score"]
    assert slim[4].out_features < 16
    with pytest.raises(PlanError, match="optimizer is Recover"):
        Compressor(trained, scheme=Prune(0.9), optimizer=Recover(), **given()).run()


def test_the_test_data_are_run_through_once(trained):
    class Counted(list):
        passes = 0

        def __iter__(self):
            self.passes += 1
            return super().__iter__()

    test = Counted(TEST)
    compressor = Compressor(
        trained,
        scheme=FilterPrune(),
        objective=Minimize("macs"),
        eps=0.5,
        trials=2,
        sampler="tpe",
        optimizer=Direct(epochs=1),
        **given(testloader=test),
    )
    compressor.run()
    assert test.passes == 1
    x, y = torch.cat([b[0] for b in TEST]), torch.cat([b[1] for b in TEST])
    with torch.no_grad():
        dense = 100 * float((trained(x).argmax(1) == y).float().mean())
    assert compressor.statistics["test"]["dense"] == pytest.approx(dense)


def test_a_model_that_returns_its_loss_and_a_score_of_ones_own():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(36, 12), nn.Linear(12, 2)

        def forward(self, x, labels=None):
            logits = self.second(self.first(x.flatten(1)).relu())
            found = {"logits": logits}
            if labels is not None:
                found["loss"] = nn.functional.cross_entropy(logits, labels)
            return found

    torch.manual_seed(0)
    data = [{"x": x, "labels": y} for x, y in TRAIN]
    model, asked = Model(), []

    def score(model):
        asked.append(model.training)
        with torch.no_grad():
            return -float(model(**data[0])["loss"])

    compressor = Compressor(
        model, scheme=NeuronPrune(0.5), optimizer=LC(steps=3), trainloader=data, valloader=score, testloader=score
    )
    assert compressor.run().first.out_features == 6
    assert not any(asked)


# -- objectives and the search -----------------------------------------------------------------------------------------


def test_the_density_is_found(trained):
    compressor = Compressor(
        trained,
        scheme=FilterPrune(),
        objective=Minimize("macs"),
        eps=0.05,
        trials=5,
        sampler="tpe",
        optimizer=Direct(epochs=3, lr=0.02),
        **given(),
    )
    slim = compressor.run()
    found = compressor.statistics
    assert found["within_eps"]
    assert found["objective"]["compressed"] == cost(slim, X[:1]).macs < found["objective"]["dense"]
    trials = found["trials"]
    assert sum(trial["score"] is not None for trial in trials) <= 5
    feasible = [trial for trial in trials if trial["feasible"]]
    assert found["objective"]["compressed"] == min(trial["value"] for trial in feasible)
    assert found["densities"] == [min(feasible, key=lambda trial: trial["value"])["densities"][0]]
    for trial in trials:
        assert (trial["score"] is None) == (trial["outcome"] in (KNOWN_INFEASIBLE, NO_BETTER))


class Counting:
    """A way to keep accuracy that trains nothing and counts how much stays."""

    def __init__(self):
        self.seen = []

    def compress(self, model, projection, task):
        support = projection.support(values_of(model))
        share = sum(int(kept.sum()) for kept in support.values()) / sum(kept.numel() for kept in support.values())
        self.seen.append(share)
        return Direct(epochs=0).compress(model, projection, task)


@pytest.mark.parametrize("sampler", ["gp", "tpe"])
def test_the_search_finds_the_edge_of_what_is_allowed(trained, sampler):
    """The score falls below what is allowed under a density of 0.37, and fewer weights are better."""
    total = sum(value.numel() for value in values_of(trained).values() if value.dim() > 1)

    def score(model):
        left = sum(int((v != 0).sum()) for v in values_of(model).values() if v.dim() > 1) / total
        return 0.0 if left >= 0.37 else left - 0.37

    way = Counting()
    compressor = Compressor(
        trained,
        scheme=Prune(),
        objective=Minimize("params"),
        eps=0.0,
        trials=10,
        sampler=sampler,
        optimizer=way,
        trainloader=TRAIN,
        valloader=score,
    )
    compressor.run()
    assert len(way.seen) <= 10
    (density,) = compressor.statistics["densities"]
    assert 0.37 <= density < 0.45
    untrained = [trial for trial in compressor.statistics["trials"] if trial["score"] is None]
    low = [trial["densities"][0] for trial in untrained if trial["outcome"] == KNOWN_INFEASIBLE]
    assert all(value < 0.37 for value in low)


def test_two_densities_are_found_together(trained):
    compressor = Compressor(
        trained,
        scheme=Compose([FilterPrune(), NeuronPrune(), Quantize("bfloat16")]),
        objective=Minimize("memory"),
        eps=0.2,
        trials=3,
        sampler="tpe",
        optimizer=Direct(epochs=1),
        **given(),
    )
    slim = compressor.run()
    first, second, third = compressor.statistics["densities"]
    assert third is None
    assert {slim[0].out_channels, slim[4].out_features} == {round(8 * first), round(16 * second)}
    assert slim[0].weight.dtype == torch.bfloat16


def test_infeasible_trials_end_early(trained):
    calls = []

    def score(model):
        calls.append(1)
        zeros = sum(int((value == 0).sum()) for value in values_of(model).values())
        return 100.0 - zeros

    compressor = Compressor(
        trained,
        scheme=Prune(),
        objective=Minimize("params"),
        eps=10.0,
        trials=2,
        sampler="tpe",
        densities=(0.1, 0.5),
        optimizer=Direct(epochs=20, iterations=1),
        trainloader=TRAIN,
        valloader=score,
    )
    with pytest.raises(PlanError, match=r"No density that was tried keeps the score of 100 above 90: the best is"):
        compressor.run()
    trials = compressor.statistics["trials"]
    assert [trial["outcome"] for trial in trials if trial["score"] is not None] == [ENDED_EARLY, ENDED_EARLY]
    assert len(calls) < 30  # of 2 x 22


@pytest.mark.parametrize("objective", [Maximize("throughput", runs=5), Minimize("latency", runs=5)])
def test_times_are_measured_beside_the_dense_network(objective):
    torch.manual_seed(0)
    dense, narrow = (nn.Sequential(nn.Linear(256, n), nn.ReLU(), nn.Linear(n, 256)) for n in (2048, 64))
    measure = Measure(objective, dense.eval(), torch.randn(64, 256))
    assert measure.before > 0
    assert objective.better(measure(narrow.eval()), measure.before)


def test_counted_objectives(trained):
    found = cost(trained, X[:1])
    sparse = Prune(0.1).compressed(trained)
    values = {name: Measure(Minimize(name), trained, X) for name in ("macs", "params", "memory")}
    assert values["macs"].before == found.macs == values["macs"](sparse)
    assert values["memory"].before == found.weight_bytes + found.peak_activation_bytes
    assert values["params"](sparse) < values["params"].before == found.params
    assert Measure(Minimize(lambda model: model[0].out_channels), trained, X).before == 8


def test_the_log_of_optuna_is_as_it_was(trained):
    optuna = pytest.importorskip("optuna")
    before = optuna.logging.get_verbosity()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        asked = given(
            scheme=FilterPrune(),
            objective=Minimize("macs"),
            trials=1,
            sampler="tpe",
            eps=1.0,
            optimizer=Direct(epochs=0),
        )
        Compressor(trained, **asked).run()
    assert optuna.logging.get_verbosity() == before


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": 3}, "model is 3"),
        ({"scheme": "Prune"}, "scheme is 'Prune'"),
        ({"optimizer": LC}, "optimizer is the class LC"),
        ({"optimizer": "lc"}, "optimizer is 'lc'"),
        ({"objective": "throughput"}, "objective is 'throughput'"),
        ({"eps": -0.1}, "eps is -0.1"),
        ({"eps": float("nan")}, "eps is nan"),
        ({"trials": 0}, "trials is 0"),
        ({"sampler": "grid"}, "sampler is 'grid'"),
        ({"densities": (0.5, 0.1)}, "densities is"),
        ({"densities": 0.5}, "densities is 0.5"),
        ({"criterion": nn.CrossEntropyLoss}, "criterion is the class CrossEntropyLoss"),
        ({"trainloader": None}, "trainloader is None"),
        ({"valloader": X}, "valloader is a Tensor"),
        ({"testloader": 1}, "testloader is 1"),
        ({"seed": -1}, "seed is -1"),
        ({"scheme": Prune()}, "scheme leaves a density open"),
        ({"objective": Minimize("macs")}, "objective is given, and scheme leaves no density open"),
    ],
)
def test_bad_arguments_are_named(trained, change, said):
    asked = {"model": trained, "scheme": Prune(0.5), "optimizer": LC(), **given()}
    with pytest.raises(PlanError, match=said):
        Compressor(**{**asked, **change})


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: LC(steps=0), "steps is 0"),
        (lambda: LC(lr=0), "lr is 0"),
        (lambda: LC(lr_end=-1), "lr_end is -1"),
        (lambda: LC(iterations=0), "iterations is 0"),
        (lambda: LC(first_iterations=1.5), "first_iterations is 1.5"),
        (lambda: LC(mu=0), "mu is 0"),
        (lambda: LC(mu_factor=0.9), "mu_factor is 0.9"),
        (lambda: LC(mu=5, mu_cap=1), "mu_cap is 1"),
        (lambda: LC(momentum=1), "momentum is 1"),
        (lambda: LC(finish=1), "finish is 1"),
        (lambda: LC(weight_decay=-1), "weight_decay is -1"),
        (lambda: Direct(epochs=-1), "epochs is -1"),
        (lambda: Direct(lr="fast"), "lr is 'fast'"),
        (lambda: Recover(samples=0), "samples is 0"),
        (lambda: Maximize("latency"), "of is 'latency'; give 'throughput'"),
        (lambda: Minimize("joules"), "of is 'joules'"),
        (lambda: Minimize(3), "of is 3"),
        (lambda: Minimize("latency", backend="abacus"), "backend is 'abacus'"),
        (lambda: Minimize("latency", runs=1), "runs is 1"),
    ],
)
def test_bad_settings_are_named(make, said):
    with pytest.raises(PlanError, match=said):
        make()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"trainloader": []}, "trainloader holds no batch"),
        ({"valloader": []}, "validate holds no batch"),
        ({"testloader": []}, "testloader holds no batch"),
        ({"criterion": lambda outputs, targets: 3.0}, "criterion returned no scalar"),
        ({"criterion": lambda outputs, targets: outputs.sum() * float("nan")}, "loss on trainloader became nan"),
        ({"valloader": lambda model: float("nan")}, "score on validation data is nan"),
        ({"trainloader": [X]}, "no pair of inputs"),
    ],
)
def test_what_goes_wrong_on_the_way_changes_nothing(trained, change, said):
    before = state_of(trained)
    asked = {"scheme": Prune(0.5), "optimizer": LC(steps=3), **given(), **change}
    compressor = Compressor(trained, **asked)
    with pytest.raises(PlanError, match=said):
        compressor.run()
    assert compressor.statistics == {}
    assert same(before, state_of(trained))
    assert not trained.training


def test_the_package_has_it():
    assert structprune.search.LC is LC
