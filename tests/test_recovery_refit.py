"""Producers solved together with their consumer: adjoints, slopes, what is gained, and what is left alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from test_recovery import GONE, IMAGES, TOKENS, conv_net, data_of, error, jittered, linear_net, removal
from test_recovery_selection import CALLS
from torch import nn

import structprune
from structprune.recovery import refit as refit_module
from structprune.recovery.chain import Batch, Chain, Weights
from structprune.recovery.linear_maps import linear_map
from structprune.recovery.pieces import slopes
from structprune.recovery.refit import refit, settled

# -- operators -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CALLS)
def test_adjoints_are_adjoint(name):
    shape, weight_shape, options = CALLS[name]
    generator = torch.Generator().manual_seed(0)
    x, other = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    weight, change = (torch.randn(weight_shape, generator=generator, dtype=torch.float64) for _ in range(2))
    form = linear_map(name, (x, weight), options)
    result = form(x, weight)
    function = torch.matmul if name == "matmul" else getattr(F, name)
    torch.testing.assert_close(result, function(x, weight, **options))
    grad = torch.randn(result.shape, generator=generator, dtype=torch.float64)
    torch.testing.assert_close((form(x, change) * grad).sum(), (change * form.to_weight(grad, x, weight)).sum())
    torch.testing.assert_close((form(other, weight) * grad).sum(), (other * form.to_input(grad, x, weight)).sum())
    shift = torch.randn(form.form.weight_outputs * form.form.groups, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(((form(x, weight, shift) - result) * grad).sum(), (shift * form.to_shift(grad)).sum())


def test_uneven_padding_is_left_to_others():
    x, weight = torch.randn(2, 4, 9), torch.randn(6, 4, 4)
    assert linear_map("conv1d", (x, weight), {"padding": "same"}) is None


def test_slopes_of_a_gate():
    gate, up = torch.randn(2, 5, 3, dtype=torch.float64)
    hidden, (by_gate, by_up) = slopes(lambda results: F.silu(results[0]) * results[1], [gate, up])
    sigmoid = torch.sigmoid(gate)
    torch.testing.assert_close(hidden, gate * sigmoid * up)
    torch.testing.assert_close(by_up, gate * sigmoid)
    torch.testing.assert_close(by_gate, up * sigmoid * (1 + gate * (1 - sigmoid)))


def test_what_has_no_derivative_has_no_slope():
    x = torch.randn(4, 3, dtype=torch.float64)
    _, (mask,) = slopes(lambda results: (results[0] > 0).double(), [x])
    _, (first, second) = slopes(lambda results: results[0] * results[1].detach(), [x, x])
    assert not mask.any()
    assert not second.any()
    torch.testing.assert_close(first, x)


# -- the solver ------------------------------------------------------------------------------------------------------


def problem(samples):
    """A gated layer of three units that has to do what another one of the same size does."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, 5, generator=generator, dtype=torch.float64)
    shapes = (3, 5), (3, 5), (2, 3)
    true = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    near = [w + 0.2 * torch.randn(w.shape, generator=generator, dtype=torch.float64) for w in true]
    maps = [linear_map("linear", (x[:, : w.shape[1]], w), {}) for w in true]
    chain = Chain((maps[0], maps[1]), lambda r: torch.tanh(r[0]) * r[1], maps[2], lambda r: r[0])
    goal = (torch.tanh(x @ true[0].T) * (x @ true[1].T)) @ true[2].T
    batches = [Batch((part, part), torch.zeros_like(wanted), wanted) for part, wanted in
               zip(x.split(20), goal.split(20), strict=True)]  # fmt: skip
    return chain, batches, Weights(near, [None, None, None])


def test_gauss_newton_finds_weights_that_fit_exactly():
    chain, batches, start = problem(200)
    found = refit(chain, batches[:8], batches[8:], start, rounds=20, steps=40)
    assert found.helps
    assert found.after < 1e-12 * found.before
    assert chain.error(batches[8:], found.weights) == pytest.approx(found.after)


def test_what_is_learned_wrongly_is_not_taken():
    chain, batches, start = problem(200)
    wrong = [Batch(b.inputs, b.rest, 2 * chain.whole(b, start) - b.goal) for b in batches[:8]]
    found = refit(chain, wrong, batches[8:], start, rounds=3)
    assert found.after <= found.before
    gain = refit(chain, batches[:8], batches[8:], start, rounds=3)
    assert gain.after < 1e-2 * found.after


def test_a_ridge_keeps_weights_near_the_start():
    chain, batches, start = problem(200)
    moved = []
    for ridge in (0.0, 1e-2, 1.0, 100.0):
        found = refit(chain, batches[:8], batches[8:], start, rounds=20, steps=40, ridge=ridge)
        moved.append(float((found.weights.flat() - start.flat()).norm()))
    assert moved == sorted(moved, reverse=True)
    assert moved[-1] < 0.1 * moved[0]


def test_the_pull_of_a_ridge_is_towards_the_start_not_the_last_round():
    """Damping alone slows rounds down but does not keep them from the same end."""
    chain, batches, start = problem(200)
    ends = [refit(chain, batches[:8], batches[8:], start, 30, 40, ridge=ridge).weights for ridge in (0.0, 10.0)]
    free, held = (float((end.flat() - start.flat()).norm()) for end in ends)
    assert held < 0.5 * free


def test_the_first_rounds_see_fewer_batches_where_there_are_plenty(monkeypatch):
    chain, batches, start = problem(400)
    seen = []
    inner = refit_module._step

    def counted(chain, train, *rest):
        seen.append(len(train))
        return inner(chain, train, *rest)

    monkeypatch.setattr(refit_module, "_step", counted)
    refit(chain, batches[:16], batches[16:], start, rounds=4, steps=2)
    assert seen[-1] == 16
    equations, unknowns = 16 * 20 * 2, start.flat().numel()
    every = min(refit_module.THIN, equations // (refit_module.EQUATIONS * unknowns) or 1)
    assert seen[0] == -(-16 // every)
    monkeypatch.setattr(refit_module, "EQUATIONS", 2)
    seen.clear()
    refit(chain, batches[:16], batches[16:], start, rounds=4, steps=2)
    assert seen == [4, 4, 4, 16]


def test_the_last_step_sees_all_samples():
    """What is held out has another answer; the step goes towards both, and errors stay those of before."""
    chain, batches, start = problem(200)
    other = [Batch(b.inputs, b.rest, b.goal + 0.3) for b in batches[8:]]
    found = refit(chain, batches[:8], other, start, rounds=4, steps=40)
    last = settled(chain, [*batches[:8], *other], start, found, steps=40)
    assert (last.before, last.after, last.rounds) == (found.before, found.after, found.rounds + 1)
    together = [chain.error([*batches[:8], *other], each.weights) for each in (found, last)]
    assert together[1] < together[0]
    again = settled(chain, [*batches[:8], *other], start, last, steps=0)
    assert again.weights is last.weights


# -- in a model ------------------------------------------------------------------------------------------------------


class Gated(nn.Module):
    """The MLP of a language model."""

    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(6, 8, bias=False), nn.Linear(6, 8, bias=False), nn.Linear(8, 4)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


def normed(activation, **options):
    layers = [nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), activation, nn.Conv2d(8, 4, 3, **options)]
    return jittered(nn.Sequential(*layers))


def depthwise():
    layers = [nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU(True)]
    return jittered(nn.Sequential(*layers, nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4)))


MODELS = {
    "relu": (lambda: conv_net(nn.Conv2d(8, 4, 3)), IMAGES, "0", ("0",)),
    "norm": (lambda: normed(nn.ReLU()), IMAGES, "0", ("0",)),
    "in place": (lambda: normed(nn.ReLU(inplace=True), bias=False), IMAGES, "0", ("0",)),
    "strided": (lambda: normed(nn.SiLU(), stride=2, padding=1), IMAGES, "0", ("0",)),
    "depthwise": (depthwise, IMAGES, "0", ("2",)),
    "gelu": (lambda: jittered(nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 4))), TOKENS, "0", ("0",)),
    "gated": (lambda: jittered(Gated()), TOKENS, "gate", ("gate", "up")),
    "activation behind": (
        lambda: jittered(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4), nn.ReLU())),
        TOKENS, "0", ("0",),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_producers_bring_the_result_closer(name):
    make, shape, layer, producers = MODELS[name]
    model, data = make(), data_of((60, *shape[1:]))
    slim = removal(model, data[0], layer).apply(model)
    alone, together = (structprune.recover(slim, model, data, rounds=rounds) for rounds in (0, 6))
    row = structprune.recovery_report(together).layers[-1]
    assert row.producers == producers
    assert not structprune.recovery_report(alone).layers[-1].producers
    assert row.after < structprune.recovery_report(alone).layers[-1].after
    fresh = data_of((25, *shape[1:]), 1)
    assert error(together, model, fresh) < 0.95 * error(alone, model, fresh)


def test_the_results_at_hand_are_those_of_the_new_weights():
    layers = [nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5), nn.LayerNorm(5), nn.Linear(5, 4)]
    model, data = jittered(nn.Sequential(*layers)), data_of((60, 5, 6))
    slim = removal(model, data[0], "0").apply(model)
    recovered = structprune.recover(slim, model, data)
    rows = {row.layer: row for row in structprune.recovery_report(recovered).layers}
    assert rows["2"].producers == ("0",)
    with torch.no_grad():
        # The last fifth of each batch is held out; for the last layer nothing changes any more.
        ours, theirs = (torch.cat([m(x)[-4:] for x in data]) for m in (recovered, model))
    # It was solved once more on all samples behind the error that is told.
    assert float((ours - theirs).norm() / theirs.norm()) == pytest.approx(rows["4"].after, rel=0.1)


class Between(nn.Module):
    """A layer whose channels come through something."""

    def __init__(self, through):
        super().__init__()
        self.up, self.down, self.through = nn.Linear(6, 8), nn.Linear(8, 4), through

    def forward(self, x):
        return self.down(self.through(F.relu(self.up(x))))


class Written(Between):
    def forward(self, x):
        x = x + 1.0
        y = self.down(F.relu(self.up(x)))
        x.mul_(0.0)
        return y + x.sum(-1, keepdim=True)


class Used(Between):
    def forward(self, x):
        y = self.up(x)
        return self.down(F.relu(y)), y.sum(-1)


class WrittenThroughView(Between):
    def forward(self, x):
        x = x + 1.0
        view = x[:]
        y = self.up(x)
        view.mul_(2.0)
        return self.down(F.relu(y))


class Tied(Between):
    """The weight of the producer has a second name, in a layer that is used later."""

    def __init__(self):
        super().__init__(None)
        self.later, self.last = nn.Linear(6, 8), nn.Linear(4, 6)
        self.later.weight = self.up.weight

    def forward(self, x):
        y = self.down(F.relu(self.up(x)))
        return y, self.later(self.last(y)).sum(-1)


class Positions(Between):
    """Something of its own is added to each sample."""

    def __init__(self):
        super().__init__(None)
        self.places = nn.Parameter(torch.ones(8, 5, 8))

    def forward(self, x):
        return self.down(F.relu(self.up(x) + self.places))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Between(lambda x: x.cumsum(1)), "come through cumsum"),
        (lambda: Used(None), "is used elsewhere too"),
        (lambda: Written(None), "is written over"),
        (lambda: WrittenThroughView(None), "when it is repeated"),
        (Tied, "no weight of its own"),
        (Positions, "differs from sample to sample"),
    ],
)
def test_what_cannot_be_refitted_is_left_with_a_reason(make, reason):
    model, data = jittered(make()), data_of(TOKENS)
    slim = removal(model, data[0], "up").apply(model)
    rows = {row.layer: row for row in structprune.recovery_report(structprune.recover(slim, model, data)).layers}
    assert rows["down"].producers == ()
    assert reason in rows["down"].alone


class BatchStatistics(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.up, self.down, self.norm = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3), norm

    def forward(self, x):
        return self.down(self.norm(F.relu(self.up(x))))


class AlwaysTraining(nn.BatchNorm2d):
    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, training=True)


@pytest.mark.parametrize("norm", [lambda: nn.BatchNorm2d(8, track_running_stats=False), lambda: AlwaysTraining(8)])
def test_a_norm_by_the_batch_is_no_function_of_entries(norm):
    model, data = jittered(BatchStatistics(norm())), data_of(IMAGES)
    slim = removal(model, data[0], "up").apply(model)
    (row,) = [
        r for r in structprune.recovery_report(structprune.recover(slim, model, data)).layers if r.layer == "down"
    ]
    assert row.producers == ()
    assert "statistics from the batch" in row.alone


def test_a_layer_behind_which_a_norm_goes_by_the_batch_is_left():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), AlwaysTraining(4))
    model, data = jittered(model), data_of(IMAGES)
    slim = removal(model, data[0], "0").apply(model)
    recovered = structprune.recover(slim, model, data)
    assert "statistics from the batch" in structprune.recovery_report(recovered).skipped["2"]
    assert torch.equal(recovered[2].weight, slim[2].weight)


def test_a_layer_solved_with_its_producers_is_a_producer_of_the_next():
    layers = [nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, 4)]
    model, data = jittered(nn.Sequential(*layers)), data_of((120, 6))
    slim = removal(model, data[0], "0").apply(model)
    recovered = structprune.recover(slim, model, data)
    rows = {row.layer: row for row in structprune.recovery_report(recovered).layers}
    assert rows["2"].producers == ("0",)
    # Otherwise it would be solved on what went into layer 2 before, which no longer gives what comes out of it.
    assert "when it is repeated" not in rows["4"].alone


def test_a_batch_may_hold_a_single_sample():
    model, data = jittered(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))), data_of((24, 6), 1)
    slim = removal(model, data[0], "0").apply(model)
    recovered = structprune.recover(slim, model, data[0].split([15, 8, 1]))
    assert error(recovered, model, data) < error(slim, model, data)


def test_no_producer_is_touched_where_nothing_is_missing():
    model, data = linear_net(nn.Linear(8, 4)), data_of(TOKENS)
    with torch.no_grad():
        model[2].weight[:, GONE] = 0.0
    slim = removal(model, data[0], "0").apply(model)
    recovered = structprune.recover(slim, model, data)
    assert torch.equal(recovered[0].weight, slim[0].weight)
