"""Other channels of each group of a grouped convolution may go, equally many of each."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

import structprune
from structprune import masks
from structprune.errors import PlanError, RecoveryError, SurgeryError

IMAGE = torch.randn(1, 3, 9, 9, dtype=torch.float64)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Sigmoid(), nn.Conv2d(16, 32, 3, groups=8), nn.ReLU()]
    return nn.Sequential(*layers, nn.ConvTranspose2d(32, 16, 3, groups=8), nn.Conv2d(16, 4, 1)).double().eval()


def switched_off(model: nn.Module, layer: str, gone: Sequence[int]) -> Tensor:
    """The output without channels `gone` of a layer: what reads them is given zeros."""
    reader = {"0": "2", "3": "4", "5": "5"}[layer]

    def off(module: nn.Module, args: object, result: Tensor) -> Tensor:
        return result.index_fill(1, torch.tensor(gone), 0)

    handle = model.get_submodule(reader).register_forward_hook(off)
    result = model(IMAGE)
    handle.remove()
    return result


CHOICES = [
    pytest.param("0", [0, 3, 4, 7, 8, 11, 12, 15], (8, 32, 16, 8), id="inputs"),
    pytest.param("3", [0, 5, 10, 15, 16, 21, 26, 31], (16, 24, 16, 8), id="outputs"),
    pytest.param("5", [0, 3, 4, 7, 8, 11, 12, 15], (16, 32, 8, 8), id="outputs of a transposed one"),
    pytest.param("0", [0, 1, 2, 3, 5, 6, 8, 11, 12, 15], (6, 24, 12, 6), id="two whole groups too"),
]


@pytest.mark.parametrize(("layer", "gone", "widths"), CHOICES)
def test_each_group_may_lose_channels_of_its_own(layer: str, gone: list[int], widths: tuple[int, ...]) -> None:
    model = network()
    original = copy.deepcopy(model)
    plan = structprune.DependencyGraph(model, IMAGE).prune_group(layer, gone)
    assert (model[0].out_channels, model[3].out_channels, model[5].out_channels, model[3].groups) == widths
    if widths[3] == 8:  # of a whole group that goes, the biases go too
        torch.testing.assert_close(model(IMAGE), switched_off(original, layer, gone))
    assert structprune.verify(original, model, plan, IMAGE).ok


def test_a_plan_with_sections_is_saved_and_applied_again() -> None:
    model = network()
    original = copy.deepcopy(model)
    plan = structprune.DependencyGraph(model, IMAGE).prune_group("0", [0, 3, 4, 7, 8, 11, 12, 15])
    again = structprune.Plan.from_json(plan.to_json())
    assert again == plan
    assert again.digest == plan.digest
    assert torch.equal(again.apply(original)(IMAGE), model(IMAGE))
    assert 1 not in plan.removed.get("3.weight", {})
    assert structprune.kept(model)["3.weight"] == {}
    with pytest.raises(RecoveryError, match=r"Each group of the convolution with '3.weight' lost other inputs"):
        structprune.recover(model, original, [IMAGE])


def test_a_mask_has_zeros_where_each_group_loses_channels() -> None:
    model = network()
    plan = structprune.DependencyGraph(copy.deepcopy(model), IMAGE).prune_group("0", [0, 3, 4, 7, 8, 11, 12, 15])
    stays = masks.from_plan(plan, model)[3].weight_mask[:, :, 0, 0]
    assert stays[::4].tolist() == [[0, 1], [1, 0]] * 4


def test_an_optimizer_follows() -> None:
    model = network()
    optimizer = torch.optim.Adam(model.parameters())
    model(IMAGE).square().sum().backward()
    optimizer.step()
    before = optimizer.state[model[3].weight]["exp_avg"].clone()
    plan = structprune.DependencyGraph(model, IMAGE).prune_group("0", [0, 3, 4, 7, 8, 11, 12, 15])
    remapped = structprune.remap_optimizer(optimizer, plan, model)
    found = (remapped or optimizer).state[model[3].weight]["exp_avg"]
    expected = torch.cat([before[4 * i : 4 * i + 4, [1 - i % 2]] for i in range(8)])
    assert torch.equal(found, expected)


def test_different_numbers_take_whole_groups() -> None:
    model = network()
    structprune.DependencyGraph(model, IMAGE).prune_group("0", [0, 3, 4])
    assert (model[0].out_channels, model[3].groups) == (10, 5)


class Seen(nn.Module):
    """Something else looks at the channels in a group: a scale for each of them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 32, 3, groups=8), nn.Conv2d(32, 4, 3)
        self.scale = nn.Parameter(torch.rand(2, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x = (x.unflatten(1, (8, 2)) * self.scale).flatten(1, 2)
        return self.c(self.b(x))


def test_positions_that_something_else_sees_go_in_every_group() -> None:
    with pytest.raises(PlanError, match="whole rows and columns go"):
        structprune.DependencyGraph(Seen(), IMAGE.float()).prune_group("a", [0, 3, 4, 7, 8, 11, 12, 15])


@pytest.mark.parametrize(
    "sections", [((0,),) * 7, ((0, 1),) * 8, ((2,),) * 8, ()], ids=["too few", "too many left", "out of range", "none"]
)
def test_sections_that_do_not_fit_are_refused(sections: tuple[tuple[int, ...], ...]) -> None:
    model = network()
    plan = structprune.DependencyGraph(copy.deepcopy(model), IMAGE).prune_group("0", [0, 3, 4, 7, 8, 11, 12, 15])
    data = json.loads(plan.to_json())
    for sliced in data["slices"]:
        if "sections" in sliced:
            sliced["sections"] = sections
    with pytest.raises(SurgeryError, match="in sections that a tensor of shape"):
        structprune.Plan.from_data(data).apply(model)
