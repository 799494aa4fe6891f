"""Export every model of the zoo's tests to ONNX after pruning, save and load it, and write down what came of it.

Each model has a process of its own with a time limit. What the pruned model cannot do is tried with the dense one too:
a model that torch.onnx does not export in the first place is no failure of pruning, and the result says so.

    python benchmarks/export_zoo.py [--only PATTERN] [--missing] [--dense] [--limit 900]
"""

from __future__ import annotations

import fnmatch
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from export_report import as_markdown, line
from harness import of_zoo
from harness.children import Report, one_line, run_apart
from harness.environment import environment
from support import oracle
from test_zoo import MODELS
from torch import nn
from zoo_check import built, parameters, saved_exactly
from zoo_models import entries
from zoo_models.entry import Entry

import structprune

RATIO = 0.5


def exported(model: nn.Module, inputs: Any, **options: Any) -> dict[str, Any]:
    """What became of an export: size, operator set and error, or why there is none."""
    start = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        try:
            found = structprune.export_onnx(model, Path(folder) / "model.onnx", inputs, **options)
        except Exception as error:  # recorded as what came of it
            return {"error": one_line(error, 500)}
        said = structprune.onnx_info(found.path)
    return {
        "bytes": found.bytes,
        "opset": found.opset,
        "max_relative_error": found.max_relative_error,
        "digests": list(said.digests),
        "params": [cost.params for cost in (said.before, said.after) if cost],
        "seconds": round(time.process_time() - start, 1),
    }


def saved_and_loaded(entry: Entry, slim: nn.Module, inputs: Any) -> str:
    """Whether a folder gives back the same bits, in the tensors and in the outputs."""
    try:
        saved_exactly(entry, slim, inputs, oracle.call(slim, inputs))
    except Exception as error:  # recorded as what came of it
        return one_line(error)
    return "exact"


def tried(entry: Entry, with_dense: bool) -> Callable[[Report], None]:
    """Work for a process of its own."""

    def work(report: Report) -> None:
        model, inputs = built(entry)
        plan = structprune.plan(model, inputs, ratio=RATIO)
        slim = plan.apply(model)
        report(
            {
                "params": [parameters(slim), parameters(model)],
                "digest": plan.digest,
                "literal_edits": len(plan.literal_edits),
            }
        )
        report({"saved": saved_and_loaded(entry, slim, inputs)})
        free = exported(slim, inputs)
        report({"slim": free})
        if with_dense or "error" in free:
            report({"dense": exported(model, inputs)})
        if "error" in free:
            fixed = exported(slim, inputs, dynamic_batch=False)
            report({"slim_fixed": fixed})
            if "error" in fixed:
                report({"dense_fixed": exported(model, inputs, dynamic_batch=False)})

    return work


def write(path: Path, models: dict[str, Any]) -> None:
    """Both files, in the order of the tests."""
    order = {key: position for position, key in enumerate(MODELS)}
    models = dict(sorted(models.items(), key=lambda item: order.get(item[0], len(order))))
    result = {"environment": environment(), "ratio": RATIO, "asked": list(MODELS), "models": models}
    path.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    path.with_suffix(".md").write_text(as_markdown(result))


def main() -> int:
    parser = of_zoo.parser(__doc__, only="a pattern of names", limit=900.0, name="export")
    parser.add_argument("--missing", action="store_true", help="only models that have no result yet")
    parser.add_argument("--dense", action="store_true", help="export the dense models too, to compare the files")
    options = parser.parse_args()
    path, known = of_zoo.begun(options)
    by_key = {entry.key: entry for entry in entries()}
    for key in MODELS:
        if not fnmatch.fnmatch(key, options.only or "*") or (options.missing and key in known):
            continue
        known[key] = run_apart(tried(by_key[key], options.dense), options.limit)
        print(line(key, known[key]), flush=True)
        write(path, known)
    return 0 if len(known) == len(MODELS) else 1


if __name__ == "__main__":
    sys.exit(main())
