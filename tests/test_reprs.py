"""What is shown of results: short, and tables in notebooks; narrow terminals lose columns, not names."""

from __future__ import annotations

import io

import pytest
import timm
import torch
from rich.console import Console
from torch import nn

import structprune
from structprune.benchmarking.results import Timing

X = torch.randn(2, 4)


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


def test_a_plan_is_shown_in_one_line() -> None:
    model = timm.create_model("resnet50").eval()
    plan = structprune.plan(model, torch.randn(1, 3, 64, 64), ratio=0.5)
    assert len(repr(plan)) < 120
    assert f"Plan({plan.digest[:12]}: 106 weights thinned" in repr(plan)


def test_all_results_are_short_and_have_tables(net: nn.Module) -> None:
    graph = structprune.DependencyGraph(net, X)
    plan = structprune.plan(net, X, ratio=0.5)
    slim = structprune.recover(plan.apply(net), net, [torch.randn(64, 4)])
    found = structprune.sensitivity(net, X, X, lambda model, x: -float((model(x) - net(x)).abs().mean()))
    shown = {
        "DependencyGraph(Sequential: 1 groups, 3 pinned axes)": graph,
        "Group('0', mlp, 8 channels, 3 slices)": graph.groups()[0],
        "Sensitivity(dense=0, 1 groups)": found,
        "RecoveryReport(1 of 1 layers changed, 0 skipped)": structprune.recovery_report(slim),
    }
    for text, what in shown.items():
        assert repr(what).replace("-0", "0") == text
        assert "<table" in what._repr_html_()
    assert "<td>58</td>" in structprune.cost(net, X)._repr_html_()
    assert "equal" in structprune.verify(net, plan.apply(net), plan, X)._repr_html_()


@pytest.mark.parametrize("width", [60, 80, 100, 150])
def test_a_narrow_table_keeps_the_names(width: int) -> None:
    times = tuple(Timing(name, "onnxruntime", (0.01, 0.02, 0.03), 8, 1000) for name in ("a long name", "slim"))
    found = structprune.Benchmark(times, "cpu", 1, 8, macs={"a long name": 200, "slim": 100})
    text = io.StringIO()
    Console(file=text, width=width).print(found)
    assert "a long name" in text.getvalue()
    assert "20.000" in text.getvalue()
    assert "1.00x" in text.getvalue()
    assert "…" not in text.getvalue()
    assert ("interval" in text.getvalue()) == (width == 150)
