"""Runtimes beside ONNX Runtime: what is written for each computes what the model computes, and each can be timed."""

from __future__ import annotations

import sys
from functools import partial
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from support.latency import IMAGES, NETWORKS, seeded
from torch import nn

import structprune
from structprune.benchmarking.nodes import NODE_TIMERS
from structprune.coupling.graph import ChannelGraph
from structprune.errors import ExportError, MissingExtraError, PlanError
from structprune.export.runtimes import RUNTIMES
from structprune.latency.measure import DeviceTimer
from structprune.latency.runtimes import time_in_runtime
from structprune.latency.specs import uses

OTHERS = {
    "openvino": (structprune.export_openvino, "model.xml"),
    "executorch": (partial(structprune.export_executorch, largest_batch=8), "model.pte"),
    "litert": (structprune.export_litert, "model.tflite"),
}
PACKAGES = {"litert": "litert_torch"}
# A file of LiteRT is for the sizes of the example alone.
SIZES = {"litert": (2,)}


def if_installed(names):
    return [
        pytest.param(
            name,
            marks=pytest.mark.skipif(
                not find_spec(PACKAGES.get(name, name)), reason=f"the extra {name} is not installed here"
            ),
        )
        for name in names
    ]


class Noisy(nn.Module):
    def forward(self, x):
        return x + torch.randn_like(x)


def small():
    net = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 16, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5),
    )  # fmt: skip
    net[1].running_mean.uniform_(-1, 1)
    net[1].running_var.uniform_(0.5, 2)
    return net


@pytest.fixture
def slim():
    torch.manual_seed(0)
    return structprune.prune(small().eval(), torch.randn(2, 3, 12, 12), ratio=0.5, round_to=1)


@pytest.mark.parametrize("name", if_installed(OTHERS))
def test_what_is_written_computes_what_the_pruned_model_computes(slim, tmp_path, name):
    export, file = OTHERS[name]
    slim.train()
    found = export(slim, tmp_path / file, torch.randn(2, 3, 12, 12))
    assert slim.training
    assert 0 < found.max_relative_error < 1e-4
    assert (
        found.bytes
        == sum(each.stat().st_size for each in tmp_path.iterdir())
        > 4 * sum(parameter.numel() for parameter in slim.parameters())
    )
    slim.eval()
    run = RUNTIMES[name].load(found.path, 1)
    for size in SIZES.get(name, (1, 2, 7)):
        x = torch.randn(size, 3, 12, 12)
        (result,) = run({"input": x.numpy()})
        np.testing.assert_allclose(result, slim(x).detach().numpy(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", if_installed(OTHERS))
def test_what_computes_something_else_is_not_written(tmp_path, name):
    export, file = OTHERS[name]
    (tmp_path / file).write_text("an older file")
    with pytest.raises(ExportError, match=RUNTIMES[name].name):
        export(Noisy(), tmp_path / file, torch.randn(2, 4))
    assert (tmp_path / file).read_text() == "an older file"
    assert [each.name for each in tmp_path.iterdir()] == [file]


@pytest.mark.parametrize("name", if_installed(OTHERS))
def test_a_tolerance_that_is_not_met_is_told(slim, tmp_path, name):
    export, file = OTHERS[name]
    with pytest.raises(ExportError, match=f"PyTorch and {RUNTIMES[name].name}, more than 0;"):
        export(slim, tmp_path / file, torch.randn(2, 3, 12, 12), tolerance=0)


@pytest.mark.parametrize("name", OTHERS)
def test_what_cannot_be_used_is_refused_before_anything_is_imported(monkeypatch, tmp_path, name):
    export, file = OTHERS[name]
    with pytest.raises(ExportError, match="files that end in"):
        export(nn.Linear(2, 2), tmp_path / "model.bin", torch.randn(2, 2))
    monkeypatch.setitem(sys.modules, RUNTIMES[name].modules[0], None)
    with pytest.raises(MissingExtraError, match=rf"pip install 'structprune\[{name}\]'"):
        export(nn.Linear(2, 2), tmp_path / file, torch.randn(2, 2))
    with pytest.raises(MissingExtraError, match=rf"pip install 'structprune\[{name}\]'"):
        structprune.benchmark({"a": nn.Linear(2, 2)}, torch.zeros(1, 2), backends=(name,))


@pytest.mark.parametrize("name", if_installed(OTHERS))
def test_models_are_timed(name):
    torch.manual_seed(0)
    models = {"wide": small(), "same": small()}
    x = torch.randn(4, 3, 12, 12)
    found = structprune.benchmark(models, x, backends=(name,), runs=3, threads=1)
    assert [(each.model, each.backend) for each in found.timings] == [("wide", name), ("same", name)]
    assert all(second > 0 for each in found.timings for second in each.seconds)
    assert all(each.memory is None or each.memory > 0 for each in found.timings)
    assert found.environment[name if name != "litert" else "litert-torch"]


@pytest.mark.parametrize("name", if_installed(set(OTHERS) & set(NODE_TIMERS)))
def test_times_go_to_layers(name):
    found = structprune.layer_times(small(), torch.randn(4, 3, 48, 48), backend=name)
    assert {"0", "3"} <= found.keys()
    assert all(seconds > 0 for seconds in found.values())


@pytest.mark.parametrize("name", if_installed(set(OTHERS) & set(NODE_TIMERS)))
@pytest.mark.parametrize("network", NETWORKS)
def test_operations_are_timed(name, network):
    build, x = NETWORKS[network]
    graph = ChannelGraph(seeded(build), x)
    points = [(use.spec, use.spec.widths) for use in uses(graph.trace, graph.channels)]
    assert all(0 < t < 60 for t in time_in_runtime(points, name, 1, 3, 60.0))


@pytest.mark.parametrize("name", if_installed(set(OTHERS) & set(NODE_TIMERS)))
def test_a_wider_operation_takes_longer(name):
    graph = ChannelGraph(nn.Sequential(nn.Conv2d(3, 256, 3), nn.Conv2d(256, 256, 3), nn.Conv2d(256, 4, 1)), IMAGES)
    spec = uses(graph.trace, graph.channels)[1].spec
    thin, wide = time_in_runtime([(spec, (32, 256)), (spec, (256, 256))], name, 1, 6, 60.0)
    assert wide > 2 * thin


@pytest.mark.parametrize("name", if_installed(set(OTHERS) & set(NODE_TIMERS)))
def test_a_plan_for_its_time_is_met(name, tmp_path):
    """Real clocks: that widths follow the runtime's own measured steps, and that the table is kept."""
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.ReLU(), nn.Conv2d(64, 4, 1)).eval()
    latency = structprune.Latency(backend=name, threads=1, runs=3, cache=tmp_path)
    plan = structprune.plan(model, torch.randn(2, 3, 32, 32), target={"latency": 0.6}, latency=latency)
    assert plan.settings["latency"]["backend"] == name
    assert plan.after.macs < plan.before.macs
    (table,) = tmp_path.glob(f"{name}-cpu-*.json")
    assert name in table.read_text()


@pytest.mark.parametrize("name", sorted(set(OTHERS) & set(NODE_TIMERS)))
def test_where_it_cannot_run_it_is_refused(name):
    with pytest.raises(PlanError, match=f"Operations of {RUNTIMES[name].name} are timed on the CPU only"):
        DeviceTimer(structprune.Latency(backend=name), torch.empty(1, device="meta"))
