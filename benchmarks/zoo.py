"""Prune every model of the zoo by one call, each width by itself, and write down what came of it.

Each model has a process of its own with a time limit. Results of earlier runs are kept and completed.

    python benchmarks/zoo.py [--family timm] [--only PATTERN] [--failed] [--peer] [--limit 120] [--jobs 1]
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from harness import of_zoo
from harness.children import run_apart
from harness.environment import environment
from rich.console import Console
from rich.table import Table
from zoo_check import checked
from zoo_models import FAMILIES, entries
from zoo_models.entry import Entry
from zoo_peer import peer_outcome
from zoo_report import as_markdown, causes, line, outcome, summary

RATIOS = (0.5, 0.3)
PEER_LIMIT = 60.0  # seconds of the processor that torch-pruning may take
PEER_WALL = 600.0  # seconds by the clock for it and the comparison


def chosen(options: argparse.Namespace, known: dict[str, Any]) -> list[Entry]:
    """The models that the options ask for."""
    found = [e for e in entries() if not options.family or e.family in options.family.split(",")]
    if options.only:
        patterns = [f"*{pattern}*" for pattern in options.only.split(",")]
        found = [e for e in found if any(fnmatch.fnmatch(e.key, pattern) for pattern in patterns)]
    if options.failed:
        found = [e for e in found if any(outcome(known.get(e.key, {}), str(ratio)) != "right" for ratio in RATIOS)]
    return found


def measure(entry: Entry, options: argparse.Namespace) -> dict[str, Any]:
    """Everything about one model."""
    found = {} if options.peer_only else run_apart(checked(entry, RATIOS), options.limit)
    if options.peer or options.peer_only:
        theirs = run_apart(peer_outcome(entry, PEER_LIMIT), PEER_WALL)
        found["peer"] = theirs if "outcome" in theirs else {"outcome": "crashes", "error": theirs.get("died", "")}
    return found


def _peer_of(facts: dict[str, Any]) -> dict[str, Any]:
    return {"peer": facts["peer"]} if "peer" in facts else {}


def write(path: Path, models: dict[str, Any]) -> None:
    """Both files, in the order of the registry."""
    order = {entry.key: position for position, entry in enumerate(entries())}
    models = dict(sorted(models.items(), key=lambda item: order.get(item[0], len(order))))
    result = {"environment": environment(), "ratios": RATIOS, "models": models}
    path.parent.mkdir(exist_ok=True)
    path.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    path.with_suffix(".md").write_text(as_markdown(result))


def _print_summary(console: Console, models: dict[str, Any]) -> None:
    table = Table("family", "right at both ratios", "models")
    for family, right, total in summary(models):
        table.add_row(family, str(right), str(total))
    console.print(table)
    for (stage, _, at), keys, message in causes(models):
        console.print(f"{len(keys)} x {stage}: {at}: {message[:300]}\n    {', '.join(keys)}", highlight=False)


def main() -> int:
    parser = of_zoo.parser(__doc__, only="parts of names or patterns, separated by commas", limit=120.0, name="zoo")
    parser.add_argument("--family", default="", help=f"families, separated by commas: {', '.join(FAMILIES)}")
    parser.add_argument("--failed", action="store_true", help="only models that were not right at both ratios before")
    parser.add_argument("--peer", action="store_true", help="also what torch-pruning makes of each model")
    parser.add_argument("--peer-only", action="store_true", help="that alone, beside results that are there already")
    parser.add_argument("--jobs", type=int, default=1, help="models at a time")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    options = parser.parse_args()
    path, known = of_zoo.begun(options)
    picked = chosen(options, known)
    if options.list:
        print("\n".join(entry.key for entry in picked))
        return 0
    for package in {entry.family for entry in picked} & {"torchvision", "timm", "transformers"}:
        importlib.import_module(package)  # here, so that no process imports it again
    console = Console(file=sys.stdout, width=160)
    done: dict[str, Any] = {}
    with ThreadPoolExecutor(options.jobs) as pool:
        for entry, facts in zip(picked, pool.map(lambda e: measure(e, options), picked), strict=True):
            before = known.get(entry.key, {})
            facts = {**before, **facts} if options.peer_only else {**facts, **_peer_of(before), **_peer_of(facts)}
            known[entry.key] = done[entry.key] = facts
            console.print(line(entry.key, facts), highlight=False, soft_wrap=True)
            write(path, known)
    _print_summary(console, done)
    return 0 if all(right == total for _, right, total in summary(done)) else 1


if __name__ == "__main__":
    raise SystemExit(main())
