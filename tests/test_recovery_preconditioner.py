"""The blocks of the normal equations that precondition the conjugate gradients, against the Jacobian written out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from structprune.equations.linear_maps import linear_map
from structprune.recovery import preconditioner
from structprune.recovery.chain import Chain, ChainWeights, linearised
from structprune.recovery.channel_blocks import channel_blocks
from structprune.recovery.samples import Samples

DAMPING = 1e-3


def gate(g, u):
    return F.silu(g) * u


def problem(shifted):
    """Inputs, weights, shifts and the consumer's weight of a gated layer with four hidden channels."""
    torch.manual_seed(1)
    x = torch.randn(50, 3, dtype=torch.float64)
    weights = [torch.randn(4, 3, dtype=torch.float64) for _ in range(2)]
    shifts = [torch.randn(4, dtype=torch.float64) if shifted else None for _ in range(2)]
    return x, weights, shifts, torch.randn(5, 4, dtype=torch.float64)


def made(x, weights, shifts):
    return [F.linear(x, w, b) for w, b in zip(weights, shifts, strict=True)]


def blocks_of(x, weights, shifts, last):
    """What `channel_blocks` makes of the problem, with the slopes by automatic differentiation."""
    leaves = [result.requires_grad_() for result in made(x, weights, shifts)]
    slopes = torch.autograd.grad(gate(*leaves).sum(), leaves)
    maps = tuple(linear_map("linear", (x, w), {}) for w in weights)
    shifted = [b is not None for b in shifts]
    return channel_blocks(maps, [((x, x), slopes)], last.square().sum(0), shifted, DAMPING, 1)


@pytest.mark.parametrize("shifted", [False, True])
def test_each_block_is_that_of_the_normal_equations(shifted):
    x, weights, shifts, last = problem(shifted)
    found = blocks_of(x, weights, shifts, last)
    for channel in range(4):
        rows = [
            torch.cat([w[channel], *([] if b is None else [b[channel, None]])])
            for w, b in zip(weights, shifts, strict=True)
        ]

        def result(*own):
            own_shifts = [part[3] if shifted else None for part in own]
            hidden = [x @ part[:3] + (0 if b is None else b) for part, b in zip(own, own_shifts, strict=True)]
            return (gate(*hidden)[:, None] * last[:, channel]).flatten()  # noqa: B023, called at once

        jacobian = torch.cat(torch.autograd.functional.jacobian(result, tuple(rows)), 1)
        normal = jacobian.T @ jacobian
        diagonal = normal.diagonal()
        count = 8 if shifted else 6
        wanted = normal + torch.diag(DAMPING * diagonal + 1e-4 * diagonal.sum() / 8)
        inverse = found.inverse[channel]
        kept = torch.arange(8) if shifted else torch.tensor([0, 1, 2, 4, 5, 6])
        torch.testing.assert_close(inverse[kept][:, kept] @ wanted, torch.eye(count, dtype=torch.float64))


def test_it_is_applied_channel_by_channel():
    x, weights, shifts, last = problem(True)
    found = blocks_of(x, weights, shifts, last)
    given = [torch.randn_like(w) for w in weights], [torch.randn_like(b) for b in shifts]
    new_weights, new_shifts = found(*given)
    for channel in range(4):
        vector = torch.cat([torch.cat([w[channel], b[channel, None]]) for w, b in zip(*given, strict=True)])
        got = torch.cat(
            [torch.cat([w[channel], b[channel, None]]) for w, b in zip(new_weights, new_shifts, strict=True)]
        )
        torch.testing.assert_close(got, found.inverse[channel] @ vector)


def test_a_channel_that_is_off_stays_finite():
    x, weights, shifts, last = problem(True)
    last[:, 2] = 0
    assert torch.isfinite(blocks_of(x, weights, shifts, last).inverse).all()


def test_a_grouped_convolution_has_none():
    x, weight = torch.randn(2, 4, 5, 5), torch.randn(4, 2, 3, 3)
    found = linear_map("conv2d", (x, weight, None, 1, 1, 1, 2), {})
    slopes = torch.ones(2, 4, 5, 5)
    assert channel_blocks((found,), [((x,), (slopes,))], torch.ones(4), [False], DAMPING, 1) is None


def test_blocks_that_cost_more_than_they_save_are_not_gathered():
    x, weight = torch.randn(20, 64), torch.randn(4, 64)
    found = linear_map("linear", (x, weight), {})
    given = [((x,), (torch.ones(20, 4),))], torch.ones(4), [False], DAMPING, 1
    assert channel_blocks((found,), *given) is None


def test_many_features_are_in_sections(monkeypatch):
    """What is not on the blocks of the diagonal is left out; with a single section all of it is there."""
    monkeypatch.setattr(preconditioner, "MAX_FEATURES", 4)
    features = torch.arange(2 * 7 * 3.0).reshape(2, 7, 3)
    found = preconditioner._sections(features)
    assert found.shape == (4, 4, 3)
    assert torch.equal(found.reshape(2, 8, 3)[:, :7], features)
    assert not found.reshape(2, 8, 3)[:, 7].any()


@pytest.mark.parametrize("most", [3, 1536])
def test_the_factor_of_features_is_the_inverse_of_its_sections(monkeypatch, most):
    monkeypatch.setattr(preconditioner, "MAX_FEATURES", most)
    torch.manual_seed(0)
    x = torch.randn(40, 5, dtype=torch.float64)
    layer = linear_map("linear", (x, torch.zeros(2, 5)), {})
    rows = torch.cat([x, torch.ones(40, 1, dtype=torch.float64)], 1)
    moments = preconditioner.second_moments(preconditioner._sections(rows.T[None]).transpose(1, 2))
    factors = preconditioner._factors(layer, moments, None, DAMPING, shifted=True)
    weight, shift = torch.randn(2, 5, dtype=torch.float64), torch.randn(2, dtype=torch.float64)
    solved, solved_shift = factors.apply(weight, shift)
    found = torch.cat([solved.T, solved_shift[None]])
    back = rows.T @ rows
    if most == 3:
        back[:3, 3:] = back[3:, :3] = 0
    ridge = (DAMPING + 1e-6) * torch.stack([part.mean() for part in back.diagonal().split(most)])
    back = back + torch.diag(ridge.repeat_interleave(min(most, 6)))
    torch.testing.assert_close(back @ found, torch.cat([weight.T, shift[None]]))
    assert factors.damping.shape == (1, 6, 2)


def test_a_preconditioner_serves_for_more_samples_and_its_damping_grows_with_them():
    torch.manual_seed(0)
    x = torch.randn(60, 4, dtype=torch.float64)
    weights = [torch.randn(3, 4, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)]
    maps = [linear_map("linear", (x[:, : w.shape[1]], w), {}) for w in weights]
    chain = Chain((maps[0],), lambda results: torch.tanh(results[0]), maps[1], None)
    at = ChainWeights(weights, [None, None])
    parts = [Samples((part,), torch.zeros(20, 2).double(), torch.ones(20, 2).double()) for part in x.split(20)]
    lines = [linearised(chain, part, at)[0] for part in parts]
    first = preconditioner.Preconditioner.of(lines[:1], DAMPING)
    again = preconditioner.Preconditioner.of(lines, DAMPING, first)
    torch.testing.assert_close(again.damping, 3 * first.damping)
    vector = torch.randn_like(at.flat())
    torch.testing.assert_close(again.inverse(vector), first.inverse(vector))
