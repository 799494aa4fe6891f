"""Sums over the windows of a convolution against those over its features, unfolded."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import structprune
from structprune.equations.linear_maps import linear_map, with_intercept
from structprune.equations.windows import has_window_sums, window_sums
from structprune.recovery import layer_solver, whole_samples

CASES = {
    "one dimension": ((3, 4, 20), (2, 4, 7), {"padding": 3}),
    "longer than the input": ((2, 3, 5), (2, 3, 8), {"padding": 4}),
    "wide": ((3, 2, 16, 1), (4, 2, 9, 1), {"padding": (4, 0)}),
    "tall and dilated": ((2, 3, 5, 17), (2, 3, 3, 4), {"dilation": (1, 3), "padding": (1, 2)}),
    "a stride in the other dimension": ((2, 3, 9, 12), (2, 3, 2, 5), {"stride": (2, 1), "padding": (1, 0)}),
    "three dimensions": ((2, 2, 6, 5, 7), (3, 2, 2, 4, 3), {"stride": (1, 1, 2), "dilation": (2, 1, 1), "padding": 1}),
    "uneven padding": ((2, 3, 12), (2, 3, 4), {"padding": "same"}),
    "one entry": ((2, 3, 4, 4), (2, 3, 1, 1), {}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_they_are_those_of_the_features(name):
    size, weight_size, options = CASES[name]
    torch.manual_seed(0)
    x, weight = torch.randn(size, dtype=torch.float64), torch.randn(weight_size, dtype=torch.float64)
    layer = linear_map(f"conv{len(size) - 2}d", (x, weight), options)
    y = torch.randn(size[0], weight_size[0], *layer._windows(x).shape[2 : len(size)], dtype=torch.float64)
    at = torch.arange(layer.positions(y))
    rows = with_intercept(layer.features_at(x, at))[0]
    xx, xy = window_sums(layer, x, y)
    torch.testing.assert_close(xx, rows.T @ rows)
    torch.testing.assert_close(xy, rows.T @ layer.outputs_at(y, at)[0])


def test_strides_and_groups_are_left():
    x = torch.zeros(2, 4, 9, 9)
    assert not has_window_sums(linear_map("conv2d", (x, torch.zeros(2, 4, 5, 1)), {"stride": (2, 1)}))
    assert not has_window_sums(linear_map("conv2d", (x, torch.zeros(4, 2, 5, 1)), {"groups": 2}))
    assert not has_window_sums(linear_map("conv_transpose2d", (x, torch.zeros(4, 2, 5, 1)), {}))
    assert not has_window_sums(linear_map("linear", (x, torch.zeros(2, 9)), {}))
    assert has_window_sums(linear_map("conv2d", (x, torch.zeros(2, 4, 5, 1)), {"stride": (1, 3)}))


@pytest.mark.parametrize("bias", [False, True])
def test_layers_are_solved_alike_on_whole_samples_and_on_positions(monkeypatch, bias):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv1d(2, 12, 5), nn.ReLU(), nn.Conv1d(12, 3, 9, bias=bias, padding=4), nn.Flatten(), nn.Linear(48, 2)
    )
    model = model.double().eval()
    data = [torch.randn(32, 2, 20, dtype=torch.float64) for _ in range(3)]  # 24 and 6 samples of 30
    slim = structprune.prune(model, data[0], ratio=0.5, round_to=1)
    plain = structprune.recover(slim, model, data, rounds=0)
    monkeypatch.setattr(layer_solver, "UNFOLDED", 20)
    called = []
    monkeypatch.setattr(whole_samples, "window_sums", lambda *args: called.append(args) or window_sums(*args))
    found = structprune.recover(slim, model, data, rounds=0)
    assert len(called) == 2  # what is solved on, and what is held out, of all batches
    for ours, wanted in zip(layers(found), layers(plain), strict=True):
        assert ours.after == pytest.approx(wanted.after, rel=1e-9)
    for ours, wanted in zip(found.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, wanted)


def layers(model):
    return structprune.recovery_report(model).layers
