"""The table and the plot of `criteria`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from harness.environment import as_line

Axis = dict[str, Any]
TOOLS = ("structprune", "torch-pruning")
KINDS = ("raw", "recalibrated")
# The criteria that both tools are quoted with, the scopes that both have, and what ours is called if not as theirs.
NAMED = ("l2", "taylor", "fpgm", "fpgm, filters alone")
SCOPES = ("global", "local", "isomorphic")
RIVALS = {"fpgm, filters alone": "fpgm"}


def at(known: Iterable[Axis], **asked: Any) -> list[Axis]:
    """The rows that have all of these values."""
    return [row for row in known if all(row.get(name) == value for name, value in asked.items())]


def chosen(known: Iterable[Axis]) -> dict[str, Axis]:
    """Our plans at 2.0x that do best on the training images kept for choosing: raw, recalibrated, and both together."""
    mine = [row for row in at(known, tool="structprune", times=2.0, inside=True, goal=None) if "choose" in row]
    ways: dict[str, Callable[[Axis], float]] = {
        "raw": lambda row: row["choose"]["raw"],
        "recalibrated": lambda row: row["choose"]["recalibrated"],
        "both": lambda row: row["choose"]["raw"] + row["choose"]["recalibrated"],
    }
    return {name: max(mine, key=way) for name, way in ways.items()} if mine else {}


def best_scopes(known: Iterable[Axis], tool: str, criterion: str, times: float = 2.0) -> list[Axis]:
    """The rows with the scope that is best raw, and that is best recalibrated; of torch-pruning by the test images."""
    mine = at(known, tool=tool, criterion=criterion, times=times, inside=True)
    return [max(mine, key=lambda row, kind=kind: row[kind]) for kind in KINDS] if mine else []


def _cell(row: Axis | None) -> str:
    return "-" if row is None else f"{row['raw']:.1f} / {row['recalibrated']:.1f}"


def _named(known: list[Axis]) -> list[str]:
    """Same-named criteria of both tools, scope by scope and the best of each."""
    theirs = dict.fromkeys(row["criterion"] for row in at(known, tool="torch-pruning", times=2.0))
    names = {name: name for name in theirs} | RIVALS
    lines = [
        "| criterion | " + " | ".join(f"{scope}: ours | theirs" for scope in SCOPES) + " |",
        "|---|" + "---:|---:|" * len(SCOPES),
    ]
    for name, rival in names.items():
        cells: list[str] = []
        for scope in SCOPES:
            for tool, criterion in zip(TOOLS, (name, rival), strict=True):
                found = at(known, tool=tool, criterion=criterion, scope=scope, times=2.0, inside=True)
                cells.append(_cell(found[0] if found else None))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _table(known: list[Axis], before: int) -> list[str]:
    lines = [
        "| times fewer MACs | tool | criterion | scope | MACs | raw | recalibrated | on training images | images |",
        "|---:|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in sorted(known, key=lambda row: (not row["inside"], row["times"], -row["recalibrated"])):
        picked = _cell(row["choose"]) if "choose" in row else "-"
        where = "" if row["inside"] else ", all axes"
        lines.append(
            f"| {row['times']:g} | {row['tool']} | {row['criterion']} | {row['scope']}{where} | "
            f"{row['macs'] / before:.3f} | {row['raw']:.1f} | {row['recalibrated']:.1f} | {picked} | {row['images']} |"
        )
    return lines


def _quoted(known: list[Axis]) -> list[str]:
    lines = ["| what | criterion | scope | raw | recalibrated | images |", "|---|---|---|---:|---:|---:|"]
    found = [(f"ours, best {way} on training images", row) for way, row in chosen(known).items()]
    for name in NAMED:
        for tool in TOOLS:
            for kind, row in zip(KINDS, best_scopes(known, tool, name), strict=False):
                found.append((f"{name} of {tool}, best {kind}", row))
    for what, row in found:
        lines.append(
            f"| {what} | {row['criterion']} | {row['scope']} | {row['raw']:.2f} | {row['recalibrated']:.2f} "
            f"| {row['images']} |"
        )
    return lines


def markdown(state: dict[str, Any]) -> str:
    """The report; figures are accuracies in percent."""
    known, dense = state["rows"], state["dense"]
    whole = f", {dense['accuracy']:.2f} %" if "accuracy" in dense else ""
    lines = [
        "# Criteria, scopes and targets without training",
        "",
        f"ResNet-56 on CIFAR-10, {dense['macs'] / 1e6:.2f} M multiply-accumulates dense{whole}. "
        "Pruned once, nothing trained. *Raw*: as it is. *Recalibrated*: batch norms averaged anew over 2,048 training "
        "images. Criteria that look at data see 512 training images (`obd_fisher` 128, one by one). Widths are not "
        "rounded. The residual streams stay whole in both tools, except where it says *all axes*. Column *images*: how "
        "many test images a row was measured on: the first 1,000 in the sweep, with a standard error of 1.5 points at "
        "60 % and one at 87 %; all 10,000 once `--full` has run. "
        "Made by `benchmarks/criteria.py`.",
        "",
        "torch-pruning: `MagnitudePruner` with the criterion named, its defaults (group mean, scores over their mean), "
        "the layers outside of blocks ignored, and the ratio found by bisection so that no more MACs remain than asked "
        "for (half a percent more is let pass). A criterion that both have keeps just as many in ours, whatever those "
        "are. Its "
        "gradients are of the mean loss over the same images. `obd_fisher` is its `HessianImportance` with "
        "squared gradients averaged by hand, `kfac` its `OBDCImportance` with its preparation repaired, "
        "`activation_mean` its `ActivationImportance`.",
        "",
        "## Quoted, 2.0x fewer MACs",
        "",
        *_quoted(known),
        "",
        "Ours are chosen on 1,000 training images that were used for nothing else; for the same-named criteria of both "
        "tools the scope is the one that is best on the test images.",
        "",
        "## Same-named criteria, 2.0x: raw / recalibrated",
        "",
        *_named(known),
        "",
        "## All rows",
        "",
        *_table(known, dense["macs"]),
        "",
        as_line(state["environment"]),
        "",
    ]
    return "\n".join(lines)


def plot(state: dict[str, Any], file: Path) -> None:
    """Every row at its target: raw on the left, recalibrated on the right."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    known = at(state["rows"], times=2.0, inside=True)
    names = sorted(
        dict.fromkeys(row["criterion"] for row in known),
        key=lambda name: max(row["recalibrated"] for row in at(known, criterion=name)),
    )
    marks = {"global": "o", "local": "s", "isomorphic": "^", "per_cost": "D", "sensitivity": "P"}
    colours = dict(zip(TOOLS, ("tab:blue", "tab:orange"), strict=True))
    several = len({row["times"] for row in state["rows"]}) > 1
    panels = 3 if several else 2
    figure, axes = plt.subplots(1, panels, figsize=(4.8 * panels, 2 + 0.3 * len(names)))
    for axis, kind, goal in zip(axes[:2], KINDS, (60, 87), strict=True):
        for row in known:
            shift = 0.16 if row["tool"] == "torch-pruning" else -0.16
            axis.plot(
                row[kind], names.index(row["criterion"]) - shift, marks[row["scope"]], color=colours[row["tool"]],
                markersize=5, alpha=0.8,
            )  # fmt: skip
        axis.axvline(goal, color="grey", linewidth=0.8, linestyle=":")
        axis.set_yticks(range(len(names)), names if kind == "raw" else [""] * len(names), fontsize=8)
        axis.set_xlabel(f"accuracy at 2.0x fewer MACs, {kind} (%)")
        axis.grid(axis="y", linewidth=0.3)
    if several:
        _by_target(axes[2], state["rows"], colours)
    handles = [plt.Line2D([], [], color="grey", marker=mark, linestyle="", label=s) for s, mark in marks.items()]
    handles += [plt.Line2D([], [], color=c, marker="o", linestyle="", label=tool) for tool, c in colours.items()]
    figure.legend(handles=handles, loc="upper center", ncols=7, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.93))
    figure.savefig(file, dpi=110)
    plt.close(figure)


def _by_target(axis: Any, known: list[Axis], colours: dict[str, str]) -> None:
    """Accuracy over the target for the criteria that were tried at several."""
    series: dict[tuple[str, str, str], dict[float, Axis]] = {}
    for row in at(known, inside=True):
        series.setdefault((row["tool"], row["criterion"], row["scope"]), {})[row["times"]] = row
    styles = iter(("-", "--", ":", "-.", "-", "--", ":", "-.") * 4)
    for (tool, criterion, scope), found in series.items():
        if len(found) > 1:
            times = sorted(found)
            axis.plot(
                times, [found[t]["recalibrated"] for t in times], next(styles), marker=".", color=colours[tool],
                label=f"{criterion}, {scope}", alpha=0.8,
            )  # fmt: skip
    axis.set_xlabel("times fewer MACs")
    axis.set_ylabel("recalibrated (%)")
    axis.legend(fontsize=6, loc="lower left")
