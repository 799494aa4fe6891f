"""Tables with bars, a heat map, a curve: the parts of the report that are no graph."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any, Protocol, runtime_checkable

import numpy as np

from structprune.checking import Check, instance, is_number
from structprune.planning.sensitivities import Sensitivity
from structprune.reporting.layers import LayerRow, Pair
from structprune.reporting.text import element, kept, short

Point = tuple[float, float] | tuple[float, float, str]
_STEPS = 8
# Wider tables scroll on narrow screens, as cells beside each other are what they show.
_STACKED = 8


class RecoveredLayer(Protocol):
    """How far a layer was from what it has to meet, before and after it was solved anew."""

    @property
    def layer(self) -> str:
        """Path of the layer."""
        ...

    @property
    def before(self) -> float:
        """Relative error with the weights as they were."""
        ...

    @property
    def after(self) -> float:
        """Relative error with the weights as they are now."""
        ...


@runtime_checkable
class Recovery(Protocol):
    """What ``structprune.recovery_report`` returns."""

    @property
    def layers(self) -> Sequence[RecoveredLayer]:
        """In the order in which they were solved."""
        ...

    @property
    def skipped(self) -> dict[str, str]:
        """Layers that could not be solved, with the reason."""
        ...


def _is_point(value: Any) -> bool:
    numbers = isinstance(value, (tuple, list)) and len(value) in (2, 3) and all(map(is_number, value[:2]))
    return numbers and all(isinstance(label, str) for label in value[2:])


POINTS = Check(
    lambda value: isinstance(value, (tuple, list)) and all(map(_is_point, value)),
    "give a list of (cost, accuracy) or (cost, accuracy, label)",
)
RECOVERY = instance(Recovery, "give what structprune.recovery_report returned")


def table(
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    caption: str,
    sortable: bool = True,
    minor: Sequence[bool] = (),
    folded: str = "",
) -> str:
    """A table from cells that are ``td`` or ``th`` elements; its columns can be sorted by their headings.

    Rows that are `minor` are folded away behind a switch that says `folded`. On narrow screens each row becomes a
    block, whose cells say what they are.
    """
    head = "".join(
        element("th", element("button", escape(h), type="button") if sortable else escape(h), scope="col")
        for h in headings
    )
    small = [*minor, *[False] * (len(rows) - len(minor))]
    body = "".join(
        element("tr", *map(_labelled, row, headings), class_="minor" if least else None)
        for row, least in zip(rows, small, strict=True)
    )
    switch = element("label", '<input type="checkbox">', f" {escape(folded)}", class_="unfold") if any(small) else ""
    return switch + element(
        "div",
        element(
            "table",
            element("caption", escape(caption)),
            element("thead", element("tr", head)),
            element("tbody", body),
            class_=" ".join(["sortable"] * sortable + ["stacked"] * (len(headings) <= _STACKED)) or None,
        ),
        class_="scroll",
        tabindex=0,
        role="region",
        aria_label=caption,
    )


def _labelled(cell: str, heading: str) -> str:
    """A cell that knows its heading: on narrow screens it stands beside it."""
    return cell.replace(">", f' data-label="{escape(heading)}">', 1) if cell.startswith("<td") else cell


def bar(pair: tuple[float, float], most: float, text: str) -> str:
    """A cell with a bar: before as its track, after as what is filled."""
    before, after = (100 * value / most if most else 0 for value in pair)
    track = element("i", style=f"--b:{before:.2f}%;--a:{after:.2f}%", class_="bar", aria_hidden="true")
    return element("td", track, element("span", text), class_="bars", data_value=f"{pair[0]:.8g}")


def layers_table(rows: Sequence[LayerRow], caption: str) -> str:
    """Widths, MACs, parameters and, where it was measured, time of layers or blocks."""
    widths = any(row.channels for row in rows)
    slowest = max((max(row.seconds) for row in rows if row.seconds), default=0.0)
    widest = max([1, *(row.channels[0] for row in rows if row.channels)])
    most = LayerRow("", "", (widest, 0), _greatest(rows, "macs"), _greatest(rows, "params"), (slowest, 0.0))
    lines = [_cells(row, most, widths) for row in rows]
    headings = ["layer" if widths else "block", "kind", *(["channels"] if widths else []), "MACs", "parameters"]
    headings += ["time, ms"] if slowest else []
    minor = [not (row.macs[0] or row.seconds or row.kind.endswith(" layers")) for row in rows]
    minor = minor if any(minor) and not all(minor) else []
    folded = f"show {sum(minor)} more without multiply-accumulates, such as norms"
    return table(headings, lines, caption=caption, minor=minor, folded=folded)


def _greatest(rows: Sequence[LayerRow], name: str) -> Pair:
    return max([1, *(getattr(row, name)[0] for row in rows)]), 0


def _cells(row: LayerRow, most: LayerRow, widths: bool) -> list[str]:
    """The cells of a layer; `most` holds the numbers whose bars fill a cell, a time of 0 if none was measured."""
    cells = [element("th", escape(row.path or "(model)"), scope="row"), element("td", escape(row.kind))]
    if widths:
        cells.append(_bar_of(row.channels, most.channels, _change(row.channels, exact=True) if row.channels else ""))
    cells += [_bar_of(row.macs, most.macs, _change(row.macs)), _bar_of(row.params, most.params, _change(row.params))]
    if most.seconds and most.seconds[0]:
        cells.append(_bar_of(row.seconds, most.seconds, _milliseconds(row.seconds) if row.seconds else ""))
    return cells


def _bar_of(pair: tuple[float, float] | None, most: tuple[float, float] | None, text: str) -> str:
    return EMPTY if pair is None or most is None else bar(pair, most[0], text)


def _milliseconds(pair: tuple[float, float]) -> str:
    before, after = (f"{1e3 * value:.3g}" for value in pair)
    if pair[0] == pair[1]:
        return before
    return f"{before} → {after} {element('span', kept(*pair), class_='muted')}"


EMPTY = '<td class="bars" data-value="-1"><span class="muted">none</span></td>'


def _change(pair: Pair, exact: bool = False) -> str:
    before, after = (str(value) if exact else short(value) for value in pair)
    if pair[0] == pair[1]:
        return f"{before}"
    share = element("span", kept(*pair), class_="muted")
    return f"{before} → {after} {share}"


def heat_map(sensitivity: Sensitivity) -> str:
    """How far the metric falls when each group alone loses a share of its channels."""
    deepest = max(1 - curve.kept[-1] / curve.channels for curve in sensitivity.curves)
    shares = deepest * np.arange(1, _STEPS + 1) / _STEPS
    drops = [curve.drop(sensitivity.dense, curve.channels * (1 - shares)) for curve in sensitivity.curves]
    worst = max(1e-12, float(np.max(drops)))
    rows: list[list[str]] = []
    for curve, drop in zip(sensitivity.curves, drops, strict=True):
        cells = [
            element(
                "td",
                f"{value:.3g}",
                class_="heat hot" if value > 0.72 * worst else "heat",
                style=f"--t:{max(0.0, value) / worst:.3f}",
                data_value=f"{value:.8g}",
            )
            for value in drop
        ]
        name = f"{escape(curve.group)} {element('span', escape(curve.axis.replace('_', ' ')), class_='muted')}"
        rows.append([element("th", name, scope="row"), *cells])
    caption = (
        f"Fall of the metric (whole model: {sensitivity.dense:.4g}) by the share of a group's channels that is removed"
    )
    return table(["group", *(f"{share:.0%}" for share in shares)], rows, caption=caption)


def recovery_table(recovery: Recovery) -> str:
    """Relative errors of recovered layers, and what was left."""
    most = max([1e-12, *(max(row.before, row.after) for row in recovery.layers)])
    rows = [
        [
            element("th", escape(row.layer), scope="row"),
            bar((row.before, row.after), most, f"{row.before:.4f} → {row.after:.4f}"),
        ]
        for row in recovery.layers
    ]
    skipped = "".join(
        element("li", element("code", escape(layer)), f": {escape(reason)}")
        for layer, reason in recovery.skipped.items()
    )
    left = element("p", "As they were:") + element("ul", skipped) if skipped else ""
    return table(["layer", "relative error"], rows, caption="Relative errors before and after recovery") + left


# -- the curve --------------------------------------------------------------------------------------------------------

_W, _H = 640.0, 340.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 70.0, 36.0, 24.0, 52.0


def curve(points: Sequence[Point], axes: tuple[str, str]) -> str:
    """Accuracy over cost as a chart, and the same points as a table."""
    ordered = sorted(points, key=lambda point: point[0])
    xs, ys = _ticks([p[0] for p in ordered], zero=True), _ticks([p[1] for p in ordered])

    places = max(len(f"{round(t, 10):.10g}".partition(".")[2]) for t in ys)

    def x(value: float) -> float:
        return _LEFT + (_W - _LEFT - _RIGHT) * (value - xs[0]) / (xs[-1] - xs[0])

    def y(value: float) -> float:
        return _H - _BOTTOM - (_H - _TOP - _BOTTOM) * (value - ys[0]) / (ys[-1] - ys[0])

    grid = [
        element("path", class_="grid", d="".join(f"M{_LEFT} {y(t):.1f}H{_W - _RIGHT}" for t in ys)),
        *(_label(short(round(t, 10)), x(t), _H - _BOTTOM + 20, "middle") for t in xs),
        *(_label(f"{t:.{places}f}", _LEFT - 10, y(t) + 4, "end") for t in ys),
        _label(axes[0], (_LEFT + _W - _RIGHT) / 2, _H - 8, "middle"),
        element(
            "text",
            escape(axes[1]),
            transform=f"translate(16 {(_H - _BOTTOM) / 2:.0f}) rotate(-90)",
            text_anchor="middle",
        ),
    ]
    line = "M" + "L".join(f"{x(p[0]):.1f} {y(p[1]):.1f}" for p in ordered)
    dots = [_dot(p, x(p[0]), y(p[1])) for p in ordered]
    chart = element(
        "svg", *grid, element("path", class_="line", d=line), *dots, class_="chart", viewBox=f"0 0 {_W:.0f} {_H:.0f}",
        role="img", aria_label=f"{axes[1]} over {axes[0]}",
    )  # fmt: skip
    rows = [
        [element("th", escape(_name(p)), scope="row"), number_cell(p[0], short(p[0])), number_cell(p[1], f"{p[1]:g}")]
        for p in ordered
    ]
    return element("div", chart, table(["point", *axes], rows, caption=f"{axes[1]} and {axes[0]}"), class_="pair")


def _name(point: Point) -> str:
    return str(point[2]) if len(point) > 2 else "point"


def number_cell(value: float, text: str) -> str:
    """A cell that is sorted by its value."""
    return element("td", escape(text), data_value=f"{value:.10g}")


def _label(text: str, x: float, y: float, anchor: str) -> str:
    return element("text", escape(text), x=f"{x:.1f}", y=f"{y:.1f}", text_anchor=anchor)


def _dot(point: Point, x: float, y: float) -> str:
    first = x < _LEFT + 80
    parts = [
        element("circle", element("title", escape(f"{point[0]:g}, {point[1]:g}")), cx=f"{x:.1f}", cy=f"{y:.1f}", r=5)
    ]
    if len(point) > 2:
        parts.append(
            _label(str(point[2]), x + (10 if first else -9), y + (4 if first else -8), "start" if first else "end")
        )
    return "".join(parts)


def _ticks(values: Sequence[float], zero: bool = False) -> list[float]:
    """Round numbers that enclose the values."""
    low, high = min([*values, 0.0] if zero else values), max(values)
    span: Any = (high - low) or abs(high) or 1.0
    step = 10.0 ** np.floor(np.log10(span / 4))
    step *= next(f for f in (1, 2, 2.5, 5, 10) if f * step >= span / 5)
    first, last = np.floor(low / step + 1e-9), np.ceil(high / step - 1e-9)
    return [float(step * i) for i in np.arange(first, max(last, first + 1) + 1)]
