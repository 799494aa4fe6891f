"""The tables of ``zoo.py``."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from typing import Any

from harness.environment import as_line

_RATIOS = ("0.5", "0.3")


def outcome(facts: dict[str, Any], ratio: str = "0.5") -> str:
    """``right``, or the stage that failed."""
    for part in (facts.get("model", {}), facts.get(ratio, {})):
        if "failed" in part:
            return f"fails: {part['failed']}"
    at = facts.get(ratio, {}) or facts.get("model", {})
    if facts.get(ratio, {}).get("stage") == "done":
        return "right"
    if "died" in facts:
        return f"stopped: {at.get('stage', 'built')}"
    return "not run"


def _cause(facts: dict[str, Any]) -> tuple[str, str, str] | None:
    """Stage, error without this model's names, and source line of the first failure."""
    parts = [facts.get("model", {}), *(facts.get(ratio, {}) for ratio in _RATIOS)]
    for part in parts:
        if "failed" in part:
            error = re.sub(r"'[^']*'", "'…'", part["error"])
            error = re.sub(r"[\w/.-]+\.py:\d+", "….py", error)
            error = re.sub(r"\b\w+(\.\w+)+\b", "…", error)
            error = re.sub(r"\d+(\.\d+)?(e[+-]?\d+)?", "N", error)
            return part["failed"], error[:90], part.get("at", "")
    if "died" in facts:
        stage = next((part["stage"] for part in reversed(parts) if part.get("stage", "done") != "done"), "built")
        return stage, facts["died"][:90], facts.get("died_at", "")
    return None


def causes(models: dict[str, Any]) -> list[tuple[tuple[str, str, str], list[str], str]]:
    """Failures by cause, the most frequent first: the cause, its models, the whole message of the first."""
    found: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for key, facts in models.items():
        cause = _cause(facts)
        if cause:
            found[cause].append(key)
    return [
        (cause, keys, _message(models[keys[0]]))
        for cause, keys in sorted(found.items(), key=lambda item: -len(item[1]))
    ]


def _message(facts: dict[str, Any]) -> str:
    for part in (facts.get("model", {}), *(facts.get(ratio, {}) for ratio in _RATIOS)):
        if "error" in part:
            return part["error"]
    return facts.get("died", "")


def line(key: str, facts: dict[str, Any]) -> str:
    """One model on one line, for the terminal."""
    half = facts.get("0.5", {})
    text = f"{key:<55} {outcome(facts):<22}"
    if "kept" in half:
        text += f" kept {half['kept']:.2f}, prunable {facts['model'].get('prunable', 0):.2f}"
        text += f", {half.get('planned_s', 0) + half.get('applied_s', 0):.2f} s, error {half.get('relative_error', '')}"
    if outcome(facts) == "right" and outcome(facts, "0.3") != "right":
        text += f"; at 0.3 {outcome(facts, '0.3')}"
    cause = _cause(facts)
    return text if cause is None else f"{text}\n    {cause[2]}  {_message(facts)[:220]}"


def _share(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, int | float) else ""


def _row(key: str, facts: dict[str, Any], peer: bool) -> str:
    model, half, third = (facts.get(part, {}) for part in ("model", *_RATIOS))
    error = half.get("relative_error", "")
    cells = [key, f"{model.get('parameters', 0) / 1e6:.1f}", outcome(facts), outcome(facts, "0.3")]
    cells += [f"{error:.0e}" if isinstance(error, float) else str(error), _share(half.get("kept"))]
    cells += [_share(third.get("kept")), _share(model.get("prunable"))]
    cells.append(_share(half["planned_s"] + half["applied_s"]) if "applied_s" in half else "")
    if peer:
        cells.append(facts.get("peer", {}).get("outcome", ""))
    reasons = "; ".join(f"{p['reason']} ({p['axes']})" for p in model.get("pinned", [])[:3])
    return "| " + " | ".join([*cells, reasons.replace("|", "/")]) + " |"


def summary(models: dict[str, Any]) -> list[tuple[str, int, int]]:
    """Family, models right at both ratios, models."""
    right: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for key, facts in models.items():
        family = key.partition("/")[0]
        total[family] += 1
        right[family] += all(outcome(facts, ratio) == "right" for ratio in _RATIOS)
    return [(family, right[family], count) for family, count in total.items()]


def as_markdown(result: dict[str, Any]) -> str:
    """For the results folder."""
    models = result["models"]
    peer = any("peer" in facts for facts in models.values())
    columns = ["model", "M params", "at 0.5", "at 0.3", "error", "kept 0.5", "kept 0.3", "prunable", "s"]
    columns += ["torch-pruning"] * peer + ["why the rest is pinned (axes)"]
    lines = [
        "# The zoo",
        "",
        "Each model with random weights, pruned by one plain call and compared in float64, every tensor jittered, with "
        "the original whose removed channels are switched off (`tests/support/oracle.py`). *kept* is the share of the "
        "parameters, *prunable* the share of the channels of all weights that may go, *s* the seconds of planning and "
        "applying at ratio 0.5.",
        "",
        as_line(result["environment"]) + ".",
        "",
        *(f"- {family}: {right} of {total} right at both ratios" for family, right, total in summary(models)),
        "",
        "| " + " | ".join(columns) + " |",
        "|" + "---|" * len(columns),
        *(_row(key, facts, peer) for key, facts in models.items()),
        "",
    ]
    failures = causes(models)
    if failures:
        lines += ["## Failures by cause", ""]
        for (stage, _, at), keys, message in failures:
            lines += [f"- **{stage}**, {at or 'outside the package'}: {message[:300]} — {', '.join(keys)}"]
        lines.append("")
    return "\n".join(lines)
