"""The classical pruning experiments on CIFAR-10, and what the masked networks are worth once they are cut.

Run ``python benchmarks/basic_experiments.py --train`` with the data at hand (see `harness.cifar`) to train the network
briefly on a CPU (10,000 images, 4 epochs, bfloat16; about half an hour on one core), and then without ``--train``. The
published network was trained for longer: 79.67% dense. Counts of zeroed parameters do not depend on that.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from harness import RESULTS, cifar, classic
from harness.environment import as_line, environment
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import prune

import structprune
from structprune import masks
from structprune.masks import Saliency

CONVOLUTIONS, LINEARS = ("conv1", "conv2", "conv3"), ("fc1", "fc2", "fc3")


class EveryOther(prune.BasePruningMethod):
    """Every other entry goes."""

    PRUNING_TYPE = "unstructured"

    def compute_mask(self, t: torch.Tensor, default_mask: torch.Tensor) -> torch.Tensor:
        mask = default_mask.clone()
        mask.view(-1)[::2] = 0
        return mask


def _layered(model: nn.Module) -> None:
    for names, amount in ((CONVOLUTIONS, 0.3), (LINEARS, 0.4)):
        for layer in names:
            for tensor in ("weight", "bias"):
                prune.l1_unstructured(model.get_submodule(layer), tensor, amount)


def _everything(model: nn.Module) -> None:
    tensors = [(module, name) for module in model.modules() for name in ("weight", "bias") if hasattr(module, name)]
    prune.global_unstructured(tensors, prune.L1Unstructured, amount=0.75)


def _both(method: Callable[..., object], *options: float) -> Callable[[nn.Module], None]:
    def apply(model: nn.Module) -> None:
        for tensor in ("weight", "bias"):
            method(model.conv1, tensor, *options)

    return apply


# What is done, how, and how many parameters were zeroed in the published runs.
EXPERIMENTS: dict[str, tuple[Callable[[nn.Module], object], int]] = {
    "random, 40% of conv1, weights and biases": (_both(prune.random_unstructured, 0.4), 2867),
    "L1, 40% of conv1, weights": (lambda m: prune.l1_unstructured(m.conv1, "weight", 0.4), 2765),
    "random filters, 40% of conv1": (lambda m: prune.random_structured(m.conv1, "weight", 0.4, dim=0), 2754),
    "random filters, 41.479% of conv1": (lambda m: prune.random_structured(m.conv1, "weight", 0.41479, dim=0), 2862),
    "L1 filters, 40% of conv1": (lambda m: prune.ln_structured(m.conv1, "weight", 0.4, n=1, dim=0), 2754),
    "L1 filters, 41.479% of conv1": (lambda m: prune.ln_structured(m.conv1, "weight", 0.41479, n=1, dim=0), 2862),
    "L1, 30% of convolutions, 40% of linears": (_layered, 5550033),
    "L1, 75% of all parameters": (_everything, 11516552),
    "every other entry of conv1": (_both(EveryOther.apply), 3584),
}
# Of these the physically smaller network is measured and recovered as well.
RECOVERED = tuple(name for name in EXPERIMENTS if "filters" in name)


@dataclass
class Row:
    """An experiment; accuracies in %, sizes in MB of a safetensors file, times in ms for a batch."""

    name: str
    zeroed: int
    published: int
    share: float
    masked: float
    difference: float
    params: int
    megabytes: float
    milliseconds: float | None = None
    cut: float | None = None
    recovered: float | None = None


def megabytes(model: nn.Module) -> float:
    """Size of the file with all that the model holds."""
    with tempfile.TemporaryDirectory() as folder:
        save_file(model.state_dict(), Path(folder, "file"))
        return Path(folder, "file").stat().st_size / 1e6


def milliseconds(models: list[nn.Module], x: torch.Tensor, times: int = 7) -> list[float]:
    """The least of several times of each, in turns, so that all have the same weather."""
    found = [float("inf")] * len(models)
    with torch.no_grad():
        for _ in range(times):
            for number, model in enumerate(models):
                began = time.perf_counter()
                model(x)
                found[number] = min(found[number], 1e3 * (time.perf_counter() - began))
    return found


def ours_is_the_same(model: nn.Module) -> None:
    """The masks of our own values are those of torch."""
    scores = Saliency.magnitude(model)
    filters = scores.only(["conv1.weight"]).mask(0.41479, dim=0, n=1)
    everything = Saliency.magnitude(model, [name for name, _ in model.named_parameters()]).mask(0.75)
    copied = copy.deepcopy(model)
    prune.ln_structured(copied.conv1, "weight", 0.41479, n=1, dim=0)
    assert torch.equal(filters["conv1.weight"], copied.conv1.weight_mask.bool())
    assert everything.entries - everything.kept == 11516552


def main() -> None:
    """Train, or measure all of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=Path, default=Path(tempfile.gettempdir(), "structprune-classic.safetensors"))
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--images", type=int, default=2000, help="of the test set")
    parser.add_argument("--calibration", type=int, default=512, help="training images, without labels, for recover")
    parser.add_argument("--without-recover", action="store_true", help="it takes minutes on a busy machine")
    given = parser.parse_args()
    if given.train:
        classic.train(given.weights)
        return
    model = classic.load(given.weights)
    ours_is_the_same(model)
    images, labels = cifar.test_set()
    images, labels = images[: given.images], labels[: given.images]
    x, probe = images[:1], images[:50]
    calibration = cifar.train_images(given.calibration, seed=1)[0].split(64)
    total = sum(p.numel() for p in model.parameters())
    dense = cifar.accuracy(model, images, labels, 100)
    print(f"dense: {dense:.2f}%, {total:,} parameters", flush=True)
    size, found = megabytes(model), rows_of(given, dense)
    # Those that take longest come last; what is known so far is written after each.
    for name in sorted(EXPERIMENTS, key=lambda name: name in RECOVERED):
        if name in found and (given.without_recover or name not in RECOVERED or found[name].recovered is not None):
            continue
        masked, slim = made(name, model, x)
        zeros = masks.sparsity(masked).zeros
        assert zeros == EXPERIMENTS[name][1], (name, zeros)
        with torch.no_grad():
            wanted, got = masked(probe), slim(probe)
        difference = float((wanted - got).abs().max() / wanted.abs().max())
        params = sum(p.numel() for p in slim.parameters())
        accuracy = cifar.accuracy(masked, images, labels, 100)
        row = Row(name, zeros, EXPERIMENTS[name][1], zeros / total, accuracy, difference, params, megabytes(slim))
        if name in RECOVERED:
            row.cut = cifar.accuracy(slim, images, labels, 100)
            if not given.without_recover:
                recovered = structprune.recover(slim, model, calibration)
                row.recovered = cifar.accuracy(recovered, images, labels, 100)
        found[name] = row
        print(row, flush=True)
        write(given, dense, None, size, total, found)
    cut = [name for name, row in found.items() if row.params < total]
    plain, *times = milliseconds([model, *(made(name, model, x)[1] for name in cut)], probe[:20])
    for name, time_of in zip(cut, times, strict=True):
        found[name].milliseconds = time_of
    write(given, dense, plain, size, total, found)


def made(name: str, model: nn.Module, x: torch.Tensor) -> tuple[nn.Module, nn.Module]:
    """The masked network of an experiment, and the smaller one."""
    torch.manual_seed(0)
    masked = copy.deepcopy(model)
    EXPERIMENTS[name][0](masked)
    return masked, masks.compact(masked, x)


def rows_of(given: argparse.Namespace, dense: float) -> dict[str, Row]:
    """What an earlier run with the same weights and images has found."""
    file = RESULTS / "basic_experiments.json"
    held = json.loads(file.read_text()) if file.exists() else {}
    if held.get("dense") != dense or held.get("images") != given.images:
        return {}
    return {row["name"]: Row(**row) for row in held["rows"]}


def write(
    given: argparse.Namespace, dense: float, plain: float | None, size: float, total: int, found: dict[str, Row]
) -> None:
    """The results as Markdown and JSON."""
    facts, rows = environment(), [found[name] for name in EXPERIMENTS if name in found]
    spent = "" if plain is None else f", {plain:.0f} ms"
    head = (
        "experiment|zeroed|share|masked, %|cut minus masked, relative|parameters|MB|ms, 20 images|cut, %|recovered, %"
    )
    lines = [
        "# Basic experiments",
        "",
        "Made by `python benchmarks/basic_experiments.py`, after `--train`.",
        f"CIFAR-10, {classic.IMAGES:,} training images, {classic.EPOCHS} epochs in bfloat16 on a CPU; accuracy on the "
        f"first {given.images:,} test images (one standard error: {100 * (0.21 / given.images) ** 0.5:.1f} points). "
        "Published, after a full training: dense 79.67%; L1 filters cut by hand 72.36% at 59.55 of 61.45 MB.",
        f"Recovered on {given.calibration} training images without labels. {as_line(facts)}. Times are the least of "
        "seven in turns, on a busy machine.",
        "",
        f"Dense: {dense:.2f}%, {total:,} parameters, {size:.2f} MB{spent}.",
        "",
        f"| {head.replace('|', ' | ')} |",
        "|---" * 10 + "|",
    ]
    for row in rows:
        later = ["" if value is None else f"{value:.2f}" for value in (row.cut, row.recovered)]
        spent = "" if row.milliseconds is None else f"{row.milliseconds:.0f}"
        numbers = f"{row.zeroed:,} | {row.share:.2%} | {row.masked:.2f} | {row.difference:.0e} | {row.params:,}"
        lines.append(f"| {row.name} | {numbers} | {row.megabytes:.2f} | {spent} | {later[0]} | {later[1]} |")
    if not any(row.recovered is not None for row in rows):
        lines += ["", "`recover` was left out of this run (`--without-recover`)."]
    lines += [
        "",
        "All counts of zeroed parameters are the published ones. Where single weights go, few or no channels lose all "
        "of theirs, and the network stays about as large as it was.",
        "Cut minus masked: the largest difference of 50 images' outputs, over the largest output, in float32.",
    ]
    (RESULTS / "basic_experiments.md").write_text("\n".join(lines) + "\n")
    data = {
        "environment": facts,
        "dense": dense,
        "images": given.images,
        "milliseconds": plain,
        "rows": [asdict(row) for row in rows],
    }
    (RESULTS / "basic_experiments.json").write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
