"""Saves that are killed, saves and loads side by side, bad inputs: what is lost, and what is not refused?

    python benchmarks/robustness.py            # 1,000 kills, in about five minutes
    python benchmarks/robustness.py --kills 50 --seconds 2 --no-write

Each model holds one number in all of its entries, so that a mixture of two saves is seen. Kills come in sequences of up
to five, at random moments of a save; after each one the folder has to hold the save before or the killed one, whole.
Then writers and readers share a folder: no save may fail, and each load has to give one whole model. Last, every public
function is called with bad values for each of its arguments (``benchmarks/bad_inputs.py``).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from bad_inputs import attempts, count
from harness import RESULTS
from harness.environment import environment
from support.torchvision_shim import make_torchvision_importable
from torch import nn

import structprune
from structprune.errors import StructpruneError

WIDTH = 256
LONGEST = 5


def build() -> nn.Module:
    """The model before pruning."""
    return nn.Sequential(nn.Linear(8, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 2))


def of_number(number: int) -> nn.Module:
    """A pruned model all of whose entries are `number`; the plans differ between even and odd ones."""
    model = structprune.prune(build(), torch.zeros(1, 8), ratio=0.5 if number % 2 else 0.25)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(number)
    return model


def number_in(folder: Path) -> int:
    """The number of the model in a folder.

    Raises:
        ValueError: it is a mixture of several.
    """
    model = structprune.load(build, folder)
    values = {value for parameter in model.parameters() for value in parameter.unique().tolist()}
    width = WIDTH // 2 if max(values) % 2 else WIDTH * 3 // 4
    if len(values) != 1 or model[0].out_features != width:
        raise ValueError(f"a model of {sorted(values)} and width {model[0].out_features}")
    return int(values.pop())


# -- kills ------------------------------------------------------------------------------------------------------------


def _save(models: list[nn.Module], number: int, folder: Path, ready: Connection) -> None:
    ready.send(None)
    structprune.save(models[number], folder)


def _killed_save(models: list[nn.Module], number: int, folder: Path, delay: float) -> bool:
    """Save in a process of its own, which is killed `delay` seconds after it began; whether it had not ended before."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.Process(target=_save, args=(models, number, folder, theirs))
    process.start()
    ours.recv()
    time.sleep(delay)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    return process.exitcode == -signal.SIGKILL


def kills(count: int, seed: int = 0) -> dict[str, int]:
    """Kill at least `count` saves in sequences of one to five, and look after each.

    Returns:
        How many were killed, how many folders held the old and the new model afterwards, how many held none
        (``"lost"``), and how many files were left once a save was let to its end.
    """
    rng, found = random.Random(seed), Counter[str]()
    models = [of_number(number) for number in range(LONGEST + 2)]
    with tempfile.TemporaryDirectory() as scratch:
        begun = time.perf_counter()
        for number in range(5):
            structprune.save(models[number], Path(scratch, "timed"))
        longest = 2 * (time.perf_counter() - begun) / 5
        while found["killed"] < count:
            folder = Path(scratch, f"{found['sequences']}")
            structprune.save(models[0], folder)
            before = 0
            for number in range(1, rng.randint(1, LONGEST) + 1):
                killed = _killed_save(models, number, folder, rng.uniform(0, longest))
                try:
                    now = number_in(folder)
                except (StructpruneError, ValueError, OSError):
                    found["killed"] += killed
                    found["lost"] += 1
                    break
                found["lost"] += now not in (before, number)
                if killed:
                    found["killed"] += 1
                    found["new" if now == number else "old"] += 1
                before = now
            structprune.save(models[-1], folder)
            found["lost"] += number_in(folder) != LONGEST + 1
            found["left behind"] += len(list(folder.iterdir())) - 2
            found["sequences"] += 1
    return dict.fromkeys(("killed", "sequences", "old", "new", "lost", "left behind"), 0) | dict(found)


# -- side by side -----------------------------------------------------------------------------------------------------


def _writing(number: int, folder: Path, until: float, told: Connection) -> None:
    model, found = of_number(number), Counter[str]()
    while time.time() < until:
        try:
            structprune.save(model, folder)
            found["saves"] += 1
        except (StructpruneError, OSError):
            found["saves that failed"] += 1
    told.send(found)


def _reading(number: int, folder: Path, until: float, told: Connection) -> None:
    found = Counter[str]()
    while time.time() < until:
        try:
            number_in(folder)
            found["loads"] += 1
        except (StructpruneError, ValueError, OSError):
            found["loads that failed"] += 1
    told.send(found)


def side_by_side(seconds: float, writers: int = 4, readers: int = 4) -> dict[str, int]:
    """Let processes save to one folder and load from it for some seconds; counts of what succeeded and failed."""
    found = Counter[str](dict.fromkeys(("saves", "saves that failed", "loads", "loads that failed"), 0))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "shared")
        structprune.save(of_number(0), folder)
        until = time.time() + seconds
        jobs: list[Callable[..., None]] = [_writing] * writers + [_reading] * readers
        pipes = [multiprocessing.Pipe() for _ in jobs]
        processes = [
            multiprocessing.Process(target=job, args=(number, folder, until, theirs))
            for number, (job, (_, theirs)) in enumerate(zip(jobs, pipes, strict=True))
        ]
        for process in processes:
            process.start()
        for ours, _ in pipes:
            found.update(ours.recv())
        for process in processes:
            process.join()
        number_in(folder)
        found["left behind"] = len(list(folder.iterdir())) - 2
    return dict(found)


# -- the report -------------------------------------------------------------------------------------------------------


def as_markdown(result: dict[str, Any]) -> str:
    """The counts as two sentences and a table."""
    rows = [
        ("saves killed, in sequences of up to five", result["kills"]["killed"]),
        ("folders that held the save before", result["kills"]["old"]),
        ("folders that held the killed save", result["kills"]["new"]),
        ("folders that held neither: **lost**", result["kills"]["lost"]),
        ("files left once a save had ended", result["kills"]["left behind"]),
        ("saves of 4 writers to one folder", result["side by side"]["saves"]),
        ("of them failed", result["side by side"]["saves that failed"]),
        ("loads of 4 readers meanwhile", result["side by side"]["loads"]),
        ("loads that failed or gave a mixture", result["side by side"]["loads that failed"]),
        ("files left at the end", result["side by side"]["left behind"]),
        ("calls of public functions with one bad value", result["bad inputs"]["calls"]),
        ("of them accepted", result["bad inputs"]["accepted"]),
        ("that raised an error of torch or Python", result["bad inputs"]["raw"]),
        ("whose error does not say what was wrong", result["bad inputs"]["unclear"]),
        ("after which the model was another", result["bad inputs"]["touched"]),
    ]
    lines = ["| | count |", "|---|--:|", *(f"| {name} | {count:,} |" for name, count in rows)]
    head = (
        "# Robustness\n\nMade by `python benchmarks/robustness.py`: processes that save are killed (SIGKILL) at random "
        f"moments, {result['seconds']:g} seconds of writers and readers that share a folder, and bad inputs to "
        "every public function, one argument at a time.\n\n"
    )
    return head + "\n".join(lines) + "\n"


def main() -> None:
    """Run both, print the table, and write it to ``benchmarks/results``."""
    make_torchvision_importable()  # transformers, in which folders are pruned, asks for it
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-write", action="store_true", help="print the table only")
    args = parser.parse_args()
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork")
    result = {
        "kills": kills(args.kills, args.seed),
        "seconds": args.seconds,
        "side by side": side_by_side(args.seconds),
        "bad inputs": count(list(attempts())),
        "environment": environment(),
    }
    text = as_markdown(result)
    print(text)
    if not args.no_write:
        path = RESULTS / "robustness"
        path.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        path.with_suffix(".md").write_text(text, encoding="utf-8")
    bad = result["bad inputs"]["calls"] and sum(result["bad inputs"].values()) - result["bad inputs"]["calls"]
    sys.exit(bool(result["kills"]["lost"] or result["side by side"]["loads that failed"] or bad))


if __name__ == "__main__":
    main()
