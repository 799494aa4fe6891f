"""From the dense network to what is shipped: accuracy, size and time of each stage, as a figure and as a table."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

import numpy as np

from structprune.checking import PATH, Check, is_number, require
from structprune.extras import matplotlib_figure, save_figure
from structprune.reporting.charts import EMPTY, bar, number_cell, table
from structprune.reporting.text import element, short

# What is dense is grey, what is shipped blue.
_FIRST, _LAST = (0.60, 0.64, 0.70), (0.16, 0.38, 0.79)
_MUTED = "#5d6470"


@dataclass(frozen=True)
class Stage:
    """A network on its way, and what was measured of it. See `structprune.plot_chain` for an example.

    Attributes:
        name: What it is by now: ``"pruned"``, ``"int8"``.
        accuracy: In whatever unit all stages have; None if it was not measured.
        bytes: Size of its file; None if it has none.
        macs: Multiply-accumulates of a sample; None if they were not counted.
        seconds: Of a run, by what ran it: ``{"ONNX Runtime": 1.8e-3}``. What is missing there was not measured.
    """

    name: str
    accuracy: float | None = None
    bytes: int | None = None
    macs: int | None = None
    seconds: Mapping[str, float] = field(default_factory=dict[str, float])


def _is_stage(value: Any) -> bool:
    formed = isinstance(value, Stage) and isinstance(value.name, str) and isinstance(value.seconds, Mapping)
    return formed and all(map(is_number, _numbers(value)))


def _numbers(stage: Stage) -> list[Any]:
    return [each for each in (stage.accuracy, stage.bytes, stage.macs, *stage.seconds.values()) if each is not None]


CHAIN = Check(
    lambda value: isinstance(value, (tuple, list)) and all(map(_is_stage, value)),
    "give a list of structprune.Stage whose numbers are finite",
)


@dataclass(frozen=True)
class _Column:
    """One measure of all stages.

    Attributes:
        title: what it is, with its unit.
        values: of each stage, in that unit; None where it was not measured.
        text: a value in words.
        words: what less and more of it are; none where less is no gain.
    """

    title: str
    values: tuple[float | None, ...]
    text: Callable[[float], str]
    words: tuple[str, str] | None = None

    def said(self, number: int) -> tuple[str, str]:
        """The value of a stage, and its change against the first."""
        first, value = self.values[0], self.values[number]
        if value is None:
            return "not measured", ""
        if number == 0 or first is None:
            return self.text(value), ""
        if self.words is None:
            return self.text(value), f"{value - first:+.3g}".replace("-", "\u2212")
        if not value or not first:
            return self.text(value), ""
        less, more = self.words
        return self.text(value), f"{first / value:.2f}x {less}" if value <= first else f"{value / first:.2f}x {more}"


def _columns(stages: Sequence[Stage], measure: str) -> list[_Column]:
    """The measures that at least one stage has."""
    runs = list(dict.fromkeys(name for stage in stages for name in stage.seconds))
    columns = [
        _Column(measure, tuple(stage.accuracy for stage in stages), lambda value: f"{value:#.4g}"),
        _Column(
            "file, MB",
            tuple(None if stage.bytes is None else stage.bytes / 1e6 for stage in stages),
            lambda value: f"{value:#.3g}",
            ("smaller", "larger"),
        ),
        _Column("MACs", tuple(stage.macs for stage in stages), short, ("fewer", "more")),
        *(
            _Column(
                f"{name}, ms",
                tuple(1e3 * stage.seconds[name] if name in stage.seconds else None for stage in stages),
                lambda value: f"{value:#.3g}",
                ("faster", "slower"),
            )
            for name in runs
        ),
    ]
    return [column for column in columns if any(value is not None for value in column.values)]


def plot_chain(
    stages: Sequence[Stage], path: str | os.PathLike[str] | None = None, *, measure: str = "accuracy, %"
) -> Any:
    """Draw dense, pruned, recovered, quantised in rows below each other: accuracy, size, MACs and times side by side.

    Args:
        stages: The first is what the others are compared with. What none of them has is left out.
        path: The file to write, if any; its ending says which format (pdf, svg, png).
        measure: What accuracy is, with its unit.

    Returns:
        The figure.

    Raises:
        MissingExtraError: Matplotlib is not installed.
        ValueError: There are no stages, or nothing was measured.

    Example:
        >>> import tempfile
        >>> stages = [
        ...     Stage("dense", accuracy=93.4, bytes=3_400_000, seconds={"ONNX Runtime": 1.8e-3}),
        ...     Stage("pruned, int8", accuracy=93.0, bytes=490_000, seconds={"ONNX Runtime": 0.6e-3}),
        ... ]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     figure = plot_chain(stages, f"{folder}/chain.png")
        >>> len(figure.axes)
        3
    """
    require(locals(), ValueError, stages=CHAIN, path=PATH.or_none)
    columns = _columns(stages, measure)
    if not columns:
        raise ValueError("stages is empty, or none of them has a number: there is nothing to draw.")
    figure = matplotlib_figure((1.5 + 2.15 * len(columns), 0.8 + 0.52 * len(stages)))
    panels = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    colours = np.linspace(_FIRST, _LAST, max(2, len(stages)))
    for panel, column in zip(panels, columns, strict=True):
        _draw_panel(panel, column, colours)
    panels[0].set_yticks(range(len(stages)), [stage.name for stage in stages])
    panels[0].set_ylim(len(stages) - 0.4, -0.6)
    if path is not None:
        save_figure(figure, path, 200)
    return figure


def _draw_panel(panel: Any, column: _Column, colours: Any) -> None:
    """One measure: bars from zero where less is a gain, else dots on a scale of their own."""
    known = [(row, value) for row, value in enumerate(column.values) if value is not None]
    values = [value for _, value in known]
    rows = [row for row, _ in known]
    if column.words:
        panel.barh(rows, values, height=0.46, color=colours[rows])
        panel.set_xlim(0, 1.9 * max(values) or 1)
        start = 0.0
    else:
        panel.plot(values, rows, color="#c3cad6", linewidth=1.2, zorder=1)
        panel.scatter(values, rows, s=34, color=colours[rows], zorder=2)
        room = (max(values) - min(values)) or 1.0
        panel.set_xlim(min(values) - 0.12 * room, max(values) + 1.0 * room)
        start = min(values)
    for row in range(len(column.values)):
        value = column.values[row]
        text, change = column.said(row)
        at = (start if value is None else value, row)
        style: dict[str, Any] = {"textcoords": "offset points", "va": "center", "fontsize": 8}
        style["bbox"] = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}  # over the line that joins dots
        panel.annotate(text, at, (7, 5 if change else 0), color=_MUTED if value is None else "black", **style)
        if change:
            panel.annotate(change, at, (7, -5), color=_MUTED, **{**style, "fontsize": 7})
    panel.set_title(column.title, fontsize=9, loc="left")
    panel.set_xticks([])
    panel.tick_params(axis="y", length=0, labelsize=9)
    panel.spines[["top", "right", "bottom"]].set_visible(False)
    panel.spines["left"].set_visible(column.words is not None)
    panel.spines["left"].set_color("#c3cad6")


def chain_table(stages: Sequence[Stage], measure: str = "accuracy") -> str:
    """The same as a table with bars."""
    columns = _columns(stages, measure)
    rows = [
        [element("th", escape(stage.name), scope="row"), *(_cell(column, number) for column in columns)]
        for number, stage in enumerate(stages)
    ]
    caption = "From the dense network to what is shipped; changes are against the first"
    return table(["stage", *(column.title for column in columns)], rows, caption=caption, sortable=False)


def _cell(column: _Column, number: int) -> str:
    value = column.values[number]
    if value is None:
        return EMPTY.replace("none", "not measured")
    text, change = column.said(number)
    if column.words is None:
        return number_cell(value, f"{text} ({change})" if change else text)
    most = max(each for each in column.values if each is not None)
    first = column.values[0] or value
    muted = element("span", escape(change), class_="muted") if change else ""
    return bar((first, value), most, f"{escape(text)} {muted}".rstrip())
