"""Accuracy at equal measured time: a plan for MACs against a plan for latency, in ONNX Runtime on this CPU.

ResNet-56 on CIFAR-10 is pruned to half its MACs and timed; then it is pruned to that same time. Nothing is trained;
accuracies are raw and with batch norms recalibrated on 2,048 training images. And ResNet-50 at half its time: how far
the prediction is from what is measured. Criteria that look at data see 512 training images.

    python benchmarks/latency.py [--importance thinet] [--scopes per_cost] [--time-scope per_cost] [--axes channels]
"""

from __future__ import annotations

import argparse
import copy
import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from harness import RESULTS
from harness.cifar import accuracy, batches, load_resnet, test_set, train_images
from harness.scores import Scores
from support.torchvision_shim import make_torchvision_importable
from torch import Tensor, nn

import structprune
from structprune.latency.cache import processor
from structprune.latency.measure import DeviceTimer

FILE = RESULTS / "latency.json"
# Of the time of the plan for MACs, the plan for latency is asked to take this share: measured again, times differ by
# about as much, and it is not to be the slower one.
ASKED = 0.98


def accuracies(model: nn.Module, images: Tensor, count: int) -> dict[str, float]:
    """Percent of the first `count` test images that are right, raw and recalibrated on `images`."""
    test, labels = (part[:count] for part in test_set())
    test = test.contiguous(memory_format=torch.channels_last)
    models = {"raw": model, "recalibrated": structprune.recalibrate(model, images.split(128))}
    return {
        name: accuracy(copy.deepcopy(m).to(memory_format=torch.channels_last), test, labels, 100)
        for name, m in models.items()
    }


@cache
def scores(importance: str, depth: int) -> Scores:
    """What channels are worth by 512 training images."""
    model = load_resnet(depth)
    return Scores(
        importance, structprune.DependencyGraph(model, torch.zeros(1, 3, 32, 32)), batches(*train_images(512), 64)
    )


def compare(
    importance: str = "l2",
    *,
    depth: int = 56,
    macs: float = 0.5,
    scope: Any = "local",
    time_scope: Any = "global",
    axes: list[str] | None = None,
    batch: int = 64,
    count: int = 10000,
    latency: structprune.Latency | None = None,
) -> dict[str, Any]:
    """A plan for MACs and one for latency at its measured time; times in milliseconds, accuracies in percent.

    Args:
        importance: what a channel is worth, for both plans, by name.
        depth: of the residual network, 20 or 56.
        macs: the share of the MACs that the first plan keeps.
        scope: of the first plan; the second weighs importance against time.
        time_scope: of the second: ``"global"`` weighs scores over the mean of their group, ``"per_cost"`` as they are.
        axes: what may go, in both plans.
        batch: images in one run.
        count: how many test images accuracies are measured on.
        latency: where time is measured; ONNX Runtime on one thread if not given.
    """
    latency = latency or structprune.Latency(backend="onnxruntime", threads=1)
    model, images = load_resnet(depth), train_images(2048)[0]
    x = images[:batch]
    found: dict[str, Any] = {"importance": importance, "scope": str(scope), "batch": batch}
    found |= {"axes": axes, "count": count}
    asked: Any = {"axes": axes, "importance": scores(importance, depth)}
    by_macs = structprune.plan(model, x, target={"macs": macs}, scope=scope, **asked)
    first = by_macs.apply(model)
    with DeviceTimer(latency, x) as timer:
        dense, taken = timer.networks([model, first], x)
        by_time = structprune.plan(
            model, x, target={"latency": min(1.0, ASKED * taken / dense)}, scope=time_scope, latency=latency, **asked
        )
        second = by_time.apply(model)
        times = timer.networks([model, first, second], x)
    found["dense"] = {"ms": 1e3 * times[0], "macs": by_macs.before.macs}
    for name, plan, slim, seconds in (("macs", by_macs, first, times[1]), ("latency", by_time, second, times[2])):
        found[name] = {
            "ms": 1e3 * seconds,
            "of dense": seconds / times[0],
            "macs": plan.after.macs,
            "settings": dict(plan.settings),
            "widths": {layer.layer: layer.after for layer in plan.layers if "conv" in layer.layer},
            **accuracies(slim, images, count),
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
    return {"target": target, "batch": batch, **plan.settings.measured, "macs": plan.after.macs / plan.before.macs}


def report(found: dict[str, Any]) -> str:
    """The figures as Markdown."""
    lines = ["# Accuracy at equal measured time", "", f"ONNX Runtime, one thread, {found['cpu']}.", ""]
    lines += [
        "Time is that of the process's CPU, since others work on the machine too: the median of 15 runs, in which the "
        "dense network and both pruned ones take turns, as the ratio to the dense one. The plan for latency gets the "
        "measured time of the plan for MACs as its target, or 2 % less. Accuracies are raw and with batch norms "
        "recalibrated on 2,048 training images, on the first test images, as many as column *images* says.",
        "",
    ]
    lines += [
        "| ResNet-56, CIFAR-10 | importance | scope | axes | MACs kept | time kept | raw | recalibrated | images |"
    ]
    lines += ["|---|---|---|---|---:|---:|---:|---:|---:|"]
    for case in found.get("resnet56", []):
        for name in ("macs", "latency"):
            row = case[name]
            scope = case["scope"] if name == "macs" else row["settings"]["scope"]
            lines.append(
                f"| target {name} | {case['importance']} | {scope} | {', '.join(case.get('axes') or ['all'])} "
                f"| {row['macs'] / case['dense']['macs']:.3f} | {row['of dense']:.3f} | {row['raw']:.2f} "
                f"| {row['recalibrated']:.2f} | {case.get('count', 10000)} |"
            )
    lines += ["", "| ResNet-50 | predicted, ms | measured, ms | asked for, ms | off by |", "|---|---:|---:|---:|---:|"]
    for row in found.get("resnet50", []):
        off = row["predicted_ms"] / row["measured_ms"] - 1
        lines.append(
            f"| {row['backend']}, batch {row['batch']} | {row['predicted_ms']:.1f} | {row['measured_ms']:.1f} "
            f"| {row['limit_ms']:.1f} | {off:+.1%} |"
        )
    return "\n".join(lines) + "\n"


def _same(case: dict[str, Any]) -> tuple[Any, ...]:
    return case["importance"], case["scope"], case["latency"]["settings"]["scope"], case.get("axes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=["resnet56", "resnet50"], help="leave the other part as it was")
    parser.add_argument("--scopes", nargs="+", default=["local", "global"], help="of the plan for MACs")
    parser.add_argument("--time-scope", default="global", help="of the plan for latency")
    parser.add_argument("--importance", default="l2")
    parser.add_argument("--axes", nargs="+", help="what may go; all by default")
    parser.add_argument("--images", type=int, default=10000, help="test images to measure accuracy on")
    parser.add_argument("--out", type=Path, default=FILE)
    args = parser.parse_args()
    found = json.loads(args.out.read_text()) if args.out.exists() else {}
    found["cpu"] = processor()
    if args.only != "resnet50":
        for scope in args.scopes:
            case = compare(args.importance, scope=scope, time_scope=args.time_scope, axes=args.axes, count=args.images)
            others = [c for c in found.get("resnet56", []) if _same(c) != _same(case)]
            found["resnet56"] = [*others, case]
            args.out.write_text(json.dumps(found, indent=1))
            print(report(found), flush=True)
    if args.only != "resnet56":
        found["resnet50"] = [predicted()]
    args.out.write_text(json.dumps(found, indent=1) + "\n")
    args.out.with_suffix(".md").write_text(report(found))
    print(report(found))


if __name__ == "__main__":
    main()
