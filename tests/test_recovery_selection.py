"""Choice of channels that knows of the reconstruction, and the parts that it and `recover` are made of."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from support.ranks import needs_distributed, on_two_ranks
from support.snapshot import assert_untouched, snapshot
from test_recovery import GONE, IMAGES, KEPT, TOKENS, conv_net, copy_channels, data_of, error, linear_net, removal
from torch import nn

import structprune
from structprune.errors import PlanError, RecoveryError
from structprune.recovery.contraction import apply_matrix, contraction
from structprune.recovery.elimination import View, eliminate
from structprune.recovery.least_squares import Sums, fit
from structprune.recovery.selection import divergence, squared_error

# -- contractions ----------------------------------------------------------------------------------------------------

CALLS = {
    "conv1d": ((2, 4, 9), (6, 4, 3), {"padding": "same"}),
    "conv2d": ((2, 4, 7, 6), (6, 2, 3, 2), {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2), "groups": 2}),
    "conv3d": ((2, 2, 4, 5, 3), (3, 2, 2, 2, 2), {"padding": "valid"}),
    "conv_transpose1d": ((2, 4, 5), (4, 3, 4), {"stride": 3, "dilation": 2}),
    "conv_transpose2d": (
        (2, 4, 5, 4), (4, 3, 3, 3), {"stride": 2, "padding": 1, "output_padding": 1, "groups": 2}
    ),
    "linear": ((2, 3, 5), (7, 5), {}),
    "matmul": ((2, 3, 5), (5, 7), {}),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_a_contraction_is_rows_times_a_matrix(name):
    shape, weight_shape, options = CALLS[name]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    weight = torch.randn(weight_shape, generator=generator, dtype=torch.float64)
    function = torch.matmul if name == "matmul" else getattr(F, name)
    result = function(x, weight, **options)
    form = contraction(name, (x, weight), options)
    everywhere = torch.arange(form.positions(result))
    matrix = form.matrix(weight)
    rows = form.rows(x, everywhere)
    assert rows.shape == (form.groups, len(everywhere), form.features)
    torch.testing.assert_close(form.weight(matrix), weight)
    torch.testing.assert_close(rows @ matrix, form.outputs(result, everywhere))
    torch.testing.assert_close(apply_matrix(name, form, matrix, (x, weight), options), result)


# -- least squares ---------------------------------------------------------------------------------------------------


def sums_of(x, y):
    sums = Sums.zeros(1, x.shape[1], y.shape[1], x.device)
    for rows in zip(x.split(7), y.split(7), strict=True):
        sums.add(rows[0][None], rows[1][None])
    return sums


def test_streamed_sums_give_the_least_squares_solution():
    x, y = torch.randn(50, 4, dtype=torch.float64), torch.randn(50, 3, dtype=torch.float64)
    sums = sums_of(x, y)
    solution = sums.solve(1e-14, 0)
    torch.testing.assert_close(solution[0], torch.linalg.lstsq(x, y).solution)
    torch.testing.assert_close(sums.error(solution)[0], (y - x @ solution[0]).square().sum(0))


def test_noise_is_not_fitted():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(60, 20, generator=generator, dtype=torch.float64)
    y = torch.randn(60, 2, generator=generator, dtype=torch.float64)
    found = fit(sums_of(x[:25], -y[:25]), sums_of(x[:25], y[:25]), 0)  # what was learned is wrong where it is held out
    assert not found.helps
    assert found.after == found.before
    assert not found.matrix.any()


# -- elimination -----------------------------------------------------------------------------------------------------


def brute(view, removed):
    """Error of the consumer solved again without some channels, over the power of its result."""
    left = torch.ones(len(view.xx), dtype=torch.bool)
    left[view.places[list(removed)].flatten()] = False
    moment = view.penalised()
    goal = view.xx @ view.matrix

    def fitted(index):
        return (goal[index] * torch.linalg.solve(moment[index][:, index], goal[index])).sum()

    return float((fitted(torch.ones_like(left)) - fitted(left)) / view.power())


def view_of(seed, channels, each, outputs):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(200, channels * each, generator=generator, dtype=torch.float64).relu()
    x = torch.cat([x, torch.ones(200, 1, dtype=torch.float64)], 1)
    matrix = torch.randn(channels * each + 1, outputs, generator=generator, dtype=torch.float64)
    matrix[-1] = 0
    return View(x.T @ x, matrix, torch.arange(channels * each).view(channels, each))


@pytest.mark.parametrize("each", [1, 3])
def test_each_step_takes_the_channel_that_costs_least(each):
    views = [view_of(0, 6, each, 4), view_of(1, 6, each, 2)]
    order, rises = eliminate(views)
    assert sorted(order.tolist()) == list(range(6))
    gone = []
    for channel, rise in zip(order[:-1].tolist(), rises.tolist(), strict=True):
        candidates = {c: sum(brute(v, [*gone, c]) for v in views) for c in range(6) if c not in gone}
        assert channel == min(candidates, key=candidates.get)
        assert rise == pytest.approx(candidates[channel], rel=1e-8)
        gone.append(channel)


def test_the_change_is_the_best_without_the_channels():
    view = view_of(0, 6, 3, 4)
    removed = torch.tensor([1, 4])
    change = view.change(removed)
    assert not (view.matrix + change)[view.places[removed].flatten()].any()
    gap = (change * (view.xx @ change)).sum() / view.power()
    assert float(gap) == pytest.approx(brute(view, [1, 4]), rel=1e-2)


# -- the criterion ---------------------------------------------------------------------------------------------------


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
    assert cheap[4] < 1e-2 * other[1] < other[3] < 1e2 * cheap[5]


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


# -- several processes -----------------------------------------------------------------------------------------------


def recovered_weight(data):
    model = conv_net(nn.Conv2d(8, 4, 3))
    plan = removal(model, data[0], "0")
    return structprune.recover(plan.apply(model), model, data)[2].weight.detach()


def weight_of(rank):
    return recovered_weight(data_of(IMAGES, 4)[2 * rank : 2 * rank + 2])


@needs_distributed
def test_every_rank_gives_its_share(tmp_path):
    found = on_two_ranks(weight_of, tmp_path)
    together = recovered_weight(data_of(IMAGES, 4))
    for weight in found:
        torch.testing.assert_close(weight, together, rtol=1e-9, atol=1e-12)


def test_batches_that_take_another_branch_are_refused():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 4)

        def forward(self, x):
            y = self.up(x)
            return self.down(F.relu(y) if len(x) > 2 else F.gelu(y))

    model, data = Branch().double(), data_of(TOKENS)
    plan = removal(model, data[0], "up")
    with pytest.raises(RecoveryError, match="A batch runs gelu where the trace of the original has relu"):
        structprune.recover(plan.apply(model), model, [data[0], data[1][:2]])
