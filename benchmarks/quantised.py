"""A trained network on its way to what is shipped: dense, pruned, recovered, quantised; in ONNX Runtime and OpenVINO.

Run ``python benchmarks/quantised.py`` with the data at hand (see `harness.cifar`); results go to
``results/quantised.*``. The same 512 training images, without labels, serve to choose channels, to recover and to
calibrate; the first 2,000 test images are for the last measurement alone.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import ROOT, cifar
from harness.environment import as_line, environment
from torch import Tensor, nn

import structprune
from structprune.errors import ExportError
from structprune.export.runtimes import RUNTIMES
from structprune.recovery.selection import divergence

RESULTS = ROOT / "benchmarks" / "results"
IMAGES, TESTED = 512, 2000
# Half the MACs; and fewer parameters than these would leave, since files are what is shipped.
TARGET = {"macs": 1 / 2, "params": 0.43}
BATCHES = (1, 8)
RUNS = 15


def pruned(model: nn.Module, images: Tensor) -> nn.Module:
    """Half the network, not yet recovered."""
    data = list(images.split(128))
    criterion = structprune.Reconstruction(per="macs", probes=64, rows=8192, distance=divergence)
    chosen = criterion.fit(structprune.DependencyGraph(model, images[:1]), data)
    return structprune.prune(model, images[:1], importance=chosen, scope=chosen, target=TARGET, round_to=1)


class Loaded(nn.Module):
    """A file in a runtime, as something to measure."""

    def __init__(self, run: Callable[[dict[str, Any]], list[Any]]) -> None:
        super().__init__()
        self._run = run

    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(np.array(self._run({"x": x.numpy()})[0]))


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in cifar.batches(images, labels, 250))
    return 100 * right / len(labels)


def measured(files: dict[str, Path], runtime: str, images: Tensor, labels: Tensor) -> dict[str, dict[str, Any]]:
    """Accuracy and milliseconds of each file, timed in turns on one thread."""
    models: dict[str, nn.Module] = {}
    refused: dict[str, dict[str, Any]] = {}
    for name, file in files.items():
        try:
            models[name] = Loaded(RUNTIMES[runtime].load(file, 1))
        except ExportError as error:
            refused[name] = {"refused": str(error)}
    # OpenVINO's calls wait on another thread, so its time is the process's as well.
    times = structprune.benchmark(
        models, images[:8], batch_sizes=BATCHES, threads=1, runs=RUNS, clock="process", memory=False, explanations=False
    )
    medians = {(each.model, each.batch_size): 1e3 * each.median for each in times.timings}
    return refused | {
        name: {
            "accuracy": accuracy(model, images, labels),
            "milliseconds": {str(size): medians[name, size] for size in BATCHES},
        }
        for name, model in models.items()
    }


def chain(folder: Path) -> dict[str, Any]:
    """All steps of one network."""
    began = time.perf_counter()
    dense = cifar.load_resnet(56)
    calibration = cifar.train_images(IMAGES, 0)[0].contiguous(memory_format=torch.channels_last)
    images, labels = (part[:TESTED] for part in cifar.test_set())
    data, x = list(calibration.split(128)), calibration[:2]
    thin = pruned(dense, calibration)
    print(f"chosen and cut after {time.perf_counter() - began:.0f} s", flush=True)
    recovered = structprune.recover(thin, dense, data, rows=8192, rounds=1)
    print(f"recovered after {time.perf_counter() - began:.0f} s", flush=True)
    before, after = structprune.cost(dense, x[:1]), structprune.cost(recovered, x[:1])
    files = {
        "dense": structprune.export_onnx(dense, folder / "dense.onnx", x).path,
        "pruned and recovered": structprune.export_onnx(recovered, folder / "recovered.onnx", x).path,
        "int8": structprune.quantize(dense, folder / "int8.onnx", x, data).path,
        "pruned, recovered, int8": structprune.quantize(recovered, folder / "both.onnx", x, data).path,
    }
    print(f"written after {time.perf_counter() - began:.0f} s", flush=True)
    runtimes = [name for name in ("onnxruntime", "openvino") if find_spec(name)]
    return {
        "macs_ratio": before.macs / after.macs,
        "params_ratio": before.params / after.params,
        "seconds": time.perf_counter() - began,
        "bytes": {name: file.stat().st_size for name, file in files.items()},
        "runtimes": {name: measured(files, name, images, labels) for name in runtimes},
        "environment": environment() | {name: version(name) for name in runtimes},
    }


def as_markdown(result: dict[str, Any]) -> str:
    """The page."""
    sizes: dict[str, int] = result["bytes"]
    lines = [
        "# From a trained network to what is shipped",
        "",
        f"ResNet-56 on CIFAR-10, {result['macs_ratio']:.2f}x fewer MACs and {result['params_ratio']:.2f}x fewer "
        f"parameters, by {IMAGES:,} training images without labels: the same ones choose channels, recover and "
        f"calibrate. Accuracy on the first {TESTED:,} test images (standard error about 0.6 points; all rows see the "
        "same images). Files are ONNX; int8 is `structprune.quantize`, whose files other runtimes read too. "
        "Milliseconds of CPU time on one "
        f"thread, medians of {RUNS} runs in turns.",
        "",
        "| | bytes | x smaller | "
        + " | ".join(f"{name}: accuracy | batch 1, ms | batch 8, ms" for name in result["runtimes"])
        + " |",
        "|---|---:|---:|" + "---:|---:|---:|" * len(result["runtimes"]),
    ]
    for name, size in sizes.items():
        cells = [f"{size:,}", f"{sizes['dense'] / size:.2f}"]
        for found in result["runtimes"].values():
            if "refused" in found[name]:
                cells += ["refused", "-", "-"]
                continue
            times = found[name]["milliseconds"]
            cells += [f"{found[name]['accuracy']:.2f} %", *(f"{times[str(batch)]:.2f}" for batch in BATCHES)]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += [
        f"\n{runtime} refuses {name}: {of['refused']}"
        for runtime, found in result["runtimes"].items()
        for name, of in found.items()
        if "refused" in of
    ]
    lines += ["", as_line(result["environment"]), ""]
    return "\n".join(lines)


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        result = chain(Path(folder))
    (RESULTS / "quantised.json").write_text(json.dumps(result, indent=1) + "\n")
    (RESULTS / "quantised.md").write_text(as_markdown(result))
    print(as_markdown(result))


if __name__ == "__main__":
    main()
