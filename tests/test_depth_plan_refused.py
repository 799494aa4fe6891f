"""Plans of blocks that cannot be are refused with the reason, and nothing has changed."""

from __future__ import annotations

import pytest
import torch
from support.depth_nets import cross_entropy, residuals
from torch import nn

import structprune
from structprune.errors import PlanError, UnknownLayerError

WIDE = {"axes": ("blocks", "widths"), "round_to": 1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"axes": "layers"}, "axes names layers; known are"),
        ({"axes": "blocks", "ratio": 0.95}, "asks for all 5 that may go; at least one stays"),
        ({"axes": "blocks", "target": {"params": 0.01}}, "target cannot be met.*no channels may go"),
        ({"axes": "blocks", "ratio": {"0": 0.5}}, "'0', in which there is no block"),
        ({"axes": "blocks", "ratio": lambda group: 0.5}, "function of groups"),
        ({"axes": ("blocks", "mlp"), "ratio": {"1": 0.5}}, "Remove the blocks first"),
        ({"axes": ("blocks", "mlp"), "scope": [["1"]]}, "scope names layers"),
        ({"axes": "blocks", "branch_score": "best"}, "it is one of 'angular', 'error'"),
        ({"branch_score": "kl"}, "axes names no 'blocks'"),
        ({"axes": "blocks", "branch_score": "taylor"}, "loss="),
        ({"axes": "blocks", "loss": cross_entropy}, "no data to compute it on"),
        ({"axes": "blocks", "ignore": ["1", "2", "3", "4", "5"]}, "has none that may go"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_cannot_be_is_refused_with_the_reason(options, message):
    model, x = residuals()
    structure = repr(model)
    with pytest.raises(PlanError, match=message):
        structprune.plan(model, x, **options)
    assert repr(model) == structure


def test_names_of_nothing_are_refused():
    model, x = residuals()
    with pytest.raises(UnknownLayerError, match="no layer 'nowhere'"):
        structprune.plan(model, x, axes="blocks", ratio={"nowhere": 0.5})


def test_a_network_without_branches_has_nothing_to_remove():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    with pytest.raises(PlanError, match="none that may go"):
        structprune.plan(model, torch.randn(2, 4), axes="blocks", ratio=0.5)


def test_weights_without_values_are_refused():
    model, x = residuals()
    with pytest.raises(PlanError, match="meta device"):
        structprune.plan(model.to("meta"), x.to("meta"), axes="blocks", ratio=0.5)


def test_steps_of_pruning_are_for_channels():
    model, x = residuals()
    with pytest.raises(PlanError, match="go in one step"):
        structprune.Pruner(model, x, steps=2, ratio=0.5, axes="blocks")
    with pytest.raises(PlanError, match="go in one step"):
        structprune.training.SoftPruner(model, x, ratio=0.5, axes="blocks").step()


def test_blocks_that_cannot_be_taken_out_are_passed_over():
    class Tall(nn.Module):
        """Two branches: whoever takes out the first finds its size missing in the rest of the forward."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            inner = self.first(x).relu()
            y = x + inner
            return (y + self.second(y)) * inner.shape[-1]

    torch.manual_seed(0)
    model, x = nn.Sequential(Tall(), Tall(), nn.Linear(8, 2)).eval(), torch.randn(4, 8)
    plan = structprune.plan(model, x, axes="branches", target={"params": 0.75}, data=[x])
    assert structprune.verify(model, plan.apply(model), plan, x).ok
