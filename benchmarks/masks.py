"""Random masks over the models that continuous integration prunes: masked, cut by `masks.compact`, and compared.

Run ``python benchmarks/masks.py``; results go to ``results/masks.*``. A model that was measured already is not measured
again, so that a run that was stopped goes on. ``--only`` takes a part of a name.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import torch
from harness import RESULTS
from harness.children import OverTime, at_most, one_line
from harness.environment import as_line, environment
from support import oracle
from support.torchvision_shim import make_torchvision_importable
from torch import nn
from torch.overrides import TorchFunctionMode

make_torchvision_importable()
from test_zoo import MODELS  # noqa: E402, torchvision has to be importable first
from zoo_check import jittered  # noqa: E402, as above
from zoo_models import FAMILIES  # noqa: E402, as above

from structprune import masks  # noqa: E402, as above
from structprune.errors import StructpruneError  # noqa: E402, as above
from structprune.masks import Saliency  # noqa: E402, as above
from structprune.tracing.trace import run_once, tensors_in  # noqa: E402, as above

AMOUNTS, KINDS = (0.3, 0.6, 0.9), ("filters", "entries")
ORDER = (0.6, 0.9, 0.3)
TOLERANCE = 1e-10
LIMIT = 240.0


def difference(masked: nn.Module, slim: nn.Module, inputs: Any) -> float:
    """The largest difference of outputs, over the largest output."""
    pairs = zip(*(list(tensors_in(run_once(model, inputs))) for model in (masked, slim)), strict=True)
    found = 0.0
    for wanted, got in pairs:
        if wanted.is_floating_point() and wanted.numel():
            scale = wanted.abs().max().clamp(min=1e-30)
            found = max(found, float((wanted - got).abs().max() / scale))
    return found


class Float64(TorchFunctionMode):
    """A forward that asks for float32 by itself, as RAFT's does for its grid, stays in float64 as its weights are."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {})) if func is not torch.Tensor.float else args[0].double()


def measured(key: str, kind: str, amount: float) -> dict[str, Any]:
    """One model with one mask."""
    family, _, name = key.partition("/")
    (entry,) = [entry for entry in FAMILIES[family]() if entry.name == name]
    torch.manual_seed(0)
    model, inputs = entry.build()
    model = jittered(model.eval(), torch.float64)
    inputs = oracle.double(inputs)
    mask = Saliency.random(model, seed=1).mask(amount, "tensor", dim=0 if kind == "filters" else None)
    mask.apply(model)
    before = sum(p.numel() for p in model.parameters())
    began = time.perf_counter()
    found = masks.compaction(model, inputs)
    seconds = time.perf_counter() - began
    return {
        "params": before,
        "left": sum(p.numel() for p in found.model.parameters()),
        "zeroed": mask.entries - mask.kept,
        "off": sum(len(layer.off) for layer in found.layers),
        "gone": sum(len(layer.removed) for layer in found.layers),
        "difference": difference(model, found.model, inputs),
        "seconds": seconds,
    }


def main() -> None:
    """Measure what was not measured yet, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="")
    parser.add_argument("--for", dest="minutes", type=float, default=600.0, help="begin no further model after these")
    given = parser.parse_args()
    file = RESULTS / "masks.json"
    found: dict[str, Any] = json.loads(file.read_text())["rows"] if file.exists() else {}
    end = time.monotonic() + 60 * given.minutes
    # All models with one mask come before all with the next.
    for amount in ORDER:
        for kind in KINDS:
            for key in MODELS:
                name = f"{key} {kind} {amount:.0%}"
                if given.only not in key or name in found or time.monotonic() > end:
                    continue
                try:
                    with at_most(LIMIT), Float64():
                        found[name] = measured(key, kind, amount)
                except (StructpruneError, OverTime) as error:
                    found[name] = {"error": one_line(error)}
                print(name, found[name], flush=True)
                record = {"environment": environment(), "rows": found}
                file.write_text(json.dumps(record, indent=1) + "\n")
    write(found)


def write(found: dict[str, Any]) -> None:
    """The table: a line for each model."""
    right = sum(row.get("difference", 1.0) <= TOLERANCE for row in found.values())
    refused = {name: row["error"] for name, row in found.items() if "error" in row}
    lines = [
        "# Masks to smaller networks",
        "",
        "Made by `python benchmarks/masks.py`: the models of continuous integration with random weights in float64; "
        "of each tensor of two dimensions or more a share of its filters (or its single entries) zeroed at random, "
        "then `masks.compact`. Biases and norms stay, so that a filter of zeros leaves a constant. "
        f"{as_line(environment())}.",
        "",
        f"{right} of {len(found)} compacted networks compute what the masked ones compute, to {TOLERANCE:g} of the "
        f"largest output; {len(refused)} could not be made; {len(found) - right - len(refused)} differ.",
        "",
        f"Measured so far: {len({name.split(' ')[0] for name in found})} of {len(MODELS)} models.",
        "",
        "Parameters that are gone, and in brackets the channels gone of those that the zeros switch off. Those that "
        "nothing reads go too:",
        "",
        "| model | parameters | filters 30% | 60% | 90% | entries 30% | 60% | 90% | largest difference |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for key in MODELS:
        rows = [found.get(f"{key} {kind} {amount:.0%}") for kind in KINDS for amount in AMOUNTS]
        if not any(rows):
            continue
        there = [row for row in rows if row and "error" not in row]
        params = f"{there[0]['params']:,}" if there else ""
        largest = f"{max(row['difference'] for row in there):.0e}" if there else ""
        lines.append(f"| {key} | {params} | {' | '.join(map(_cell, rows))} | {largest} |")
    lines += ["", *(f"- {name}: {why}" for name, why in refused.items())]
    (RESULTS / "masks.md").write_text("\n".join(lines).rstrip() + "\n")


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    if "error" in row:
        return "refused"
    return f"{1 - row['left'] / row['params']:.0%} ({row['gone']:,} of {row['off']:,})"


if __name__ == "__main__":
    main()
