"""Layers with many features, solved by conjugate gradients without a matrix of moments, against the exact solution."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.recovery_nets import copy_channels, jittered, removal
from torch import nn

import structprune
from structprune.equations import fourier, window_equations
from structprune.equations.fixed_inputs import FixedInput
from structprune.equations.linear_maps import linear_map
from structprune.equations.window_moments import WindowMoments
from structprune.equations.windows import window_sums
from structprune.recovery import layer_solver, preconditioner
from structprune.recovery.whole_samples import exact_equations, iterative_equations

OPTIONS = {"padded": {"padding": 3}, "dilated": {"padding": 2, "dilation": 2}, "inside": {}}


@pytest.fixture(autouse=True)
def _always(monkeypatch):
    """Spectra for whatever they know, however small."""
    monkeypatch.setattr(fourier, "MARGIN", 0.0)


def layer_of(options, channels=3, outputs=2, entries=6):
    x = torch.zeros(1, channels, 20, dtype=torch.float64)
    return linear_map("conv1d", (x, torch.zeros(outputs, channels, entries, dtype=torch.float64)), options)


def signals(count, channels, steps, seed=0):
    """Walks with a mean: neighbouring steps are alike."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, channels, steps, generator=generator, dtype=torch.float64).cumsum(2) / 3 + 1


# -- moments ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIONS)
def test_sums_and_squares_are_those_of_the_windows(name):
    layer = layer_of(OPTIONS[name])
    inputs = [signals(5, 3, 20), signals(2, 3, 17, 1)]
    moments = WindowMoments.of(layer, inputs)
    xx = sum(
        window_sums(layer, x, torch.zeros_like(layer(x, torch.zeros(layer.weight_shape).double())))[0] for x in inputs
    )
    torch.testing.assert_close(moments.sums.flatten(), xx[:-1, -1])
    torch.testing.assert_close(moments.diagonal.flatten(), xx.diagonal()[:-1])
    assert moments.count == xx[-1, -1]


@pytest.mark.parametrize("dilation", [1, 3])
def test_blocks_are_those_of_the_nearest_circulant_matrix(dilation):
    """The discrete Fourier transform of the moments of all windows that meet the input, from either side."""
    entries, x = 7, signals(5, 3, 20)
    layer = layer_of({"padding": 2, "dilation": dilation}, entries=entries)
    whole = layer_of({"padding": (entries - 1) * dilation, "dilation": dilation}, entries=entries)
    result = whole(x, torch.zeros(whole.weight_shape, dtype=torch.float64))
    toeplitz = window_sums(whole, x, result)[0][:-1, :-1].view(3, entries, 3, entries)
    transform = torch.fft.fft(torch.eye(entries, dtype=torch.float64)) / entries**0.5
    wanted = torch.einsum("fk,ckdl,fl->fcd", transform, toeplitz.to(transform.dtype), transform.conj())
    torch.testing.assert_close(WindowMoments.of(layer, [x]).blocks, wanted[: entries // 2 + 1])


@pytest.mark.parametrize("free", [False, True])
def test_the_inverse_is_that_of_the_circulant_matrix(free):
    """Of a signal that repeats itself, without borders, the moments are circulant."""
    entries, steps = 6, 24
    layer = layer_of({})
    period = signals(4, 3, entries)
    x = period.repeat(1, 1, steps // entries + 1)[..., : steps + entries - 1]
    moments = WindowMoments.of(layer, [x])
    xx, _ = window_sums(layer, x, torch.zeros(4, 2, steps, dtype=torch.float64))
    blocks = xx[:-1, :-1].view(3, entries, 3, entries)
    transform = torch.fft.fft(torch.eye(entries, dtype=torch.float64)) / entries**0.5
    moments.blocks = torch.einsum("fk,ckdl,fl->fcd", transform, blocks.to(transform.dtype), transform.conj())
    moments.blocks = moments.blocks[: entries // 2 + 1]
    penalty = moments.penalty(1e-2, free)
    matrix, shift = torch.randn(18, 2, dtype=torch.float64), torch.randn(2, dtype=torch.float64)
    solved, last = moments.inverse(penalty, free).with_intercept(matrix, shift)
    whole = xx.clone()
    whole[:-1, :-1] += torch.diag(penalty.mean(1).repeat_interleave(entries))
    if not free:
        whole[-1, :-1] = whole[:-1, -1] = 0
        whole[-1, -1] = 1
    torch.testing.assert_close(whole @ torch.cat([solved, last[None]]), torch.cat([matrix, shift[None]]))


# -- equations -------------------------------------------------------------------------------------------------------


def equations(options, intercept, outputs=2):
    """Both kinds of equations of a layer, for samples of two sizes."""
    layer = layer_of(options, outputs=outputs)
    weight = torch.randn(layer.weight_shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    pairs = []
    for x in (signals(30, 3, 20), signals(12, 3, 17, 1)):
        lacks = layer(x, weight) + 0.7
        noise = torch.randn(lacks.shape, generator=torch.Generator().manual_seed(len(x)), dtype=torch.float64)
        pairs.append((x, lacks + 0.3 * noise))
    return exact_equations(layer, pairs, intercept), iterative_equations(layer, pairs, intercept)


@pytest.mark.parametrize("intercept", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_they_have_the_exact_solution(monkeypatch, name, intercept):
    monkeypatch.setattr(window_equations, "ENOUGH", 1e-16)
    exact, iterative = equations(OPTIONS[name], intercept)
    for ridge in (1e-4, 1e-1):  # the second starts from the first
        wanted, found = exact.solve(ridge, int(intercept)), iterative.solve(ridge, int(intercept))
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(iterative.error(found), exact.error(found))
    torch.testing.assert_close(iterative.xy, exact.xy)
    torch.testing.assert_close(iterative.yy, exact.yy)


def test_sums_and_parts_of_them_are_equations_too(monkeypatch):
    monkeypatch.setattr(window_equations, "ENOUGH", 1e-16)
    (one, mine), (other, also) = equations({}, True, outputs=5), equations({"padding": 3}, True, outputs=5)
    wanted = one.plus(one).of_outputs(2).solve(1e-2, 1)
    found = mine.plus(mine).of_outputs(2).solve(1e-2, 1)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    assert float((other.solve(1e-2, 1) - also.solve(1e-2, 1)).abs().max()) < 1e-6


@pytest.mark.parametrize("intercept", [False, True])
def test_they_are_moved_as_the_exact_ones_are(intercept):
    exact, iterative = equations({"padding": 3}, intercept)
    center = torch.randn(exact.xy.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    wanted, found = exact.about(center), iterative.about(center)
    torch.testing.assert_close(found.xy, wanted.xy)
    torch.testing.assert_close(found.yy, wanted.yy)
    torch.testing.assert_close(found.error(center), wanted.error(center))
    torch.testing.assert_close(iterative.xy, exact.xy)  # they themselves stay


@pytest.mark.parametrize("intercept", [False, True])
def test_an_input_of_zeros_changes_nothing_and_no_windows_have_no_solution(intercept):
    layer = layer_of({"padding": 3})
    x, lacks = torch.zeros(4, 3, 20, dtype=torch.float64), torch.ones(4, 2, 21, dtype=torch.float64)
    solution = iterative_equations(layer, [(x, lacks)], intercept).solve(1e-4, int(intercept))
    assert torch.equal(solution[0, :18], torch.zeros(18, 2, dtype=torch.float64))
    if intercept:
        torch.testing.assert_close(solution[0, 18], torch.ones(2, dtype=torch.float64))
    assert iterative_equations(layer, [(x[:0], lacks[:0])], intercept).solve(1e-4, int(intercept)) is None


def test_few_steps_remove_nearly_all_of_the_error():
    exact, iterative = equations({"padding": 3}, True)
    wanted, found = (float(exact.error(each.solve(1e-3, 1)).sum()) for each in (exact, iterative))
    assert wanted < found < wanted + 0.01 * (float(exact.yy.sum()) - wanted)


# -- in `recover` ----------------------------------------------------------------------------------------------------


def network(bias=True):
    layers = (
        nn.Conv1d(2, 12, 5, padding=2), nn.ReLU(), nn.Conv1d(12, 3, 9, bias=bias, padding=4),
        nn.Flatten(), nn.Linear(3 * 24, 2),
    )  # fmt: skip
    return jittered(nn.Sequential(*layers))


@pytest.fixture
def _low(monkeypatch):
    monkeypatch.setattr(layer_solver, "UNFOLDED", 20)
    monkeypatch.setattr(preconditioner, "MAX_FEATURES", 20)


def made(monkeypatch):
    """How often equations of either kind were made."""
    calls = {"exact": 0, "iterative": 0}

    def counted(name, function):
        def run(*args):
            calls[name] += 1
            return function(*args)

        return run

    monkeypatch.setattr(layer_solver, "exact_equations", counted("exact", exact_equations))
    monkeypatch.setattr(layer_solver, "iterative_equations", counted("iterative", iterative_equations))
    return calls


@pytest.mark.parametrize("rounds", [0, 3])
@pytest.mark.parametrize("bias", [False, True])
def test_layers_end_up_where_the_exact_solution_puts_them(monkeypatch, bias, rounds):
    model = network(bias)
    data = [signals(32, 2, 24, seed) for seed in range(3)]
    slim = structprune.prune(model, data[0], ratio=0.5, round_to=1)
    plain = structprune.recover(slim, model, data, rounds=rounds)
    monkeypatch.setattr(layer_solver, "UNFOLDED", 20)
    monkeypatch.setattr(preconditioner, "MAX_FEATURES", 20)
    calls = made(monkeypatch)
    found = structprune.recover(slim, model, data, rounds=rounds)
    assert calls == {"exact": 0, "iterative": 2}
    mine, theirs = (next(row for row in report(each).layers if row.layer == "2") for each in (found, plain))
    assert mine.after < theirs.after + 0.01 * (theirs.before - theirs.after)
    assert report(found).kept == report(plain).kept


@pytest.mark.usefixtures("_low")
def test_what_can_be_met_is_met_exactly(monkeypatch):
    """The channels that are gone are multiples of others: conjugate gradients come close, and then it is solved."""
    model = jittered(nn.Sequential(nn.Conv1d(2, 8, 5, padding=2), nn.ReLU(), nn.Conv1d(8, 3, 9, padding=4)))
    copy_channels(model[0].weight, model[0].bias)
    data = [signals(32, 2, 24, seed) for seed in range(3)]
    slim = removal(model, data[0], "0").apply(model)
    calls = made(monkeypatch)
    found = structprune.recover(slim, model, data, rounds=0)
    assert calls == {"exact": 2, "iterative": 2}
    with torch.no_grad():
        torch.testing.assert_close(found(data[0]), model(data[0]), rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("_low")
def test_a_bias_alone_needs_no_conjugate_gradients(monkeypatch):
    model = network()
    data = [signals(32, 2, 24, seed) for seed in range(3)]
    slim = structprune.prune(model, data[0], ratio=0.5, round_to=1)
    calls = made(monkeypatch)
    found = structprune.recover(slim, model, data, rounds=0, weights=False)
    assert calls["iterative"] == 0
    assert torch.equal(found[2].weight, slim[2].weight)


def test_the_inverse_by_frequency_leads_further_than_the_diagonal(monkeypatch):
    layer = layer_of({"padding": 16}, entries=32)
    x = signals(40, 3, 100)
    weight = torch.randn(layer.weight_shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    monkeypatch.setattr(window_equations, "MOST_STEPS", 8)

    def error():
        each = iterative_equations(layer, [(x, layer(x, weight))], True)
        return float(each.error(each.solve(1e-3, 1)).sum() / each.yy.sum())

    by_frequency = error()
    monkeypatch.setattr(WindowMoments, "inverse", lambda moments, penalty, free: Diagonal(moments, penalty))
    assert by_frequency < 0.3 * error()


class Diagonal:
    def __init__(self, moments, penalty):
        self.factor = 1 / (moments.diagonal + penalty).view(-1, 1)

    def __call__(self, matrix):
        return matrix * self.factor


@pytest.mark.parametrize("shifted", [False, True])
def test_a_chain_is_damped_alike_by_moments_of_either_kind(shifted):
    layer, x = layer_of({"padding": 3}), signals(5, 3, 20)
    nothing = torch.zeros(layer.weight_shape, dtype=torch.float64)
    moments = WindowMoments.of(layer, [x])
    found = preconditioner._factors(layer, moments, None, 1e-3, shifted)
    wanted = preconditioner._factors(layer, window_sums(layer, x, layer(x, nothing))[0][None], None, 1e-3, shifted)
    torch.testing.assert_close(found.damping, wanted.damping)
    weight, shift = torch.randn_like(nothing), torch.randn(2, dtype=torch.float64)
    solved, last = found.apply(weight, shift if shifted else None)
    inverse = moments.inverse(moments.penalty(1e-3 + 1e-6, shifted), shifted)
    matrix, row = inverse.with_intercept(layer.matrix_of(weight)[0], shift if shifted else torch.zeros(2).double())
    torch.testing.assert_close(solved, layer.weight_of(matrix[None]))
    assert torch.equal(last, row) if shifted else last is None


def test_a_fixed_input_gives_what_the_map_gives():
    layer, x = layer_of({"padding": 3}), signals(4, 3, 20)
    weight = torch.randn(layer.weight_shape, dtype=torch.float64)
    fixed = FixedInput.of(layer, x)
    assert fixed.lines is not None
    result = F.conv1d(x, weight, torch.ones(2, dtype=torch.float64), padding=3)
    torch.testing.assert_close(fixed(weight, torch.ones(2, dtype=torch.float64)), result)
    torch.testing.assert_close(
        fixed.to_weight(result, weight), layer._convolution_backward(result, x, weight, (False, True))[1]
    )


def report(model):
    return structprune.recovery_report(model)
