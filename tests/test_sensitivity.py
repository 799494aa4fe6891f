"""What a metric loses when each group alone is thinned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.snapshot import assert_untouched, snapshot
from torch import Tensor, nn

import structprune
from structprune.errors import PlanError


class Net(nn.Module):
    """The second layer's output is hardly used; the first one's is."""

    def __init__(self) -> None:
        super().__init__()
        self.vital = nn.Linear(6, 16)
        self.idle = nn.Linear(16, 16)
        self.out = nn.Linear(16, 3)
        with torch.no_grad():
            self.idle.weight.mul_(0.001)
            self.idle.bias.mul_(0.001)
            self.out.weight.mul_(0.001)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.vital(x))
        return self.out(torch.relu(self.idle(x))) + x.sum(-1, keepdim=True)


@pytest.fixture
def model() -> Net:
    torch.manual_seed(0)
    return Net()


X = torch.randn(32, 6, generator=torch.Generator().manual_seed(1))


class Metric:
    """Minus the distance to the outputs of the whole model; counts its calls."""

    def __init__(self, model: nn.Module) -> None:
        with torch.no_grad():
            self.wanted = model(X)
        self.calls = 0

    def __call__(self, model: nn.Module, loader: Tensor) -> float:
        self.calls += 1
        with torch.no_grad():
            return -float((model(loader) - self.wanted).abs().mean())


def test_each_group_is_measured_alone(model: Net) -> None:
    before = snapshot(model)
    metric = Metric(model)
    found = structprune.sensitivity(model, X, X, metric, ratios=(0.5, 0.75))
    assert_untouched(model, before)
    assert found.dense == 0.0
    assert [(c.group, c.channels, c.kept) for c in found.curves] == [("vital", 16, (8, 4)), ("idle", 16, (8, 4))]
    assert metric.calls == 5
    for curve, layer in zip(found.curves, ("vital", "idle"), strict=True):
        slim = structprune.prune(model, X, ratio={layer: 0.5}, round_to=1)
        assert curve.metric[0] == pytest.approx(metric(slim, X), abs=1e-6)
    vital, idle = found.curves
    assert vital.metric[1] < 10 * idle.metric[1] < 0
    assert structprune.Sensitivity.from_json(found.to_json()) == found


def test_a_plan_takes_what_hurts_least_and_measures_nothing_anew(model: Net) -> None:
    metric = Metric(model)
    found = structprune.sensitivity(model, X, X, metric)
    calls = metric.calls
    plan = structprune.plan(model, X, target={"channels": 0.75}, scope=found, round_to=1)
    widths = {layer.layer: layer.after for layer in plan.layers}
    assert widths["idle"] < 10
    assert widths.get("vital", 16) > 14
    structprune.plan(model, X, target={"channels": 0.9}, scope=found)
    assert metric.calls == calls
    with pytest.raises(PlanError, match="give a target as well"):
        structprune.plan(model, X, scope=found)
    with pytest.raises(PlanError, match="was not measured"):
        structprune.plan(nn.Sequential(nn.Linear(6, 9), nn.Linear(9, 2)), X, scope=found, target={"macs": 0.5})


def test_criteria_that_look_at_data_are_fitted_once(model: Net) -> None:
    before, metric, passes = snapshot(model), Metric(model), []

    class Data:
        def __iter__(self):
            passes.append(1)
            return iter([X])

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch).square().mean()

    found = structprune.sensitivity(model, X, X, metric, ratios=(0.5,), importance="taylor", data=Data(), loss=loss)
    assert_untouched(model, before)
    assert len(passes) == 1
    for curve, layer in zip(found.curves, ("vital", "idle"), strict=True):
        slim = structprune.prune(model, X, ratio={layer: 0.5}, importance="taylor", data=[X], loss=loss, round_to=1)
        assert curve.metric[0] == pytest.approx(metric(slim, X), abs=1e-6)
    assert found != structprune.sensitivity(model, X, X, metric, ratios=(0.5,))
    with pytest.raises(PlanError, match="pass loss="):
        structprune.sensitivity(model, X, X, metric, importance="taylor", data=[X])
    with pytest.raises(PlanError, match="pass data="):
        structprune.sensitivity(model, X, X, metric, importance="flap")


def test_a_run_that_was_cut_short_goes_on(model: Net, tmp_path: Path) -> None:
    file = tmp_path / "sensitivity.json"

    class Dies(Metric):
        def __call__(self, model: nn.Module, loader: Tensor) -> float:
            if self.calls == 6:
                raise KeyboardInterrupt
            return super().__call__(model, loader)

    with pytest.raises(KeyboardInterrupt):
        structprune.sensitivity(model, X, X, Dies(model), checkpoint=file)
    metric = Metric(model)
    found = structprune.sensitivity(model, X, X, metric, checkpoint=file)
    assert metric.calls == 4  # the second group only
    assert found == structprune.sensitivity(model, X, X, Metric(model))
    with pytest.raises(PlanError, match="another model or other ratios"):
        structprune.sensitivity(model, X, X, metric, ratios=(0.1,), checkpoint=file)
    file.write_text("[]")
    with pytest.raises(PlanError, match="not the JSON of a sensitivity"):
        structprune.sensitivity(model, X, X, metric, checkpoint=file)


def test_the_table_and_the_picture(model: Net, tmp_path: Path) -> None:
    found = structprune.sensitivity(model, X, X, Metric(model))
    assert list(found.table().columns[0].cells) == ["vital", "idle"]
    found.plot(tmp_path / "heat.png")
    assert (tmp_path / "heat.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("ratios", [(), (0.0,), (1.0, 0.5), ("0.5",), "0.5"])
def test_ratios_out_of_range_are_refused(model: Net, ratios: Any) -> None:
    with pytest.raises(PlanError, match="give shares of channels"):
        structprune.sensitivity(model, X, X, Metric(model), ratios=ratios)
