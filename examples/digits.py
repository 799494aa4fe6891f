"""Train a small residual network on handwritten digits, prune it to half of its MACs, and see what that costs.

Then its layers are solved again on a few images without labels, and at last it is fine-tuned. It takes a minute:
``python examples/digits.py``, or ``make demo``.
"""

from __future__ import annotations

import bisect
import copy
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import structprune
from structprune.benchmarking import benchmark
from structprune.export.onnx import export_onnx

TRAIN_EPOCHS = 8
FINE_TUNE_EPOCHS = 4
SHARE_OF_MACS = 0.5
IMAGES = 256  # that the network is recovered on
WIDTH = 48
# Convolutions run fastest on whole SIMD blocks of channels; the widths kept are multiples of this.
BLOCK = 8


class Block(nn.Module):
    """Two convolutions and a shortcut, which is projected where the shape changes."""

    def __init__(self, width: int, out: int, stride: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(width, out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.shortcut = nn.Sequential()
        if stride != 1 or width != out:
            self.shortcut = nn.Sequential(nn.Conv2d(width, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class DigitNet(nn.Module):
    """Four residual blocks over 8 by 8 images, the third of which halves the image."""

    def __init__(self, width: int = WIDTH, classes: int = 10):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.stage1 = nn.Sequential(Block(width, width), Block(width, width))
        self.stage2 = nn.Sequential(Block(width, 2 * width, stride=2), Block(2 * width, 2 * width))
        self.classifier = nn.Linear(2 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage2(self.stage1(self.stem(x)))
        return self.classifier(x.mean(dim=(2, 3)))


def load() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images in [0, 1] as (n, 1, 8, 8) and labels as (n,): 75% to train on, 25% to test on."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    train, test = train_test_split(range(len(labels)), test_size=0.25, stratify=digits.target, random_state=0)
    return images[train], labels[train], images[test], labels[test]


def fit(model: nn.Module, images: Tensor, labels: Tensor, epochs: int, lr: float, tick: Callable[[], None]) -> None:
    """Stochastic gradient descent under a one-cycle schedule; `tick` is called after each epoch."""
    size = 64
    steps = epochs * (len(images) // size)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    model.train()
    for _ in range(epochs):
        order = torch.randperm(len(images))
        for batch in order[: len(order) // size * size].split(size):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
            schedule.step()
        tick()
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of images whose digit is recognised."""
    return (model(images).argmax(dim=1) == labels).double().mean().item()


def plan_for(model: nn.Module, image: Tensor, share: float) -> structprune.Plan:
    """The plan that keeps the most channels within a share of the MACs, by bisection: more pruning, fewer MACs."""
    ratios = [removed / WIDTH for removed in range(BLOCK, WIDTH, BLOCK)]

    def fits(ratio: float) -> bool:
        candidate = structprune.plan(model, image, ratio=ratio)
        return candidate.after.macs <= share * candidate.before.macs

    return structprune.plan(model, image, ratio=ratios[bisect.bisect_left(ratios, True, key=fits)])


def main() -> None:
    """Run it all and print one table."""
    torch.manual_seed(0)
    # Layers this small gain little from a second thread, and wait long for it where the machine has other work.
    torch.set_num_threads(1)
    console = Console()
    train_images, train_labels, test_images, test_labels = load()
    image, batch = test_images[:1], test_images[:64]
    bar = Progress(TextColumn("{task.description:<34}"), BarColumn(), TimeElapsedColumn(), console=console)
    with bar, tempfile.TemporaryDirectory() as folder:
        steps = TRAIN_EPOCHS + FINE_TUNE_EPOCHS + 6
        task = bar.add_task("", total=steps)

        def tick() -> None:
            bar.advance(task)

        bar.update(task, description="training")
        dense = DigitNet()
        fit(dense, train_images, train_labels, TRAIN_EPOCHS, 0.1, tick)

        bar.update(task, description="looking for half of the MACs")
        plan = plan_for(dense, image, SHARE_OF_MACS)
        tick()

        bar.update(task, description="pruning and verifying")
        pruned = plan.apply(dense)
        report = structprune.verify(dense, pruned, plan, batch)
        report.raise_for_error()
        tick()

        bar.update(task, description="recovering, without labels")
        recovered = structprune.recover(pruned, dense, train_images[:IMAGES].split(64))
        tick()

        bar.update(task, description="fine-tuning")
        slim = copy.deepcopy(recovered)
        fit(slim, train_images, train_labels, FINE_TUNE_EPOCHS, 0.02, tick)

        bar.update(task, description="exporting and checking in ONNX Runtime")
        dense_file = export_onnx(dense, Path(folder) / "dense.onnx", batch)
        tick()
        slim_file = export_onnx(slim, Path(folder) / "slim.onnx", batch)
        tick()

        bar.update(task, description="timing")
        times = benchmark(
            {"dense": dense, "slim": slim}, batch, backends=("eager", "onnxruntime"), threads=1, progress=False
        )
        tick()
        bar.update(task, description="done")

    table = Table(
        title=f"Handwritten digits: a residual network within {SHARE_OF_MACS:.0%} of its MACs",
        caption=f"MACs of one image; milliseconds for {times.batch_size} images on one thread, in eager PyTorch and "
        "in ONNX Runtime (ORT)",
    )
    table.add_column("network")
    for heading in ("accuracy", "params", "MACs", "ONNX file", "eager", "ORT"):
        table.add_column(heading, justify="right")
    rows = (
        ("dense", "dense", dense, dense_file),
        ("pruned", "slim", pruned, slim_file),
        ("recovered", "slim", recovered, slim_file),
        ("fine-tuned", "slim", slim, slim_file),
    )
    for label, timed, model, file in rows:
        cost = structprune.cost(model, image)
        table.add_row(
            label,
            f"{accuracy(model, test_images, test_labels):.1%}",
            f"{cost.params / 1e3:.0f} k",
            f"{cost.macs / 1e6:.2f} M",
            f"{file.bytes / 1024:.0f} KiB",
            *(f"{times.timing(timed, backend).median * 1e3:.2f} ms" for backend in ("eager", "onnxruntime")),
        )
    console.print(table)
    eager, runtime = (times.speedup("slim", backend) for backend in ("eager", "onnxruntime"))
    console.print(
        f"The pruned network equals the dense one with those channels switched off to {report.max_relative_error:.1e}, "
        f"and its ONNX file equals it to {slim_file.max_relative_error:.1e} in ONNX Runtime. On a batch of "
        f"{times.batch_size} and one thread it runs {eager.ratio:.2f} times as fast "
        f"({eager.low:.2f} to {eager.high:.2f}) in eager PyTorch and {runtime.ratio:.2f} times as fast "
        f"({runtime.low:.2f} to {runtime.high:.2f}) in ONNX Runtime.",
        highlight=False,
    )


if __name__ == "__main__":
    main()
