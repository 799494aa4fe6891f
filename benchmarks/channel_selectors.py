"""Which criterion, in which scope, leaves the most accuracy: raw, with norms recalibrated, and after `recover`.

ResNet-56 on CIFAR-10 at 1.5x to 4x fewer MACs (inside of blocks), and a Llama of 260 K parameters trained on stories at
shares of its parameters (MLP and heads). Every figure is of one draw of the calibration data: training images, or the
first half of the tokens. Criteria that look at data see `FIT` of it; `recalibrate` and `recover` see `RECOVER` of it,
without labels. Measured on the first 2,000 test images, or the second half of the tokens. Nothing is trained. Each
figure is saved once it is measured, and a run that was cut short goes on.

    python benchmarks/channel_selectors.py [--only NAME] [--how pruned] [--minutes N] [--report]
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "2")

import torch
from channel_selectors_report import CRITERIA, MODELS, SCOPES, SHARES, TEST, markdown
from harness import RESULTS, cifar, stories
from harness.environment import environment
from harness.scores import Scores
from torch import Tensor, nn

import structprune

FILE = RESULTS / "channel_selectors.json"
FIT = {"resnet56": 512, "stories260k": 64}  # images, windows of 256 tokens
RECOVER = {"resnet56": 256, "stories260k": 128}
ROWS = 16384  # positions that a layer is solved on
BATCH = {"resnet56": 64, "stories260k": 32}
AXES = {"resnet56": ("channels",), "stories260k": ("mlp", "heads")}
AMOUNT = {"resnet56": "macs", "stories260k": "params"}
# Chosen by a criterion, then merged by `structprune.fold`: how, and whether it sees data.
FOLDED: dict[str, tuple[str, str, bool]] = {
    "l2, folded": ("l2", "scaled", False),
    "folding": ("folding", "scaled", False),
    "folding, means": ("folding", "mean", False),
    "folding with data": ("folding_activations", "scaled", True),
}


@dataclass(frozen=True)
class Row:
    """A network, and how it is thinned to which share of its MACs or parameters."""

    model: str
    share: float
    criterion: str
    scope: str

    @property
    def key(self) -> str:
        return f"{self.model} {self.share:g} {self.criterion} {self.scope}"


def steps() -> Iterator[tuple[Row, str]]:
    """What is measured, what matters most first: without `recover`, then with it."""
    for number in range(max(map(len, SHARES.values()))):
        shares = {model: SHARES[model][number] for model in MODELS if number < len(SHARES[model])}
        for how in ("pruned", "recovered"):
            for scope in SCOPES:
                for criterion in CRITERIA:
                    for model, share in shares.items():
                        yield Row(model, share, criterion, scope), how
                if scope == SCOPES[0]:
                    for model, share in shares.items():
                        yield Row(model, share, "reconstruction", "its own"), how


# -- networks and data -----------------------------------------------------------------------------------------------


@cache
def dense(model: str) -> nn.Module:
    return cifar.load_resnet(56) if model == "resnet56" else stories.load_stories()


@cache
def samples(model: str) -> tuple[Tensor, Tensor | None]:
    """Training images and their labels, or windows of tokens, in an order drawn once."""
    if model == "resnet56":
        images, labels = cifar.train_images(max(FIT[model], RECOVER[model]))
        return images.contiguous(memory_format=torch.channels_last), labels
    found = stories.windows(0)
    return found[torch.randperm(len(found), generator=torch.Generator().manual_seed(0))], None


def labelled(model: str) -> list[Any]:
    """Batches for criteria; the labels of a language model are its tokens."""
    inputs, labels = (part if part is None else part[: FIT[model]] for part in samples(model))
    assert inputs is not None
    if labels is not None:
        return cifar.batches(inputs, labels, BATCH[model])
    return [{**stories.as_batch(ids), "labels": ids} for ids in inputs.split(16)]


def calibration(model: str) -> list[Any]:
    parts = samples(model)[0][: RECOVER[model]].split(BATCH[model])
    return list(parts) if model == "resnet56" else [stories.as_batch(ids) for ids in parts]


def example(model: str) -> Any:
    return torch.zeros(1, 3, 32, 32) if model == "resnet56" else stories.as_batch(stories.windows(0)[:1])


def language_loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    return model(**batch).loss


@cache
def scores(model: str, criterion: str) -> Scores:
    loss = cifar.cross_entropy if model == "resnet56" else language_loss
    graph = structprune.DependencyGraph(dense(model), example(model))
    return Scores(criterion, graph, labelled(model), loss)


@cache
def reconstruction(model: str) -> Any:
    chosen = structprune.Reconstruction(per=AMOUNT[model], rows=ROWS, axes=AXES[model], probes=RECOVER[model] // 2)
    return chosen.fit(structprune.DependencyGraph(dense(model), example(model)), calibration(model))


def accuracy(model: str, network: nn.Module) -> float:
    """Percent of the test images, or perplexity."""
    if model != "resnet56":
        return stories.perplexity(network, stories.windows(1))
    images, labels = cifar.test_set()
    return cifar.accuracy(network, images[:TEST].contiguous(memory_format=torch.channels_last), labels[:TEST])


# -- measuring -------------------------------------------------------------------------------------------------------


def pruned(row: Row) -> Any:
    network = dense(row.model)
    own = row.criterion == "reconstruction"
    name, how, on_data = FOLDED.get(row.criterion, (row.criterion, "", False))
    importance: Any = reconstruction(row.model) if own else scores(row.model, name)
    plan = structprune.plan(
        network, example(row.model), importance=importance, scope=importance if own else row.scope,
        target={AMOUNT[row.model]: row.share}, axes=AXES[row.model], round_to=1, uniform=False,
    )  # fmt: skip
    slim = plan.apply(network)
    if how:
        data = calibration(row.model) if on_data else None
        slim = structprune.fold(slim, network, example(row.model), how=how, data=data)
    return slim.to(memory_format=torch.channels_last) if row.model == "resnet56" else slim


def figures(row: Row, how: str) -> dict[str, Any]:
    begin = time.process_time()
    slim = pruned(row)
    if how == "recovered":
        recovered = structprune.recover(slim, dense(row.model), calibration(row.model), rows=ROWS)
        spent = time.process_time() - begin
        return {"recovered": accuracy(row.model, recovered), "recover_cpu_seconds": round(spent, 1)}
    cost = structprune.cost(slim, example(row.model))
    found: dict[str, Any] = {"macs": cost.macs, "params": cost.params, "raw": accuracy(row.model, slim)}
    if row.model == "resnet56":
        found["recalibrated"] = accuracy(row.model, structprune.recalibrate(slim, calibration(row.model)))
    return found


def save(state: dict[str, Any]) -> None:
    FILE.write_text(json.dumps(state | {"environment": environment()}, indent=1) + "\n")
    FILE.with_suffix(".md").write_text(markdown(state | {"environment": environment()}))


def main(wanted: Callable[[Row, str], bool], seconds: float) -> None:
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    state = json.loads(FILE.read_text()) if FILE.exists() else {"dense": {}, "rows": {}}
    begin = time.monotonic()
    for model in MODELS:
        if model not in state["dense"]:
            cost = structprune.cost(dense(model), example(model))
            state["dense"][model] = {"value": accuracy(model, dense(model)), "macs": cost.macs, "params": cost.params}
    for row, how in steps():
        found = state["rows"].setdefault(row.key, vars(row).copy())
        if time.monotonic() - begin > seconds:
            break
        if ("raw" if how == "pruned" else how) in found or not wanted(row, how):
            continue
        found |= figures(row, how)
        print(json.dumps(found), flush=True)
        save(state)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="only rows whose key holds this")
    parser.add_argument("--how", nargs="+", default=["pruned", "recovered"], help="without recover, with it, or both")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no row after so many")
    parser.add_argument("--report", action="store_true", help="measure nothing; write the tables anew")
    given = parser.parse_args()
    if given.report:
        known = json.loads(FILE.read_text())
        FILE.with_suffix(".md").write_text(markdown(known))
    else:
        main(lambda row, how: given.only in row.key and how in given.how, 60 * given.minutes)
