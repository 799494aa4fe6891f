"""Criterion x scope x target on ResNet-56 and CIFAR-10, pruned without any training, torch-pruning in the same run.

Two figures for each plan: accuracy as it is, and with batch norms recalibrated on 2,048 training images. Criteria that
look at data see the first 512 of them, with labels where they need any. A criterion that both tools have keeps as many
MACs in ours as torch-pruning's plan kept, so those rows come in pairs. Each row is saved once it is measured, and a
run that was cut short goes on. The sweep looks at a fixed subset of the test images, `--full` measures the rows that
are quoted on all 10,000. The plans that are called ours are chosen on training images that nothing else saw.

    python benchmarks/criteria.py [--images 1000] [--full] [--rows N] [--only NAME] [--report]
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import criteria_report as report
import torch
import torch.nn.functional as F
from harness import RESULTS, cifar, peer_criteria
from harness.environment import environment
from harness.scores import Scores
from torch import Tensor, nn

import structprune
from structprune.importance import CRITERIA, FPGM, OBD, PerLayer, Sum

FILE = RESULTS / "criteria.json"
FIT, RECALIBRATE, CHOOSE = 512, 2048, 1000
# What is added to the criteria that have a name, made of those that are fitted already.
OURS: dict[str, Callable[[], Any]] = {
    "thinet / root of mean": lambda: PerLayer(scores("thinet"), "mean", 0.5),
    "thinet / fourth root of mean": lambda: PerLayer(scores("thinet"), "mean", 0.25),
    # Of what a channel adds to the next layer's outputs, its mean counts less: recalibration can make up for it.
    "flap + wanda_square": lambda: Sum([scores("flap"), scores("wanda_square")], weights=[3.0, 1.0]),
    "fpgm, filters alone": lambda: FPGM(),
    # The 512 images and their mirror images.
    "thinet, mirrored": lambda: "thinet",
    "thinet, mirrored / 0.3 power of mean": lambda: PerLayer(scores("thinet, mirrored"), "mean", 0.3),
}
BEST = "thinet, mirrored / 0.3 power of mean"


@dataclass(frozen=True)
class Axis:
    """One plan of the table; `times` is how many times fewer MACs, `inside` whether residual streams stay whole."""

    tool: str
    criterion: str
    scope: str
    times: float = 2.0
    inside: bool = True

    @property
    def key(self) -> str:
        return f"{self.tool} {self.criterion} {self.scope} {self.times:g} {'inside' if self.inside else 'all'}"

    @property
    def rival(self) -> Axis | None:
        """The row of torch-pruning that this one is compared with."""
        name = report.RIVALS.get(self.criterion, self.criterion)
        matched = self.tool == "structprune" and name in peer_criteria.CRITERIA and self.scope in report.SCOPES
        return replace(self, tool="torch-pruning", criterion=name) if matched else None


def rows() -> Iterator[Axis]:
    """The table, what matters most first."""
    named = report.NAMED
    strong = ("thinet", "flap + wanda_square", "flap", "wanda_square")
    yield Axis("structprune", BEST, "per_cost")
    for name in ("thinet", "thinet / fourth root of mean", "thinet / root of mean"):
        yield Axis("structprune", name, "per_cost")
    yield from _pairs(named, ("global", "local"))
    for name in strong:
        yield Axis("structprune", name, "per_cost")
        yield Axis("structprune", name, "global")
    others = tuple(name for name in peer_criteria.CRITERIA if name not in named)
    yield from _pairs(others, ("global",))
    for times in (3.0, 1.5):
        yield Axis("structprune", BEST, "per_cost", times)
        yield from _pairs(named, ("global",), times)
    yield Axis("structprune", "thinet", "sensitivity")
    yield from _pairs(others, ("local",))
    more = ("wanda", "taylor", "kfac", "group_fisher")
    for name in more:
        yield Axis("structprune", name, "per_cost")
        yield Axis("structprune", name, "global")
    yield from _pairs(("l2",), ("global", "local"), inside=False)
    yield from _pairs(named, ("isomorphic",))
    for name in ("thinet", "flap"):
        yield Axis("structprune", name, "local")
        yield Axis("structprune", name, "isomorphic")
    slow = ("obd_hutchinson", "obd_gates", "hrank", "snip", "tvs", "obs", "kfac_obs")
    for name in CRITERIA:
        if name not in (*named, *others, *strong, *more, *slow):
            yield Axis("structprune", name, "global")


def _pairs(
    names: tuple[str, ...], scopes: tuple[str, ...], times: float = 2.0, *, inside: bool = True
) -> Iterator[Axis]:
    """The same criterion and scope in both tools."""
    for name in names:
        for scope in scopes:
            mine = Axis("structprune", name, scope, times, inside)
            if mine.rival is not None:
                yield mine.rival
            yield mine


# -- models ----------------------------------------------------------------------------------------------------------


@cache
def training(part: str) -> tuple[Tensor, Tensor]:
    """Training images by what they are for, and their labels."""
    images, labels = cifar.train_images(RECALIBRATE + CHOOSE)
    held = {"fit": slice(FIT), "recalibrate": slice(RECALIBRATE), "choose": slice(RECALIBRATE, None)}[part]
    return images[held].contiguous(memory_format=torch.channels_last), labels[held]


@cache
def dense() -> nn.Module:
    return cifar.load_resnet(56)


EXAMPLE = torch.zeros(1, 3, 32, 32)


@cache
def scores(criterion: str) -> Scores:
    images, labels = training("fit")
    if criterion == "thinet, mirrored":
        images, labels = torch.cat([images, images.flip(3)]), labels.repeat(2)
    data = cifar.batches(images, labels, 64)
    importance: Any = OURS[criterion]() if criterion in OURS else criterion
    if criterion == "obd_fisher":  # samples are run one by one
        importance, data = OBD(), cifar.batches(*(part[: peer_criteria.SINGLE] for part in training("fit")), 64)
    return Scores(importance, structprune.DependencyGraph(dense(), EXAMPLE), data)


@cache
def sensitivity(criterion: str) -> structprune.Sensitivity:
    """By how far the outputs on 128 training images move, each group thinned alone."""
    images = training("fit")[0][:128]
    with torch.no_grad():
        wanted = F.log_softmax(dense()(images), 1)

    def near(model: nn.Module, images: Tensor) -> float:
        return -float(F.kl_div(F.log_softmax(model(images), 1), wanted, log_target=True, reduction="batchmean"))

    return structprune.sensitivity(
        dense(), EXAMPLE, images, near, ratios=(0.25, 0.5, 0.75), importance=scores(criterion)
    )


@cache
def prepared(criterion: str) -> peer_criteria.Prepared:
    return peer_criteria.prepared(criterion, dense(), EXAMPLE, cifar.batches(*training("fit"), 64))


def pruned(row: Axis, goal: int | None = None) -> nn.Module:
    """The network that a row is about, with no more MACs than `goal`, or its share of the MACs if that is not given."""
    share = 1 / row.times
    if row.tool == "torch-pruning":
        return peer_criteria.at_macs(prepared(row.criterion), EXAMPLE, share, row.scope, inside=row.inside)
    scope: Any = sensitivity(row.criterion) if row.scope == "sensitivity" else row.scope
    plan = structprune.plan(
        dense(), EXAMPLE, importance=scores(row.criterion), scope=scope, target={"macs": goal or share},
        axes=["channels"] if row.inside else None, round_to=1,
    )  # fmt: skip
    return plan.apply(dense())


# -- measuring -------------------------------------------------------------------------------------------------------


def both(slim: nn.Module, recalibrated: nn.Module, images: Tensor, labels: Tensor) -> dict[str, float]:
    """Percent of images that are right."""
    images = images.contiguous(memory_format=torch.channels_last)
    models = {"raw": slim, "recalibrated": recalibrated}
    return {name: cifar.accuracy(model, images, labels, size=100) for name, model in models.items()}


def measured(row: Axis, images: int, goal: int | None) -> dict[str, Any]:
    """One row: cost and accuracies in percent, on the first `images` test images."""
    begin = time.process_time()
    slim = pruned(row, goal).to(memory_format=torch.channels_last)  # convolutions of few channels run faster so
    spent = time.process_time() - begin
    cost = structprune.cost(slim, EXAMPLE)
    again = structprune.recalibrate(slim, training("recalibrate")[0].split(128))
    found: dict[str, Any] = {"key": row.key, **asdict(row), "goal": goal, "macs": cost.macs, "params": cost.params}
    found |= {"cpu_seconds": round(spent, 2), "images": images}
    if row.times == 2 and row.tool == "structprune" and goal is None:
        found["choose"] = both(slim, again, *training("choose"))
    return found | both(slim, again, *(part[:images] for part in cifar.test_set()))


def quoted(known: list[dict[str, Any]]) -> list[Axis]:
    """What the text of the report quotes: ours, chosen on training images; same-named criteria at their best scope."""
    found = [row["key"] for row in report.chosen(known).values()]
    for name in report.NAMED:
        for tool in report.TOOLS:
            found += [row["key"] for row in report.best_scopes(known, tool, name)]
    return [row for row in dict.fromkeys(rows()) if row.key in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1000, help="test images that the sweep looks at")
    parser.add_argument("--full", action="store_true", help="measure the rows that are quoted on all test images")
    parser.add_argument("--rows", type=int, help="only so many rows of the table, what matters most first")
    parser.add_argument("--only", default="", help="only rows whose key holds this")
    parser.add_argument("--report", action="store_true", help="measure nothing; write table and plot anew")
    given = parser.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    state = json.loads(FILE.read_text()) if FILE.exists() else {"dense": {}, "rows": []}
    done = {row["key"]: row for row in state["rows"]}
    images = 10000 if given.full else given.images
    todo = [] if given.report else quoted(state["rows"]) if given.full else list(dict.fromkeys(rows()))[: given.rows]
    state["dense"]["macs"] = structprune.cost(dense(), EXAMPLE).macs
    if given.full and "accuracy" not in state["dense"]:
        state["dense"]["accuracy"] = cifar.accuracy(dense(), size=100)
    for row in todo:
        goal = done[row.rival.key]["macs"] if row.rival is not None and row.rival.key in done else None
        found = done.get(row.key, {"images": 0, "goal": None})
        if given.only in row.key and (found["images"] < images or found.get("goal") != goal):
            done[row.key] = measured(row, max(images, found["images"]), goal)
            print(json.dumps(done[row.key]), flush=True)
            state |= {"rows": list(done.values()), "environment": environment()}
            FILE.write_text(json.dumps(state, indent=1) + "\n")
    FILE.with_suffix(".md").write_text(report.markdown(state))
    report.plot(state, FILE.with_suffix(".png"))


if __name__ == "__main__":
    main()
