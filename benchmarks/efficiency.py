"""Speed-up efficiency: how much of what MACs promise is measured as time. ResNet-50 at half its MACs.

Everything is left at its default: ``structprune.plan(model, images, target={"macs": 0.5})``. torch-pruning removes as
many MACs, its widths as they come and rounded to 8 and 16. All models run in turns on one thread, and what counts is
the time of this process on the CPU, since others use the machine too. Run from the root:
``python benchmarks/efficiency.py``.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import torch
from harness import RESULTS
from harness.environment import environment
from harness.peer import last_layers
from support.torchvision_shim import make_torchvision_importable
from torch import Tensor, nn

import structprune

FILE = RESULTS / "efficiency.json"
ROUNDED = (None, 8, 16)
# Bisections of the peer's ratio, which it takes in place of a target.
HALVINGS = 7


def peer_at(model: nn.Module, images: Tensor, macs: int, round_to: int | None) -> nn.Module:
    """The model as torch-pruning leaves it, at the ratio that comes nearest to so many MACs."""
    import torch_pruning as tp

    def pruned(ratio: float) -> tuple[int, nn.Module]:
        slim = copy.deepcopy(model)
        pruner = tp.pruner.MagnitudePruner(
            slim,
            images[:1],
            importance=tp.importance.MagnitudeImportance(p=2),
            pruning_ratio=ratio,
            round_to=round_to,
            ignored_layers=last_layers(slim, images[:1]),
            in_channel_groups={},
            out_channel_groups={},
            channel_groups={},
        )
        pruner.step()
        return structprune.cost(slim, images).macs, slim

    low, high = 0.0, 0.9
    found: list[tuple[int, nn.Module]] = []
    for _ in range(HALVINGS):
        ratio = (low + high) / 2
        found.append(pruned(ratio))
        low, high = (ratio, high) if found[-1][0] > macs else (low, ratio)
    return min(found, key=lambda each: abs(each[0] - macs))[1]


def measure(batch: int, runs: int, backends: list[str], share: float) -> dict[str, Any]:
    """Time all of them; the statistics, without the runs one by one."""
    make_torchvision_importable()
    import torchvision

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, images = torchvision.models.resnet50().eval(), torch.randn(batch, 3, 224, 224)
    plan = structprune.plan(model, images, target={"macs": share})
    models = {"dense": model, "structprune": plan.apply(model)}
    for round_to in ROUNDED:
        name = "torch-pruning" + (f", rounded to {round_to}" if round_to else "")
        models[name] = peer_at(model, images, plan.after.macs, round_to)
    found = structprune.benchmark(models, images, backends=backends, threads=1, runs=runs, warmup=2, clock="process")
    data = json.loads(found.to_json())
    for row in data["timings"]:
        del row["seconds"]
    data["versions"] = environment()
    data["macs_kept"] = {name: macs / found.macs["dense"] for name, macs in found.macs.items()}
    data["runs"] = runs
    return data


def report(data: dict[str, Any]) -> str:
    """The figures as Markdown."""
    facts = data["environment"]
    lines = [
        "# Speed-up efficiency: ResNet-50 at half its MACs",
        "",
        f"{facts['processor']} ({facts['vectors']}), one thread, batch of {data['batch_size']}, {data['runs']} runs of "
        f"each in turns, process time; torch {facts['torch']}, ONNX Runtime {facts['onnxruntime']}, torch-pruning "
        f"{data['versions']['torch-pruning']}. Nothing is set but the target. Efficiency is the measured speed-up "
        "divided by the ratio of MACs; in brackets the 95% interval.",
        "",
        "| backend | model | MACs kept | ms | peak MB | speed-up | efficiency |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in data["timings"]:
        kept, gain = data["macs_kept"][row["model"]], row["speedup"]
        cells = [row["backend"], row["model"], f"{kept:.4f}", f"{1e3 * row['median']:.1f}"]
        cells.append("" if row["memory"] is None else f"{row['memory'] / 1e6:.0f}")
        if row["model"] != "dense":
            ends = f"{gain['low'] * kept:.3f} to {gain['high'] * kept:.3f}"
            cells += [f"{gain['ratio']:.2f}", f"{row['efficiency']:.3f} ({ends})"]
        lines.append("| " + " | ".join([*cells, "", ""][:7]) + " |")
    if data["explanations"]:
        lines += ["", "Where less is gained than MACs promise:", ""]
        lines += [f"- {each['text']}" for each in data["explanations"]]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--runs", type=int, default=31)
    parser.add_argument("--macs", type=float, default=0.5)
    parser.add_argument("--backends", nargs="+", default=["onnxruntime", "eager", "channels_last"])
    parser.add_argument("--out", type=Path, default=FILE)
    args = parser.parse_args()
    data = measure(args.batch, args.runs, args.backends, args.macs)
    args.out.write_text(json.dumps(data, indent=1) + "\n")
    text = report(data)
    args.out.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
