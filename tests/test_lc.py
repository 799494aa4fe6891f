"""L-C against the algorithm written out, and direct training."""

from __future__ import annotations

import pytest
import torch
from support.tiny_images import TRAIN, X, given, same, state_of, trained_network
from torch import nn

from structprune.search import (
    LC,
    Compose,
    Compressor,
    Direct,
    FilterPrune,
    Prune,
    Quantize,
    StructurePrune,
)
from structprune.search.projections import values_of
from structprune.search.task import Task


@pytest.fixture(scope="module")
def trained():
    return trained_network()


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
