"""The report: what it says, and that a real browser shows it whole, alone, and by keyboard."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from support.browser import CHROMIUM, Browser
from support.cases import all_cases
from torch import nn

import structprune
from structprune.benchmarking import Benchmark, Explanation, Timing
from structprune.coupling.costs import count_layers
from structprune.coupling.graph import ChannelGraph
from structprune.planning.sensitivities import GroupCurve, Sensitivity
from structprune.reporting.charts import _ticks
from structprune.reporting.drawing import called
from structprune.reporting.layers import blocks, counts, layer_rows
from structprune.reporting.layout import HEIGHT, WIDTH, layered
from structprune.reporting.network import network_of

IMAGE = torch.zeros(1, 3, 64, 64)
MODELS = {
    "resnet50": lambda: timm.create_model("resnet50"),
    "vit": lambda: timm.create_model("vit_tiny_patch16_224", img_size=64),
}

TIMES = {
    "resnet50": [{"conv1": 2.5e-3, "layer1.0.act1": 5e-4}, {"conv1": 1.25e-3, "layer1.0.act1": 3e-4}],
    "vit": [{"blocks.0.mlp.fc1": 2.5e-3, "blocks.0.mlp.act": 5e-4}],
}
BENCHMARK = Benchmark(
    tuple(
        Timing(model, backend, tuple(size * seconds * (1 + 0.01 * i) for i in range(5)), size, 10**7)
        for backend in ("eager", "onnxruntime")
        for size in (1, 8)
        for model, seconds in (("dense", 4e-3), ("slim <1>", 2e-3))
    ),
    "cpu", 1, 1, macs={"dense": 300, "slim <1>": 100}, environment={"processor": "A processor"},
    explanations=(Explanation("slim <1>", "eager", 8, {"memory": 0.6}, "conv1", 0.3, "Memory-bound: <60%> of it."),),
)  # fmt: skip


def data_of(text: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text)[1])


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
    """A model, its plan, and a report with everything in it."""
    torch.manual_seed(0)
    model = MODELS[request.param]().eval()
    plan = structprune.plan(model, IMAGE, ratio=0.5)
    graph = structprune.DependencyGraph(model, IMAGE)
    curves = tuple(
        GroupCurve(g.name, g.axis, g.channels, (g.channels - 1, 1), (0.7, 0.5 / (1 + i)))
        for i, g in enumerate(graph.groups())
    )
    recovery = SimpleNamespace(
        layers=[SimpleNamespace(layer="conv<1>", before=0.5, after=0.125)], skipped={"fc": "its input is <the same>"}
    )
    file = structprune.report(
        model,
        IMAGE,
        tmp_path_factory.mktemp("report") / "report.html",
        plan=plan,
        verification=structprune.verify(model, plan.apply(model), plan, IMAGE),
        sensitivity=Sensitivity(0.75, curves),
        points=[(4e9, 0.76, "dense"), (2e9, 0.75), (1e9, 0.7, "</script><b>quarter")],
        recovery=recovery,
        times=TIMES[request.param],
        benchmark=BENCHMARK,
    )
    modules = dict(model.named_modules())
    return SimpleNamespace(
        model=model, plan=plan, graph=graph, file=file, text=file.read_text(), has=modules.__contains__
    )


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


# -- in a real browser ------------------------------------------------------------------------------------------------

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed to show the page in")


@pytest.fixture(scope="module")
def browser():
    with Browser() as found:
        yield found


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1440, 420])
def test_it_renders_alone_and_whole(browser, case, width, scheme):
    browser.problems.clear()
    browser.requests.clear()
    browser.open(case.file, width=width, scheme=scheme)
    assert browser.problems == []
    assert browser.requests == [case.file.as_uri()]
    assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")
    for number in range(len(case.graph.groups())):
        assert browser.evaluate(f"document.querySelectorAll('.node[data-groups~=\"{number}\"]').length") >= 1
    # Every node lies inside the drawing, every label inside its node.
    outside = """(() => {
        const frame = document.getElementById("graph").getBoundingClientRect();
        const out = (box, of) => box.left < of.left - 1 || box.right > of.right + 1
            || box.top < of.top - 1 || box.bottom > of.bottom + 1;
        return [...document.querySelectorAll(".node")].filter((node) => {
            const own = node.querySelector(".box").getBoundingClientRect();
            const labels = [...node.querySelectorAll("text")].map((text) => text.getBoundingClientRect());
            return out(own, frame) || labels.some((label) => out(label, own));
        }).map((node) => node.id);
    })()"""
    assert browser.evaluate(outside) == []
    # No name of a layer is broken into letters.
    lines = (
        "[...document.querySelectorAll('#layers tr:not(.minor) th')].map((cell) => cell.getClientRects()[0]?.height)"
    )
    assert max(height for height in browser.evaluate(lines) if height is not None) < 60
    background = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(17, 19, 24)") == (scheme == "dark")


@needs_browser
def test_the_keyboard_reaches_everything(browser, case):
    browser.open(case.file)
    order = []
    for _ in range(100):
        browser.press("Tab")
        order.append(
            browser.evaluate("document.activeElement.closest('nav, .zoom, .stage, .legend, .scroll')?.className")
        )
        if order[-1] == "scroll" and "legend" in order:
            break
    # Links, what was measured, buttons, one stop for the whole graph, the groups, then the other tables.
    reached = [name for name, before in zip(order, [None, *order], strict=False) if name not in (before, None)]
    assert list(dict.fromkeys(reached)) == ["", "scroll", "zoom", "stage", "legend"]
    assert reached[-1] == "scroll"
    assert order.count("stage") == 1

    browser.evaluate("document.getElementById('n0').focus()")
    browser.press("ArrowDown")
    assert browser.evaluate("document.activeElement.id") == "n1"
    browser.press("Enter")
    assert browser.evaluate("document.activeElement.getAttribute('aria-pressed')") == "true"
    name = browser.evaluate("document.querySelector('#panel h3').textContent")
    assert name == data_of(case.text)["nodes"][1]["label"]
    assert browser.evaluate("document.querySelectorAll('.node.lit').length") >= 2
    browser.press("Escape")
    assert browser.evaluate("document.querySelectorAll('[aria-pressed=\"true\"]').length") == 0
    browser.press("ArrowUp")
    assert browser.evaluate("document.activeElement.id") == "n0"
    assert browser.problems == []


@needs_browser
def test_pinned_axes_say_why_on_hover(browser, case):
    browser.open(case.file, height=1400)
    nodes = data_of(case.text)["nodes"]
    number = next(i for i, node in enumerate(nodes) if any("output" in reason for _, reason in node["pins"]))
    browser.evaluate(f"document.getElementById('n{number}').scrollIntoView({{behavior: 'instant', block: 'center'}})")
    box = f"document.getElementById('n{number}').getBoundingClientRect()"
    left, top, width, height = (browser.evaluate(f"{box}.{key}") for key in ("left", "top", "width", "height"))
    browser.mouse("mouseMoved", left + width / 2, top + height / 2)
    text = browser.evaluate("document.getElementById('panel').textContent")
    assert "it is a dimension of the model's output" in text
    browser.mouse("mouseMoved", 2, 2)
    assert "Channels by kind" in browser.evaluate("document.getElementById('panel').textContent")


@needs_browser
def test_it_zooms_and_moves(browser, case):
    browser.open(case.file, height=1400)
    width = "document.getElementById('graph').viewBox.baseVal.width"
    whole = browser.evaluate(width)
    browser.evaluate("document.getElementById('graph').scrollIntoView({behavior: 'instant', block: 'center'})")
    browser.evaluate("document.getElementById('n0').focus({preventScroll: true})")
    browser.press("+")
    assert browser.evaluate(width) == pytest.approx(0.75 * whole)
    middle = "document.getElementById('graph').getBoundingClientRect()"
    x, y = (
        browser.evaluate(f"{middle}.left + {middle}.width / 2"),
        browser.evaluate(f"{middle}.top + {middle}.height / 2"),
    )
    corner = "document.getElementById('graph').viewBox.baseVal.x"
    before = browser.evaluate(corner)
    browser.mouse("mousePressed", x, y, button="left", clickCount=1)
    browser.mouse("mouseMoved", x - 90, y, button="left")
    browser.mouse("mouseReleased", x - 90, y, button="left", clickCount=1)
    assert browser.evaluate(corner) > before + 50
    browser.mouse("mouseWheel", x, y, deltaX=0, deltaY=-120, modifiers=2)
    assert browser.evaluate(width) < 0.7 * whole
    browser.evaluate("document.getElementById('n0').focus()")
    browser.press("0")
    assert browser.evaluate(width) == pytest.approx(whole)
    assert browser.problems == []


@needs_browser
def test_rows_without_multiplications_are_folded_and_narrow_rows_say_what_they_hold(browser, case):
    shown = "[...document.querySelectorAll('#layers tbody tr')].filter((row) => row.getClientRects().length).length"
    browser.open(case.file, width=420)
    rows = layer_rows(case.graph, *counts(case.graph, case.plan), TIMES["resnet50" if case.has("conv1") else "vit"])
    heavy = sum(bool(row.macs[0] or row.seconds) for row in rows)
    assert browser.evaluate(shown) == heavy < len(rows)
    label = "getComputedStyle(document.querySelector('#layers td'), '::before').content"
    assert browser.evaluate(label) == 'attr(data-label) ": "' or "kind" in browser.evaluate(label)
    browser.evaluate("document.querySelector('#layers .unfold input').click()")
    assert browser.evaluate(shown) == len(rows)
    assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert browser.problems == []


@needs_browser
def test_tables_sort(browser, case):
    browser.open(case.file)
    heading = "document.querySelector('#layers thead th:nth-child(4)')"
    browser.evaluate(f"{heading}.querySelector('button').click()")
    assert browser.evaluate(f"{heading}.getAttribute('aria-sort')") == "descending"
    values = browser.evaluate(
        "[...document.querySelectorAll('#layers tbody tr')].map((row) => +row.cells[3].dataset.value)"
    )
    assert values == sorted(values, reverse=True)
    assert values[0] > values[-1]
