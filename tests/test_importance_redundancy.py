"""Criteria of redundancy between filters against literal implementations of their definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from support.importance_nets import (
    Chain,
    build,
    everything,
    first,
)

from structprune.importance.redundancy import FPGM, Cosine, GeometricMedian, geometric_median


@pytest.fixture
def net() -> Chain:
    model = build("chain")
    assert isinstance(model, Chain)
    return model


def chosen(net: Chain, which: str) -> np.ndarray:
    if which == "output":
        return net.first.weight.detach().flatten(1).numpy()
    return np.array([everything(net, c) for c in range(4)])


@pytest.mark.parametrize("which", ["output", "all"])
def test_fpgm(net: Chain, which: str) -> None:
    rows = chosen(net, which)
    expected = [sum(np.linalg.norm(rows[i] - rows[j]) for j in range(4)) for i in range(4)]
    assert first(net, FPGM(which)) == pytest.approx(expected)
    assert first(net, FPGM(which, squared=True)) == pytest.approx(np.square(expected))


def test_fpgm_by_name_takes_the_whole_group_and_squares(net: Chain) -> None:
    assert first(net, "fpgm") == pytest.approx(first(net, FPGM("all", squared=True)))


@pytest.mark.parametrize("which", ["output", "all"])
def test_geometric_median_of_filters(net: Chain, which: str) -> None:
    rows = chosen(net, which)

    def total(point: np.ndarray) -> float:
        return np.linalg.norm(rows - point, axis=1).sum()

    median = minimize(total, rows.mean(0), method="BFGS", options={"gtol": 1e-9}).x
    assert first(net, GeometricMedian(which)) == pytest.approx(np.linalg.norm(rows - median, axis=1), rel=1e-4)


def test_geometric_median_at_a_point_and_of_equal_points() -> None:
    points = torch.tensor([[0.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]], dtype=torch.float64)
    torch.testing.assert_close(geometric_median(points), points[0])
    moved = torch.cat([points[1:2], points[1:2], points[1:2], points[:1]])  # most of the weight lies on one point
    torch.testing.assert_close(geometric_median(moved), points[1], atol=1e-6, rtol=0)
    assert geometric_median(points[:1].repeat(3, 1)).tolist() == [0, 0]


@pytest.mark.parametrize("against", ["nearest", "mean"])
def test_cosine(net: Chain, against: str) -> None:
    rows = chosen(net, "output")
    expected = []
    for i in range(4):
        alike = [
            abs(rows[i] @ rows[j]) / (np.linalg.norm(rows[i]) * np.linalg.norm(rows[j])) for j in range(4) if j != i
        ]
        expected.append(1 - (max(alike) if against == "nearest" else sum(alike) / 3))
    assert first(net, Cosine(against)) == pytest.approx(expected)


def test_a_copy_of_a_channel_is_redundant(net: Chain) -> None:
    net.first.weight.data[3] = -2 * net.first.weight.data[0]
    scores = first(net, Cosine())
    assert scores[0] == scores[3] == pytest.approx(0, abs=1e-12)
    assert min(scores[1:3]) > 1e-3
