"""What two processes gain over one: criteria, Reconstruction, recover, recalibrate, sensitivity, fine-tuning.

Run ``python benchmarks/ranks.py`` with the data at hand (see `harness.cifar`) on a machine with two free cores; results
go to ``results/ranks.*``. The network is ResNet-20 on CIFAR-10, half of its multiply-accumulates removed; the data are
512 training images in batches of 32. Each process computes on one thread, and two of them meet over gloo and share the
batches. One process and two take turns. With ``--only`` a part is measured anew, and the rest stays as it is there.
"""

from __future__ import annotations

import argparse
import json
import os
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
IMAGES, BATCH, TESTED = 512, 32, 2000


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


def scores(fit: Callable[[Any], Any]) -> Callable[[], Tensor]:
    """What fits a criterion, and gives the scores of all groups."""
    graph = structprune.DependencyGraph(cifar.load_resnet(20), example())

    def work() -> Tensor:
        score = fit(graph)
        return torch.cat([score(group, tensors_of(graph)) for group in graph.groups()])

    return work


def taylor() -> Callable[[], Tensor]:
    """A criterion of gradients."""
    batches = data()
    return scores(lambda graph: fitted("taylor", graph, batches, loss))


def reconstruction() -> Callable[[], Tensor]:
    """Least squares for each group, and the output at four widths of each."""
    batches = images()
    return scores(lambda graph: structprune.Reconstruction().fit(graph, batches))


def recalibrated() -> Callable[[], Tensor]:
    """Statistics of all norms."""
    smaller, batches = slim(), images()
    return lambda: weights(structprune.recalibrate(smaller, batches))


def recovered(**options: Any) -> Callable[[], nn.Module]:
    """The recovered network."""
    smaller, whole, batches = slim(), cifar.load_resnet(20), images()
    return lambda: structprune.recover(smaller, whole, batches, **options)


def sensitivities() -> Callable[[], Tensor]:
    """Accuracy on all the images, with half of each group gone, and a quarter."""
    everything, whole = cifar.batches(*cifar.train_images(IMAGES), BATCH), cifar.load_resnet(20)

    def work() -> Tensor:
        found = structprune.sensitivity(whole, example(), everything, accuracy, ratios=(0.25, 0.5))
        return torch.tensor([value for curve in found.curves for value in curve.metric])

    return work


def accuracy(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> float:
    """Percent that are classified rightly."""
    model.eval()
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in batches)
    return 100 * right / sum(len(y) for _, y in batches)


def trained() -> Callable[[], None]:
    """Two epochs on halves of the batches, so that two ranks take the steps of one process."""
    rank, count = rank_and_count()
    smaller, teacher = slim(), cifar.load_resnet(20)
    batches = [
        tuple(part[rank * BATCH // count : (rank + 1) * BATCH // count] for part in batch)
        for batch in cifar.batches(*cifar.train_images(IMAGES), BATCH)
    ]
    model = DistributedDataParallel(smaller) if count > 1 else smaller

    def work() -> None:
        finetune(model, batches, batches[:4], epochs=2, lr=0.001, teacher=teacher, progress=False)

    return work


# What gets everything ready, and returns what is timed.
WORK: dict[str, Callable[[], Callable[[], Any]]] = {
    "criterion `taylor`": taylor,
    "`Reconstruction`": reconstruction,
    "`recalibrate`": recalibrated,
    "`recover`, layers alone": lambda: recovered(rounds=0),
    "`recover`": recovered,
    "`sensitivity`, two ratios": sensitivities,
    "`finetune` with a teacher, two epochs": trained,
}


def one_rank(rank: int, count: int, folder: str, names: list[str]) -> None:
    """Do all work and write down times and results."""
    torch.set_num_threads(1)
    if count > 1:
        store = dist.FileStore(f"{folder}/meeting", count)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=count)
    cifar.train_arrays()
    found: dict[str, Any] = {}
    for name in names:
        work = WORK[name]()
        cifar.load_resnet(20)(example())
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
    torch.save(found, f"{folder}/draft-{count}-{rank}")
    os.replace(f"{folder}/draft-{count}-{rank}", f"{folder}/{count}-{rank}")
    while not all(Path(f"{folder}/{count}-{number}").exists() for number in range(count)):
        time.sleep(0.01)
    os._exit(0)  # threads of gloo may abort a process that ends by itself


def measured(rounds: int, names: list[str]) -> dict[str, Any]:
    """Seconds of one process and of two, taken in turns, and how far their results differ."""
    rows: dict[str, dict[str, Any]] = {name: {"one": [], "two": [], "cpu_one": [], "cpu_two": []} for name in names}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            for count in (1, 2):
                mp.spawn(one_rank, (count, folder, names), nprocs=count)
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
        f"{IMAGES} training images in batches of {BATCH}. One process with one thread, and two with one thread each "
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
    parser.add_argument("--only", help="what to measure: a part of its name")
    given = parser.parse_args()
    torch.set_num_threads(1)
    names = [name for name in WORK if given.only is None or given.only in name]
    # What else the machine had to do: with as much as there are cores, the clock says nothing of two free ones.
    facts = {"cores": os.cpu_count(), "load average before": round(os.getloadavg()[1], 1)}
    rows, facts = measured(given.rounds, names), {**environment(), **facts}
    if given.only is not None and given.out.with_suffix(".json").exists():
        known = json.loads(given.out.with_suffix(".json").read_text())["rows"] | rows
        rows = {name: known[name] for name in WORK if name in known}
    given.out.with_suffix(".json").write_text(json.dumps({"rows": rows, "environment": facts}, indent=1) + "\n")
    given.out.with_suffix(".md").write_text(table(rows, facts, given.rounds))
    print(given.out.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
