"""A Llama of 5.9 M parameters, pruned: which criterion, one width for all layers or each its own, or whole blocks.

The network is that of `benchmarks/train_llm.py`. Of the parameters of its blocks (all but the embedding, which is the
last layer too) 20, 30 or 50% go. Calibration sees the first half of the real tokens, which the network was not trained
on: criteria `FIT` windows of 256 tokens, `recover` `RECOVER` windows. The second half judges, as it is (raw), after
`structprune.recover`, and for some after distillation too: from the dense network, on text that it was trained on, with
no labels. One draw of the calibration data. Each figure is saved once it is measured, and a run that was cut short goes
on.

    python benchmarks/llm.py [--only WORDS ...] [--how recovered] [--minutes N] [--report]
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

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from harness import RESULTS, llm, stories
from harness.environment import environment
from harness.scores import Scores
from llm_report import BLOCK_SCORES, CRITERIA, GONE, HIDDEN, markdown
from torch import Tensor, nn

import structprune
from structprune.errors import PlanError
from structprune.importance import FLAP, PerLayer

FILE = RESULTS / "llm.json"
SEED = 0
FIT, RECOVER = 64, 64  # windows of 256 tokens
ROWS, ROUNDS = 4096, 1  # of `recover`
EPOCHS = 2  # of distillation
AXES: dict[str, tuple[str, ...]] = {
    "mlp and heads": ("mlp", "heads"),
    "mlp": ("mlp",),
    "blocks": ("blocks",),
    "blocks and widths": ("blocks", "mlp", "heads"),
    "hidden": ("hidden",),
}
NAMED: dict[str, Any] = {"flap, standardised": lambda: PerLayer(FLAP(), "standard")}


@dataclass(frozen=True)
class Row:
    """What goes: a share of the parameters of the blocks, of which kind, chosen how, in which widths."""

    gone: float
    what: str
    widths: str  # "uniform", or each layer its own ("free")
    criterion: str

    @property
    def key(self) -> str:
        return f"{self.gone:.0%} {self.what}, {self.widths}, {self.criterion}"


def rows(gone: float) -> Iterator[Row]:
    """All of one share, what matters most first."""
    for criterion in CRITERIA:
        if "standardised" not in criterion:  # layers compete only where each has a width of its own
            yield Row(gone, "mlp", "uniform", criterion)
    for criterion in CRITERIA:
        if "biases" not in criterion:
            yield Row(gone, "mlp and heads", "free", criterion)
    for score in BLOCK_SCORES:
        yield Row(gone, "blocks", "-", score)
    for criterion in HIDDEN:
        yield Row(gone, "hidden", "uniform", criterion)
    for criterion in ("flap", "taylor", "l2"):
        yield Row(gone, "mlp and heads", "uniform", criterion)
    yield Row(gone, "blocks and widths", "free", "taylor")


TELLING = (
    ("mlp", "flap"), ("mlp", "l2"), ("mlp", "flap, biases alone"), ("mlp", "flap, with biases"), ("mlp", "taylor"),
    ("mlp and heads", "taylor"), ("mlp and heads", "flap"), ("blocks", "kl"), ("hidden", "activation_l2, rotated"),
    ("hidden", "activation_l2"),
)  # fmt: skip


DISTILLED = (("mlp and heads", "free", "flap"), ("mlp", "uniform", "flap"), ("blocks", "-", "kl"))


def telling(row: Row) -> bool:
    """Which rows come first."""
    return (row.what, row.criterion) in TELLING and (row.what, row.widths) != ("mlp and heads", "uniform")


def steps() -> Iterator[tuple[Row, str]]:
    """What is measured, what matters most first. Some rows are distilled too, those for which there is time."""
    for gone in GONE:
        yield from ((row, how) for row in rows(gone) if telling(row) for how in ("raw", "recovered"))
        yield from ((row, "raw") for row in rows(gone))
    for what, widths, criterion in DISTILLED:
        yield from ((Row(gone, what, widths, criterion), "distilled") for gone in GONE)
    for gone in GONE:
        yield from ((row, how) for row in rows(gone) for how in ("raw", "recovered"))


# -- networks and data -----------------------------------------------------------------------------------------------


@cache
def dense(form: str = "") -> nn.Module:
    """The trained network, or one that computes the same.

    With ``"biases"`` of zero, ``"untied"`` with its last layer apart from the embedding, ``"rotated"`` with its
    residual stream on principal axes too.
    """
    if form == "rotated":
        return structprune.rotate_residual(dense("untied"), example(), calibration())
    return llm.load_llm(biases=form == "biases", tied=form != "untied")


def form_of(row: Row) -> str:
    if row.what == "hidden":
        return "rotated" if "rotated" in row.criterion else "untied"
    return "biases" if "biases" in row.criterion else ""


@cache
def windows() -> Tensor:
    found = stories.windows(0)
    return found[torch.randperm(len(found), generator=torch.Generator().manual_seed(SEED))]


def labelled() -> list[dict[str, Tensor]]:
    """Batches for criteria; the labels of a language model are its tokens."""
    return [{**stories.as_batch(ids), "labels": ids} for ids in windows()[:FIT].split(16)]


def calibration() -> list[dict[str, Any]]:
    return [stories.as_batch(ids) for ids in windows()[:RECOVER].split(16)]


def example() -> dict[str, Any]:
    return stories.as_batch(windows()[:1])


def language_loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    return model(**batch).loss


@cache
def scores(criterion: str, form: str) -> Any:
    graph = structprune.DependencyGraph(dense(form), example())
    importance = NAMED.get(criterion, lambda: criterion.partition(", ")[0])()
    return Scores(importance, graph, labelled(), language_loss)


# -- measuring -------------------------------------------------------------------------------------------------------


def pruned(row: Row) -> nn.Module:
    network: Any = dense(form_of(row))
    share = 1 - row.gone * sum(p.numel() for p in network.model.layers.parameters()) / sum(
        p.numel() for p in network.parameters()
    )
    options: dict[str, Any] = {"scope": "global"}
    if row.what == "blocks":
        options |= {"data": calibration(), "branch_score": row.criterion}
        if row.criterion == "taylor":
            options |= {"data": labelled(), "loss": language_loss}
    else:
        options["importance"] = scores(row.criterion, form_of(row))
        options["uniform"] = row.widths == "uniform"
    if row.what == "blocks and widths":
        options |= {"data": calibration(), "branch_score": "kl"}
    plan = structprune.plan(network, example(), target={"params": share}, axes=AXES[row.what], round_to=1, **options)
    return plan.apply(network)


def recovered(row: Row) -> nn.Module:
    how: dict[str, Any] = {"rounds": ROUNDS} if not row.criterion.endswith("alone") else {"weights": False}
    return structprune.recover(pruned(row), dense(form_of(row)), calibration(), rows=ROWS, **how)


def figures(row: Row, how: str) -> dict[str, Any]:
    """Perplexity, with processor seconds of all that led to the network but the fit of its criterion."""
    used = time.process_time()
    judge = stories.windows(1)
    if how == "raw":
        slim = pruned(row)
        blocks: Any = slim.model.layers  # type: ignore[union-attr]
        cost = structprune.cost(slim, example())
        size = sum(p.numel() for p in blocks.parameters())
        return {"params": cost.params, "block_params": size, "macs": cost.macs, "raw": stories.perplexity(slim, judge)}
    network = recovered(row)
    if how == "distilled":
        network = llm.distilled(network, dense(), EPOCHS, SEED)
    spent = round(time.process_time() - used, 1)
    return {how: stories.perplexity(network, judge), f"{how}_cpu_seconds": spent}


def save(state: dict[str, Any]) -> None:
    state |= {"environment": environment(), "seed": SEED, "training": llm.log()}
    FILE.write_text(json.dumps(state, indent=1) + "\n")
    FILE.with_suffix(".md").write_text(markdown(state))


def main(wanted: Callable[[Row, str], bool], seconds: float) -> None:
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    state = json.loads(FILE.read_text()) if FILE.exists() else {"dense": {}, "rows": {}}
    begin = time.monotonic()
    if not state["dense"]:
        cost = structprune.cost(dense(), example())
        network: Any = dense()
        size = sum(p.numel() for p in network.model.layers.parameters())
        value = stories.perplexity(dense(), stories.windows(1))
        state["dense"] = {"perplexity": value, "params": cost.params, "block_params": size, "macs": cost.macs}
    for row, how in steps():
        if time.monotonic() - begin > seconds:
            break
        found = state["rows"].get(row.key, vars(row).copy())
        if how in found or "refused" in found or not wanted(row, how):
            continue
        try:
            found |= figures(row, how)
        except PlanError as error:
            found["refused"] = str(error)[:200]
        state["rows"][row.key] = found
        print(json.dumps(found), flush=True)
        save(state)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], help="only rows whose key holds all of these")
    parser.add_argument("--how", nargs="+", default=["raw", "recovered", "distilled"])
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no figure after so many")
    parser.add_argument("--report", action="store_true", help="measure nothing; write the tables anew")
    given = parser.parse_args()
    if given.report:
        FILE.with_suffix(".md").write_text(markdown(json.loads(FILE.read_text())))
    else:
        main(lambda row, how: all(word in row.key for word in given.only) and how in given.how, 60 * given.minutes)
