"""The report: what it says."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from support.cases import all_cases
from support.reported import IMAGE, MODELS, TIMES, data_of, reported
from torch import nn

import structprune
from structprune.coupling.costs import count_layers
from structprune.coupling.graph import ChannelGraph
from structprune.reporting.charts import _ticks
from structprune.reporting.drawing import called
from structprune.reporting.layers import blocks, counts, layer_rows
from structprune.reporting.layout import HEIGHT, WIDTH, layered
from structprune.reporting.network import network_of


class Outside(HTMLParser):
    """Collects what would be fetched."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        self.found += [
            v for k, v in attrs if k in ("src", "href", "data", "action") and not v.startswith(("#", "data:"))
        ]


@pytest.fixture(scope="module", params=MODELS)
def case(request, tmp_path_factory):
    return reported(request.param, tmp_path_factory.mktemp("report"))


# -- costs by layer ---------------------------------------------------------------------------------------------------


def built(each):
    """A case with weights that are numbers: bare parameters may come uninitialised."""
    torch.manual_seed(0)
    model = each.build()
    for parameter in model.parameters():
        nn.init.normal_(parameter.data, std=0.2)
    return model, each.inputs()


CASES = [case for case in all_cases() if case.thins]


@pytest.mark.parametrize("each", CASES, ids=str)
def test_costs_of_layers_add_up_to_those_of_the_plan(each):
    model, inputs = built(each)
    plan = structprune.plan(model, inputs, ratio=0.5)
    graph = ChannelGraph(model, inputs, outputs=plan.outputs)
    for count, total in zip(counts(graph, plan), (plan.before, plan.after), strict=True):
        found = count_layers(model, graph.trace, graph.channels, count).values()
        assert (sum(c.params for c in found), sum(c.macs for c in found)) == (total.params, total.macs)
    rows = layer_rows(graph, *counts(graph, plan))
    assert sum(row.params[1] for row in rows) == sum(p.numel() for p in plan.apply(model).parameters())


@pytest.mark.parametrize("each", CASES, ids=str)
def test_every_case_can_be_reported(each, tmp_path):
    model, inputs = built(each)
    plan = structprune.plan(model, inputs, ratio=0.5)
    data = data_of(structprune.report(model, inputs, tmp_path / "r.html", plan=plan).read_text())
    drawn = {g for node in data["nodes"] for g in node["groups"]}
    assert drawn == set(range(len(structprune.DependencyGraph(model, inputs, outputs=plan.outputs).groups())))


# -- the network and its layout ---------------------------------------------------------------------------------------


def test_the_network_of_a_residual_block():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.norm, self.b = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)

        def forward(self, x):
            x = self.norm(self.a(x)).relu()
            return self.b(x) + x

    network = network_of(ChannelGraph(Block(), IMAGE, outputs=()))
    assert [(n.label, n.kind, n.merged) for n in network.nodes] == [
        ("input", "input", []),
        ("a", "layer", ["norm"]),
        ("b", "layer", []),
        ("add", "join", []),
        ("output", "output", []),
    ]
    assert network.edges == {(0, 1): None, (1, 2): 0, (1, 3): 0, (2, 3): 0, (3, 4): 0}


@pytest.mark.parametrize("seed", range(5))
def test_nodes_do_not_overlap_and_edges_go_down_or_to_the_next_column(seed):
    random = np.random.default_rng(seed)
    edges = [(int(random.integers(max(0, b - 9), b)), b) for b in range(1, 60) for _ in range(random.integers(1, 3))]
    edges = list(dict.fromkeys(edges))
    found = layered(60, edges)
    at = np.array(found.centres)
    apart = np.abs(at[:, None] - at[None, :])
    overlap = (apart[..., 0] < WIDTH) & (apart[..., 1] < HEIGHT)
    assert not (overlap & ~np.eye(60, dtype=bool)).any()
    assert (at >= [WIDTH / 2, HEIGHT / 2]).all()
    assert (at <= [found.width - WIDTH / 2, found.height - HEIGHT / 2]).all()
    for (start, end), course in zip(edges, found.courses, strict=True):
        assert found.centres[end][1] > found.centres[start][1] or found.centres[end][0] > found.centres[start][0]
        numbers = [number for _, points in course for point in points for number in point]
        assert numbers[0] == pytest.approx(found.centres[start][0], abs=0.1)
        assert numbers[-1] == pytest.approx(found.centres[end][1] - HEIGHT / 2, abs=0.1)
        assert max(numbers) <= max(found.width, found.height)


def test_one_node_alone_has_a_place():
    assert layered(1, []).centres[0][0] == pytest.approx(layered(1, []).width / 2, abs=40)


@pytest.mark.parametrize("values", [[0.7, 0.76], [3.0], [0.0, 4.1e9], [-2.5, -2.4], [0.0]])
def test_ticks_enclose_the_values(values):
    ticks = _ticks(values)
    assert 2 <= len(ticks) <= 8
    assert ticks[0] <= min(values) + 1e-9
    assert ticks[-1] >= max(values) - 1e-9


# -- the page ---------------------------------------------------------------------------------------------------------


def test_the_page_fetches_nothing_and_escapes_names(case):
    seen = Outside()
    seen.feed(case.text)
    assert seen.found == []
    assert "default-src 'none'" in case.text
    assert "url(" not in case.text
    assert "@import" not in case.text
    assert "<b>quarter" not in case.text
    assert "conv&lt;1&gt;" in case.text


def test_the_page_holds_the_plan(case):
    data = data_of(case.text)
    assert [group["name"] for group in data["groups"]] == [called(group) for group in case.graph.groups()]
    assert [group["number"] for group in data["groups"]] == list(range(1, 1 + len(data["groups"])))
    kinds = {group["axis"] for group in data["groups"] if "residual stream" in group["axis"]}
    assert kinds == {"residual stream"}
    assert sum(group["channels"][1] for group in data["groups"]) == sum(axis.after for axis in case.plan.axes)
    assert sum(node["macs"][0] for node in data["nodes"]) == case.plan.before.macs
    assert sum(node["macs"][1] for node in data["nodes"]) == case.plan.after.macs
    pins = {reason for node in data["nodes"] for _, reason in node["pins"]}
    assert "it is a dimension of the model's output" in pins
    assert not any("site-packages" in reason for reason in pins)
    assert case.plan.digest in case.text
    for edit in case.plan.attribute_edits:
        assert f"{edit.old} → {edit.new}" in case.text


def test_without_a_plan_the_model_is_shown_as_it_is(tmp_path):
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    text = structprune.report(model, torch.zeros(1, 4), tmp_path / "r.html", title="<mine>").read_text()
    assert "<h1>&lt;mine&gt;</h1>" in text
    assert "→" not in re.sub("<(script|style).*?</", "", text, flags=re.S)
    assert 'id="settings"' not in text
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_page_holds_what_was_measured(case):
    assert "A processor, 1 thread, batch of 1, 8: medians of 5 runs in turns, with 95% intervals" in case.text
    assert "slim &lt;1&gt;" in case.text
    assert "Memory-bound: &lt;60%&gt; of it." in case.text
    assert "2.00x, 2.00 to 2.00" in case.text
    assert '<td data-value="0.6666666667" data-label="efficiency">0.67</td>' in case.text
    assert "MACs, parameters and time by block" in case.text
    after = "2.5 → 1.25" if "layer1" in case.text else "2.5"
    assert after in case.text


def test_the_page_holds_the_way_from_dense_to_what_is_shipped(case):
    (section,) = re.findall(r'<section id="chain">.*?</section>', case.text, re.DOTALL)
    assert "pruned &lt;&amp;&gt; int8" in section
    for said in (
        "92.90 (\u22120.5)",
        "7.50x smaller",
        "2.00x fewer",
        "1.25x slower",
        "not measured",
        "ONNX &lt;Runtime&gt;",
    ):
        assert said in section


def test_times_of_layers_stand_beside_their_costs(case):
    times = [{"": 1e-3, **each} for each in next(t for t in TIMES.values() if all(case.has(p) for p in t[0]))]
    rows = layer_rows(case.graph, *counts(case.graph, case.plan), times)
    assert {row.path: row.seconds for row in rows if row.seconds} == {
        path: (times[0][path], times[-1][path]) for path in times[0]
    }
    assert sum(row.seconds[0] for row in blocks(rows) if row.seconds) == pytest.approx(sum(times[0].values()))
    assert [row for row in rows if row.macs[0]] == [
        replace(row, seconds=next(r.seconds for r in rows if r.path == row.path))
        for row in layer_rows(case.graph, *counts(case.graph, case.plan))
        if row.macs[0]
    ]


def test_a_plan_in_a_notebook():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    html = structprune.plan(model, torch.zeros(1, 4), ratio=0.5)._repr_html_()
    assert re.search(r"<td>0</td><td>8</td><td>4 \(50.0%\)</td>", html)
    assert "params" in html
