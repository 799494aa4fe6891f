"""A trained network on its way to what is shipped: dense, pruned, recovered, quantised; on the runtimes that ship it.

Run ``python benchmarks/quantised.py`` with the data at hand (see `harness.cifar`); results go to
``results/quantised.*``. The same 1,024 training images, without labels, serve to choose channels, to recover and to
calibrate; the test images are for the last measurement alone. ``--tested`` and ``--images`` make it shorter. Then a
small language model, whose weights alone are quantised; ``--only language`` measures it anew and leaves the
rest as it is.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from harness import ROOT, cifar, stories
from harness.environment import as_line, environment
from torch import Tensor, nn

import structprune
from structprune.export.aotinductor import compiler_lacking
from structprune.export.runtimes import RUNTIMES
from structprune.recovery.selection import divergence

RESULTS = ROOT / "benchmarks" / "results"
IMAGES, TESTED = 1024, 10_000
# Half the MACs, and half the parameters, since files are what is shipped; both at once.
TARGET = {"macs": 1 / 2, "params": 1 / 2}
ROWS, ROUNDS = 32768, 3
BATCHES = (1, 8)
RUNS = 25
# What the int8 network may lose of the recovered one, in points, and how many times smaller its file is to be.
LOSS, SMALLER = 0.5, 7.0
DENSE, PRUNED, RECOVERED, INT8, BOTH = "dense", "pruned", "recovered", "dense, int8", "recovered, int8"
TITLES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO", "aotinductor": "AOTInductor"}
PACKAGES = {"onnxruntime": ("onnxruntime",), "openvino": ("openvino",), "aotinductor": ("torchao",)}


def pruned(model: nn.Module, data: list[Tensor]) -> nn.Module:
    """Half the network, not yet recovered."""
    x = data[0][:1]
    criterion = structprune.Reconstruction(per="macs", probes=128, rows=ROWS, distance=divergence)
    chosen = criterion.fit(structprune.DependencyGraph(model, x), data)
    return structprune.prune(model, x, importance=chosen, scope=chosen, target=TARGET, round_to=1, allocation="exact")


class Loaded(nn.Module):
    """A file in a runtime, as something to measure."""

    def __init__(self, run: Callable[[dict[str, Any]], list[Any]]) -> None:
        super().__init__()
        self._run = run

    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(np.array(self._run({"x": x.numpy()})[0]))


def accuracy(model: nn.Module, images: Tensor, labels: Tensor, size: int) -> float:
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in cifar.batches(images, labels, size))
    return 100 * right / len(labels)


def onnx_files(models: dict[str, nn.Module], data: list[Tensor], folder: Path) -> dict[str, Path]:
    """Each network as ONNX; two of them as integers too."""
    x = data[0][:2]
    files = {name: structprune.export_onnx(model, folder / f"{name}.onnx", x).path for name, model in models.items()}
    for name, of in ((INT8, DENSE), (BOTH, RECOVERED)):
        files[name] = structprune.quantize(models[of], folder / f"{name}.onnx", x, data).path
    return files


def programs(models: dict[str, nn.Module], data: list[Tensor], folder: Path) -> dict[str, nn.Module]:
    """Each network as AOTInductor is to compile it; integers are torchao's."""
    held = dict(models)
    for name, of in ((INT8, DENSE), (BOTH, RECOVERED)):
        file = folder / f"{name}-program.pt2"
        held[name] = structprune.torch_model(
            structprune.quantize(models[of], file, data[0][:2], data, backend="torchao").path
        )
    return held


def package(model: nn.Module, images: Tensor, file: Path) -> nn.Module:
    """Compiled by AOTInductor for as many images."""
    return structprune.torch_model(structprune.export_aotinductor(model, file, images, dynamic_batch=False).path)


def measured(
    models: dict[int, dict[str, nn.Module]], images: Tensor, labels: Tensor, size: int = 250
) -> dict[str, dict[str, Any]]:
    """Accuracy and milliseconds of each, timed in turns on one thread.

    Args:
        models: by the size of a batch, and by name.
        images: to classify.
        labels: what they are.
        size: of the batches on which accuracy is measured.
    """
    medians: dict[tuple[str, int], float] = {}
    for batch in BATCHES:
        # OpenVINO's calls wait on another thread, so its time is the process's as well.
        options = {"threads": 1, "runs": RUNS, "clock": "process", "memory": False, "explanations": False}
        times = structprune.benchmark(models[batch], images[:batch], **options)
        medians |= {(each.model, batch): 1e3 * each.median for each in times.timings}
    return {
        name: {
            "accuracy": accuracy(model, images, labels, size),
            "milliseconds": {str(batch): medians[name, batch] for batch in BATCHES},
        }
        for name, model in models[BATCHES[-1]].items()
    }


def chain(folder: Path, count: int, tested: int) -> dict[str, Any]:
    """All steps of one network."""
    began = time.perf_counter()

    def say(what: str) -> None:
        print(f"{what} after {time.perf_counter() - began:.0f} s", flush=True)

    dense = cifar.load_resnet(56)
    calibration = cifar.train_images(count, 0)[0].contiguous(memory_format=torch.channels_last)
    images, labels = (part[:tested] for part in cifar.test_set())
    data = list(calibration.split(128))
    thin = pruned(dense, data)
    say("chosen and cut")
    shown = [*data, *(part.flip(3) for part in data)]
    recovered = structprune.recover(thin, dense, shown, rows=ROWS, rounds=ROUNDS)
    say("recovered")
    nets: dict[str, nn.Module] = {DENSE: dense, PRUNED: thin, RECOVERED: recovered}
    costs = {name: structprune.cost(model, data[0][:1]) for name, model in nets.items()}
    files = onnx_files(nets, data, folder)
    say("written")
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for name in ("onnxruntime", "openvino"):
        if find_spec(name):
            loaded = {file: Loaded(RUNTIMES[name].load(path, 1)) for file, path in files.items()}
            found[name] = measured(dict.fromkeys(BATCHES, loaded), images, labels)
            say(f"measured in {TITLES[name]}")
    if find_spec("torchao") and not compiler_lacking():
        held = programs(nets, data, folder)
        compiled = {
            size: {name: package(net, images[:size], folder / f"{name}-{size}.pt2") for name, net in held.items()}
            for size in BATCHES
        }
        found["aotinductor"] = measured(compiled, images, labels, BATCHES[-1])
        say("measured by AOTInductor")
    return {
        "images": count,
        "tested": tested,
        "macs": {name: cost.macs for name, cost in costs.items()},
        "params": {name: cost.params for name, cost in costs.items()},
        "seconds": time.perf_counter() - began,
        "bytes": {name: file.stat().st_size for name, file in files.items()},
        "runtimes": found,
        "environment": environment()
        | {package: version(package) for name in found for package in PACKAGES[name] if find_spec(package)},
    }


# -- a language model -------------------------------------------------------------------------------------------------


class Logits(nn.Module):
    """A file as the model that it came from, for what wants its logits."""

    def __init__(self, file: nn.Module) -> None:
        super().__init__()
        self._file = file

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        outputs = self._file(input_ids)
        return SimpleNamespace(logits=outputs[0] if isinstance(outputs, tuple) else outputs)


def language(folder: Path) -> dict[str, dict[str, float]]:
    """Perplexity and size of a small Llama, in float and quantised in each way; not pruned."""
    model = stories.load_stories()
    data = [stories.as_batch(ids) for ids in stories.windows(0)[:16].split(4)]
    dense = structprune.export_onnx(model, folder / "dense.onnx", data[0])
    found = {"float": {"perplexity": stories.perplexity(model, stories.windows(1)), "bytes": dense.bytes}}
    load = {"onnxruntime": structprune.onnx_model, "torchao": structprune.torch_model}
    for backend, read in load.items():
        if backend == "torchao" and not find_spec("torchao"):
            continue
        for scheme in ("int8_dynamic", "int8_weights", "int4_weights"):
            file = folder / f"{scheme}.{'onnx' if backend == 'onnxruntime' else 'pt2'}"
            small = structprune.quantize(model, file, data[0], data, scheme=scheme, backend=backend)
            perplexity = stories.perplexity(Logits(read(small.path)), stories.windows(1))
            found[f"{scheme}, {backend}"] = {"perplexity": perplexity, "bytes": small.bytes}
            print(f"{scheme}, {backend}: perplexity {perplexity:.3f}", flush=True)
    return found


def language_lines(found: dict[str, dict[str, float]]) -> list[str]:
    lines = [
        "",
        "## A language model",
        "",
        f"{stories.NAME}, a Llama of 260 thousand parameters that is not pruned; perplexity on the second half of the "
        "stories. Embeddings stay in float, and in four bits by torchao layers of 172 inputs too, which are no "
        "multiple of 32; torchao's programs hold the graph as text, which counts in files as small as these.",
        "",
        "| | perplexity | bytes | x smaller |",
        "|---|---:|---:|---:|",
    ]
    for name, row in found.items():
        smaller = found["float"]["bytes"] / row["bytes"]
        lines.append(f"| {name} | {row['perplexity']:.3f} | {row['bytes']:,} | {smaller:.2f} |")
    return lines


# -- the page --------------------------------------------------------------------------------------------------------


def stages(result: dict[str, Any]) -> list[structprune.Stage]:
    """The network on its way, as `structprune.plot_chain` draws it."""
    chosen = {DENSE: DENSE, PRUNED: PRUNED, RECOVERED: RECOVERED, BOTH: "int8"}
    return [
        structprune.Stage(
            title,
            accuracy=result["runtimes"]["onnxruntime"][name]["accuracy"],
            bytes=result["bytes"][name],
            macs=result["macs"].get(name, result["macs"][RECOVERED]),
            seconds={
                TITLES[runtime]: of[name]["milliseconds"][str(BATCHES[0])] / 1e3
                for runtime, of in result["runtimes"].items()
            },
        )
        for name, title in chosen.items()
    ]


def as_markdown(result: dict[str, Any]) -> str:
    """The page."""
    sizes: dict[str, int] = result["bytes"]
    macs, params = (result[key][DENSE] / result[key][RECOVERED] for key in ("macs", "params"))
    error = 100 * (0.92 * 0.08 / result["tested"]) ** 0.5
    lines = [
        "# From a trained network to what is shipped",
        "",
        f"ResNet-56 on CIFAR-10, {macs:.2f}x fewer MACs and {params:.2f}x fewer parameters, by {result['images']:,} "
        "training images without labels: the same ones choose channels, recover and calibrate. Accuracy on the first "
        f"{result['tested']:,} test images (standard error about {error:.1f} points; all rows see the same images). "
        "Files are ONNX; int8 is `structprune.quantize`: by ONNX Runtime in the file that ONNX Runtime and OpenVINO "
        "run, by torchao in AOTInductor, which compiles programs of `torch.export` into packages for one size of batch "
        f"that hold code beside the weights. Milliseconds of CPU time on one thread, medians of {RUNS} runs in turns, "
        f"at a batch of {' and of '.join(map(str, BATCHES))}.",
        "",
        "| | bytes | x smaller | "
        + " | ".join(f"{TITLES[name]}: accuracy | batch 1, ms | batch 8, ms" for name in result["runtimes"])
        + " |",
        "|---|---:|---:|" + "---:|---:|---:|" * len(result["runtimes"]),
    ]
    for name, size in sizes.items():
        cells = [f"{size:,}", f"{sizes[DENSE] / size:.2f}"]
        for found in result["runtimes"].values():
            times = found[name]["milliseconds"]
            cells += [f"{found[name]['accuracy']:.2f} %", *(f"{times[str(batch)]:.2f}" for batch in BATCHES)]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", *verdicts(result), "", "![The way from dense to what is shipped](quantised.png)"]
    lines += language_lines(result["language"]) if "language" in result else []
    lines += ["", as_line(result["environment"]), ""]
    return "\n".join(lines)


def verdicts(result: dict[str, Any]) -> list[str]:
    """What was aimed at, and what was reached."""
    lost = {
        TITLES[name]: found[RECOVERED]["accuracy"] - found[BOTH]["accuracy"]
        for name, found in result["runtimes"].items()
    }
    smaller = result["bytes"][DENSE] / result["bytes"][BOTH]
    worst = max(lost.values())
    return [
        f"- int8 loses at most {LOSS} points of the recovered network: {'met' if worst <= LOSS else 'missed'} ("
        + ", ".join(f"{points:+.2f} points lost in {name}" for name, points in lost.items())
        + ").",
        f"- The file is at least {SMALLER:g}x smaller than the dense one: {'met' if smaller >= SMALLER else 'missed'} "
        f"({smaller:.2f}x).",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument("--tested", type=int, default=TESTED)
    parser.add_argument("--only", choices=["images", "language"], help="the other figures stay as they are")
    parser.add_argument("--out", type=Path, default=RESULTS / "quantised.json")
    args = parser.parse_args()
    if args.tested % BATCHES[-1]:
        parser.error(f"--tested is {args.tested}; packages take {BATCHES[-1]} images at a time, so give a multiple")
    torch.set_num_threads(1)
    result: dict[str, Any] = json.loads(args.out.read_text()) if args.only else {}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        if args.only != "language":
            result |= chain(Path(folder), args.images, args.tested)
        if args.only != "images":
            result["language"] = language(Path(folder))
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    args.out.with_suffix(".md").write_text(as_markdown(result))
    structprune.plot_chain(stages(result), args.out.with_suffix(".png"))
    print(as_markdown(result))


if __name__ == "__main__":
    main()
