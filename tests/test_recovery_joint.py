"""Producers solved together with their consumer: what is gained in a model, and what is left alone with a reason."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.recovery_nets import GONE, IMAGES, TOKENS, conv_net, data_of, error, jittered, linear_net, removal
from torch import nn

import structprune


class Gated(nn.Module):
    """The MLP of a language model."""

    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(6, 8, bias=False), nn.Linear(6, 8, bias=False), nn.Linear(8, 4)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Product(nn.Module):
    """The last layer is a product with its bias in one call."""

    def __init__(self):
        super().__init__()
        self.up, self.weight, self.bias = nn.Linear(6, 8), nn.Parameter(torch.empty(8, 4)), nn.Parameter(torch.empty(4))

    def forward(self, x):
        return torch.addmm(self.bias, F.relu(self.up(x)), self.weight)


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
    "addmm": (lambda: jittered(Product()), (60, 6), "up", ("up",)),
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
