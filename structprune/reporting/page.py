"""`report`: one HTML file that shows a model, a plan for it, and what was measured."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import nn

from structprune.benchmarking import Benchmark, Speedup, Timing
from structprune.checking import INPUTS, MODEL, PATH, TEXT, instance, pair, require
from structprune.coupling.costs import Cost
from structprune.coupling.graph import ChannelGraph
from structprune.depth.plan import DepthPlan
from structprune.files import write_text
from structprune.planning.plan import Plan
from structprune.planning.sensitivities import Sensitivity
from structprune.reporting.chain import CHAIN, Stage, chain_table
from structprune.reporting.charts import (
    EMPTY,
    POINTS,
    RECOVERY,
    Point,
    Recovery,
    bar,
    curve,
    heat_map,
    layers_table,
    number_cell,
    recovery_table,
    table,
)
from structprune.reporting.drawing import Drawing, hue
from structprune.reporting.layers import PLAN, TIMES, Times, blocks, counts, layer_rows
from structprune.reporting.network import network_of
from structprune.reporting.text import element, kept, short
from structprune.surgery.verify import Report
from structprune.tracing.trace import ExampleInputs

_COSTS = {
    "params": "Parameters",
    "macs": "MACs",
    "weight_bytes": "Size of the weights, bytes",
    "peak_activation_bytes": "Activations at their peak, bytes",
}
# Nothing may be fetched: whatever a name in the model holds, the page stays by itself.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


def report(
    model: nn.Module,
    example_inputs: ExampleInputs,
    path: str | os.PathLike[str],
    *,
    plan: Plan | None = None,
    verification: Report | None = None,
    sensitivity: Sensitivity | None = None,
    points: Sequence[Point] = (),
    point_axes: tuple[str, str] = ("MACs", "accuracy"),
    recovery: Recovery | None = None,
    times: Times = (),
    benchmark: Benchmark | None = None,
    chain: Sequence[Stage] = (),
    title: str | None = None,
) -> Path:
    """Write one self-contained HTML file: no network, no other file.

    It shows the dependency graph, in which coupled channels have one colour and pinned axes say why; the widths, MACs
    and parameters of each layer before and after; and of the rest what is given.

    Args:
        model: the model that `plan` was made for, unchanged.
        example_inputs: a tensor, a tuple (positional) or a dict (keyword) that the model accepts.
        path: the file to write.
        plan: what is to be removed; without one the model is shown as it is.
        verification: what `structprune.verify` returned.
        sensitivity: what `structprune.sensitivity` returned; shown as a heat map.
        points: cost and accuracy of several plans, with a label each if wanted: ``(2.0e9, 0.76, "half")``.
        point_axes: what the two numbers of a point are.
        recovery: what ``structprune.recovery_report`` returned.
        times: what ``structprune.layer_times`` returned for the model and, if wanted, for the smaller one: a list of
            one or two; shown beside the costs of blocks and layers.
        benchmark: what ``structprune.benchmark`` returned.
        chain: the network on its way from dense to what is shipped, as for `structprune.plot_chain`.
        title: heading of the page; the model's class if not given.

    Returns:
        The file.

    Raises:
        TraceError: the forward cannot be recorded.
        OSError: the folder cannot be written, or `path` is a device, a pipe or a folder.

    Example:
        >>> import tempfile, structprune
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> x = torch.randn(1, 4)
        >>> plan = structprune.plan(model, x, ratio=0.5)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     text = structprune.report(model, x, f"{folder}/report.html", plan=plan).read_text()
        >>> "8 → 4" in text
        True
    """
    _require(locals())
    graph = ChannelGraph(model, example_inputs, outputs=None if plan is None else plan.outputs)
    before, after = counts(graph, plan)
    drawing = Drawing(graph, network_of(graph), before, after)
    rows = layer_rows(graph, before, after, times, plan)
    total = plan.before if plan else graph.costs.at(before)
    name = title or type(model).__name__
    takes = "MACs, parameters and time" if times else "MACs and parameters"
    sections = [
        ("overview", "", _cards(total, plan.after if plan else total, verification)),
        ("measured", "Measured", benchmark_table(benchmark) if benchmark else ""),
        ("chain", "From dense to shipped", chain_table(chain) if chain else ""),
        ("curve", "Accuracy and cost", curve(points, point_axes) if points else ""),
        ("recovery", "Recovery", recovery_table(recovery) if recovery else ""),
        ("graph-section", "What is coupled", _graph(drawing)),
        ("blocks", "Where the cost is", layers_table(blocks(rows), f"{takes} by block")),
        ("layers", "Layers", layers_table(rows, f"Channels, {takes} of each layer")),
        ("sensitivity", "Sensitivity", heat_map(sensitivity) if sensitivity and sensitivity.curves else ""),
        ("settings", "The plan", _settings(plan) if plan else ""),
    ]
    file = Path(path)
    write_text(file, _page(name, _subtitle(model, plan), sections, drawing.data()))
    return file


def _require(given: Mapping[str, Any]) -> None:
    """Check what `report` was given."""
    require(given, model=MODEL, example_inputs=INPUTS, path=PATH, plan=PLAN, title=TEXT.or_none)
    require(given, points=POINTS, point_axes=pair("what the two numbers of a point are"), times=TIMES)
    require(given, verification=instance(Report, "give what structprune.verify returned").or_none)
    require(given, sensitivity=instance(Sensitivity, "give what structprune.sensitivity returned").or_none)
    require(given, recovery=RECOVERY.or_none, chain=CHAIN)
    require(given, benchmark=instance(Benchmark, "give what structprune.benchmark returned").or_none)


def _subtitle(model: nn.Module, plan: Plan | None) -> str:
    kind = type(model)
    what = f"{kind.__module__}.{kind.__qualname__}"
    return f"{what}, {'pruned by plan ' + plan.digest[:12] if plan else 'as it is'}, torch {torch.__version__}"


def _page(name: str, subtitle: str, sections: list[tuple[str, str, str]], data: dict[str, Any]) -> str:
    shown = [(key, heading, body) for key, heading, body in sections if body]
    links = "".join(element("a", escape(heading), href=f"#{key}") for key, heading, _ in shown if heading)
    parts = "".join(
        element("section", element("h2", escape(heading)) if heading else "", body, id=key)
        for key, heading, body in shown
    )
    # "</" would end the script element.
    payload = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    head = "".join(
        (
            '<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            '<link rel="icon" href="data:,">',
            element("title", escape(f"{name}: pruning report")),
            element("style", _asset("style.css")),
        )
    )
    header = element(
        "header",
        element("div", element("h1", escape(name)), element("p", escape(subtitle))),
        element("nav", links, aria_label="Sections"),
    )
    scripts = f'<script type="application/json" id="data">{payload}</script><script>{_asset("script.js")}</script>'
    body = element("body", header, element("main", parts), scripts)
    return f"<!doctype html>\n{element('html', element('head', head), body, lang='en')}\n"


def _asset(name: str) -> str:
    return files("structprune.reporting").joinpath(name).read_text(encoding="utf-8")


def _cards(before: Cost, after: Cost, verification: Report | None) -> str:
    left = asdict(after)
    cards = [_card(_COSTS[key], value, left[key]) for key, value in asdict(before).items()]
    if verification is not None:
        error = f"{verification.max_relative_error:.1e}" if verification.numbers else "shapes only"
        cards.append(
            element(
                "div",
                element("p", "Against the original with the channels switched off", class_="label"),
                element("p", "equal" if verification.ok else "DIFFERENT", class_="value"),
                element("p", f"largest relative error {error}, tolerance {verification.tolerance:g}", class_="muted"),
                class_="card good" if verification.ok else "card bad",
            )
        )
    return element("div", *cards, class_="cards")


def _card(label: str, before: int, after: int) -> str:
    share = 100 * after / before if before else 100
    parts = [element("p", label, class_="label"), element("p", short(after), class_="value")]
    if before != after:
        parts.append(element("p", f"{kept(before, after)} of {short(before)}", class_="muted"))
    parts.append(element("i", class_="bar", style=f"--b:100%;--a:{share:.1f}%", aria_hidden="true"))
    return element("div", *parts, class_="card")


def _graph(drawing: Drawing) -> str:
    data = drawing.data()
    help_text = (
        "Lines and bands of one colour, and boxes of one number, are channels that are kept or removed together; grey "
        "ones are pinned. Hover over a node or focus it; arrow keys follow the graph, Enter keeps a node marked, "
        "Escape lets it go. "
        "Drag to move; Ctrl and the wheel, or + and -, zoom; 0 shows all."
    )
    buttons = "".join(
        element("button", sign, type="button", data_zoom=key, aria_label=label, title=label)
        for key, sign, label in (("in", "+", "Zoom in"), ("out", "\u2212", "Zoom out"), ("fit", "⤢", "Show all"))
    )
    stage = element("div", drawing.svg(), class_="stage")
    panel = element("aside", _overview(data), id="panel", aria_live="polite")
    legend = "".join(_legend(number, group) for number, group in enumerate(data["groups"]))
    above = element("p", help_text, class_="muted help") + element("div", buttons, class_="zoom")
    parts = [element("div", above, class_="above"), element("div", stage, panel, class_="explorer")]
    if legend:
        parts += [element("h3", f"{len(data['groups'])} coupled groups"), element("div", legend, class_="legend")]
    return "".join(parts)


def _overview(data: dict[str, Any]) -> str:
    """What the panel says while no node is chosen: how many channels of each kind, and what is pinned."""
    axes: dict[str, list[dict[str, Any]]] = {}
    for group in data["groups"]:
        axes.setdefault(group["axis"], []).append(group)
    lines = "".join(
        element("dt", escape(axis)) + element("dd", _arrow(*(sum(g["channels"][i] for g in mine) for i in (0, 1))))
        for axis, mine in axes.items()
    )
    pinned = [it for it in data["nodes"] if it["group"] is None and it["kind"] not in ("join", "input", "output")]
    held = "".join(element("li", element("code", escape(it["label"]))) for it in pinned)
    parts = [
        element("h3", f"{len(data['nodes'])} layers and sums"),
        element("p", "Point at one to see what it is tied to.", class_="muted"),
    ]
    parts.append(element("h4", "Channels by kind") + element("dl", lines) if lines else "")
    return "".join([*parts, element("h4", "Layers whose output is pinned") + element("ul", held) if held else ""])


def _arrow(before: int, after: int) -> str:
    return f"{before:,} → {after:,}" if before != after else f"{before:,}"


def _legend(number: int, group: dict[str, Any]) -> str:
    return element(
        "button",
        element("i", str(number + 1), class_="swatch"),
        element("span", escape(group["name"]), class_="name"),
        element("span", f"{escape(group['axis'])}, {_arrow(*group['channels'])}", class_="muted"),
        type="button",
        style=f"--h:{hue(number)}",
        data_group=number,
        aria_pressed="false",
        title=f"{group['name']}, {group['axis']}",
    )


def _settings(plan: Plan) -> str:
    asked = "".join(
        element("dt", escape(key.replace("_", " "))) + element("dd", escape(_plain(value)))
        for key, value in plan.settings.items()
        if value is not None
    )
    attributes = "".join(
        element(
            "li", element("code", escape(".".join([r.module or "model", *map(str, r.chain)]))), f": {r.old} → {r.new}"
        )
        for r in plan.attribute_edits
    )
    removed = "".join(element("li", element("code", escape(name)), ": removed") for name in _branches(plan))
    literals = "".join(
        element("li", f"a size in the forward of {element('code', escape(r.module or 'the model'))}: {r.old} → {r.new}")
        for r in plan.literal_edits
    )
    changed = element("h3", "What the forward reads") + element("ul", attributes, literals, class_="changes")
    if removed:
        changed = element("h3", "Blocks and branches") + element("ul", removed, class_="changes") + changed
    return element("dl", asked, element("dt", "digest"), element("dd", element("code", plan.digest))) + (
        changed if attributes or literals or removed else ""
    )


def _branches(plan: Plan) -> tuple[str, ...]:
    return plan.removal.branches if isinstance(plan, DepthPlan) else ()


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


# -- what was measured, as a table of the report ---------------------------------------------------------------------


def benchmark_table(measured: Benchmark) -> str:
    """Measured medians, throughput, memory and gains; and why no more is gained."""
    slowest = max(timing.median for timing in measured.timings)
    several = len(measured.batch_sizes) > 1
    memory = any(timing.memory is not None for timing in measured.timings)
    rows = [_row(measured, timing, slowest, several, memory) for timing in measured.timings]
    headings = ["model", "backend", *(["batch"] if several else []), "median and interval, ms", "samples/s"]
    headings += ["peak MB"] if memory else []
    notes = "".join(element("li", escape(each.text)) for each in measured.explanations)
    return table([*headings, "speed-up", "efficiency"], rows, caption=_caption(measured)) + (
        element("ul", notes, class_="notes") if notes else ""
    )


def _caption(measured: Benchmark) -> str:
    threads = f"{measured.threads} thread{'s' if measured.threads != 1 else ''}"
    where = [str(measured.environment[key]) for key in ("gpu", "processor") if measured.environment.get(key)]
    return (
        f"{(where or [measured.device])[0]}, {threads}, batch of {', '.join(map(str, measured.batch_sizes))}: "
        f"medians of {len(measured.timings[0].seconds)} runs in turns, with {measured.confidence:.0%} intervals"
    )


def _row(measured: Benchmark, timing: Timing, slowest: float, several: bool, memory: bool) -> list[str]:
    size = timing.batch_size or measured.batch_size
    low, high = (1e3 * end for end in timing.interval(measured.confidence))
    gains = [EMPTY_GAIN, EMPTY_GAIN]
    if timing.model != measured.timings[0].model:
        gain = measured.speedup(timing.model, timing.backend, size)
        share = measured.efficiency(timing.model, timing.backend, size)
        gains = [_gain(gain), EMPTY if share is None else number_cell(share, f"{share:.2f}")]
    return [
        element("th", escape(timing.model), scope="row"),
        element("td", escape(timing.backend)),
        *([number_cell(size, str(size))] if several else []),
        bar((timing.median, timing.median), slowest, f"{1e3 * timing.median:.3g}, {low:.3g} to {high:.3g}"),
        number_cell(size / timing.median, f"{size / timing.median:.4g}"),
        *([_megabytes(timing)] if memory else []),
        *gains,
    ]


def _megabytes(timing: Timing) -> str:
    return EMPTY if timing.memory is None else number_cell(timing.memory, f"{timing.memory / 1e6:.4g}")


EMPTY_GAIN = element("td", data_value=1)


def _gain(gain: Speedup) -> str:
    return element("td", f"{gain.ratio:.2f}x, {gain.low:.2f} to {gain.high:.2f}", data_value=f"{gain.ratio:.6g}")
