"""The fastest network within what may be lost, by measured latency: a search, and what it is beside.

CIFAR-10, ONNX Runtime, one thread, a batch of 16. No labels are used to prune or recover; `structprune.optimize` sees
the labels of the first 2,000 test images through its `evaluate`. What is found is then judged on the other 8,000,
beside uniform pruning of equal measured speed that is recovered in the same way, and torch-pruning's magnitude pruner
at equal speed, raw and with its norms recalibrated. Half a point may be lost on the images that the search sees.
VGG-19 is trained by ``benchmarks/train_vgg.py``.

Run from the root: ``python benchmarks/search.py``; ``--networks``, ``--images`` and ``--trials`` say how long it takes.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from harness import RESULTS, cifar
from harness.environment import as_line, environment
from harness.peer import last_layers
from harness.peer import prune as peer_prune
from harness.vgg import load_vgg
from recovery import CASES, peer_pruned
from torch import Tensor, nn

import structprune
from structprune.latency.measure import DeviceTimer, Latency

FILE, PAGE = RESULTS / "search.json", RESULTS / "search.md"
BATCH, JUDGED = 16, 2000


def peer_vgg(model: nn.Module, x: Tensor, ratio: float) -> nn.Module:
    """torch-pruning's magnitude pruner, which thins each layer by the same ratio."""
    slim = copy.deepcopy(model)
    peer_prune(slim, x, ratio, last_layers(slim, x), {})
    return slim


@dataclass(frozen=True)
class Study:
    """What is searched, and how far.

    Attributes:
        title: for people.
        load: the trained network.
        peer: torch-pruning's network of a ratio.
        eps: points that may be lost on the images that the search sees.
        levels: of the library: shares of the channels that go.
        rounds: of joint solving.
    """

    title: str
    load: Callable[[], nn.Module]
    peer: Callable[[nn.Module, Tensor, float], nn.Module]
    eps: float
    levels: tuple[float, ...]
    rounds: int


def resnet(depth: int, levels: int) -> Study:
    """A ResNet, of whose channels 1, 2, ... of so many parts may go in each group."""
    case = next(case for case in CASES if case.model == f"resnet{depth}")
    shares = tuple(n / levels for n in range(1, min(levels, 15)))
    return Study(f"ResNet-{depth}", partial(cifar.load_resnet, depth), partial(peer_pruned, case), 0.5, shares, 2)


STUDIES = {
    "resnet20": resnet(20, 16),
    "resnet56": resnet(56, 8),
    # Its layers of 4,608 features take seconds each: fewer levels, and none solved together with its producers.
    "vgg19": Study("VGG-19", load_vgg, peer_vgg, 0.5, (1 / 4, 1 / 2, 5 / 8, 3 / 4, 7 / 8), 0),
}


def at_speed(make: Callable[[float], nn.Module], share: Callable[[nn.Module], float], wanted: float) -> nn.Module:
    """The network of the smallest ratio that takes no more than a share of the time, by bisection."""
    low, high = 0.0, 0.9
    for _ in range(5):
        middle = (low + high) / 2
        low, high = (low, middle) if share(make(middle)) <= wanted else (middle, high)
    return make(high)


def run(name: str, images: int, trials: int) -> dict[str, Any]:
    """Search, and what it is compared with."""
    study = STUDIES[name]
    model, rounds = study.load(), study.rounds
    calibration = cifar.train_images(images, 0)[0].contiguous(memory_format=torch.channels_last)
    data: list[Tensor] = list(calibration.split(128))
    seen, labels = cifar.test_set()
    x = calibration[:BATCH].contiguous()
    begun = time.process_time()
    latency = Latency(backend="onnxruntime", threads=1, runs=30)
    library = structprune.library(
        model, x, data, levels=study.levels, distance="squared_error", rows=16384, axes=("channels",), round_to=1
    )
    how = structprune.Searching(
        warm=trials, latency=latency, rounds=rounds, rows=16384, space=structprune.Space(remaining=(0.1, 0.95))
    )
    found = structprune.optimize(
        model,
        x,
        data,
        lambda slim: cifar.accuracy(slim, seen[:JUDGED], labels[:JUDGED]),
        eps=study.eps,
        minimize="latency",
        trials=trials,
        using=library,
        how=how,
    )
    seconds = time.process_time() - begun
    print(found, flush=True)
    found.plot(RESULTS / f"search_{name}.png")

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
        theirs = at_speed(partial(study.peer, model, x), share, wanted)
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
    asked = {"images": images, "trials": trials, "eps": study.eps, "cpu_seconds": round(seconds)}
    return {"asked": asked, "evaluations": found.evaluations, "rows": rows, "trials": told, "versions": environment()}


def section(name: str, data: dict[str, Any]) -> list[str]:
    """The results of one network as tables."""
    asked = data["asked"]
    lines = [
        f"## {STUDIES[name].title}",
        "",
        f"At most {asked['eps']:g} points lost; {asked['images']:,} images to calibrate, {asked['trials']} trials of "
        f"which {data['evaluations']} were evaluated, {asked['cpu_seconds']} CPU seconds for library and search.",
        "",
        "| network | time, share of the dense one's | times as fast | MACs | accuracy on 8,000 other test images |",
        "|---|--:|--:|--:|--:|",
    ]
    lines += [
        f"| {r['network']} | {r['latency']:.3f} | {1 / r['latency']:.2f} | {r['macs']:.3f} | {r['accuracy']:.2f}% |"
        for r in data["rows"]
    ]
    lines += ["", "| trial | remaining MACs | time | accuracy on 2,000 | |", "|--:|--:|--:|--:|---|"]
    for number, t in enumerate(data["trials"]):
        numbers = ["" if t[k] is None else f"{t[k]:.3f}" for k in ("macs", "latency")]
        quality = "" if t["quality"] is None else f"{t['quality']:.2f}%"
        lines.append(f"| {number} | {numbers[0]} | {numbers[1]} | {quality} | {t['state']} {t['why']} |")
    return [*lines, "", as_line(data["versions"]), ""]


def page(data: dict[str, Any]) -> str:
    """All results."""
    told = (__doc__ or "").partition("\n\n")[2].partition("Run from")[0].strip()
    lines = ["# The fastest network within what may be lost", "", told, ""]
    return "\n".join([*lines, *(line for name, each in data.items() for line in section(name, each))])


def main() -> None:
    """Search and compare, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", nargs="+", choices=list(STUDIES), default=list(STUDIES))
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--trials", type=int, default=10)
    given = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = json.loads(FILE.read_text()) if FILE.exists() else {}
    for name in given.networks:
        results[name] = run(name, given.images, given.trials)
        results = {known: results[known] for known in STUDIES if known in results}
        FILE.write_text(json.dumps(results, indent=1) + "\n")
        PAGE.write_text(page(results))


if __name__ == "__main__":
    main()
