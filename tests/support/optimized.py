"""A small network with something to lose, for the tests of `structprune.optimize`; run as a script it is a worker."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import torch
from torch import nn

import structprune

EPS = 0.05


def task():
    """A network, its data, and how often it agrees with itself."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)).eval()
    x = torch.randn(160, 6)
    with torch.no_grad():
        goal = model(x).argmax(1)
    return model, x, lambda slim: float((slim(x).argmax(1) == goal).float().mean())


def optimized(strategy="tpe", trials=6, evaluate=None, per_group=False, patience=60.0, **given):
    model, x, agreement = task()
    how = structprune.Searching(
        strategy=strategy, warm=3, rounds=0, patience=patience, space=structprune.Space(per_group=per_group)
    )
    given = {"minimize": "macs", "round_to": 1, **given}
    return structprune.optimize(
        model, x[:1], list(x.split(40)), evaluate or agreement, eps=EPS, trials=trials, how=how, **given
    )


def work(storage: str, told: str, seconds: float) -> None:
    """A worker whose evaluations take long; it says when one begins, and may be killed in it."""
    torch.set_num_threads(1)
    _, _, agreement = task()

    def evaluate(slim):
        with Path(told).open("a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(seconds)
        return agreement(slim)

    optimized(trials=6, evaluate=evaluate, patience=1.0, storage=storage, study_name="s")


def kill(process) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()


if __name__ == "__main__":
    work(sys.argv[1], sys.argv[2], float(sys.argv[3]))
