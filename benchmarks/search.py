"""The fastest ResNet-20 within half a point of the dense one, by measured latency: a search, and what it is beside.

CIFAR-10, ONNX Runtime, one thread, a batch of 16. No labels are used to prune or recover; `structprune.optimize` sees
the labels of the first 2,000 test images through its `evaluate`. What is found is then judged on the other 8,000,
beside uniform pruning of equal measured speed that is recovered in the same way, and torch-pruning's global magnitude
pruner at equal speed, raw and with its norms recalibrated.

Run from the root: ``python benchmarks/search.py``; ``--images``, ``--trials`` and ``--rounds`` say how long it takes.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch
from harness import RESULTS, cifar
from harness.environment import as_line, environment
from recovery import CASES, peer_pruned
from torch import Tensor, nn

import structprune
from structprune.latency.measure import DeviceTimer, Latency

FILE, PAGE, FIGURE = RESULTS / "search.json", RESULTS / "search.md", RESULTS / "search.png"
BATCH, EPS, JUDGED = 16, 0.5, 2000
LEVELS = tuple(n / 16 for n in range(1, 15))
CASE = next(case for case in CASES if case.model == "resnet20")


def at_speed(make: Callable[[float], nn.Module], share: Callable[[nn.Module], float], wanted: float) -> nn.Module:
    """The network of the smallest ratio that takes no more than a share of the time, by bisection."""
    low, high = 0.0, 0.9
    for _ in range(5):
        middle = (low + high) / 2
        low, high = (low, middle) if share(make(middle)) <= wanted else (middle, high)
    return make(high)


def run(images: int, trials: int, rounds: int) -> dict[str, Any]:
    """Search, and what it is compared with."""
    model = cifar.load_resnet(20)
    calibration = cifar.train_images(images, 0)[0].contiguous(memory_format=torch.channels_last)
    data: list[Tensor] = list(calibration.split(128))
    seen, labels = cifar.test_set()
    x = calibration[:BATCH].contiguous()
    begun = time.process_time()
    latency = Latency(backend="onnxruntime", threads=1, runs=30)
    library = structprune.library(
        model, x, data, levels=LEVELS, distance="squared_error", rows=16384, axes=("channels",), round_to=1
    )
    how = structprune.Searching(
        warm=trials, latency=latency, rounds=rounds, rows=16384, space=structprune.Space(remaining=(0.3, 0.95))
    )
    found = structprune.optimize(
        model, x, data, lambda slim: cifar.accuracy(slim, seen[:JUDGED], labels[:JUDGED]), eps=EPS, minimize="latency",
        trials=trials, using=library, how=how,
    )  # fmt: skip
    seconds = time.process_time() - begun
    print(found, flush=True)
    found.plot(FIGURE)

    def judged(slim: nn.Module) -> float:
        return cifar.accuracy(slim, seen[JUDGED:], labels[JUDGED:])

    def recovered(slim: nn.Module) -> nn.Module:
        return structprune.recover(slim, model, data, rows=16384, rounds=rounds)

    def uniform(ratio: float) -> nn.Module:
        return structprune.plan(model, x, ratio=ratio, axes=("channels",), round_to=1).apply(model)

    rows = [{"network": "dense", "latency": 1.0, "macs": 1.0, "accuracy": judged(model)}]
    with DeviceTimer(latency, x) as timer:

        def share(slim: nn.Module) -> float:
            dense, other = timer.networks([model, slim], x)
            return other / dense

        whole = structprune.cost(model, x).macs
        wanted = 1.0 if found.best is None or found.best.cost is None else found.best.cost
        theirs = at_speed(lambda ratio: peer_pruned(CASE, model, x, ratio), share, wanted)
        same = at_speed(uniform, share, wanted)
        named = {"uniform, recovered": recovered(same), "torch-pruning": theirs}
        named["torch-pruning, norms recalibrated"] = structprune.recalibrate(theirs, data)
        if found.model is not None:
            named = {"structprune.optimize": found.model, **named}
        for name, slim in named.items():
            row = {"network": name, "latency": share(slim), "macs": structprune.cost(slim, x).macs / whole}
            rows.append({**row, "accuracy": judged(slim)})
            print(rows[-1], flush=True)
    told = [
        {
            "point": dict(t.point),
            "state": t.state,
            "why": t.why,
            "macs": t.share,
            "latency": t.cost,
            "quality": t.quality,
        }
        for t in found.trials
    ]
    asked = {"images": images, "trials": trials, "rounds": rounds, "cpu_seconds": round(seconds)}
    return {"asked": asked, "evaluations": found.evaluations, "rows": rows, "trials": told, "versions": environment()}


def page(data: dict[str, Any]) -> str:
    """The results as tables."""
    asked = data["asked"]
    lines = [
        "# The fastest network within half a point",
        "",
        (__doc__ or "").partition("\n\n")[2].partition("Run from")[0].strip(),
        "",
    ]
    lines += [
        f"{asked['images']:,} images to calibrate, {asked['trials']} trials of which {data['evaluations']} were "
        f"evaluated, {asked['cpu_seconds']} CPU seconds for library and search.",
        "",
        "| network | time, share of the dense one's | MACs | accuracy on 8,000 other test images |",
        "|---|--:|--:|--:|",
    ]
    lines += [f"| {r['network']} | {r['latency']:.3f} | {r['macs']:.3f} | {r['accuracy']:.2f}% |" for r in data["rows"]]
    lines += ["", "| trial | remaining MACs | time | accuracy on 2,000 | |", "|--:|--:|--:|--:|---|"]
    for number, t in enumerate(data["trials"]):
        numbers = ["" if t[k] is None else f"{t[k]:.3f}" for k in ("macs", "latency")]
        quality = "" if t["quality"] is None else f"{t['quality']:.2f}%"
        lines.append(f"| {number} | {numbers[0]} | {numbers[1]} | {quality} | {t['state']} {t['why']} |")
    return "\n".join([*lines, "", as_line(data["versions"]), ""])


def main() -> None:
    """Search and compare, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--trials", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    data = run(given.images, given.trials, given.rounds)
    FILE.write_text(json.dumps(data, indent=1) + "\n")
    PAGE.write_text(page(data))


if __name__ == "__main__":
    main()
