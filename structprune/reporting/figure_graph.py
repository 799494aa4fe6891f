"""Edges and boxes of the dependency graph with Matplotlib."""

from __future__ import annotations

from colorsys import hls_to_rgb
from typing import Any

from structprune.reporting.layout import HEIGHT, WIDTH, Course

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
