"""L-C, direct training and recovery behind schemes; objectives, and the search for a density."""

from __future__ import annotations

import json
import random
import warnings

import numpy as np
import pytest
import torch
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
from structprune.search.task import Task
from structprune.search.trials import ENDED_EARLY, KNOWN_INFEASIBLE, NO_BETTER

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(192, 1, 6, 6, generator=GENERATOR)
Y = (X.flatten(1)[:, :18].sum(1) > 0).long()


def batches(first, last, size=32):
    return [(X[i : i + size], Y[i : i + size]) for i in range(first, last, size)]


TRAIN, CHOOSE, TEST = batches(0, 128), batches(128, 160), batches(160, 192, 16)


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 16), nn.ReLU(), nn.Linear(16, 2)
    )


@pytest.fixture(scope="module")
def trained():
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(60):
        for x, y in TRAIN:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    return model.eval()


def given(**more):
    return {"trainloader": TRAIN, "valloader": CHOOSE, "criterion": nn.CrossEntropyLoss(), **more}


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# -- the algorithm -----------------------------------------------------------------------------------------------------


def literal_lc(w, x, y, density, steps, count, rate, last, momentum, mu, factor):
    """L-C of one linear layer, written out: by the penalised loss and autograd, with pruning by sorting."""

    def project(v):
        kept = v.abs().flatten().argsort(descending=True)[: round(density * v.numel())]
        return torch.zeros(v.numel()).index_copy(0, kept, v.flatten()[kept]).view(v.shape)

    theta, multipliers, thetas = project(w), torch.zeros_like(w), []
    thetas.append(theta)
    for _ in range(steps - 1):
        velocity = torch.zeros_like(w)
        for i in range(count):
            v = w.clone().requires_grad_()
            loss = nn.functional.mse_loss(x @ v.T, y)
            loss = loss + mu / 2 * (v - theta - multipliers / mu).square().sum()
            (gradient,) = torch.autograd.grad(loss, v)
            velocity = momentum * velocity + gradient
            w = w - rate * (last / rate) ** (i / count) * (gradient + momentum * velocity)
        theta = project(w - multipliers / mu)
        multipliers = multipliers - mu * (w - theta)
        thetas.append(theta)
        mu *= factor
    return thetas


def test_lc_is_the_algorithm_written_out():
    torch.manual_seed(1)
    model = nn.Linear(6, 4, bias=False)
    x, y = torch.randn(16, 6), torch.randn(16, 4)
    projection = Prune(0.25).on(model)
    scores, seen = iter(range(9)), []

    def score(compressed):
        seen.append(compressed.weight.detach().clone())
        return float(next(scores))

    task = Task([(x, y)], lambda model, batch: nn.functional.mse_loss(model(batch[0]), batch[1]), score)
    lc = LC(steps=9, lr=0.1, lr_end=0.02, iterations=5, mu=0.3, mu_factor=1.5, finish=0, momentum=0.8)
    found = lc.compress(model, projection, task)
    wanted = literal_lc(model.weight.detach(), x, y, 0.25, 9, 5, 0.1, 0.02, 0.8, 0.3, 1.5)
    assert len(seen) == len(wanted) == 9
    for mine, other in zip(seen, wanted, strict=True):
        torch.testing.assert_close(mine, other)
    assert [step.mu for step in found.history[1:]] == pytest.approx([0.3 * 1.5**i for i in range(8)])
    assert torch.equal(found.model.weight, seen[-1])


def test_the_theta_with_the_best_score_is_kept(trained):
    scores = iter([1.0, 5.0, 3.0, 5.0])
    thetas = []

    def score(model):
        thetas.append(state_of(model))
        return next(scores)

    task = Task(TRAIN, lambda m, batch: nn.functional.cross_entropy(m(batch[0]), batch[1]), score)
    found = LC(steps=4, iterations=2, finish=0).compress(trained, Prune(0.2).on(trained), task)
    assert found.score == 5
    assert same(state_of(found.model), thetas[1])
    assert [step.score for step in found.history] == [1.0, 5.0, 3.0, 5.0]


def test_at_the_end_what_is_left_is_trained(trained):
    task = Task(TRAIN, lambda m, batch: nn.functional.cross_entropy(m(batch[0]), batch[1]), lambda _: 0.0)
    found = LC(steps=11, lr=0.02, iterations=2, finish=0.3).compress(trained, Prune(0.2).on(trained), task)
    assert len(found.history) == 11
    assert [step.mu > 0 for step in found.history] == [False] + 7 * [True] + 3 * [False]
    assert [step.distance == 0 for step in found.history] == 8 * [False] + 3 * [True]


def test_batch_norms_of_theta_have_statistics_of_their_own(trained):
    """Of zeros in front the norms give shifts alone; with the statistics of other weights they would not."""
    seen = []

    def score(model):
        x = torch.cat([x for x, _ in TRAIN])
        with torch.no_grad():
            seen.append(((model[0](x).mean((0, 2, 3)) - model[1].running_mean).abs().max(), model[1].momentum))
        return 0.0

    task = Task(TRAIN, lambda m, batch: nn.functional.cross_entropy(m(batch[0]), batch[1]), score)
    LC(steps=4, lr=0.1, iterations=4, finish=0).compress(trained, Prune(0.1).on(trained), task)
    assert len(seen) == 4
    assert all(gap < 1e-5 and momentum == 0.1 for gap, momentum in seen)


def test_the_penalty_grows_up_to_its_cap_and_the_rate_follows(trained):
    task = Task(TRAIN, lambda m, batch: nn.functional.cross_entropy(m(batch[0]), batch[1]), lambda _: 0.0)
    lc = LC(steps=6, lr=0.5, lr_end=0.5, iterations=1, mu=10, mu_factor=10, mu_cap=500, finish=0, momentum=0)
    history = lc.compress(trained, Prune(0.3).on(trained), task).history
    assert [step.mu for step in history] == [0, 10, 100, 500, 500, 500]
    # At a rate above 1/mu the penalty alone would throw the weights away: 0.5 * 500 times their distance.
    assert history[-1].distance < history[0].distance


def test_published_steps_get_the_published_penalty(trained):
    task = Task(TRAIN, lambda m, b: m(b[0]).sum(), lambda _: 0.0)
    assert LC(iterations=3000, finish=0)._first_mu(task) == pytest.approx(1e-3)
    # A hundredth as many batches at five times the rate: the penalty has to draw twenty times as strongly.
    assert LC(lr=0.05, iterations=30, finish=0)._first_mu(task) == pytest.approx(2e-2, rel=0.1)
    # Six L steps fewer end at the same strength.
    assert LC(iterations=3000)._first_mu(task) == pytest.approx(1e-3 * 1.1**6)
    assert LC(mu=0.7, iterations=30)._first_mu(task) == 0.7
    assert (LC().steps, LC().lr, LC().mu_factor, LC().mu_cap) == (30, 0.01, 1.1, 1e4)


@pytest.mark.parametrize(
    "scheme",
    [Prune(0.05), FilterPrune(0.25), Compose([StructurePrune(0.4), Quantize("bfloat16")])],
    ids=lambda scheme: type(scheme).__name__,
)
@pytest.mark.parametrize("optimizer", [LC(steps=16, lr=0.05, iterations=8), Direct(epochs=15, lr=0.05, iterations=8)])
def test_any_scheme_is_trained(trained, scheme, optimizer):
    at_once = Compressor(trained, scheme=scheme, optimizer=Direct(epochs=0), **given())
    at_once.run()
    compressor = Compressor(trained, scheme=scheme, optimizer=optimizer, **given())
    slim = compressor.run()
    found = compressor.statistics
    assert found["score"]["compressed"] >= at_once.statistics["score"]["compressed"]
    assert found["weights"]["compressed"]["nonzero"] < 0.6 * found["weights"]["dense"]["nonzero"]
    assert slim(X).shape == (192, 2)


def test_direct_holds_what_is_zero(trained):
    sparse = Compressor(trained, scheme=Prune(0.1), optimizer=Direct(epochs=3, lr=0.05), **given()).run()
    support = Prune(0.1).on(trained).support(values_of(trained))
    values = values_of(sparse)
    for name, kept in support.items():
        assert (values[name][~kept] == 0).all()
    moved = max(float((values[n][k] - values_of(trained)[n][k]).abs().max()) for n, k in support.items())
    assert moved > 1e-3


def test_lc_beats_direct_where_almost_all_goes():
    """The support that the dense network shows is not the best one; L-C changes it."""
    torch.manual_seed(0)
    model = nn.Linear(24, 1, bias=False)
    x = torch.randn(256, 24)
    x[:, 1] = x[:, 0] + 0.05 * torch.randn(256)  # two inputs that say the same share what one weight could hold
    y = 2 * x[:, :1] + 1.2 * x[:, 5:6]
    with torch.no_grad():
        model.weight.zero_()
        model.weight[0, [0, 1, 5, 7]] = torch.tensor([1.0, 1.0, 0.8, 0.9])
    data = [(x, y)]
    loss = {}
    for way in (LC(steps=30, lr=0.05, iterations=20), Direct(epochs=29, lr=0.05, iterations=20)):
        compressor = Compressor(
            model, scheme=Prune(2 / 24), optimizer=way, trainloader=data, valloader=data, criterion=nn.MSELoss()
        )
        compressor.run()
        loss[type(way).__name__] = -compressor.statistics["score"]["compressed"]
    assert loss["LC"] < 0.1 * loss["Direct"]


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
