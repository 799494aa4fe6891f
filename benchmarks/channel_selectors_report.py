"""The tables of `channel_selectors.py`."""

from __future__ import annotations

from typing import Any

from harness.environment import as_line

MODELS = ("resnet56", "stories260k")
# What is left of the MACs, or of the parameters, what matters most first.
SHARES = {"resnet56": (1 / 2, 1 / 3, 1 / 1.5, 1 / 4), "stories260k": (0.8, 0.65, 0.9)}
SCOPES = ("global", "per_cost", "local")
CRITERIA = (
    "l2",
    "taylor",
    "wanda_square",
    "flap",
    "thinet",
    "obs",
    "l2, folded",
    "folding",
    "folding, means",
    "folding with data",
)
TEST = 2000
NAMES = {"resnet56": "ResNet-56 on CIFAR-10", "stories260k": "stories260k, a Llama of 260 K parameters"}
FIGURES = ("raw", "recalibrated", "recovered")


def standard_error(percent: float) -> float:
    """Of a share of `TEST` images, in points."""
    return 100 * (percent / 100 * (1 - percent / 100) / TEST) ** 0.5


def best_of(rows: list[dict[str, Any]], figure: str) -> float | None:
    """The best figure of some rows: the highest accuracy, the lowest perplexity."""
    values = [row[figure] for row in rows if figure in row]
    better = max if rows and rows[0]["model"] == "resnet56" else min
    return better(values) if values else None


def _cell(row: dict[str, Any] | None, figures: tuple[str, ...], best: dict[str, float | None]) -> str:
    if row is None or not any(figure in row for figure in figures):
        return "-"
    parts: list[str] = []
    for figure in figures:
        if figure not in row:
            parts.append("-")
            continue
        text = f"{row[figure]:.1f}" if row["model"] == "resnet56" or row[figure] >= 100 else f"{row[figure]:.2f}"
        parts.append(f"**{text}**" if row[figure] == best[figure] else text)
    return " / ".join(parts)


def table(state: dict[str, Any], model: str, share: float) -> list[str]:
    """Lines of Markdown: criteria down, scopes across."""
    rows = [
        row
        for row in state["rows"].values()
        if row["model"] == model and row["share"] == share and any(figure in row for figure in FIGURES)
    ]
    if not rows:
        return []
    figures = FIGURES if model == "resnet56" else ("raw", "recovered")
    best = {figure: best_of(rows, figure) for figure in figures}
    scopes = [scope for scope in (*SCOPES, "its own") if any(row["scope"] == scope for row in rows)]
    amount = f"{1 / share:g}x fewer MACs" if model == "resnet56" else f"{share:.0%} of the parameters left"
    lines = [
        f"### {NAMES[model]}, {amount}: {' / '.join(figures)}",
        "",
        "| criterion | " + " | ".join(scopes) + " |",
        "|---|" + "---:|" * len(scopes),
    ]
    for criterion in dict.fromkeys(row["criterion"] for row in rows):
        mine = {row["scope"]: row for row in rows if row["criterion"] == criterion}
        lines.append(f"| {criterion} | " + " | ".join(_cell(mine.get(scope), figures, best) for scope in scopes) + " |")
    return [*lines, ""]


def markdown(state: dict[str, Any]) -> str:
    """All tables."""
    lines = [
        "# Selectors: which criterion in which scope",
        "",
        "Pruned once, nothing trained. *Raw*: as it is. *Recalibrated*: batch norms on 256 training images. "
        "*Recovered*: `structprune.recover` on the same 256 images, or on 128 windows of 256 tokens, without labels, "
        "with 16,384 positions a layer. Criteria that look at data see 512 images, or 64 windows. Widths are not "
        "rounded. ResNet-56 loses channels inside of blocks, the Llama MLP channels and heads. *Folded*: removed "
        "channels are merged into kept ones by `structprune.fold`: as multiples of them by their weights, or as means; "
        "*with data*, by their values. *Folding* chooses them by Ward's clusters. One draw of the calibration data; "
        "bold is best in its table. Made by `benchmarks/channel_selectors.py`.",
        "",
        f"Accuracy in percent, on the first {TEST:,} test images: one standard error is "
        f"{standard_error(92):.1f} points at 92%, {standard_error(80):.1f} at 80%, {standard_error(50):.1f} at 50%. "
        "Perplexity on the second half of the stories' tokens, lower is better.",
        "",
    ]
    for model in MODELS:
        if model in state["dense"]:
            value = state["dense"][model]["value"]
            lines += [f"Dense {NAMES[model]}: {value:.2f}{' %' if model == 'resnet56' else ''}.", ""]
    for model in MODELS:
        for share in SHARES[model]:
            lines += table(state, model, share)
    return "\n".join([*lines, as_line(state["environment"]), ""])
