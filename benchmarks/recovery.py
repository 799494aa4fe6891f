"""Accuracy without training: structprune's reconstruction, torch-pruning beside it, in the same run.

Run ``python benchmarks/recovery.py`` with the data at hand (see `harness.cifar`); results go to ``results/recovery.*``.
Calibration and the choice of channels see training images, or the first half of the tokens, without labels; the test
set, or the second half, is for the last measurement alone.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

import torch
from harness import ROOT, cifar, stories, vit
from harness.environment import as_line, environment
from harness.peer import heads_of, last_layers, prune
from torch import Tensor, nn

import structprune
from structprune.recovery.selection import divergence, squared_error

RESULTS = ROOT / "benchmarks" / "results"
IMAGES = 1024
ROWS = 32768
SEEDS = (0, 1, 2)
IMAGE_MODELS = ("resnet20", "resnet56", "vit")


@dataclass(frozen=True)
class Case:
    """A model, what is to remain of it, and what the result should come to."""

    name: str
    model: str
    target: dict[str, float]
    axes: tuple[str, ...]
    goal: float  # below zero: points that may be lost against the dense model
    unit: str
    rounds: int = 4
    epochs: int = 8  # of distillation, where there is one
    probes: int = 256  # images; windows of tokens are an eighth as many
    distance: Callable[[Tensor, Tensor], Tensor] = divergence


# Probes save time; by which distance is better was seen on training images that were not among those calibrated on.
CASES = (
    Case("ResNet-56, 2.0x fewer MACs", "resnet56", {"macs": 1 / 2}, ("channels",), 92.3, "%", probes=128),
    Case("ResNet-56, 3.0x fewer MACs", "resnet56", {"macs": 1 / 3}, ("channels",), 89.0, "%"),
    Case("ResNet-20, 2.0x fewer MACs", "resnet20", {"macs": 1 / 2}, ("channels",), 88.5, "%", distance=squared_error),
    Case("stories260k, 20 % of all parameters", "stories260k", {"params": 0.8}, ("mlp", "heads"), 7.3, "perplexity", 8),
    Case("stories260k, 35 % of the MLP width", "stories260k", {"mlp": 0.65}, ("mlp",), 6.6, "perplexity", 8, 14),
    Case("ViT, 2.0x fewer MACs", "vit", {"macs": 1 / 2}, ("mlp", "heads"), -2.0, "%"),
)


# -- models and data -------------------------------------------------------------------------------------------------


def load(name: str) -> nn.Module:
    if name == "vit":
        return vit.load_vit()
    if name.startswith("resnet"):
        return cifar.load_resnet(int(name.removeprefix("resnet")))
    return stories.load_stories()


def calibration(name: str, seed: int) -> list[Any]:
    if name in IMAGE_MODELS:
        # Channels last in memory: convolutions of so few channels are about twice as fast.
        images = cifar.train_images(IMAGES, seed)[0].contiguous(memory_format=torch.channels_last)
        return list(images.split(128))
    return [stories.as_batch(part) for part in calibration_tokens(seed).split(32)]


def calibration_tokens(seed: int) -> Tensor:
    """The windows of the first half, shuffled."""
    found = stories.windows(0)
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))
    return found[order[: len(order) // 32 * 32]]  # the forward takes another branch for a batch of one


def score(name: str, model: nn.Module) -> float:
    """Accuracy in percent, or perplexity."""
    return cifar.accuracy(model) if name in IMAGE_MODELS else stories.perplexity(model, stories.windows(1))


def one_sample(data: list[Any]) -> Any:
    first = data[0]
    return first[:1] if isinstance(first, Tensor) else {**first, "input_ids": first["input_ids"][:1]}


def amounts(case: Case, model: nn.Module) -> dict[str, float]:
    """The case's target in what `structprune.plan` knows."""
    if "mlp" not in case.target:
        return case.target
    mlp = sum(p.numel() for name, p in model.named_parameters() if ".mlp." in name)
    return {"params": 1 - (1 - case.target["mlp"]) * mlp / sum(p.numel() for p in model.parameters())}


# -- ours ------------------------------------------------------------------------------------------------------------


def ours(case: Case, model: nn.Module, data: list[Any]) -> tuple[nn.Module, dict[str, float]]:
    begin, used = time.perf_counter(), time.process_time()
    x = one_sample(data)
    (kind,) = amounts(case, model)
    probes = case.probes if isinstance(data[0], Tensor) else case.probes // 8
    criterion = structprune.Reconstruction(per=kind, probes=probes, rows=ROWS, axes=case.axes, distance=case.distance)
    chosen = criterion.fit(structprune.DependencyGraph(model, x), data)
    plan = structprune.plan(
        model, x, importance=chosen, scope=chosen, target=amounts(case, model), axes=case.axes, round_to=1
    )
    images = isinstance(data[0], Tensor)
    shown = [*data, *(part.flip(3) for part in data)] if images else data
    slim = structprune.recover(plan.apply(model), model, shown, rows=ROWS if images else 2 * ROWS, rounds=case.rounds)
    return slim, {"seconds": time.perf_counter() - begin, "cpu_seconds": time.process_time() - used}


# -- torch-pruning ---------------------------------------------------------------------------------------------------


def peer_pruned(case: Case, model: nn.Module, x: Any, share: float) -> nn.Module:
    """torch-pruning's magnitude pruner over all layers at once, on the layers that the case thins.

    The transformer is thinned everywhere by the same ratio, as torch-pruning's own example does with such models.
    """
    import torch_pruning as tp

    model = copy.deepcopy(model)
    if case.model == "vit":
        prune(model, x, share, last_layers(model, x), heads_of(model))
        return model
    thinned = ("conv1",) if case.model.startswith("resnet") else ("gate_proj", "up_proj")
    ignored = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear) and (name == "conv1" or not name.endswith(thinned))
    ]
    pruner = tp.pruner.MagnitudePruner(
        model, x, importance=tp.importance.MagnitudeImportance(p=2), global_pruning=True, pruning_ratio=share,
        ignored_layers=ignored, in_channel_groups={}, out_channel_groups={}, channel_groups={},
    )  # fmt: skip
    pruner.step()
    return model


def peer(case: Case, model: nn.Module, data: list[Any]) -> nn.Module:
    """The smallest share that reaches the target, by bisection."""
    x = one_sample(data)
    (kind,), (left,) = amounts(case, model), amounts(case, model).values()
    goal = getattr(structprune.cost(model, x), kind) * left
    low, high = 0.0, 0.95
    for _ in range(8):
        middle = (low + high) / 2
        small = getattr(structprune.cost(peer_pruned(case, model, x, middle), x), kind) <= goal
        low, high = (low, middle) if small else (middle, high)
    return peer_pruned(case, model, x, high)


# -- results ---------------------------------------------------------------------------------------------------------


def run(case: Case, seed: int, known: dict[str, Any] | None = None) -> dict[str, Any]:
    """One row; what concerns torch-pruning is taken from `known` if given."""
    model, data = load(case.model), calibration(case.model, seed)
    x = one_sample(data)
    slim, times = ours(case, model, data)
    before, after = structprune.cost(model, x), structprune.cost(slim, x)
    found = {
        "case": case.name,
        "seed": seed,
        **times,
        "macs_ratio": before.macs / after.macs,
        "params_ratio": before.params / after.params,
        "structprune": score(case.model, slim),
        **(against(case, model, data) if known is None else {k: v for k, v in known.items() if k.startswith("torch_")}),
    }
    if case.model == stories.NAME:
        used = time.process_time()
        taught = stories.distilled(slim, model, calibration_tokens(seed), case.epochs, seed)
        found["distilled"], found["distilled_cpu_seconds"] = score(case.model, taught), time.process_time() - used
    return found


def against(case: Case, model: nn.Module, data: list[Any]) -> dict[str, float]:
    """What torch-pruning comes to."""
    other, x = peer(case, model, data), one_sample(data)
    before, after = structprune.cost(model, x), structprune.cost(other, x)
    found = {
        "torch_pruning": score(case.model, other),
        "torch_pruning_macs_ratio": before.macs / after.macs,
        "torch_pruning_params_ratio": before.params / after.params,
    }
    if case.model.startswith("resnet"):
        found["torch_pruning_recalibrated"] = score(case.model, structprune.recalibrate(other, data))
    return found


def spread(rows: list[dict[str, Any]], key: str) -> str:
    values = [row[key] for row in rows if key in row]
    if not values:
        return "-"
    return f"{mean(values):.2f} ± {stdev(values):.2f}" if len(values) > 1 else f"{values[0]:.2f}"


def distilled(rows: list[dict[str, Any]]) -> str:
    if not any("distilled" in row for row in rows):
        return "-"
    return f"{spread(rows, 'distilled')} ({spread(rows, 'distilled_cpu_seconds')} CPU s)"


def aim(case: Case, dense: dict[str, float]) -> float:
    return case.goal if case.goal > 0 else dense[case.model] + case.goal


def markdown(rows: list[dict[str, Any]], dense: dict[str, float]) -> str:
    lines = [
        "# Recovery without training",
        "",
        f"No labels, no training: {IMAGES:,} training images, as they are and flipped, or the first half of the "
        "tokens. Mean and standard deviation over seeds of the calibration data. torch-pruning: its magnitude pruner "
        "over all layers at once at the same cost, as it is, and with its batch norms recalibrated by structprune. "
        "The language model is then distilled from the dense one by gradients, still without labels, on the same "
        "tokens and on text that the dense one wrote by itself.",
        "",
        "| case | seeds | dense | structprune | then distilled | aim | torch-pruning | recalibrated | x fewer MACs "
        "| x fewer parameters | CPU seconds |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for case in CASES:
        mine = [row for row in rows if row["case"] == case.name]
        if mine:
            keys = ("torch_pruning", "torch_pruning_recalibrated", "macs_ratio", "params_ratio", "cpu_seconds")
            cells = " | ".join(spread(mine, key) for key in keys)
            lines.append(
                f"| {case.name} | {len(mine)} | {dense[case.model]:.2f} {case.unit} | {spread(mine, 'structprune')} "
                f"| {distilled(mine)} | {aim(case, dense):.2f} | {cells} |"
            )
    return "\n".join([*lines, "", as_line(environment()), ""])


def plot(rows: list[dict[str, Any]], dense: dict[str, float]) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    names = [case.name for case in CASES if any(row["case"] == case.name for row in rows)]
    height = -(-len(names) // 3)
    figure, axes = plt.subplots(height, 3, figsize=(10, 3 * height), squeeze=False)
    kinds: tuple[tuple[str, str], ...] = (
        ("structprune", "structprune"), ("distilled", "then distilled"), ("torch_pruning", "torch-pruning"),
        ("torch_pruning_recalibrated", "recalibrated"),
    )  # fmt: skip
    colors = {key: f"C{number}" for number, (key, _) in enumerate(kinds)}
    for axis, name in zip(axes.flat, names, strict=False):  # the last row may have room left
        case = next(case for case in CASES if case.name == name)
        shown = [(key, label) for key, label in kinds if any(row["case"] == name and key in row for row in rows)]
        for at, (key, _) in enumerate(shown):
            values = [row[key] for row in rows if row["case"] == name and key in row]
            axis.bar(at, mean(values), yerr=stdev(values) if len(values) > 1 else None, color=colors[key])
        axis.axhline(aim(case, dense), color="black", linewidth=0.8)
        axis.set_title(name, fontsize=8)
        axis.set_ylabel(case.unit)
        axis.set_xticks(range(len(shown)), [label for _, label in shown], rotation=20, fontsize=7)
    figure.tight_layout()
    figure.savefig(RESULTS / "recovery.png", dpi=120)


def main(choose: Callable[[Case], bool], seeds: tuple[int, ...], ours_only: bool = False) -> None:
    torch.set_num_threads(1)
    file = RESULTS / "recovery.json"
    known = json.loads(file.read_text()) if file.exists() else {"rows": [], "dense": {}}
    rows, dense = known["rows"], known["dense"]
    for seed in seeds:
        for case in filter(choose, CASES):
            if case.model not in dense:
                dense[case.model] = score(case.model, load(case.model))
            same = [r for r in rows if (r["case"], r["seed"]) == (case.name, seed)]
            row = run(case, seed, (same or [{}])[0] if ours_only else None)
            print(json.dumps(row), flush=True)
            rows = [r for r in rows if (r["case"], r["seed"]) != (case.name, seed)] + [row]
            file.write_text(json.dumps({"environment": environment(), "dense": dense, "rows": rows}, indent=1) + "\n")
            (RESULTS / "recovery.md").write_text(markdown(rows, dense))
    plot(rows, dense)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", default="", help="run only the cases whose name holds this")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--ours", action="store_true", help="keep what is known of torch-pruning, and run structprune")
    given = parser.parse_args()
    main(lambda case: given.case in case.name, tuple(given.seeds), given.ours)
