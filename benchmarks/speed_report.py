"""The tables of ``tool_speed.py``."""

from __future__ import annotations

from typing import Any

import numpy as np
from harness.environment import as_line
from rich.table import Table

_COLUMNS = ("model", "ours, s", "peer, s", "peer / ours", "trace", "graph", "plan", "surgery", "surgery / copy")
_MEMORY = ("ours, MB", "peer, MB")


def growth(found: dict[str, Any], chains: dict[str, int]) -> dict[str, float]:
    """The exponent with which each tool's time grows with depth, fitted to the chains."""
    result = {}
    for tool in ("ours", "peer"):
        pairs = [(depth, found[name][tool]) for name, depth in chains.items() if tool in found.get(name, {})]
        if len(pairs) > 1:
            depth, taken = np.log(np.array(pairs)).T
            result[tool] = float(np.polyfit(depth, taken, 1)[0])
    return result


def _time(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}" if value < 10 else f"{value:.1f}"


def _tool(facts: dict[str, Any], tool: str) -> str:
    if tool in facts:
        return _time(facts[tool])
    failed = facts.get(f"{tool}_failed") or (facts.get("died") if tool == "ours" else None)
    return "" if failed is None else failed if failed.startswith("over") else f"fails: {failed.partition(':')[0]}"


def _ratio(facts: dict[str, Any], limit: float) -> str:
    if "ours" not in facts:
        return ""
    if "peer" in facts:
        return f"{facts['peer'] / facts['ours']:.1f}"
    over = str(facts.get("peer_failed", "")).startswith("over")
    return f"> {limit / facts['ours']:.0f}" if over else ""


def _rows(result: dict[str, Any]) -> list[list[str]]:
    rows = []
    for name, facts in result["models"].items():
        parts = facts.get("parts", {})
        row = [name, _tool(facts, "ours"), _tool(facts, "peer"), _ratio(facts, result["limit"])]
        row += [_time(parts.get(step)) for step in ("trace", "graph", "plan", "surgery")]
        row.append(f"{parts['surgery_over_copy']:.1f}" if "surgery_over_copy" in parts else "")
        row += [f"{facts[f'{t}_memory'] / 1e6:.0f}" if f"{t}_memory" in facts else "" for t in ("ours", "peer")]
        rows.append(row)
    return rows


def table(result: dict[str, Any]) -> Table:
    """For the terminal."""
    made = Table(title="trace, group, rank by L2, remove half; one thread")
    for position, column in enumerate((*_COLUMNS, *_MEMORY)):
        made.add_column(column, justify="right" if position else "left")
    for row in _rows(result):
        made.add_row(*row)
    return made


def _growth_line(result: dict[str, Any]) -> str:
    words = {"ours": "structprune", "peer": "torch-pruning"}
    fits = [f"{words[tool]} as depth^{exponent:.2f}" for tool, exponent in result["growth"].items()]
    return f"Time grows with the depth of the chain: {', '.join(fits)}.\n" if fits else ""


def as_markdown(result: dict[str, Any]) -> str:
    """For the results folder."""
    columns = (*_COLUMNS, *_MEMORY)
    lines = [
        "# Speed against torch-pruning",
        "",
        f"The whole call: trace or build, group, rank by L2, remove {result['ratio']:.0%}, in place. Medians in "
        "seconds, both tools in one process in turns, a fresh copy of the model for each call. Memory is the peak "
        "above what the process held before the call. *surgery / copy* is the time of surgery over that of copying "
        f"the surviving entries of the thinned tensors once. A call may take {result['limit']:g} s. The model on "
        "`meta` has no weights to rank: it is planned alone, with random importance, and not applied. What takes over "
        "8 s is timed once. *graph* is the time of `DependencyGraph` less that of a trace timed apart, so it is rough.",
        "",
        as_line(result["environment"]) + ".",
        "",
        "| " + " | ".join(columns) + " |",
        "|---|" + "---:|" * (len(columns) - 1),
        *("| " + " | ".join(row) + " |" for row in _rows(result)),
        "",
        _growth_line(result),
    ]
    failures = [
        f"- {name}, {tool}: {facts[key]}"
        for name, facts in result["models"].items()
        for tool, key in (("structprune", "ours_failed"), ("torch-pruning", "peer_failed"), ("process", "died"))
        if key in facts
    ]
    if failures:
        lines += ["What did not come to its end:", "", *failures, ""]
    return "\n".join(lines)
