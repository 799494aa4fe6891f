"""L-C against direct compression at equal training, on handwritten digits, over three seeds.

Run ``python benchmarks/schemes.py``; results go to ``results/schemes.*``. It needs scikit-learn, and no other data. It
takes four minutes on one thread.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from statistics import mean
from typing import Any

import torch
from harness import RESULTS
from harness.digits import digits, epochs, lenet_5, lenet_300_100
from harness.environment import as_line, environment
from torch import Tensor, nn

from structprune.search import LC, Compressor, Direct, FilterPrune, Prune, Recover, Scheme

DENSE_EPOCHS, DENSE_RATE, BATCH = 30, 1.2e-3, 50
# 29 steps of L-C, as many epochs of direct training, of as many batches.
STEPS, ITERATIONS, RATE = 30, 30, 0.05
CASES: tuple[tuple[Callable[[], nn.Module], Scheme], ...] = (
    (lenet_300_100, Prune(0.1)),
    (lenet_300_100, Prune(0.05)),
    (lenet_300_100, Prune(0.03)),
    (lenet_5, FilterPrune(0.2)),
    (lenet_5, FilterPrune(0.1)),
)


class Shuffled:
    """Batches in an order that each pass draws anew."""

    def __init__(self, data: tuple[Tensor, Tensor]) -> None:
        self._x, self._y = data

    def __len__(self) -> int:
        return -(-len(self._y) // BATCH)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for picked in torch.randperm(len(self._y)).split(BATCH):
            yield self._x[picked], self._y[picked]


def ways(scheme: Scheme) -> dict[str, Any]:
    """How accuracy is kept; to solve layers again, channels have to go."""
    found: dict[str, Any] = {
        "not trained": Direct(epochs=0),
        "Direct": Direct(epochs=STEPS - 1, lr=RATE, iterations=ITERATIONS),
        "L-C": LC(steps=STEPS, lr=RATE, iterations=ITERATIONS),
    }
    if scheme.structured:
        found["Recover"] = Recover(samples=1000)
    return found


def trained(make: Callable[[], nn.Module], seed: int, data: tuple[Tensor, Tensor]) -> nn.Module:
    torch.manual_seed(seed)
    model = make()
    for _ in epochs(model, data, 0, DENSE_EPOCHS, DENSE_RATE):
        pass
    return model


def rows_of(seed: int, data: dict[str, tuple[Tensor, Tensor]]) -> Iterator[dict[str, Any]]:
    """All cases with one seed."""
    models = {make: trained(make, seed, data["train"]) for make, _ in CASES}
    for make, scheme in CASES:
        for name, optimizer in ways(scheme).items():
            compressor = Compressor(
                models[make],
                scheme=scheme,
                optimizer=optimizer,
                trainloader=Shuffled(data["train"]),
                valloader=[data["choose"]],
                testloader=[data["test"]],
                seed=seed,
            )
            compressor.run()
            found = compressor.statistics
            row = {
                "network": make.__name__,
                "scheme": type(scheme).__name__,
                "density": scheme.density,
                "way": name,
                "seed": seed,
                "dense": found["test"]["dense"],
                "test": found["test"]["compressed"],
                "weights": found["weights"],
                "distance": found["steps"][-1]["distance"],
                "seconds": found["seconds"],
            }
            print(json.dumps(row), flush=True)
            yield row


def markdown(rows: list[dict[str, Any]], seeds: int) -> str:
    lines = [
        "# Schemes",
        "",
        "Made by `python benchmarks/schemes.py`. Networks in the manner of LeNet on the digits of scikit-learn (1,000 "
        "images to train on, 297 to choose the best step by, 500 test images, which are looked at once), trained by "
        f"Adam for {DENSE_EPOCHS} epochs. `Direct` and `L-C` train on equally many batches, {STEPS - 1} x "
        f"{ITERATIONS} of {BATCH}, at a learning rate of {RATE}; L-C with the automatic weight of "
        "its penalty, the last fifth of its steps training what is left. "
        "`Recover` solves layers again on the training images, without labels or training. Test accuracy in %: mean of "
        f"{seeds} seeds, and lowest and highest. {as_line(environment())}.",
        "",
        "| network | scheme | density | dense | not trained | Direct | L-C | Recover |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for make, scheme in CASES:
        case = make.__name__, type(scheme).__name__, scheme.density
        mine = [row for row in rows if (row["network"], row["scheme"], row["density"]) == case]
        dense = mean(row["dense"] for row in mine)
        cells = []
        for name in ("not trained", "Direct", "L-C", "Recover"):
            scores = [row["test"] for row in mine if row["way"] == name]
            cells.append(f"{mean(scores):.1f} ({min(scores):.1f} to {max(scores):.1f})" if scores else "")
        lines.append(f"| {case[0]} | {case[1]} | {case[2]} | {dense:.1f} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    data = digits()
    rows: list[dict[str, Any]] = []
    for seed in range(given.seeds):
        rows += rows_of(seed, data)
        (RESULTS / "schemes.md").write_text(markdown(rows, seed + 1))
        (RESULTS / "schemes.json").write_text(json.dumps({"environment": environment(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
