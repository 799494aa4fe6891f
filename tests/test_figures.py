"""The report's plots with Matplotlib."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import matplotlib.pyplot as plt
import pytest
import timm
import torch
from torch import nn

import structprune
from structprune.errors import MissingExtraError
from structprune.reporting.network import network_of

IMAGE = torch.zeros(1, 3, 64, 64)
TIMES = [{"conv1": 2.5e-3, "layer1.0.act1": 5e-4}, {"conv1": 1.25e-3, "layer1.0.act1": 3e-4}]


@pytest.fixture(scope="module")
def case():
    """A model, its graph and a plan."""
    torch.manual_seed(0)
    model = timm.create_model("resnet18").eval()
    graph = structprune.DependencyGraph(model, IMAGE)
    return SimpleNamespace(model=model, graph=graph, plan=structprune.plan(model, IMAGE, ratio=0.5))


@pytest.mark.parametrize("draw", [structprune.plot_widths, structprune.plot_costs])
def test_figures_for_papers(draw, case, tmp_path):
    file = tmp_path / "figure.svg"
    figure = draw(case.model, IMAGE, file, plan=case.plan)
    assert len(figure.axes) == 1
    convolutions = sum(isinstance(m, nn.Conv2d | nn.Linear) for m in case.model.modules())
    assert file.read_text().count("<path") > 2 * convolutions


def test_figures_of_what_was_measured(case, tmp_path):
    file = tmp_path / "t.svg"
    structprune.plot_costs(case.model, IMAGE, file, of="time", times=TIMES)
    assert file.read_text().count("<path") > 4
    structprune.plot_graph(case.model, IMAGE, tmp_path / "g.svg", plan=case.plan)
    graph = (tmp_path / "g.svg").read_text()
    network = network_of(case.graph)
    assert graph.count('id="patch_') >= len(network.nodes) + len(network.edges)
    points = [(4.0, 0.76, "dense"), (2.0, 0.75)]
    structprune.plot_curve(points, tmp_path / "c.svg", axes=("ms", "accuracy"))
    assert "<!-- dense -->" in (tmp_path / "c.svg").read_text()
    layers = [SimpleNamespace(layer="conv1", before=0.5, after=0.1)]
    file = tmp_path / "r.svg"
    structprune.plot_recovery(SimpleNamespace(layers=layers, skipped={}), file)
    assert "<!-- relative error -->" in file.read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"of": "weight"}, "of is 'weight'"),
        ({"of": "time"}, "of='time' needs times"),
        ({"times": [{"": 1.0}]}, "of='time' needs times"),
    ],
)
def test_a_figure_of_something_else_is_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        structprune.plot_costs(nn.Linear(2, 2), torch.zeros(1, 2), tmp_path / "x.svg", **options)


def test_missing_matplotlib_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r"structprune\[plot\]"):
        structprune.plot_widths(nn.Linear(2, 2), torch.zeros(1, 2), tmp_path / "x.svg")


def test_figures_are_drawn_on_axes_that_are_given(case):
    axes = plt.Figure().subplots(1, 2)
    for ax, draw in zip(axes, (structprune.plot_widths, structprune.plot_costs), strict=True):
        assert draw(case.model, IMAGE, plan=case.plan, ax=ax) is ax.figure
        assert ax.patches


def test_the_way_from_dense_to_what_is_shipped(tmp_path):
    stages = [
        structprune.Stage("dense", 0.934, 3_000_000, None, {"a": 2e-3}),
        structprune.Stage("pruned", 0.5),
        structprune.Stage("int8", 0.929, 400_000, None, {"a": 2.5e-3}),
    ]
    figure = structprune.plot_chain(stages, tmp_path / "c.svg", measure="accuracy")
    # Nobody counted MACs.
    assert [panel.get_title(loc="left") for panel in figure.axes] == ["accuracy", "file, MB", "a, ms"]
    said = [[text.get_text() for text in panel.texts] for panel in figure.axes]
    assert said[0] == ["0.9340", "0.5000", "\u22120.434", "0.9290", "\u22120.005"]
    assert said[1] == ["3.00", "not measured", "0.400", "7.50x smaller"]
    assert said[2] == ["2.00", "not measured", "2.50", "1.25x slower"]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["dense", "pruned", "int8"]
    assert [len(panel.patches) for panel in figure.axes] == [0, 2, 2]
    assert "<!-- pruned -->" in (tmp_path / "c.svg").read_text()


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([], "stages is empty"),
        ([structprune.Stage("dense")], "none of them has a number"),
        ([structprune.Stage("dense", float("nan"))], "give a list of structprune.Stage whose numbers are finite"),
        (["dense"], "give a list of structprune.Stage"),
    ],
)
def test_stages_without_numbers_are_refused(stages, message):
    with pytest.raises(ValueError, match=message):
        structprune.plot_chain(stages)
