"""Han's loop on a LeNet for digits: how many connections it needs, and what of that becomes speed once they are cut.

Run ``python benchmarks/connections.py``; results go to ``results/connections.*``. It needs scikit-learn, no other data.
"""

from __future__ import annotations

import copy
import json
import time
from dataclasses import asdict

import torch
from harness import RESULTS
from harness.digits import accuracy, digits, epochs, lenet_5
from harness.environment import as_line, environment

from structprune import masks

EPOCHS, RETRAIN, RATE, ROUNDS = 40, 25, 1e-3, 10
L2 = 1e-4
PUBLISHED = 12.0


def milliseconds(models, x, times=60):
    """The least of several times of each, in turns."""
    found = [float("inf")] * len(models)
    with torch.no_grad():
        for _ in range(times):
            for number, model in enumerate(models):
                began = time.perf_counter()
                model(x)
                found[number] = min(found[number], 1e3 * (time.perf_counter() - began))
    return found


def main() -> None:
    """Train, run the loop, cut, and write the results."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    data = digits()
    x = data["test"][0]

    def train(model, count=RETRAIN, rate=RATE / 2):
        for _ in epochs(model, data["train"], 0, count, rate, lambda m: masks.weight_penalty(m, l2=L2)):
            pass

    def evaluate(model):
        return accuracy(model, data["choose"])

    model = lenet_5()
    train(model, EPOCHS, RATE)
    dense, before = copy.deepcopy(model).eval(), accuracy(model, data["test"])
    found = masks.learn_connections(model, train, evaluate, rounds=ROUNDS, tolerance=0.7, drop=0.35)
    model.eval()
    print(found, f"{found.times_fewer:.1f} times fewer", flush=True)
    after = accuracy(model, data["test"])
    compaction = masks.compaction(model, x[:1])
    slim = compaction.model
    with torch.no_grad():
        difference = float((slim(x) - model(x)).abs().max() / model(x).abs().max())
    params = [sum(p.numel() for p in m.parameters()) for m in (dense, slim)]
    plain = masks.remove(copy.deepcopy(model))
    times = milliseconds([dense, plain, slim], x)
    facts = environment()
    kept = {name: f"{int(mask.sum()):,} of {mask.numel():,}" for name, mask in found.mask.items()}
    lines = [
        "# Learning both weights and connections",
        "",
        "Made by `python benchmarks/connections.py`. LeNet (20 and 50 channels, 500 neurons) on the digits of "
        f"scikit-learn: {EPOCHS} epochs, then rounds of pruning by the sensitivity of each layer and {RETRAIN} epochs "
        f"of retraining, L2 {L2:g}, dropout scaled. 297 images choose, 500 others test. {as_line(facts)}. Times "
        "are the least of 60 for 500 images, on a busy machine.",
        "",
        f"{found.times_fewer:.1f} times fewer connections ({found.mask.kept:,} of {found.mask.entries:,}) after "
        f"{len(found.rounds)} rounds; published: {PUBLISHED:.0f} times on LeNet. Test accuracy {before:.1f}% before, "
        f"{after:.1f}% after.",
        "",
        "| | connections or parameters | test, % | ms |",
        "|---|---:|---:|---:|",
        f"| dense | {params[0]:,} | {before:.1f} | {times[0]:.2f} |",
        f"| zeros in the dense network | {found.mask.kept:,} | {after:.1f} | {times[1]:.2f} |",
        f"| cut (`masks.compact`) | {params[1]:,} | {accuracy(slim, data['test']):.1f} | {times[2]:.2f} |",
        "",
        f"Cut minus masked: {difference:.0e} of the largest output (float32). "
        f"{found.times_fewer:.1f} times fewer connections are {params[0] / params[1]:.1f} times fewer parameters in "
        f"dense layers and {times[1] / times[2]:.2f} times faster: only units that lose all connections can go.",
        "",
        "| round | connections left | pruned, % | retrained, % | thresholds in standard deviations |",
        "|---:|---:|---:|---:|---|",
    ]
    for number, one in enumerate(found.rounds, 1):
        thresholds = ", ".join(f"{name} {quality:g}" for name, quality in one.qualities.items())
        lines.append(f"| {number} | {one.remaining:.1%} | {one.pruned:.1f} | {one.retrained:.1f} | {thresholds} |")
    lines += ["", "Left: " + ", ".join(f"`{name}` {text}" for name, text in kept.items()) + "."]
    (RESULTS / "connections.md").write_text("\n".join(lines) + "\n")
    record = {
        "environment": facts, "times_fewer": found.times_fewer, "test": [before, after], "params": params,
        "milliseconds": times, "rounds": [asdict(one) for one in found.rounds], "difference": difference,
    }  # fmt: skip
    (RESULTS / "connections.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
