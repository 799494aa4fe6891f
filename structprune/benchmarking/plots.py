"""A benchmark as a figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from structprune.extras import matplotlib_figure, save_figure

if TYPE_CHECKING:
    from structprune.benchmarking.results import Benchmark, Timing

# The first model is grey; the others are told apart without red against green.
_COLOURS = ("#9aa3b2", "#2a62c9", "#d9822b", "#1d8a7a", "#8a4fbf", "#b8345b")


def draw(measured: Benchmark, path: Path) -> Path:
    """Draw throughput, speed-up and memory by batch size, a column for each backend.

    Raises:
        MissingExtraError: Matplotlib is not installed.
    """
    backends = list(dict.fromkeys(timing.backend for timing in measured.timings))
    with_memory = any(timing.memory is not None for timing in measured.timings)
    rows = 3 if with_memory else 2
    figure = matplotlib_figure((1.4 + 2.9 * len(backends), 0.9 + 2.1 * rows))
    grid = figure.subplots(rows, len(backends), squeeze=False, sharey="row")
    names = list(dict.fromkeys(timing.model for timing in measured.timings))
    for column, backend in enumerate(backends):
        grid[0, column].set_title(backend, fontsize=10)
        for number, name in enumerate(names):
            mine = [t for t in measured.timings if (t.backend, t.model) == (backend, name)]
            bars = _Bars(grid[:, column], number, len(names), _COLOURS[number % len(_COLOURS)], name)
            _model(measured, mine, bars, first=number == 0, with_memory=with_memory)
        grid[-1, column].set_xlabel("batch size")
        for axes in grid[:, column]:
            axes.set_xticks(np.arange(len(measured.batch_sizes)), [str(size) for size in measured.batch_sizes])
            axes.spines[["top", "right"]].set_visible(False)
            axes.tick_params(labelsize=8)
    for row, label in enumerate(("samples per second", "speed-up", "peak memory, MB")[:rows]):
        grid[row, 0].set_ylabel(label)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(4, len(names)), frameon=False)
    threads = f"{measured.threads} thread{'s' if measured.threads != 1 else ''}"
    where = measured.environment.get("gpu") or measured.environment.get("processor") or measured.device
    figure.supxlabel(
        f"{where}, {threads}; bars: {measured.confidence:.0%} intervals; dashed: ratio of MACs", fontsize=7
    )
    return save_figure(figure, path, 150)


class _Bars:
    """The bars of one model on one backend.

    Args:
        panels: the axes of the backend, from top to bottom.
        number: which of the models it is.
        models: how many there are.
        colour: of its bars.
        label: its name.
    """

    def __init__(self, panels: Any, number: int, models: int, colour: str, label: str) -> None:
        self.panels = panels
        self._width = 0.8 / models
        self._shift = (number - (models - 1) / 2) * self._width
        self.colour, self.label = colour, label

    def add(self, row: int, values: Sequence[float], low: Any = None, high: Any = None) -> None:
        """A bar for each batch size, with its interval."""
        at = np.arange(len(values)) + self._shift
        errors = None if low is None else np.maximum(0, [np.subtract(values, low), np.subtract(high, values)])
        self.panels[row].bar(
            at, values, 0.92 * self._width, color=self.colour, label=self.label, yerr=errors,
            error_kw={"elinewidth": 0.9, "capsize": 2, "ecolor": "#30343c"},
        )  # fmt: skip

    def line(self, row: int, value: float) -> None:
        """A dashed line across the panel."""
        self.panels[row].axhline(value, color=self.colour, linestyle="--", linewidth=1)


def _model(measured: Benchmark, mine: Sequence[Timing], bars: _Bars, *, first: bool, with_memory: bool) -> None:
    sizes = np.array([timing.batch_size or measured.batch_size for timing in mine])
    ends = np.array([timing.interval(measured.confidence) for timing in mine])
    bars.add(0, (sizes / [timing.median for timing in mine]).tolist(), sizes / ends[:, 1], sizes / ends[:, 0])
    gains = [measured.speedup(t.model, t.backend, int(size)) for t, size in zip(mine, sizes, strict=True)]
    bars.add(1, [g.ratio for g in gains], [g.low for g in gains], [g.high for g in gains])
    ratio = measured.macs_ratio(mine[0].model)
    if ratio is not None and not first:
        bars.line(1, ratio)
    if with_memory:
        bars.add(2, [float("nan") if timing.memory is None else timing.memory / 1e6 for timing in mine])
