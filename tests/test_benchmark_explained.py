"""Where the time of a model goes, by layer, and why pruning gains no more than it does."""

from __future__ import annotations

import onnx
import pytest
import torch
from torch import nn

from structprune.benchmarking import benchmark, layer_times
from structprune.benchmarking.counting import Counted, count_model
from structprune.benchmarking.explain import Side, causes, explain, odd_widths
from structprune.benchmarking.machine import Machine
from structprune.benchmarking.nodes import read_events
from structprune.benchmarking.profiling import Profile, Spent, by_layer, by_module
from structprune.export.onnx import export_onnx


class Stack(nn.Module):
    """A convolution in a block, and an operation of the model's own."""

    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU())
        self.head = nn.Conv2d(32, 8, 1)

    def forward(self, x):
        return self.head(self.block(x)).exp()


@pytest.mark.parametrize("backend", ["eager", "onnxruntime"])
def test_times_by_layer(backend):
    model = Stack()
    found = layer_times(model, torch.randn(4, 3, 48, 48), backend=backend)
    assert {"block.0", "head"} <= found.keys() <= {"", *dict(model.named_modules())}
    assert next(iter(found)) in ("block.0", "")
    assert all(seconds > 0 for seconds in found.values())
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())
    with pytest.raises(ValueError, match="backend is 'abacus'"):
        layer_times(model, torch.zeros(1, 3, 8, 8), backend="abacus")


def test_a_profile_of_fused_nodes_goes_to_the_layers_of_their_weights(tmp_path):
    graph = onnx.load(export_onnx(Stack().eval(), tmp_path / "m.onnx", torch.randn(1, 3, 9, 9)).path).graph
    events = [
        {"cat": "Node", "name": f"{name}_kernel_time", "dur": dur, "args": {"op_name": op}}
        for _ in range(3)
        for name, op, dur in (("relu_nchwc", "Conv", 30), ("node_conv2d_1", "Conv", 10), ("made up", "Reorder", 5))
    ] + [{"name": "model_run", "dur": 90}] * 3
    found = by_module(read_events(events), graph, [path for path, _ in Stack().named_modules()])
    assert by_layer(found.spent) == pytest.approx({"block.0": 30e-6, "head": 10e-6, "": 5e-6})
    assert found.seconds == pytest.approx(90e-6)


MACHINE = Machine(macs=1e9, bytes=1e9, start={"convolution": 1e-5, "product": 1e-5, "other": 1e-6})


def side(seconds, **layers):
    """A model from its layers: MACs, bytes, widths, seconds."""
    counted = {n: Counted(macs, moved, {"convolution": 1}, widths) for n, (macs, moved, widths, _) in layers.items()}
    return Side(seconds, counted, Profile(tuple(Spent(n, "conv2d", t, 1) for n, (*_, t) in layers.items())))


@pytest.mark.parametrize(
    ("dense", "slim", "cause"),
    [
        # Two operations that take hardly more than their start.
        (((200, 100, (16, 16), 12e-6),) * 2, ((50, 50, (8, 8), 11e-6),) * 2, "launch"),
        # Eight megabytes for a million MACs.
        (((2e6, 9e6, (16, 16), 9e-3),) * 2, ((1e6, 8e6, (16, 16), 8e-3),) * 2, "memory"),
        # Half the MACs in two thirds of the time, at a width of 17.
        (((9e6, 1e5, (16, 32), 9e-3),) * 2, ((45e5, 1e5, (16, 17), 6e-3),) * 2, "widths"),
        # One of the two lost nothing.
        (((9e6, 1e5, (32, 32), 9e-3),) * 2, ((45e5, 1e5, (32, 16), 45e-4), (9e6, 1e5, (32, 32), 9e-3)), "untouched"),
        # As it should be.
        (((9e6, 1e5, (32, 32), 9e-3),) * 2, ((45e5, 1e5, (32, 16), 45e-4),) * 2, None),
    ],
)
def test_causes_are_told_apart(dense, slim, cause):
    a, b = (side(sum(layer[3] for layer in each), a=each[0], b=each[1]) for each in (dense, slim))
    found = causes(a, b, MACHINE, 16, starts_counted=True)
    assert list(found) == ([cause] if cause else [])
    note = explain("slim", "eager", 8, a, b, MACHINE, 16, gain="1.0x.", starts_counted=True)
    assert note.layer in ("a", "b")
    assert ("No single cause" in note.text) == (cause is None)
    assert all(0 < share <= 1 for share in found.values())


def test_time_between_operations_is_launching():
    whole = side(1e-3, a=(9e6, 1e5, (32, 32), 4e-4))
    assert causes(whole, whole, MACHINE, 16, starts_counted=False)["launch"] == pytest.approx(0.6)


def test_layers_are_counted():
    found = count_model(Stack(), torch.zeros(2, 3, 10, 10))
    assert found["block.0"].macs == 2 * 64 * 32 * 27
    assert found["block.0"].bytes == 4 * (2 * 3 * 100 + 32 * 27 + 32 + 2 * 32 * 64)
    assert found["block.0"].widths == (3, 32)
    assert found["head"].operations == {"convolution": 1}
    assert found[""].operations == {"other": 1}
    assert odd_widths(Counted(1, 1, {}, (64, 3)), Counted(1, 1, {}, (40, 2)), 16) == [40]


def test_a_model_of_tiny_layers_is_launch_bound():
    deep = nn.Sequential(*[layer for _ in range(12) for layer in (nn.Linear(16, 16), nn.ReLU())])
    slim = nn.Sequential(*[layer for _ in range(12) for layer in (nn.Linear(8, 8), nn.ReLU())])
    models = {"dense": nn.Sequential(deep, nn.Linear(16, 8)), "slim": nn.Sequential(nn.Linear(16, 8), slim)}
    (note,) = benchmark(models, torch.randn(1, 16), threads=1, runs=20, clock="process").explanations
    assert "launch" in note.causes
    assert "Launch-bound" in note.text
    assert "Use larger batches" in note.text
