"""Recurrent networks pruned and recovered without training: with their gates solved, and with the layers behind alone.

Run ``python benchmarks/recurrent.py``; results go to ``results/recurrent.*``. It needs scikit-learn; the networks on
rows of CIFAR-10 need that data (see `harness.cifar`), and are left out without it. Calibration sees training samples
without labels; the test set is for the last measurement alone.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import mean, stdev
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from harness import RESULTS, ROOT, cifar
from harness.digits import digits
from harness.environment import as_line, environment
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import structprune
from structprune.recovery import solving

CACHE = ROOT / "benchmarks" / ".cache"
COLUMNS = {"dense": "dense", "pruned": "pruned", "behind": "layers behind solved", "recovered": "gates solved too"}


@dataclass(frozen=True)
class Case:
    """A network, and how many times fewer multiply-accumulates it is to have."""

    name: str
    data: str
    kind: str
    hidden: int
    layers: int
    times: float = 2.0
    options: dict[str, Any] = field(default_factory=dict)


DIGITS = {"data": "digits", "hidden": 64, "layers": 3}
CASES = (
    Case("digits, LSTM", kind="LSTM", **DIGITS),
    Case("digits, GRU", kind="GRU", **DIGITS),
    Case("digits, RNN", kind="RNN", **DIGITS),
    Case("digits, LSTM both ways", "digits", "LSTM", 64, 2, options={"bidirectional": True}),
    Case("digits, LSTM projected", "digits", "LSTM", 96, 2, options={"proj_size": 48}),
    Case("digits, LSTM", kind="LSTM", times=4.0, **DIGITS),
    Case("rows of CIFAR-10, LSTM", "rows", "LSTM", 128, 2),
    Case("rows of CIFAR-10, LSTM", "rows", "LSTM", 128, 2, times=4.0),
)
EPOCHS = {"digits": 25, "rows": 4}
RATE = {"digits": 5e-3, "rows": 3e-3}
SIZE = {"digits": 50, "rows": 128}  # of a batch


class OfRows(nn.Module):
    """Images as sequences of their rows, by the state after the last one."""

    def __init__(self, case: Case, features: int) -> None:
        super().__init__()
        kind = getattr(nn, case.kind)
        self.rnn = kind(features, case.hidden, case.layers, batch_first=True, **case.options)
        width = (self.rnn.proj_size or case.hidden) * (2 if self.rnn.bidirectional else 1)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


def sequences(name: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Sequences ``(n, rows, features of a row)`` and labels, to train on and to test on."""
    if name == "digits":
        return {part: (x.flatten(1, 2), y) for part, (x, y) in digits().items()}
    parts = {"train": cifar.train_images(), "test": cifar.test_set()}
    return {part: (x.transpose(1, 2).flatten(2).contiguous(), y) for part, (x, y) in parts.items()}


def trained(case: Case, data: tuple[Tensor, Tensor], seed: int) -> nn.Module:
    """A network trained by Adam along a one-cycle rate; kept in ``.cache``."""
    torch.manual_seed(seed)
    model = OfRows(case, data[0].shape[2])
    options = "".join(f"_{key}{value}" for key, value in case.options.items())
    file = CACHE / f"{case.data}_{case.kind}_{case.hidden}x{case.layers}{options}_{seed}.safetensors"
    if file.exists():
        model.load_state_dict(load_file(file))
        return model.eval()
    size, epochs, rate = SIZE[case.data], EPOCHS[case.data], RATE[case.data]
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.01)
    steps = epochs * -(-len(data[0]) // size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps)
    for _ in range(epochs):
        for batch in torch.randperm(len(data[0])).split(size):
            optimizer.zero_grad()
            F.cross_entropy(model(data[0][batch]), data[1][batch]).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    CACHE.mkdir(exist_ok=True)
    save_file(model.state_dict(), file)
    return model.eval()


@contextmanager
def gates_left() -> Generator[None]:
    """While the block runs, recurrent layers are left as pruning left them."""
    with mock.patch.object(solving, "recurrent_layers", return_value=[]):
        yield


@torch.no_grad()
def score(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    """Test accuracy in percent."""
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in zip(*(t.split(500) for t in data), strict=True))
    return 100 * right / len(data[1])


def run(case: Case, seed: int) -> dict[str, Any]:
    """One network, pruned and recovered."""
    data = sequences(case.data)
    model, x = trained(case, data["train"], seed), data["train"][0][:1]
    slim = structprune.prune(model, x, target={"macs": 1 / case.times}, round_to=1)
    drawn = torch.randperm(len(data["train"][0]), generator=torch.Generator().manual_seed(seed))[:1000]
    calibration = list(data["train"][0][drawn].split(100))
    with gates_left():
        behind = structprune.recover(slim, model, calibration)
    begin = time.process_time()
    recovered = structprune.recover(slim, model, calibration)
    models = {"dense": model, "pruned": slim, "behind": behind, "recovered": recovered}
    return {
        "case": case.name,
        "times": case.times,
        "seed": seed,
        "cpu_seconds": time.process_time() - begin,
        "macs_ratio": structprune.cost(model, x).macs / structprune.cost(slim, x).macs,
        "hidden": [model.rnn.hidden_size, slim.rnn.hidden_size],
        **{name: score(each, data["test"]) for name, each in models.items()},
    }


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = [
        "# Recurrent layers recovered without training",
        "",
        "Made by `python benchmarks/recurrent.py`. Images as sequences of their rows, through recurrent layers "
        "and a linear layer behind the last step; channels by `structprune.prune`'s default, at a number of "
        "multiply-accumulates. 1,000 training samples without labels are calibrated on. Test accuracy in %, mean and "
        "standard deviation over seeds of training and of calibration: dense, pruned, with the linear layer behind "
        "solved alone, and with the gates solved too.",
        "",
        f"| network | hidden | x fewer MACs | seeds | {' | '.join(COLUMNS.values())} | CPU seconds |",
        f"|---|---|---:|---:|{'---:|' * (len(COLUMNS) + 1)}",
    ]
    for case in CASES:
        mine = [row for row in rows if (row["case"], row["times"]) == (case.name, case.times)]
        if mine:
            cells = " | ".join(spread(mine, key) for key in COLUMNS)
            before, after = mine[0]["hidden"]
            lines.append(
                f"| {case.name} | {case.layers} x {before} to {after} | {mean(r['macs_ratio'] for r in mine):.2f} "
                f"| {len(mine)} | {cells} | {mean(r['cpu_seconds'] for r in mine):.1f} |"
            )
    return "\n".join([*lines, "", f"{as_line(environment())}.", ""])


def spread(rows: list[dict[str, Any]], key: str) -> str:
    values = [row[key] for row in rows]
    return f"{mean(values):.2f} ± {stdev(values):.2f}" if len(values) > 1 else f"{values[0]:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", default="", help="run only the cases whose name holds this")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    given = parser.parse_args()
    torch.set_num_threads(1)
    file = RESULTS / "recurrent.json"
    rows: list[dict[str, Any]] = json.loads(file.read_text())["rows"] if file.exists() else []
    for case in (case for case in CASES if given.case in case.name):
        if case.data == "rows" and cifar.data_folder() is None:
            continue
        for seed in given.seeds:
            row = run(case, seed)
            print(json.dumps(row), flush=True)
            same = case.name, case.times, seed
            rows = [r for r in rows if (r["case"], r["times"], r["seed"]) != same] + [row]
            file.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=1) + "\n")
            (RESULTS / "recurrent.md").write_text(markdown(rows))


if __name__ == "__main__":
    main()
