"""Recovery of models that lost branches, and channels before or after that."""

from __future__ import annotations

import pytest
import torch
from support.depth_nets import residuals

import structprune
from structprune.planning.plan import plans_of


def test_recovery_makes_up_for_blocks_that_are_gone() -> None:
    class Residual(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = torch.nn.Linear(8, 16), torch.nn.Linear(16, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.down(self.up(x).relu())

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), *(Residual() for _ in range(4)), torch.nn.Linear(8, 3)).eval()
    x = torch.randn(512, 6)
    slim = structprune.remove_branches(model, x, structprune.choose_branches(model, x, [x], count=1))
    state = {key: value.clone() for key, value in slim.state_dict().items()}
    recovered = structprune.recover(slim, model, list(x.split(128)), rounds=1)
    held_out = torch.randn(256, 6)
    before, after = ((one(held_out) - model(held_out)).norm() for one in (slim, recovered))
    assert after < 0.7 * before
    assert len(recovered) == len(slim)
    assert all(torch.equal(value, state[key]) for key, value in slim.state_dict().items())
    thin = structprune.prune(recovered, x, ratio=0.25, round_to=1)
    assert structprune.recover(thin, recovered, [x], rounds=0)(x).shape == model(x).shape
    both_steps = structprune.recover(thin, model, [x], rounds=0)
    assert (both_steps(held_out) - model(held_out)).norm() < (thin(held_out) - model(held_out)).norm()


def test_branches_and_channels_are_recovered_together_whatever_the_weights():
    model, x = residuals()
    plan = structprune.plan(model, x, target={"macs": 0.4}, data=[x], axes=("blocks", "widths"), round_to=1)
    slim = plan.apply(model)
    with torch.no_grad():
        slim[0].bias += 0.1
    recovered = structprune.recover(slim, model, list(x.chunk(2)), rounds=1)
    before, after = ((each(x) - model(x)).norm() for each in (slim, recovered))
    assert after < 0.5 * before
    assert [type(each).__name__ for each in plans_of(recovered)] == ["Removal", "Plan"]
    report = structprune.recovery_report(recovered)
    gone = [name for name in plan.removal.names if plan.removal.names[name] is None]
    assert {row.layer for row in report.layers} <= {n.rpartition(".")[0] for n, _ in model.named_parameters()}
    assert not any(f"{row.layer}.weight" in gone for row in report.layers)


def test_channels_and_then_branches_are_recovered_one_after_the_other():
    model, x = residuals()
    thin = structprune.prune(model, x, ratio=0.3, axes=("mlp",), round_to=1)
    slim = structprune.remove_branches(thin, x, [structprune.branches(thin, x)[0].name])
    recovered = structprune.recover(slim, model, list(x.chunk(2)), rounds=1)
    before, after = ((each(x) - model(x)).norm() for each in (slim, recovered))
    assert after < 0.7 * before
    with torch.no_grad():
        slim[0].bias += 1
    with pytest.raises(structprune.errors.RecoveryError, match="more was done"):
        structprune.recover(slim, model, [x])


class Sorting(torch.nn.Module):
    """A residual network whose second branch sorts the channels, so that none of the stream may go."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = torch.nn.Linear(6, 8), torch.nn.Linear(8, 3)
        self.one, self.other = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        x = x + self.one(x).relu()
        x = x + self.other(x.sort(-1).values)
        return self.last(x)


def test_channels_that_a_removed_branch_held_are_recovered_in_a_step_of_their_own():
    torch.manual_seed(0)
    model, x = Sorting(), torch.randn(64, 6)
    cut = structprune.remove_branches(model, x, ["(other)"])
    slim = structprune.prune(cut, x, ratio=0.25, round_to=1)
    assert slim.first.out_features == 6
    recovered = structprune.recover(slim, model, [x], rounds=0)
    before, after = ((each(x) - model(x)).norm() for each in (slim, recovered))
    assert after < before
    assert recovered.first.out_features == 6
