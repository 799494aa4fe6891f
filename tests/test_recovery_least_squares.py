"""Least squares from streamed sums, and backward elimination of channels, against solutions written out."""

from __future__ import annotations

import pytest
import torch

from structprune.equations import least_squares
from structprune.equations.elimination import ConsumerMoments, eliminate
from structprune.equations.least_squares import RIDGES, NormalEquations, fit
from structprune.equations.linear_maps import with_intercept


def sums_of(x, y):
    sums = NormalEquations.zeros(1, x.shape[1], y.shape[1], x.device)
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


def test_the_ridge_of_many_outputs_is_chosen_on_some_and_the_error_is_that_of_all():
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(80, 30, generator=generator, dtype=torch.float64)
    noise = torch.randn(80, 700, generator=generator, dtype=torch.float64)
    y = x @ torch.randn(30, 700, generator=generator, dtype=torch.float64) + 5 * noise
    train, held_out = sums_of(x[:60], y[:60]), sums_of(x[60:], y[60:])
    found = fit(train, held_out, 0)
    errors = {ridge: float(held_out.error(train.solve(ridge, 0)).sum()) for ridge in RIDGES}
    assert found.ridge == min(errors, key=errors.get)
    assert found.after == pytest.approx(errors[found.ridge])
    assert found.before == pytest.approx(float(y[60:].square().sum()))
    assert found.matrix.shape == (1, 30, 700)


def test_the_ridge_pulls_towards_what_is_nearer_to_the_solution():
    """30 rows decide 30 of 40 weights, as it were; the others are those that the ridge pulls towards."""
    generator = torch.Generator().manual_seed(6)
    x, rest = torch.randn(2, 20, 40, generator=generator, dtype=torch.float64)
    rest, wanted = rest[:10], torch.randn(40, 3, generator=generator, dtype=torch.float64)
    train, held_out = sums_of(x, x @ wanted), sums_of(rest, rest @ wanted)
    about_zero = fit(train, held_out, 0)
    near = (wanted + 0.1 * torch.randn(40, 3, generator=generator, dtype=torch.float64))[None]
    found = fit(train, held_out, 0, center=near)
    assert found.helps
    assert found.before == about_zero.before
    assert found.after < 0.02 * about_zero.after
    assert float((found.matrix[0] - wanted).norm()) < 0.2 * float((about_zero.matrix[0] - wanted).norm())
    moved = held_out.about(near)
    torch.testing.assert_close(moved.xy, sums_of(rest, rest @ (wanted - near[0])).xy)
    torch.testing.assert_close(moved.yy, sums_of(rest, rest @ (wanted - near[0])).yy)
    far = fit(train, held_out, 0, center=-20 * near)
    assert torch.equal(far.matrix, about_zero.matrix)
    assert far.after == about_zero.after


def test_where_no_row_is_solved_on_the_other_matrix_may_be_the_answer():
    rest = torch.randn(20, 4, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    wanted = torch.ones(1, 4, 3, dtype=torch.float64)
    nothing, held_out = sums_of(rest[:1] * 0, rest[:1] @ wanted[0] * 0), sums_of(rest, rest @ wanted[0])
    found = fit(nothing, held_out, 0, center=wanted)
    assert found.helps
    assert found.after < 1e-20
    assert torch.equal(found.matrix, wanted)
    assert not fit(nothing, held_out, 0).helps


# -- elimination -----------------------------------------------------------------------------------------------------


def brute(consumer, removed):
    """Error of the consumer without some channels, the others changed for the best, over the power of its result.

    Of the quadratic form ``w^T H w`` in all changes, those of the removed weights are given; over the others it is
    least by the Schur complement of theirs.
    """
    gone = torch.zeros(len(consumer.xx), dtype=torch.bool)
    gone[consumer.places[list(removed)].flatten()] = True
    moment, weight = consumer.penalised(), consumer.matrix[gone]
    across = moment[gone][:, ~gone]
    schur = moment[gone][:, gone] - across @ torch.linalg.solve(moment[~gone][:, ~gone], across.T)
    return float((weight * (schur @ weight)).sum() / consumer.power())


def consumer_of(seed, channels, each, outputs):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(200, channels * each, generator=generator, dtype=torch.float64).relu()
    x = torch.cat([x, torch.ones(200, 1, dtype=torch.float64)], 1)
    matrix = torch.randn(channels * each + 1, outputs, generator=generator, dtype=torch.float64)
    matrix[-1] = 0
    return ConsumerMoments(x.T @ x, matrix, torch.arange(channels * each).view(channels, each))


@pytest.mark.parametrize("each", [1, 3])
def test_each_step_takes_the_channel_that_costs_least(each):
    consumers = [consumer_of(0, 6, each, 4), consumer_of(1, 6, each, 2)]
    order, rises = eliminate(consumers)
    assert sorted(order.tolist()) == list(range(6))
    gone = []
    for channel, rise in zip(order[:-1].tolist(), rises.tolist(), strict=True):
        candidates = {c: sum(brute(one, [*gone, c]) for one in consumers) for c in range(6) if c not in gone}
        assert channel == min(candidates, key=candidates.get)
        assert rise == pytest.approx(candidates[channel], rel=1e-8)
        gone.append(channel)


def test_the_change_is_the_best_without_the_channels():
    consumer = consumer_of(0, 6, 3, 4)
    removed = torch.tensor([1, 4])
    change = consumer.change(removed)
    assert not (consumer.matrix + change)[consumer.places[removed].flatten()].any()
    gap = (change * (consumer.xx @ change)).sum() / consumer.power()
    assert float(gap) == pytest.approx(brute(consumer, [1, 4]), rel=1e-2)


def test_what_few_rows_say_nothing_of_stays_as_it_was():
    """With 40 features and 12 rows most directions are not seen: weights along them must not be pulled to zero."""
    generator = torch.Generator().manual_seed(0)
    rows, others = torch.randn(2, 12, 40, generator=generator, dtype=torch.float64)
    matrix = torch.randn(41, 3, generator=generator, dtype=torch.float64)
    matrix[-1] = 0
    matrix[4:8] = 0  # channel 1 makes nothing: without it nothing is missing
    x = with_intercept(rows[None])[0]
    consumer = ConsumerMoments(x.T @ x, matrix, torch.arange(40).view(10, 4))
    assert not consumer.change(torch.tensor([1])).any()
    order, rises = eliminate([consumer])
    assert order[0] == 1
    assert rises[0] == 0
    unseen, change = with_intercept(others[None])[0], consumer.change(torch.tensor([2]))
    assert (unseen @ change).norm() < 0.5 * (unseen @ matrix).norm()  # 0.36; all weights solved anew leave 0.96


@pytest.mark.parametrize("ridge", [1e-10, 1e-4, 1.0])
def test_matrices_factored_in_float32_give_the_solution_of_float64(monkeypatch, ridge):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(90, 40, generator=generator, dtype=torch.float64) * torch.logspace(-3, 3, 40, dtype=torch.float64)
    y = torch.randn(90, 2, generator=generator, dtype=torch.float64)
    sums = sums_of(x, y)
    wanted = sums.solve(ridge, 1)
    monkeypatch.setattr(least_squares, "IN_FLOAT32", 10)
    called = []
    inner = least_squares._solved_in_float32
    monkeypatch.setattr(least_squares, "_solved_in_float32", lambda *args: called.append(inner(*args)) or called[-1])
    torch.testing.assert_close(sums.solve(ridge, 1), wanted, rtol=1e-6, atol=0)
    assert called[0] is not None


def test_what_float32_cannot_factor_is_left_to_float64(monkeypatch):
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    x[:, 5] = x[:, 4] + 1e-6 * x[:, 5]
    sums = sums_of(x, torch.randn(50, 2, generator=torch.Generator().manual_seed(5), dtype=torch.float64))
    wanted = sums.solve(1e-15, 0)
    monkeypatch.setattr(least_squares, "IN_FLOAT32", 1)
    found = sums.solve(1e-15, 0)
    assert torch.equal(found, wanted)


def test_second_moments_are_symmetric_products():
    x = torch.randn(2, 30, 300, dtype=torch.float64)
    torch.testing.assert_close(least_squares.second_moments(x), x.transpose(1, 2) @ x)
    narrow = least_squares.second_moments(x.float())
    assert narrow.dtype == torch.float64
    torch.testing.assert_close(narrow, x.transpose(1, 2) @ x, rtol=0, atol=1e-4)
