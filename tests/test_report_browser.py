"""The report in a real browser: whole, alone, and by keyboard."""

from __future__ import annotations

import pytest
from support.browser import CHROMIUM, Browser
from support.reported import MODELS, TIMES, data_of, reported

from structprune.reporting.layers import counts, layer_rows


@pytest.fixture(scope="module", params=MODELS)
def case(request, tmp_path_factory):
    return reported(request.param, tmp_path_factory.mktemp("report"))


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
