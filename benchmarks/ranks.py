"""What two processes gain over one: criteria, Reconstruction, recover, recalibrate, sensitivity, fine-tuning.

Run ``python benchmarks/ranks.py`` with the data at hand (see `harness.cifar`) on a machine with two free cores; results
go to ``results/ranks.*``. The network is ResNet-20 on CIFAR-10, half of its multiply-accumulates removed; the data are
1,024 training images in batches of 64. Each process computes on one thread, and two of them meet over gloo and share
the batches. One process and two take turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from harness import ROOT, cifar
from harness.environment import as_line, environment
from torch import Tensor, nn
from torch import distributed as dist
from torch import multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

import structprune
from structprune.distributed import rank_and_count
from structprune.importance.base import fitted
from structprune.planning.build import tensors_of
from structprune.training import finetune

RESULTS = ROOT / "benchmarks" / "results"
IMAGES, BATCH, TESTED = 1024, 64, 2000


def data() -> list[tuple[Tensor, Tensor]]:
    """The batches of this rank: in turns with those of the others."""
    rank, count = rank_and_count()
    return cifar.batches(*cifar.train_images(IMAGES), BATCH)[rank::count]


def images() -> list[Tensor]:
    """The same without labels."""
    return [batch for batch, _ in data()]


def example() -> Tensor:
    """Two images to trace on."""
    return cifar.train_images(2)[0]


def slim() -> nn.Module:
    """Half of the multiply-accumulates, by magnitudes."""
    return structprune.prune(cifar.load_resnet(20), example(), target={"macs": 0.5}, round_to=1)


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross entropy."""
    return F.cross_entropy(model(batch[0]), batch[1])


def weights(model: nn.Module) -> Tensor:
    """All floating-point tensors in one."""
    return torch.cat([tensor.flatten() for tensor in model.state_dict().values() if tensor.is_floating_point()])


def taylor() -> Tensor:
    """Scores of all groups."""
    graph = structprune.DependencyGraph(cifar.load_resnet(20), example())
    score = fitted("taylor", graph, data(), loss)
    return torch.cat([score(group, tensors_of(graph)) for group in graph.groups()])


def reconstruction() -> Tensor:
    """Scores of all groups."""
    graph = structprune.DependencyGraph(cifar.load_resnet(20), example())
    score = structprune.Reconstruction().fit(graph, images())
    return torch.cat([score(group, {}) for group in graph.groups()])


def recalibrated() -> Tensor:
    """Weights and statistics."""
    return weights(structprune.recalibrate(slim(), images()))


def recovered() -> nn.Module:
    """The recovered network."""
    return structprune.recover(slim(), cifar.load_resnet(20), images())


def layers_alone() -> nn.Module:
    """The same without producers."""
    return structprune.recover(slim(), cifar.load_resnet(20), images(), rounds=0)


def sensitivities() -> Tensor:
    """Accuracy on all the images, with half of each group gone."""
    everything = cifar.batches(*cifar.train_images(IMAGES), BATCH)
    found = structprune.sensitivity(cifar.load_resnet(20), example(), everything, accuracy, ratios=(0.25, 0.5))
    return torch.tensor([value for curve in found.curves for value in curve.metric])


def accuracy(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> float:
    """Percent that are classified rightly."""
    model.eval()
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in batches)
    return 100 * right / sum(len(y) for _, y in batches)


def trained() -> None:
    """Two epochs on halves of the batches, so that two ranks take the steps of one process."""
    rank, count = rank_and_count()
    model = slim()
    batches = [
        tuple(part[rank * BATCH // count : (rank + 1) * BATCH // count] for part in batch)
        for batch in cifar.batches(*cifar.train_images(IMAGES), BATCH)
    ]
    wrapped = DistributedDataParallel(model) if count > 1 else model
    finetune(wrapped, batches, batches[:4], epochs=2, lr=0.001, teacher=cifar.load_resnet(20), progress=False)


WORK: dict[str, Callable[[], Any]] = {
    "criterion `taylor`": taylor,
    "`Reconstruction`": reconstruction,
    "`recalibrate`": recalibrated,
    "`recover`, layers alone": layers_alone,
    "`recover`": recovered,
    "`sensitivity`, two ratios": sensitivities,
    "`finetune` with a teacher, two epochs": trained,
}


def one_rank(rank: int, count: int, folder: str) -> None:
    """Do all work and write down times and results."""
    torch.set_num_threads(1)
    if count > 1:
        store = dist.FileStore(f"{folder}/meeting", count)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=count)
    cifar.train_arrays()
    found: dict[str, Any] = {}
    for name, work in WORK.items():
        if count > 1:
            dist.barrier()
        begun, cpu = time.perf_counter(), time.process_time()
        result = work()
        seconds, cpu = time.perf_counter() - begun, time.process_time() - cpu
        if isinstance(result, nn.Module):
            test, labels = cifar.test_set()
            with torch.no_grad():
                found[f"{name}, accuracy"] = accuracy(result, cifar.batches(test[:TESTED], labels[:TESTED]))
            result = weights(result)
        found[name] = seconds, cpu, result
    torch.save(found, f"{folder}/{count}-{rank}")
    if count > 1:
        dist.destroy_process_group()


def measured(rounds: int) -> dict[str, Any]:
    """Seconds of one process and of two, taken in turns, and how far their results differ."""
    rows: dict[str, dict[str, Any]] = {name: {"one": [], "two": [], "cpu_one": [], "cpu_two": []} for name in WORK}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            for count in (1, 2):
                mp.spawn(one_rank, (count, folder), nprocs=count)
            one, *two = (torch.load(f"{folder}/{which}") for which in ("1-0", "2-0", "2-1"))
        for name, row in rows.items():
            row["one"].append(one[name][0])
            row["cpu_one"].append(one[name][1])
            row["two"].append(max(found[name][0] for found in two))
            row["cpu_two"].append(max(found[name][1] for found in two))
            if (expected := one[name][2]) is not None:
                size = float(expected.abs().max())
                row["difference"] = max(float((found[name][2] - expected).abs().max()) / size for found in two)
            if f"{name}, accuracy" in one:
                row["accuracy"] = [found[f"{name}, accuracy"] for found in (one, two[0])]
    return rows


def table(rows: dict[str, Any], facts: dict[str, Any], rounds: int) -> str:
    """The results as Markdown."""
    lines = [
        "# Two processes beside one\n",
        "Made by `python benchmarks/ranks.py`: ResNet-20 on CIFAR-10, half of its multiply-accumulates removed, "
        f"{IMAGES:,} training images in batches of {BATCH}. One process with one thread, and two with one thread each "
        f"over gloo, in turns; medians of {rounds}. *Times as fast* is by the clock; *by CPU* compares the CPU seconds "
        "of the one process with those of the busier of the two, which other work on the machine hardly changes, but "
        "which leaves out waiting. The difference of results is the largest one over the largest entry, in float32.\n",
        "| what | s, one | s, two | times as fast | by CPU | difference of results | accuracy, one and two |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, row in rows.items():
        one, two, cpu_one, cpu_two = (statistics.median(row[key]) for key in ("one", "two", "cpu_one", "cpu_two"))
        differ = f"{row['difference']:.1e}" if "difference" in row else "-"
        right = " and ".join(f"{value:.2f} %" for value in row["accuracy"]) if "accuracy" in row else "-"
        lines.append(
            f"| {name} | {one:.2f} | {two:.2f} | {one / two:.2f} | {cpu_one / cpu_two:.2f} | {differ} | {right} |"
        )
    return "\n".join([*lines, f"\n{as_line(facts)}\n"])


def main() -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS / "ranks")
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows, facts = measured(given.rounds), environment()
    given.out.with_suffix(".json").write_text(json.dumps({"rows": rows, "environment": facts}, indent=1) + "\n")
    given.out.with_suffix(".md").write_text(table(rows, facts, given.rounds))
    print(given.out.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
