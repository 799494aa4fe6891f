"""Prune networks around each operation of torch's test database, and around each module, and count what comes of it.

Each entry has a process of its own with a time limit.

    python benchmarks/operations.py [--only NAME] [--samples 8] [--jobs 1] [--json]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from harness import RESULTS
from harness.children import Work, run_apart, without_folders
from harness.environment import environment
from operations_report import as_markdown, faults, totals
from rich.console import Console
from support.judging import FAULTS, WHOLE, judge_case
from support.nn_modules import module_cases, module_database
from support.operations import cases, database

DATABASES = {"operations": (database, cases), "modules": (module_database, module_cases)}


def judged(kind: str, name: str, options: argparse.Namespace) -> Work:
    """Work that counts the classes of one entry, with the reasons for what was kept and every fault."""
    entries, cases_of = DATABASES[kind]

    def work(report: Any) -> None:
        torch.set_num_threads(1)
        counts: Counter[str] = Counter()
        reasons: Counter[str] = Counter()
        found: list[dict[str, str]] = []
        went = 0
        for case in cases_of(entries()[name], options.samples):
            verdict = judge_case(case, options.seconds)
            note = without_folders(verdict.note)
            counts[verdict.kind] += 1
            went += verdict.went > 0
            if verdict.kind == WHOLE:
                reasons[note] += 1
            elif verdict.kind in FAULTS:
                found.append({"case": str(case), "kind": verdict.kind, "note": note})
            report({"counts": counts, "went": went, "reasons": reasons, "faults": found, "last": str(case)})

    return work


def measure(kind: str, name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Everything about one entry; a process that did not come to its end is a fault of the case after the last."""
    facts = {"counts": {}, "went": 0, "reasons": {}, "faults": []}
    facts |= run_apart(judged(kind, name, options), options.limit)
    after = facts.pop("last", "the beginning")
    if "died" in facts:
        note = f"{facts.pop('died')} {facts.pop('died_at', '')}".strip()
        facts["faults"].append({"case": f"{name}, after {after}", "kind": "died", "note": note})
    return {key: dict(value) if isinstance(value, Counter) else value for key, value in facts.items()}


def write(path: Path, result: dict[str, Any]) -> None:
    """Both files."""
    path.parent.mkdir(exist_ok=True)
    path.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    path.with_suffix(".md").write_text(as_markdown(result))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="parts of names, separated by commas; nothing is written")
    parser.add_argument("--samples", type=int, default=8, help="of each entry, spread over all that it has")
    parser.add_argument("--seconds", type=float, default=20.0, help="for one case")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds for one entry")
    parser.add_argument("--jobs", type=int, default=1, help="entries at a time")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--output", default=str(RESULTS / "operations"), help="where to write, without a suffix")
    options = parser.parse_args()
    parts = options.only.split(",")
    picked = [(kind, name) for kind, (entries, _) in DATABASES.items() for name in entries()]
    picked = [(kind, name) for kind, name in picked if any(part in name for part in parts)]
    result: dict[str, Any] = {"environment": environment(), "samples": options.samples, "operations": {}, "modules": {}}
    console = Console(file=sys.stderr, width=200)
    with ThreadPoolExecutor(options.jobs) as pool:
        for (kind, name), facts in zip(picked, pool.map(lambda e: measure(*e, options), picked), strict=True):
            result[kind][name] = facts
            for fault in facts["faults"]:
                console.print(f"{fault['case']}: {fault['kind']}: {fault['note'][:500]}", highlight=False, markup=False)
            if options.only:
                console.print(f"{name}: {facts['counts']} {facts['reasons']}", highlight=False, markup=False)
    if not options.only:
        write(Path(options.output), result)
    print(json.dumps(result if options.json else totals(result), indent=1))
    return 1 if faults(result) else 0


if __name__ == "__main__":
    raise SystemExit(main())
