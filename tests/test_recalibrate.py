"""Statistics of batch norms over all of the data: exact, whatever the batches, and nothing else is touched."""

from __future__ import annotations

import pytest
import torch
from support.snapshot import assert_untouched, snapshot
from torch import nn

import structprune
from structprune.errors import RecoveryError


def network(**options):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, **options), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5, **options)
    )
    return model.double()


def images():
    return torch.randn(20, 3, 8, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("sizes", [[20], [1, 12, 7]])
@pytest.mark.parametrize("affine", [True, False])
def test_statistics_are_those_of_all_samples_at_once(sizes, affine):
    model, x = network(affine=affine), images()
    result = structprune.recalibrate(model, x.split(sizes)).eval()
    at = x
    with torch.no_grad():
        for layer in result:
            if isinstance(layer, nn.BatchNorm2d):
                flat = at.movedim(1, 0).flatten(1)
                torch.testing.assert_close(layer.running_mean, flat.mean(1))
                torch.testing.assert_close(layer.running_var, flat.var(1))
            at = layer(at)
    assert not torch.allclose(result[4].running_mean, model[4].running_mean)


def test_nothing_else_is_touched():
    model = network(momentum=0.3).train()
    model[1].eval()
    before, state = snapshot(model), torch.get_rng_state()
    result = structprune.recalibrate(model, [(images(), torch.zeros(20))])
    assert_untouched(model, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in result.modules()] == [m.training for m in model.modules()]
    assert result[1].momentum == 0.3
    assert all(torch.equal(a, b) for a, b in zip(result.parameters(), model.parameters(), strict=True))
    assert torch.equal(result[1].num_batches_tracked, model[1].num_batches_tracked)


def test_a_norm_used_twice_is_left():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.own = nn.BatchNorm1d(4), nn.BatchNorm1d(4)

        def forward(self, x):
            return self.own(self.norm(self.norm(x) + 1.0))

    model = Twice().double()
    result = structprune.recalibrate(model, [torch.randn(16, 4, dtype=torch.float64) + 3])
    assert torch.equal(result.norm.running_mean, model.norm.running_mean)
    assert not torch.equal(result.own.running_mean, model.own.running_mean)


@pytest.mark.parametrize(
    ("data", "message"),
    [([], "data holds no batch"), ([torch.randn(1, 3, dtype=torch.float64)], "one value of each channel")],
)
def test_too_little_data_is_refused(data, message):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double()
    with pytest.raises(RecoveryError, match=message):
        structprune.recalibrate(model, data)
