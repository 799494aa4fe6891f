"""The tables of ``zoo.py``."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from typing import Any

from harness.environment import as_line

_RATIOS = ("0.5", "0.3")
BOUND_CONVOLUTION, BOUND_ATTENTION = 0.45, 0.55


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
        text += f", {seconds(facts) or 0:.2f} s, error {_error(half)}"
    if outcome(facts) == "right" and outcome(facts, "0.3") != "right":
        text += f"; at 0.3 {outcome(facts, '0.3')}"
    cause = _cause(facts)
    return text if cause is None else f"{text}\n    {cause[2]}  {_message(facts)[:220]}"


def seconds(facts: dict[str, Any], ratio: str = "0.5") -> float | None:
    """What a call of ``prune`` takes at this ratio: plan, apply, verify."""
    at = facts.get(ratio, {})
    parts = [at.get(f"{stage}_s") for stage in ("planned", "applied", "own verify agrees")]
    return None if None in parts else sum(parts)


def bound(facts: dict[str, Any]) -> float:
    """The share of the parameters that may be kept at ratio 0.5."""
    return BOUND_ATTENTION if facts.get("model", {}).get("attends") else BOUND_CONVOLUTION


def _share(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, int | float) else ""


_SHORTER = (
    (r"^(it is|its|it has|it|they are) ", ""),
    (r" at \(…\)|\(…\)", ""),
    (r"^(a|the) ", ""),
    (r"dimension of the model's", "model's"),
)


def short_reason(reason: str) -> str:
    """A reason without its place, for a cell of the table."""
    for pattern, new in _SHORTER:
        reason = re.sub(pattern, new, reason)
    reason = " ".join(reason.split())
    return (reason if len(reason) <= 70 else reason[:69] + "…").replace("|", "/")


def _reasons(model: dict[str, Any], most: int = 4) -> str:
    counted: Counter[str] = Counter()
    for pinned in model.get("pinned", []):
        counted[short_reason(pinned["reason"])] += pinned["axes"]
    shown = [f"{reason} ({axes})" for reason, axes in counted.most_common(most)]
    left = sum(counted.values()) - sum(axes for _, axes in counted.most_common(most))
    return "; ".join(shown + ([f"other reasons ({left})"] if left else []))


def _error(at: dict[str, Any]) -> str:
    error = at.get("relative_error", "")
    text = f"{error:.0e}" if isinstance(error, float) else str(error)
    return f"{text} (float32)" if at.get("judge") == "float32" else text


def _row(key: str, facts: dict[str, Any], peer: bool) -> str:
    model, half, third = (facts.get(part, {}) for part in ("model", *_RATIOS))
    cells = [key.partition("/")[2], f"{model.get('parameters', 0) / 1e6:.1f}"]
    cells += [outcome(facts), outcome(facts, "0.3"), _error(half), _share(half.get("kept"))]
    cells += [_share(third.get("kept")), _share(model.get("prunable")), _share(seconds(facts))]
    if peer:
        cells.append(facts.get("peer", {}).get("outcome", ""))
    return "| " + " | ".join([*cells, _reasons(model)]) + " |"


def _is_right(facts: dict[str, Any]) -> bool:
    return all(outcome(facts, ratio) == "right" for ratio in _RATIOS)


def summary(models: dict[str, Any]) -> list[tuple[str, int, int]]:
    """Family, models right at both ratios, models."""
    families = _by_family(models)
    return [(family, sum(map(_is_right, found.values())), len(found)) for family, found in families.items()]


def _by_family(models: dict[str, Any]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = defaultdict(dict)
    for key, facts in models.items():
        found[key.partition("/")[0]][key] = facts
    return found


def keeps_too_much(facts: dict[str, Any]) -> bool:
    """Whether more parameters are left at ratio 0.5 than the bound of its kind."""
    return facts.get("0.5", {}).get("kept", 0.0) > bound(facts)


PEER_OUTCOMES = ("right", "wrong", "crashes", "hangs", "removes nothing")


def _totals(models: dict[str, Any], peer: bool) -> list[str]:
    """One line for each family, and one for all."""
    columns = ["family", "models", "right at 0.5", "right at 0.3", "keep too much", "longest, s"]
    columns += ["torch-pruning tried", *(f"torch-pruning {outcome}" for outcome in PEER_OUTCOMES)] * peer
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    families = _by_family(models)
    for family, found in [*families.items(), ("all", models)] if len(families) > 1 else families.items():
        every = list(found.values())
        cells: list[Any] = [family, len(every)]
        cells += [sum(outcome(facts, ratio) == "right" for facts in every) for ratio in _RATIOS]
        longest = max((seconds(facts) or 0.0 for facts in every), default=0.0)
        cells += [sum(map(keeps_too_much, every)), f"{longest:.1f}"]
        if peer:
            theirs = Counter(facts["peer"]["outcome"] for facts in every if "peer" in facts)
            tried = sum(theirs.values())
            cells += [tried, *(theirs[outcome] if tried else "" for outcome in PEER_OUTCOMES)]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


_EXPLANATION = f"""Each model with random weights, pruned by one call, each width by itself, and compared with the
original whose removed channels are switched off (`tests/support/oracle.py`): in float64, every tensor jittered;
models of more than 150 million parameters in float32. *M*: millions of parameters. *error*: relative, at ratio 0.5.
*kept*: share of the parameters. *prunable*: share of the channels of all weights that may go. *s*: processor seconds
to plan, apply and verify at ratio 0.5, one thread. *why the rest is pinned*: the reason, and the dimensions of
weights that it holds. *keep too much*: models that keep more than {BOUND_CONVOLUTION} of their parameters at ratio
0.5, or {BOUND_ATTENTION} where they have attention."""


def as_markdown(result: dict[str, Any]) -> str:
    """For the results folder."""
    models = result["models"]
    peer = any("peer" in facts for facts in models.values())
    columns = ["model", "M", "at 0.5", "at 0.3", "error", "kept 0.5", "kept 0.3", "prunable", "s"]
    columns += ["torch-pruning"] * peer + ["why the rest is pinned"]
    lines = ["# The zoo", "", _EXPLANATION, "", as_line(result["environment"]) + ".", "", *_totals(models, peer), ""]
    for family, found in _by_family(models).items():
        lines += [f"## {family}", "", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
        lines += [*(_row(key, facts, peer) for key, facts in found.items()), ""]
    lines += _failures(models)
    return "\n".join(lines)


def _failures(models: dict[str, Any]) -> list[str]:
    failures = causes(models)
    if not failures:
        return []
    lines = ["## Failures by cause", ""]
    for (stage, _, at), keys, message in failures:
        lines += [f"- **{stage}**, {at or 'outside the package'}: {message[:300]} — {', '.join(keys)}"]
    return [*lines, ""]
