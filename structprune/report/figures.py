"""The report's plots with Matplotlib, for papers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import nn

from structprune.errors import MissingExtraError
from structprune.graph import ChannelGraph
from structprune.plan import Plan
from structprune.report.layers import LayerRow, Pair, counts, layer_rows
from structprune.tracing.trace import ExampleInputs


def plot_widths(
    model: nn.Module, example_inputs: ExampleInputs, path: str | os.PathLike[str], *, plan: Plan | None = None
) -> Path:
    """Draw the output channels of each layer before and after `plan`.

    Args:
        model: the model that `plan` was made for, unchanged.
        example_inputs: a tensor, a tuple (positional) or a dict (keyword) that the model accepts.
        path: the file to write; its ending says which format (pdf, svg, png).
        plan: what is to be removed; without one the model is drawn as it is.

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
    rows = [row for row in _rows(model, example_inputs, plan) if row.channels]
    return _drawn([(row.path, row.channels) for row in rows if row.channels], "channels", path)


def plot_costs(
    model: nn.Module,
    example_inputs: ExampleInputs,
    path: str | os.PathLike[str],
    *,
    plan: Plan | None = None,
    of: Literal["macs", "params"] = "macs",
) -> Path:
    """Draw the multiply-accumulates (or parameters) of each layer before and after `plan`.

    Args:
        model: the model that `plan` was made for, unchanged.
        example_inputs: a tensor, a tuple (positional) or a dict (keyword) that the model accepts.
        path: the file to write; its ending says which format (pdf, svg, png).
        plan: what is to be removed; without one the model is drawn as it is.
        of: ``"macs"`` or ``"params"``.

    Raises:
        MissingExtraError: Matplotlib is not installed.
        TraceError: the forward cannot be recorded.
        ValueError: `of` is something else.

    Example:
        >>> import tempfile, torch, structprune
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> plan = structprune.plan(model, torch.randn(1, 4), ratio=0.5)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     figure = structprune.plot_costs(model, torch.randn(1, 4), f"{folder}/figure.svg", plan=plan)
    """
    if of not in ("macs", "params"):
        raise ValueError(f"of is {of!r}; it is 'macs' or 'params'.")
    rows = [(row.path, row.macs if of == "macs" else row.params) for row in _rows(model, example_inputs, plan)]
    label = "multiply-accumulates" if of == "macs" else "parameters"
    return _drawn([(name, pair) for name, pair in rows if pair[0]], label, path)


def _rows(model: nn.Module, example_inputs: ExampleInputs, plan: Plan | None) -> list[LayerRow]:
    graph = ChannelGraph(model, example_inputs, outputs=None if plan is None else plan.outputs)
    return layer_rows(graph, *counts(graph, plan))


def _drawn(rows: list[tuple[str, Pair]], label: str, path: str | os.PathLike[str]) -> Path:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("Drawing needs Matplotlib: pip install 'structprune[plot]'.") from error
    figure: Any = Figure(figsize=(max(4.0, 1 + 0.16 * len(rows)), 3.2), layout="constrained")
    axes = figure.subplots()
    at = np.arange(len(rows))
    axes.bar(at, [before for _, (before, _) in rows], color="#d5dbe6", width=0.85, label="before")
    axes.bar(at, [after for _, (_, after) in rows], color="#2a62c9", width=0.55, label="after")
    axes.set_xticks(at, [name or "(model)" for name, _ in rows], rotation=90, fontsize=6)
    axes.set_xlim(-0.7, len(rows) - 0.3)
    axes.set_ylabel(label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=200)
    return Path(path)
