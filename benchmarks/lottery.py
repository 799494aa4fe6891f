"""Lottery tickets on handwritten digits: rewound, reinitialised and randomly masked, over three seeds.

Run ``python benchmarks/lottery.py``; results go to ``results/lottery.*``. It needs scikit-learn, and no other data.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from statistics import mean

import torch
from harness import RESULTS
from harness.digits import accuracy, digits, epochs, lenet_300_100
from harness.environment import as_line, environment

from structprune.masks import Lottery, lottery
from structprune.masks.tickets import Draw

ROUNDS, EPOCHS, RATE = 10, 30, 1.2e-3
VARIANTS = ("ticket", "reinitialised", "random mask")


def main() -> None:
    """Draw all of them, or go on with what was drawn before."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--folder", default=None, help="keep what is found there, to go on after a kill")
    given = parser.parse_args()
    torch.set_num_threads(1)
    data = digits()

    def train(model, start):
        yield from epochs(model, data["train"], start, EPOCHS, RATE)

    def evaluate(model):
        return accuracy(model, data["test"])

    found: list[Lottery] = []
    for seed in range(given.seeds):
        folder = None if given.folder is None else f"{given.folder}/{seed}"
        found.append(lottery(lenet_300_100, train, evaluate, ROUNDS, 0, amount=0.2, folder=folder, seed=100 * seed))
        print(found[-1], flush=True)
    joined = [
        Draw(draw.variant, draw.round, draw.remaining, mean(one.draws[number].score for one in found))
        for number, draw in enumerate(found[0].draws)
    ]
    curve = Lottery(tuple(joined), {})
    curve.plot(RESULTS / "lottery.png", "accuracy, %")
    dense = joined[0].score
    lines = [
        "# Lottery tickets",
        "",
        "Made by `python benchmarks/lottery.py`. LeNet-300-100 on the digits of scikit-learn (1,000 training images, "
        f"500 test images, 8 x 8), {EPOCHS} epochs of Adam; a fifth of what is left goes in each round by magnitude "
        f"over the model, rewound to initialisation. Test accuracy in %, mean of {given.seeds} seeds. "
        f"{as_line(environment())}.",
        "",
        "| weights left | ticket | reinitialised | random mask |",
        "|---:|---:|---:|---:|",
    ]
    for number in range(ROUNDS + 1):
        row = {d.variant: d for d in joined if d.round == number}
        scores = " | ".join(f"{row[v].score:.2f}" if v in row else "" for v in VARIANTS)
        lines.append(f"| {row['ticket'].remaining:.1%} | {scores} |")
    kept = [d for d in joined if d.variant == "ticket" and d.remaining > 0.2]
    worst = min(d.score - dense for d in kept)
    lines += ["", f"Down to 20% of the weights the rewound ticket is at worst {worst:+.2f} points from dense.", ""]
    lines += ["![accuracy over weights left](lottery.png)"]
    (RESULTS / "lottery.md").write_text("\n".join(lines) + "\n")
    record = {"environment": environment(), "draws": [[asdict(d) for d in one.draws] for one in found]}
    (RESULTS / "lottery.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
