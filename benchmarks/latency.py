"""Accuracy at equal measured time: a plan for MACs against a plan for latency, in ONNX Runtime on this CPU.

ResNet-56 on CIFAR-10 is pruned to half its MACs and timed; then it is pruned to that same time. Nothing is trained;
accuracies are raw and with batch norms recalibrated on 2,048 training images. And ResNet-50 at half its time: how far
the prediction is from what is measured. Run from the root: ``python benchmarks/latency.py``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from harness import RESULTS
from harness.cifar import accuracy, load_resnet, recalibrated, train_images
from support.torchvision_shim import make_torchvision_importable
from torch import Tensor, nn

import structprune
from structprune.latency.cache import processor
from structprune.latency.measure import DeviceTimer

FILE = RESULTS / "latency.json"


def accuracies(model: nn.Module, images: Tensor) -> dict[str, float]:
    """Percent of the test set that is right, raw and recalibrated on `images`."""
    return {"raw": accuracy(model), "recalibrated": accuracy(recalibrated(model, images))}


def compare(
    importance: Any = "l2",
    *,
    depth: int = 56,
    macs: float = 0.5,
    scope: Any = "local",
    batch: int = 64,
    latency: structprune.Latency | None = None,
) -> dict[str, Any]:
    """A plan for MACs and one for latency at its measured time; times in milliseconds, accuracies in percent.

    Args:
        importance: what a channel is worth, for both plans.
        depth: of the residual network, 20 or 56.
        macs: the share of the MACs that the first plan keeps.
        scope: of the first plan; the second weighs importance against time.
        batch: images in one run.
        latency: where time is measured; ONNX Runtime on one thread if not given.
    """
    latency = latency or structprune.Latency(backend="onnxruntime", threads=1)
    model, images = load_resnet(depth), train_images(2048)[0]
    x = images[:batch]
    found: dict[str, Any] = {"importance": str(importance), "scope": str(scope), "batch": batch}
    by_macs = structprune.plan(model, x, target={"macs": macs}, scope=scope, importance=importance)
    first = by_macs.apply(model)
    with DeviceTimer(latency, x) as timer:
        dense, taken = timer.networks([model, first], x)
        by_time = structprune.plan(
            model, x, target={"latency": min(1.0, taken / dense)}, importance=importance, latency=latency
        )
        second = by_time.apply(model)
        times = timer.networks([model, first, second], x)
    found["dense"] = {"ms": 1e3 * times[0], "macs": by_macs.before.macs}
    found["dense"] |= {"raw": accuracy(model)}
    for name, plan, slim, seconds in (("macs", by_macs, first, times[1]), ("latency", by_time, second, times[2])):
        found[name] = {
            "ms": 1e3 * seconds,
            "of dense": seconds / times[0],
            "macs": plan.after.macs,
            "settings": dict(plan.settings),
            "widths": {layer.layer: layer.after for layer in plan.layers if "conv" in layer.layer},
            **accuracies(slim, images),
        }
    return found


def predicted(target: float = 0.5, batch: int = 1, latency: structprune.Latency | None = None) -> dict[str, Any]:
    """ResNet-50 at a share of its time: predicted and measured."""
    make_torchvision_importable()
    import torchvision

    torch.manual_seed(0)
    model = torchvision.models.resnet50().eval()
    latency = latency or structprune.Latency(backend="onnxruntime", threads=1, runs=9)
    plan = structprune.plan(model, torch.randn(batch, 3, 224, 224), target={"latency": target}, latency=latency)
    return {"target": target, "batch": batch, **plan.settings["latency"], "macs": plan.after.macs / plan.before.macs}


def report(found: dict[str, Any]) -> str:
    """The figures as Markdown."""
    lines = ["# Accuracy at equal measured time", "", f"ONNX Runtime, one thread, {found['cpu']}.", ""]
    lines += ["| ResNet-56, CIFAR-10 | importance | scope | MACs kept | time kept | raw | recalibrated |"]
    lines += ["|---|---|---|---:|---:|---:|---:|"]
    for case in found.get("resnet56", []):
        for name in ("macs", "latency"):
            row = case[name]
            scope = case["scope"] if name == "macs" else row["settings"]["scope"]
            lines.append(
                f"| target {name} | {case['importance']} | {scope} | {row['macs'] / case['dense']['macs']:.3f} "
                f"| {row['of dense']:.3f} | {row['raw']:.2f} | {row['recalibrated']:.2f} |"
            )
    lines += ["", "| ResNet-50 | predicted, ms | measured, ms | asked for, ms | off by |", "|---|---:|---:|---:|---:|"]
    for row in found.get("resnet50", []):
        off = row["predicted_ms"] / row["measured_ms"] - 1
        lines.append(
            f"| {row['backend']}, batch {row['batch']} | {row['predicted_ms']:.1f} | {row['measured_ms']:.1f} "
            f"| {row['limit_ms']:.1f} | {off:+.1%} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=["resnet56", "resnet50"], help="leave the other part as it was")
    parser.add_argument("--scopes", nargs="+", default=["local", "global"])
    parser.add_argument("--out", type=Path, default=FILE)
    args = parser.parse_args()
    found = json.loads(args.out.read_text()) if args.out.exists() else {}
    found["cpu"] = processor()
    if args.only != "resnet50":
        found["resnet56"] = []
        for scope in args.scopes:
            found["resnet56"].append(compare(scope=scope))
            args.out.write_text(json.dumps(found, indent=1))
            print(report(found), flush=True)
    if args.only != "resnet56":
        found["resnet50"] = [predicted()]
    args.out.write_text(json.dumps(found, indent=1) + "\n")
    args.out.with_suffix(".md").write_text(report(found))
    print(report(found))


if __name__ == "__main__":
    main()
