"""The tables of `llm.py`."""

from __future__ import annotations

from typing import Any

from harness.environment import as_line

GONE = (0.3, 0.5, 0.2)  # of the parameters of the blocks, what matters most first
CRITERIA = (
    "taylor", "flap", "wanda_square", "thinet", "l2", "flap, standardised", "flap, with biases", "flap, biases alone",
)  # fmt: skip
HIDDEN = ("activation_l2", "activation_l2, rotated", "taylor")
BLOCK_SCORES = ("kl", "influence", "taylor", "angular")
FIGURES = ("raw", "recovered", "distilled")
COLUMNS = (("mlp", "uniform"), ("mlp and heads", "free"), ("mlp and heads", "uniform"))


def best_of(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The lowest perplexity of some rows, by kind of figure."""
    values = {figure: [row[figure] for row in rows if figure in row] for figure in FIGURES}
    return {figure: min(known) for figure, known in values.items() if known}


def _cell(row: dict[str, Any] | None, whole: int, best: dict[str, float]) -> str:
    if row is None or not any(figure in row for figure in FIGURES):
        return "refused" if row and "refused" in row else "-"
    parts: list[str] = []
    for figure in FIGURES:
        if figure not in row:
            parts.append("-")
            continue
        text = f"{row[figure]:.2f}" if row[figure] < 100 else f"{row[figure]:.0f}"
        parts.append(f"**{text}**" if row[figure] == best[figure] else text)
    figures = " / ".join(parts if parts[-1] != "-" else parts[:-1])
    # Heads of uniform widths go in large steps, blocks in larger ones.
    share = 1 - row["block_params"] / whole if "block_params" in row else row["gone"]
    return figures if abs(share - row["gone"]) < 0.01 else f"{figures} ({share:.0%} gone)"


def table(state: dict[str, Any], gone: float) -> list[str]:
    """Lines of Markdown: criteria down, what is thinned across; then numbers of blocks."""
    rows = [row for row in state["rows"].values() if row["gone"] == gone]
    if not rows:
        return []
    best, whole = best_of(rows), state["dense"]["block_params"]
    lines = [
        f"## {gone:.0%} of the blocks' parameters gone: {' / '.join(FIGURES)}",
        "",
        "| criterion | " + " | ".join(f"{what}, {widths}" for what, widths in COLUMNS) + " |",
        "|---|" + "---:|" * len(COLUMNS),
    ]
    for criterion in CRITERIA:
        by_column = {(row["what"], row["widths"]): row for row in rows if row["criterion"] == criterion}
        if by_column:
            lines.append(
                f"| {criterion} | " + " | ".join(_cell(by_column.get(column), whole, best) for column in COLUMNS) + " |"
            )
    for what, title in (("hidden", "the width of the residual stream"), ("blocks", "whole blocks")):
        mine = [_line(row, whole, best) for row in rows if row["what"].startswith(what)]
        if mine:
            lines += ["", f"| {title}, by | |", "|---|---:|", *mine]
    return [*lines, ""]


def _line(row: dict[str, Any], whole: int, best: dict[str, float]) -> str:
    """A line for a row of one figure a kind."""
    name = row["criterion"] if row["what"] in ("blocks", "hidden") else f"{row['what']}, {row['criterion']}"
    return f"| {name} | {_cell(row, whole, best)} |"


def spent(state: dict[str, Any]) -> str:
    """Processor seconds of recovery and distillation."""
    parts: list[str] = []
    for how in ("recovered", "distilled"):
        known = [row[f"{how}_cpu_seconds"] for row in state["rows"].values() if f"{how}_cpu_seconds" in row]
        if known:
            parts.append(f"{how} networks took {min(known):.0f} to {max(known):.0f}")
    return f"Processor seconds on one thread: {', '.join(parts)}." if parts else ""


def markdown(state: dict[str, Any]) -> str:
    """All tables."""
    dense, training = state["dense"], state["training"]
    shape = training["config"]
    lines = [
        "# A Llama of 5.9 M parameters, pruned",
        "",
        f"{dense['params']:,} parameters, {dense['block_params']:,} of them in {shape['num_hidden_layers']} blocks of "
        f"width {shape['hidden_size']}, with {shape['num_attention_heads']} heads, {shape['num_key_value_heads']} "
        f"key-value heads and MLPs of {shape['intermediate_size']}; trained by `benchmarks/train_llm.py` on "
        f"{training['tokens_trained_on'] / 1e6:.1f} M tokens of text that stories260k wrote, with its probabilities as "
        f"targets, in {training['cpu_seconds'] / 60:.0f} minutes of one thread. Perplexity on the second half of the "
        f"real tokens of stories260k, lower is better: **{dense['perplexity']:.2f}** dense "
        f"(stories260k itself: {training['perplexity_of_the_small_one']:.2f}). What it has learned fits into a much "
        "smaller network, one of width 64, so it loses less than one that had to learn as much as it can hold.",
        "",
        "Pruned once. *Raw*: as it is. *Recovered*: `structprune.recover` on 64 windows of 256 tokens of the first "
        "half, which the network was not trained on, without labels. *Distilled*: recovered, then taught by the dense "
        "network on text that it was trained on, two epochs of 1,024 windows. Criteria that look at data see 64 "
        "windows of the first half. *Uniform*: all layers get one width, so that `from_pretrained` loads the result; "
        "*free*: each layer its own, in the global scope. *With biases*: the same network with biases of zero in "
        "attention and MLP, into which recovery puts what was constant in the channels that went; *alone*: and "
        "changes no weights (`weights=False`), as FLAP does; where that is no better on samples that are held out, the "
        "network stays as it is. *Rotated*: the residual stream on its principal axes "
        "(`structprune.rotate_residual`); in all rows of its width the last layer is a copy of the embedding. Blocks "
        "go whole, and widths of the stream in steps, so more may go than was asked for. One draw of the calibration "
        f"data (seed {state['seed']}); bold is the best of its kind of figure at that share. Made by "
        "`benchmarks/llm.py`.",
        "",
    ]
    for gone in sorted(GONE):
        lines += table(state, gone)
    return "\n".join([*lines, spent(state), "", as_line(state["environment"]), ""])
