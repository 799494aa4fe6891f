"""A chain of producers and consumer: its slopes, and the steps that fit its weights."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from structprune.equations.linear_maps import linear_map
from structprune.recovery import gauss_newton
from structprune.recovery.chain import Chain, ChainWeights, elementwise_slopes
from structprune.recovery.gauss_newton import final_step, fit_chain
from structprune.recovery.samples import Samples, joined


def test_slopes_of_a_gate():
    gate, up = torch.randn(2, 5, 3, dtype=torch.float64)
    hidden, (by_gate, by_up) = elementwise_slopes(lambda results: F.silu(results[0]) * results[1], [gate, up])
    sigmoid = torch.sigmoid(gate)
    torch.testing.assert_close(hidden, gate * sigmoid * up)
    torch.testing.assert_close(by_up, gate * sigmoid)
    torch.testing.assert_close(by_gate, up * sigmoid * (1 + gate * (1 - sigmoid)))


def test_what_has_no_derivative_has_no_slope():
    x = torch.randn(4, 3, dtype=torch.float64)
    _, (mask,) = elementwise_slopes(lambda results: (results[0] > 0).double(), [x])
    _, (first, second) = elementwise_slopes(lambda results: results[0] * results[1].detach(), [x, x])
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
    chain = Chain((maps[0], maps[1]), lambda r: torch.tanh(r[0]) * r[1], maps[2], None)
    goal = (torch.tanh(x @ true[0].T) * (x @ true[1].T)) @ true[2].T
    batches = [Samples((part, part), torch.zeros_like(wanted), wanted, place) for place, (part, wanted) in
               enumerate(zip(x.split(20), goal.split(20), strict=True))]  # fmt: skip
    return chain, batches, ChainWeights(near, [None, None, None])


def test_gauss_newton_finds_weights_that_fit_exactly():
    chain, batches, start = problem(200)
    found = fit_chain(chain, batches[:8], batches[8:], start, rounds=20, steps=40)
    assert found.helps
    assert found.after < 1e-12 * found.before
    assert chain.error(batches[8:], found.weights) == pytest.approx(found.after)


def test_what_is_learned_wrongly_is_not_taken():
    chain, batches, start = problem(200)
    wrong = [Samples(b.inputs, b.rest, 2 * chain.result(b, start) - b.goal) for b in batches[:8]]
    found = fit_chain(chain, wrong, batches[8:], start, rounds=3)
    assert found.after <= found.before
    gain = fit_chain(chain, batches[:8], batches[8:], start, rounds=3)
    assert gain.after < 1e-2 * found.after


def test_a_ridge_keeps_weights_near_the_start():
    chain, batches, start = problem(200)
    moved = []
    for ridge in (0.0, 1e-2, 1.0, 100.0):
        found = fit_chain(chain, batches[:8], batches[8:], start, rounds=20, steps=40, ridge=ridge)
        moved.append(float((found.weights.flat() - start.flat()).norm()))
    assert moved == sorted(moved, reverse=True)
    assert moved[-1] < 0.1 * moved[0]


def test_the_pull_of_a_ridge_is_towards_the_start_not_the_last_round():
    """Damping alone slows rounds down but does not keep them from the same end."""
    chain, batches, start = problem(200)
    ends = [fit_chain(chain, batches[:8], batches[8:], start, 30, 40, ridge=ridge).weights for ridge in (0.0, 10.0)]
    free, held = (float((end.flat() - start.flat()).norm()) for end in ends)
    assert held < 0.5 * free


def test_the_first_rounds_see_fewer_batches_where_there_are_plenty(monkeypatch):
    chain, batches, start = problem(400)
    seen = []
    inner = gauss_newton._step

    def counted(chain, train, *rest):
        seen.append(len(train))
        return inner(chain, train, *rest)

    monkeypatch.setattr(gauss_newton, "_step", counted)
    fit_chain(chain, batches[:16], batches[16:], start, rounds=4, steps=2)
    equations, unknowns = 16 * 20 * 2, start.flat().numel()
    stride = min(gauss_newton.MAX_STRIDE, equations // (gauss_newton.EQUATIONS * unknowns) or 1)
    assert seen[0] == -(-16 // stride)
    monkeypatch.setattr(gauss_newton, "EQUATIONS", 2)
    seen.clear()
    fit_chain(chain, batches[:16], batches[16:], start, rounds=4, steps=2)
    assert seen == [4, 4, 4, 4]


def test_the_last_step_sees_all_samples():
    """What is held out has another answer; the step goes towards both, and errors stay those of before."""
    chain, batches, start = problem(200)
    other = [Samples(b.inputs, b.rest, b.goal + 0.3) for b in batches[8:]]
    found = fit_chain(chain, batches[:8], other, start, rounds=4, steps=40)
    last = final_step(chain, [*batches[:8], *other], start, found, steps=40)
    assert (last.before, last.after, last.rounds) == (found.before, found.after, found.rounds + 1)
    together = [chain.error([*batches[:8], *other], each.weights) for each in (found, last)]
    assert together[1] < together[0]
    again = final_step(chain, [*batches[:8], *other], start, last, steps=0)
    assert again.weights is last.weights


def test_rounds_see_other_batches_one_after_the_other(monkeypatch):
    chain, batches, start = problem(400)
    seen = []
    inner = gauss_newton._step

    def noted(chain, train, *rest):
        seen.append([samples.place for samples in train])
        return inner(chain, train, *rest)

    monkeypatch.setattr(gauss_newton, "_step", noted)
    monkeypatch.setattr(gauss_newton, "EQUATIONS", 2)
    fit_chain(chain, batches[:16], batches[16:], start, rounds=3, steps=2)
    assert seen[:2] == [[0, 4, 8, 12], [1, 5, 9, 13]]


def test_joined_samples_are_those_of_all_batches():
    _, batches, _ = problem(220)
    together = joined(batches[:10], 10**9, 4)
    assert [samples.place for samples in together] == [0, 1, 2, 3]
    assert [samples.sections for samples in together] == [(20,) * 3, (20,) * 3, (20,) * 2, (20,) * 2]
    assert torch.equal(together[1].goal, torch.cat([batches[place].goal for place in (1, 5, 9)]))
    assert [len(samples.goal) for samples in joined(batches[:10], 40 * 5, 1)] == [40] * 5  # five values a sample
    assert joined(batches[:2], 10**9, 4) == batches[:2]


def test_a_step_on_joined_samples_is_that_on_each():
    chain, batches, start = problem(200)
    apart, _ = gauss_newton._step(chain, batches, start, start, (1e-3, 1e-2), 5, None)
    together, _ = gauss_newton._step(chain, joined(batches, 10**9, 4), start, start, (1e-3, 1e-2), 5, None)
    torch.testing.assert_close(together, apart)


def test_conjugate_gradients_end_where_little_is_left_to_gain(monkeypatch):
    """Most of the right side is along two directions: after as many steps little is left."""
    diagonal = torch.tensor([1.0, 1.5, 2.0, 4.0], dtype=torch.float64)
    goal, products = torch.tensor([1.0, 1.0, 1e-3, 1e-3], dtype=torch.float64), []

    def product(vector):
        products.append(vector)
        return diagonal * vector

    monkeypatch.setattr(gauss_newton, "ENOUGH", 0.0)
    whole = gauss_newton._conjugate_gradients(product, torch.clone, goal, 8)
    count = len(products)
    torch.testing.assert_close(whole, goal / diagonal, rtol=1e-6, atol=1e-9)
    products.clear()
    monkeypatch.setattr(gauss_newton, "ENOUGH", 0.2)
    some = gauss_newton._conjugate_gradients(product, torch.clone, goal, 8)
    assert len(products) < count
    left = goal - diagonal * some
    assert float(left @ (left / diagonal)) < 0.2 * float(goal @ (goal / diagonal))
