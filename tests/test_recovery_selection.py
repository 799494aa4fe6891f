"""Choice of channels that knows of the reconstruction: which go first, where, and by which distance."""

from __future__ import annotations

import itertools

import pytest
import torch
from support.recovery_nets import (
    GONE,
    IMAGES,
    KEPT,
    TOKENS,
    conv_net,
    copy_channels,
    data_of,
    error,
    jittered,
    linear_net,
)  # fmt: skip
from support.snapshot import assert_untouched, snapshot
from torch import nn

import structprune
from structprune.errors import PlanError
from structprune.recovery.selection import divergence, squared_error


def fitted(model, data, **options):
    graph = structprune.DependencyGraph(model, data[0])
    return structprune.Reconstruction(**options).fit(graph, data)


@pytest.mark.parametrize(
    ("make", "shape"),
    [(lambda: conv_net(nn.Conv2d(8, 4, 3)), IMAGES), (lambda: linear_net(nn.Linear(8, 4)), TOKENS)],
)
def test_channels_that_others_can_replace_go_first(make, shape):
    model, data = make(), data_of(shape)
    copy_channels(model[0].weight, model[0].bias)
    before = snapshot(model)
    chosen = fitted(model, data)
    assert_untouched(model, before)
    plan = structprune.plan(model, data[0], importance=chosen, ratio=3 / 8, round_to=1)
    gone = set(plan.removed["0.weight"][0])
    # Of each pair of multiples one goes; the L2 norm would take the smaller ones, whatever they are worth.
    assert gone in [set(pairs) for pairs in itertools.product(*zip(GONE, [0, 2, 7], strict=True))]
    recovered = structprune.recover(plan.apply(model), model, data)
    assert error(recovered, model, data) < 1e-8


def test_channels_go_where_the_output_misses_them_least():
    model = linear_net(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)))
    data = data_of(TOKENS)
    with torch.no_grad():
        model[2][0].weight[:, KEPT] *= 1e-3  # of the first eight channels three are of use
    graph = structprune.DependencyGraph(model, data[0])
    chosen = structprune.Reconstruction().fit(graph, data)
    cheap, other = (chosen.depth(group, torch.arange(7, 0, -1).numpy()) for group in graph.groups())
    assert list(cheap) == sorted(cheap)
    assert cheap[4] < 1e-2 * other[2] < other[3] < 1e2 * cheap[5]


def test_squared_errors_heed_samples_of_which_the_model_is_sure():
    """Half of the samples are decided by far: the divergence does not see what is lost there."""
    dense = torch.tensor([[40.0, 0.0, 0.0], [0.2, 0.0, 0.1]])
    moved = dense + torch.tensor([[-3.0, 3.0, 0.0], [0.0, 0.0, 0.0]])
    assert float(divergence(dense, moved)) < 1e-9
    assert float(squared_error(dense, moved)) == pytest.approx(18)
    assert squared_error(dense, moved).dtype == torch.float64


def test_a_criterion_that_saw_no_data_refuses():
    model, data = linear_net(nn.Linear(8, 4)), data_of(TOKENS)
    graph = structprune.DependencyGraph(model, data[0])
    with pytest.raises(PlanError, match="has to see data"):
        structprune.Reconstruction()(graph.groups()[0], {})
    with pytest.raises(PlanError, match="give an iterable with at least one batch"):
        structprune.plan(model, data[0], importance=structprune.Reconstruction())


def test_plan_fits_the_criterion_itself():
    model, data = linear_net(nn.Linear(8, 4)), data_of(TOKENS)
    copy_channels(model[0].weight, model[0].bias)
    mine = structprune.plan(model, data[0], importance=structprune.Reconstruction(), data=data, round_to=1)
    theirs = structprune.plan(model, data[0], importance=fitted(model, data), round_to=1)
    assert mine.removed == theirs.removed


def test_distances_are_measured_on_samples_that_no_layer_was_solved_on():
    """A head of 64 features solved on 24 samples fits them whatever it keeps; the output says that it needs them."""
    model = jittered(nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 4)))
    data = list(torch.randn(48, 32, generator=torch.Generator().manual_seed(2), dtype=torch.float64).split(24))
    graph = structprune.DependencyGraph(model, data[0])
    (group,) = graph.groups()
    for batches in (data, data[:1]):  # with other batches, and with a part of the only one
        fitted = structprune.Reconstruction(distance=squared_error, levels=(0.5,), probes=24).fit(graph, batches)
        curve = fitted._curve(group)
        # Half of the channels explain what was solved on; of the others nearly a hundredth of the output is lost.
        assert curve.error[31] < 1e-4
        with torch.no_grad():
            power = float(model(data[0]).square().sum())
        assert curve.price[:32].sum() * (32 + 4) > 5e-3 * power * (1 if batches is data else 0.25)
