"""Speed-up efficiency: how much of what MACs promise is measured as time. ResNet-50 and MobileNetV2 at half their MACs.

Everything is left at its default, ``structprune.plan(model, images, target={"macs": 0.5})``, and once more with
``round_to=16``. torch-pruning removes as many MACs, its widths as they come and rounded to 8 and 16. All models run in
turns on one thread, and what counts is the time of this process on the CPU, since others use the machine too. Run from
the root: ``python benchmarks/efficiency.py``; ``--models mobilenet_v2 --batches 1 --runs 3 --backends onnxruntime`` is
over in a minute. Results are written after each model and batch; those of other models and batches stay, if the runs
and versions are the same.
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
MODELS = {"resnet50": "ResNet-50", "mobilenet_v2": "MobileNetV2"}
BACKENDS = ("onnxruntime", "openvino", "compile", "aotinductor", "eager", "channels_last")
OURS, OURS_16 = "structprune", "structprune, rounded to 16"
# What is aimed at on every backend.
GOAL = 0.95
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


def networks(name: str, share: float) -> dict[str, nn.Module]:
    """The dense network, ours, and torch-pruning's at as many MACs."""
    import torchvision

    torch.manual_seed(0)
    model, image = torchvision.models.get_model(name, weights=None).eval(), torch.randn(1, 3, 224, 224)
    plan = structprune.plan(model, image, target={"macs": share})
    sixteen = structprune.plan(model, image, target={"macs": share}, round_to=16)
    models = {"dense": model, OURS: plan.apply(model), OURS_16: sixteen.apply(model)}
    for round_to in ROUNDED:
        peer = "torch-pruning" + (f", rounded to {round_to}" if round_to else "")
        models[peer] = peer_at(model, image, plan.after.macs, round_to)
    return models


def measure(name: str, models: dict[str, nn.Module], batch: int, args: argparse.Namespace) -> dict[str, Any]:
    """Time all of them; the statistics, without the runs one by one."""
    images = torch.randn(batch, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    options = {"threads": 1, "runs": args.runs, "warmup": 2, "clock": "process", "memory": args.memory}
    found = structprune.benchmark(models, images, backends=args.backends, explanations=True, **options)
    data = json.loads(found.to_json())
    for row in data["timings"]:
        del row["seconds"]
    data["network"] = name
    data["macs_kept"] = {model: macs / found.macs["dense"] for model, macs in found.macs.items()}
    return data


# -- the page --------------------------------------------------------------------------------------------------------


def summary(data: dict[str, Any]) -> list[str]:
    """For each network, batch and backend: ours, the best of torch-pruning, and whether the aim is met."""
    lines = [
        f"| network | batch | backend | structprune | rounded to 16 | torch-pruning, best of {len(ROUNDED)} | "
        f"default at least {GOAL} |",
        "|---|---:|---|---:|---:|---:|---|",
    ]
    for part in data["parts"]:
        for backend in dict.fromkeys(row["backend"] for row in part["timings"]):
            rows = [row for row in part["timings"] if row["backend"] == backend]
            by_model = {row["model"]: row["efficiency"] for row in rows}
            ours, sixteen = by_model[OURS], by_model.get(OURS_16)
            theirs = max(row["efficiency"] for row in rows if row["model"].startswith("torch-pruning"))
            cells = [MODELS[part["network"]], str(part["batch_size"]), backend, f"{ours:.3f}"]
            cells += ["-" if sixteen is None else f"{sixteen:.3f}", f"{theirs:.3f}"]
            lines.append(f"| {' | '.join(cells)} | {'met' if ours >= GOAL else 'missed'} |")
    return lines


def details(part: dict[str, Any]) -> list[str]:
    """All figures of one network at one batch size."""
    lines = [
        f"## {MODELS[part['network']]}, batch of {part['batch_size']}",
        "",
        "| backend | model | MACs kept | ms | peak MB | speed-up | efficiency |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in part["timings"]:
        kept, gain = part["macs_kept"][row["model"]], row["speedup"]
        cells = [row["backend"], row["model"], f"{kept:.4f}", f"{1e3 * row['median']:.1f}"]
        cells.append("" if row["memory"] is None else f"{row['memory'] / 1e6:.0f}")
        if row["model"] != "dense":
            ends = f"{gain['low'] * kept:.3f} to {gain['high'] * kept:.3f}"
            cells += [f"{gain['ratio']:.2f}", f"{row['efficiency']:.3f} ({ends})"]
        lines.append("| " + " | ".join([*cells, "", ""][:7]) + " |")
    if part["explanations"]:
        lines += ["", "Where less is gained than MACs promise:", ""]
        lines += [f"- {each['text']}" for each in part["explanations"]]
    return [*lines, ""]


def report(data: dict[str, Any]) -> str:
    """The figures as Markdown."""
    facts = data["parts"][0]["environment"]
    packages = {"torch": "torch", "onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
    versions = ", ".join(f"{title} {facts[key]}" for key, title in packages.items() if key in facts)
    lines = [
        "# Speed-up efficiency at half of the MACs",
        "",
        f"{facts['processor']} ({facts['vectors']}), one thread, {data['runs']} runs of each in turns, process time; "
        f"{versions}, torch-pruning {data['versions']['torch-pruning']}. Nothing is set but the target, and in one "
        "row the rounding. Efficiency is the measured speed-up divided by the ratio of MACs; in brackets the 95% "
        "interval.",
        "",
        *summary(data),
        "",
    ]
    for part in data["parts"]:
        lines += details(part)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=[*MODELS], choices=[*MODELS])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--runs", type=int, default=31)
    parser.add_argument("--macs", type=float, default=0.5)
    parser.add_argument("--backends", nargs="+", default=[*BACKENDS])
    parser.add_argument("--memory", action="store_true", help="measure the peak of memory too")
    parser.add_argument("--out", type=Path, default=FILE)
    args = parser.parse_args()
    make_torchvision_importable()
    torch.set_num_threads(1)
    data: dict[str, Any] = {"runs": args.runs, "versions": environment(), "parts": []}
    before = json.loads(args.out.read_text()) if args.out.exists() else data
    if all(before[key] == data[key] for key in ("runs", "versions")):
        data = before
    for name in args.models:
        models = networks(name, args.macs)
        for batch in args.batches:
            others = [part for part in data["parts"] if (part["network"], part["batch_size"]) != (name, batch)]
            data["parts"] = [*others, measure(name, models, batch, args)]
            args.out.write_text(json.dumps(data, indent=1) + "\n")
            args.out.with_suffix(".md").write_text(report(data))
            print("\n".join(details(data["parts"][-1])), flush=True)
    print("\n".join(summary(data)))


if __name__ == "__main__":
    main()
