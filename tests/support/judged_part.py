"""A part of torch's test databases, judged in a process of its own: its import changes torch and hypothesis for good.

    python -m support.judged_part PART PARTS SAMPLES
    python -m support.judged_part --only NAME [--broken RULE]
    python -m support.judged_part PART PARTS SAMPLES --masked

Prints a JSON object: the ``entries`` that were tried, ``counts`` by class, how often channels ``went``, and ``faults``:
for each entry that has any, its cases. With ``--broken``, the rule of one operation is replaced by one that is wrong.
With ``--masked``, `masks.compact` is judged instead of a plain call, on one network of each entry.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch

from structprune.ops import OPS
from support.judging import FAULTS, judge_case
from support.judging_masks import judge_compaction
from support.nn_modules import module_cases, module_database
from support.operations import Case, cases, database


def untied(c: Any, x: Any, *_: Any, **__: Any) -> Any:
    """The other operand is forgotten, a movement overlooked."""
    del c
    return x.axes


def reversed_list(rule: Any) -> Any:
    """What is concatenated is taken to lie the other way round."""
    return lambda c, tensors, *args, **kwargs: rule(c, list(reversed(tensors)), *args, **kwargs)


def quick(cases: Iterable[Case]) -> list[Case]:
    """Those whose other tensors are held, and one of each sample where they are inputs."""
    found: dict[Any, Case] = {}
    for case in cases:
        found.setdefault((case.name, case.number, case.training, case.held and case.dim, case.held), case)
    return list(found.values())


def one_in_eval(networks: Iterable[Case]) -> list[Case]:
    """The first network of each sample, in its own spelling."""
    found: dict[int, Case] = {}
    for case in networks:
        if not case.training:
            found.setdefault(case.number, case)
    return list(found.values())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("numbers", nargs="*", type=int, default=[0, 1, 1])
    parser.add_argument("--only")
    parser.add_argument("--broken")
    parser.add_argument("--masked", action="store_true")
    options = parser.parse_args()
    part, parts, samples = options.numbers
    entries = [(name, cases, info) for name, info in database().items()]
    entries += [(name, module_cases, info) for name, info in module_database().items()]
    if options.only:
        entries = [entry for entry in entries if entry[0] == options.only]
    if options.broken:
        op = OPS[options.broken]
        broken = reversed_list(op.coupling) if options.broken == "cat" else untied
        OPS[options.broken] = dataclasses.replace(op, coupling=broken)
    torch.set_num_threads(1)
    counts: Counter[str] = Counter()
    faults: dict[str, list[str]] = {}
    went = 0
    for name, cases_of, info in entries[part::parts]:
        networks = quick(cases_of(info, samples))
        for case in one_in_eval(networks) if options.masked else networks:
            verdict = judge_compaction(case) if options.masked else judge_case(case, reasons=False)
            counts[verdict.kind] += 1
            went += verdict.went > 0
            if verdict.kind in FAULTS:
                faults.setdefault(name, []).append(f"{case}: {verdict.kind}: {verdict.note}")
    found = {"entries": [name for name, *_ in entries[part::parts]], "counts": counts, "went": went, "faults": faults}
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
