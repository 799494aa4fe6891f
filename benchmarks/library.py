"""Does a library of widths, or evolution over it, choose better than `Reconstruction`? ResNet-20 at half of its MACs.

CIFAR-10, no labels: the same images choose channels and recover. Run from the root: ``python benchmarks/library.py``;
``--images`` and ``--rounds`` say how long it takes (some minutes by default).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from typing import Any

import torch
from harness import RESULTS, cifar
from harness.environment import as_line, environment
from recovery import CASES
from torch import Tensor, nn

import structprune

FILE, PAGE = RESULTS / "library.json", RESULTS / "library.md"
CASE = next(case for case in CASES if case.model == "resnet20")
LEVELS = tuple(n / 16 for n in range(1, 15))
TARGET = {"macs": 0.5}
ROWS, TESTED = 16384, 2000


def networks(model: nn.Module, data: list[Tensor], rounds: int) -> Iterator[tuple[str, nn.Module, float]]:
    """Each way's name, its network, and the CPU seconds that choosing it took."""
    x = data[0][:1].contiguous()
    shared: dict[str, Any] = {"axes": CASE.axes, "round_to": 1}

    def recovered(slim: nn.Module) -> nn.Module:
        return structprune.recover(slim, model, data, rows=ROWS, rounds=rounds)

    begin = time.process_time()
    criterion = structprune.Reconstruction(
        per="macs", probes=CASE.probes, rows=ROWS, axes=CASE.axes, distance=CASE.distance
    )
    chosen = criterion.fit(structprune.DependencyGraph(model, x), data)
    plan = structprune.plan(model, x, importance=chosen, scope=chosen, target=TARGET, **shared)
    seconds = time.process_time() - begin
    yield "Reconstruction, recover", recovered(plan.apply(model)), seconds
    begin = time.process_time()
    library = structprune.library(model, x, data, levels=LEVELS, distance="squared_error", rows=ROWS, **shared)
    plan = library.plan(target=TARGET)
    seconds = time.process_time() - begin
    assembled = library.assemble(plan)
    yield "library, as assembled", assembled, seconds
    yield "library, recover", recovered(plan.apply(model)), seconds
    yield "library, assembled, recover", recovered(assembled), seconds
    begin = time.process_time()
    plan = library.evolve(data, target=TARGET).plan
    seconds += time.process_time() - begin
    yield "library, evolve, as assembled", library.assemble(plan), seconds
    yield "library, evolve, recover", recovered(plan.apply(model)), seconds


def run(images: int, rounds: int) -> dict[str, Any]:
    """All rows."""
    model, (pictures, labels) = cifar.load_resnet(20), (part[:TESTED] for part in cifar.test_set())
    calibration = cifar.train_images(images, 0)[0].contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        wanted = torch.cat([model(part) for part in pictures.split(500)])
    rows: list[dict[str, Any]] = []
    for name, slim, seconds in networks(model, list(calibration.split(128)), rounds):
        with torch.no_grad():
            ours = torch.cat([slim(part) for part in pictures.split(500)])
        error = float((ours - wanted).norm() / wanted.norm())
        accuracy = cifar.accuracy(slim, pictures, labels)
        rows.append({"way": name, "error": error, "accuracy": accuracy, "seconds": round(seconds)})
        print(rows[-1], flush=True)
    dense = cifar.accuracy(model, pictures, labels)
    return {"images": images, "rounds": rounds, "dense": dense, "rows": rows, "versions": environment()}


def page(data: dict[str, Any]) -> str:
    """The results as a table."""
    lines = [
        "# A library of widths beside Reconstruction", "",
        f"ResNet-20 on CIFAR-10 at half of its multiply-accumulates, {data['images']:,} training images without "
        f"labels, {data['rounds']} rounds of joint solving, one draw; {TESTED:,} test images (dense "
        f"{data['dense']:.2f}%; a standard error is 0.7 points). Errors are those of the outputs on them.",
        "", "| | output error | accuracy | CPU s before recovery |", "|---|--:|--:|--:|",
    ]  # fmt: skip
    lines += [f"| {r['way']} | {r['error']:.4f} | {r['accuracy']:.2f}% | {r['seconds']} |" for r in data["rows"]]
    return "\n".join([*lines, "", as_line(data["versions"]), ""])


def main() -> None:
    """Measure all rows and write them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    data = run(given.images, given.rounds)
    FILE.write_text(json.dumps(data, indent=1) + "\n")
    PAGE.write_text(page(data))


if __name__ == "__main__":
    main()
