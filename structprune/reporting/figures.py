"""The report's plots with Matplotlib, for papers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from colorsys import hls_to_rgb
from typing import Any, Literal

import numpy as np
from torch import nn

from structprune.checking import INPUTS, MODEL, PATH, one_of, pair, require
from structprune.coupling.graph import ChannelGraph
from structprune.extras import matplotlib_figure, save_figure
from structprune.planning.plan import Plan
from structprune.reporting.charts import POINTS, RECOVERY, Point, Recovery
from structprune.reporting.drawing import Drawing
from structprune.reporting.layers import PLAN, TIMES, LayerRow, Times, counts, layer_rows
from structprune.reporting.layout import HEIGHT, WIDTH, Course
from structprune.reporting.network import network_of
from structprune.tracing.trace import ExampleInputs

Target = str | os.PathLike[str] | None
BEFORE, AFTER = "#d5dbe6", "#2a62c9"


def plot_widths(
    model: nn.Module,
    example_inputs: ExampleInputs,
    path: Target = None,
    *,
    plan: Plan | None = None,
    ax: Any = None,
) -> Any:
    """Draw the output channels of each layer before and after `plan`.

    Args:
        model: the model that `plan` was made for, unchanged.
        example_inputs: a tensor, a tuple (positional) or a dict (keyword) that the model accepts.
        path: the file to write, if any; its ending says which format (pdf, svg, png).
        plan: what is to be removed; without one the model is drawn as it is.
        ax: axes of Matplotlib to draw on, in place of a figure of its own.

    Returns:
        The figure.

    Raises:
        MissingExtraError: Matplotlib is not installed.
        TraceError: the forward cannot be recorded.

    Example:
        >>> import tempfile, torch, structprune
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> plan = structprune.plan(model, torch.randn(1, 4), ratio=0.5)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     figure = structprune.plot_widths(model, torch.randn(1, 4), f"{folder}/figure.svg", plan=plan)
    """
    require(locals(), model=MODEL, example_inputs=INPUTS, path=PATH.or_none, plan=PLAN)
    rows = [row for row in _rows(model, example_inputs, plan) if row.channels]
    return _drawn([(row.path, row.channels) for row in rows if row.channels], "channels", path, ax)


def plot_costs(
    model: nn.Module,
    example_inputs: ExampleInputs,
    path: Target = None,
    *,
    plan: Plan | None = None,
    of: Literal["macs", "params", "time"] = "macs",
    times: Times = (),
    ax: Any = None,
) -> Any:
    """Draw the multiply-accumulates (or parameters, or time) of each layer before and after `plan`.

    Args:
        model: the model that `plan` was made for, unchanged.
        example_inputs: a tensor, a tuple (positional) or a dict (keyword) that the model accepts.
        path: the file to write, if any; its ending says which format (pdf, svg, png).
        plan: what is to be removed; without one the model is drawn as it is.
        of: ``"macs"``, ``"params"`` or ``"time"``.
        times: for the time: what ``structprune.layer_times`` returned for the model and for the smaller one.
        ax: axes of Matplotlib to draw on, in place of a figure of its own.

    Returns:
        The figure.

    Raises:
        MissingExtraError: Matplotlib is not installed.
        TraceError: the forward cannot be recorded.
        ValueError: `of` is something else, or no times are given for the time.

    Example:
        >>> import tempfile, torch, structprune
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> plan = structprune.plan(model, torch.randn(1, 4), ratio=0.5)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     figure = structprune.plot_costs(model, torch.randn(1, 4), f"{folder}/figure.svg", plan=plan)
    """
    require(locals(), model=MODEL, example_inputs=INPUTS, path=PATH.or_none, plan=PLAN)
    require(locals(), ValueError, of=one_of(("macs", "params", "time")), times=TIMES)
    if (of == "time") != bool(times):
        raise ValueError("of='time' needs times, and only it: what structprune.layer_times returns, in a list.")
    rows = _rows(model, example_inputs, plan, times)
    if of == "time":
        milliseconds = [(row.path, (1e3 * row.seconds[0], 1e3 * row.seconds[1])) for row in rows if row.seconds]
        return _drawn(milliseconds, "time, ms", path, ax)
    pairs = [(row.path, row.macs if of == "macs" else row.params) for row in rows]
    label = "multiply-accumulates" if of == "macs" else "parameters"
    return _drawn([(name, pair) for name, pair in pairs if pair[0]], label, path, ax)


def plot_curve(
    points: Sequence[Point], path: Target = None, *, axes: tuple[str, str] = ("MACs", "accuracy"), ax: Any = None
) -> Any:
    """Draw accuracy over cost.

    Args:
        points: cost and accuracy of several plans, with a label each if wanted: ``(2.0e9, 0.76, "half")``.
        path: the file to write, if any; its ending says which format (pdf, svg, png).
        axes: what the two numbers of a point are.
        ax: axes of Matplotlib to draw on, in place of a figure of its own.

    Returns:
        The figure.

    Raises:
        MissingExtraError: Matplotlib is not installed.

    Example:
        >>> import tempfile, structprune
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     figure = structprune.plot_curve([(4.1, 0.76, "dense"), (2.0, 0.75)], f"{folder}/figure.svg")
    """
    require(locals(), points=POINTS, path=PATH.or_none, axes=pair("what the two numbers of a point are"))
    if not points:
        raise ValueError("points is empty: there is nothing to draw.")
    figure, panel = _panel((4.6, 3.2), ax)
    ordered = sorted(points, key=lambda point: point[0])
    panel.plot([p[0] for p in ordered], [p[1] for p in ordered], "o-", color=AFTER, markersize=5)
    for point in ordered:
        if len(point) > 2:
            panel.annotate(str(point[2]), point[:2], (0, 7), textcoords="offset points", ha="center", fontsize=8)
    panel.set_xlim(left=0)
    panel.margins(y=0.18)
    panel.set_xlabel(axes[0])
    panel.set_ylabel(axes[1])
    return _finished(figure, panel, path)


def plot_recovery(recovery: Recovery, path: Target = None, *, ax: Any = None) -> Any:
    """Draw the relative errors of layers before and after they were solved anew.

    Args:
        recovery: what ``structprune.recovery_report`` returned.
        path: the file to write, if any; its ending says which format (pdf, svg, png).
        ax: axes of Matplotlib to draw on, in place of a figure of its own.

    Returns:
        The figure.

    Raises:
        MissingExtraError: Matplotlib is not installed.

    Example:
        >>> import tempfile, torch, structprune
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
        >>> data = [torch.randn(64, 4)]
        >>> plan = structprune.plan(model, data[0], ratio=0.5)
        >>> slim = structprune.recover(plan.apply(model), model, data)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     figure = plot_recovery(structprune.recovery_report(slim), f"{folder}/recovery.png")
    """
    require(locals(), recovery=RECOVERY, path=PATH.or_none)
    return _drawn([(row.layer, (row.before, row.after)) for row in recovery.layers], "relative error", path, ax)


def plot_graph(
    model: nn.Module,
    example_inputs: ExampleInputs,
    path: Target = None,
    *,
    plan: Plan | None = None,
    ax: Any = None,
) -> Any:
    """Draw the dependency graph: layers and what flows between them, coupled channels in one colour, pinned ones grey.

    Args:
        model: the model that `plan` was made for, unchanged.
        example_inputs: a tensor, a tuple (positional) or a dict (keyword) that the model accepts.
        path: the file to write, if any; its ending says which format (pdf, svg, png).
        plan: whose widths are told; without one the model is drawn as it is.
        ax: axes of Matplotlib to draw on, in place of a figure of its own.

    Returns:
        The figure.

    Raises:
        MissingExtraError: Matplotlib is not installed.
        TraceError: the forward cannot be recorded.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
        >>> len(plot_graph(model, torch.randn(1, 4)).axes)
        1
    """
    require(locals(), model=MODEL, example_inputs=INPUTS, path=PATH.or_none, plan=PLAN)
    graph = ChannelGraph(model, example_inputs, outputs=None if plan is None else plan.outputs)
    drawing = Drawing(graph, network_of(graph), *counts(graph, plan))
    figure, panel = _panel((drawing.size[0] / 90, drawing.size[1] / 90), ax)
    drawing.on_axes(panel)
    return _saved(figure, path)


def _rows(model: nn.Module, example_inputs: ExampleInputs, plan: Plan | None, times: Times = ()) -> list[LayerRow]:
    graph = ChannelGraph(model, example_inputs, outputs=None if plan is None else plan.outputs)
    return layer_rows(graph, *counts(graph, plan), times, plan)


def _panel(size: tuple[float, float], ax: Any) -> tuple[Any, Any]:
    """A figure and the axes in it: those given, or new ones."""
    if ax is not None:
        return ax.figure, ax
    figure = matplotlib_figure(size)
    return figure, figure.subplots()


def _saved(figure: Any, path: Target) -> Any:
    if path is not None:
        save_figure(figure, path, 200)
    return figure


def _finished(figure: Any, panel: Any, path: Target) -> Any:
    """The figure, its panel without a frame, written if it has a path."""
    panel.spines[["top", "right"]].set_visible(False)
    return _saved(figure, path)


def _drawn(rows: Sequence[tuple[str, tuple[float, float]]], label: str, path: Target, ax: Any) -> Any:
    figure, axes = _panel((max(4.0, 1 + 0.16 * len(rows)), 3.2), ax)
    at = np.arange(len(rows))
    axes.bar(at, [before for _, (before, _) in rows], color=BEFORE, width=0.85, label="before")
    axes.bar(at, [after for _, (_, after) in rows], color=AFTER, width=0.55, label="after")
    axes.set_xticks(at, [name or "(model)" for name, _ in rows], rotation=90, fontsize=6)
    axes.set_xlim(-0.7, len(rows) - 0.3)
    axes.set_ylabel(label)
    axes.legend(frameon=False)
    return _finished(figure, axes, path)


# -- edges and boxes of the dependency graph with Matplotlib ---------------------------------------------------------

_GREY = (0.7, 0.73, 0.78)
_JOIN = 64.0


def colour(hue: float | None) -> tuple[float, float, float]:
    """The colour of a group, as in the page; grey for what is pinned."""
    return _GREY if hue is None else hls_to_rgb(hue / 360, 0.44, 0.62)


def draw_edge(axes: Any, course: Course, hue: float | None) -> None:
    """The line of an edge."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    known = {"M": Path.MOVETO, "L": Path.LINETO, "C": Path.CURVE4, "Q": Path.CURVE3}
    points = [point for _, more in course for point in more]
    codes = [int(known[step]) for step, more in course for _ in more]
    width = 1.2 if hue is None else 1.7
    axes.add_patch(PathPatch(Path(points, codes), fill=False, edgecolor=colour(hue), linewidth=width, capstyle="round"))


def draw_box(axes: Any, x: float, y: float, title: str, below: str, kind: str, hue: float | None) -> None:
    """A node: its title and, smaller, its channels; dashed if they are pinned."""
    from matplotlib.patches import FancyBboxPatch

    width = WIDTH if kind != "join" else _JOIN if len(title) < 4 else _JOIN * 1.6
    height = HEIGHT if kind != "join" else 24.0
    if kind == "join":  # as high as its neighbours' lines reach
        axes.plot([x, x], [y - HEIGHT / 2, y + HEIGHT / 2], color=colour(hue), linewidth=1.7, zorder=1)
    pinned = hue is None and kind != "join"
    axes.add_patch(
        FancyBboxPatch(
            (x - width / 2, y - height / 2), width, height, boxstyle="round,pad=0,rounding_size=7", facecolor="white",
            edgecolor=colour(hue), linewidth=1.1, linestyle=(0, (3, 2)) if pinned else "-", zorder=2,
        )
    )  # fmt: skip
    axes.text(x, y - 6 if below else y, title, ha="center", va="center", fontsize=6.5, zorder=3)
    if below:
        axes.text(x, y + 9, below, ha="center", va="center", fontsize=5.5, color="#5d6470", zorder=3)
