"""The commands that make a pruned model better: recover, finetune; compress does all in one."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from structprune.benchmarking import Benchmark, benchmark
from structprune.cli.images import batches_of
from structprune.cli.models import Loaded
from structprune.cli.options import AsJson, ModelFlags, PlanFlags, new_folder
from structprune.cli.output import Output, costs, reporting
from structprune.export.onnx import export_onnx
from structprune.extras import installed
from structprune.files import write_text
from structprune.inputs import evaluating
from structprune.io import load, save
from structprune.planning.plan import Plan
from structprune.recovery.recover import recover
from structprune.recovery.report import recovery_report
from structprune.reporting import report
from structprune.surgery.verify import verify
from structprune.training.finetuning import finetune

Data = Annotated[str, typer.Option("--data", help="A folder of images, or module:function of batches; no labels.")]
Saved = Annotated[Path, typer.Option(help="A folder of `structprune prune`.", exists=True, file_okay=False)]
Folder = Annotated[Path, typer.Option("--out", "-o", help="Folder for the result.")]
Samples = Annotated[int, typer.Option(help="Images of the folder to look at, drawn at random.", min=2)]
Size = Annotated[int, typer.Option("--batch", help="Images in one batch.", min=1)]
Epochs = Annotated[int, typer.Option(help="Epochs of training on the dense model's outputs.", min=0)]
Rate = Annotated[float, typer.Option("--lr", help="Learning rate of the training.", min=0)]
STATE = "compress.json"


def agreement(model: nn.Module, dense: nn.Module, batches: list[Tensor]) -> float:
    """The share of samples, in percent, for which both models name the same class."""
    same = total = 0
    with evaluating(model, dense):
        for batch in batches:
            ours, theirs = (_logits(each(batch)).argmax(-1) for each in (model, dense))
            same, total = same + int((ours == theirs).sum()), total + ours.numel()
    return 100 * same / total


def _logits(output: Any) -> Tensor:
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise typer.BadParameter(f"The model returns a {type(output).__name__}, which holds no class scores.")
    return logits


def held_out(batches: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The first four fifths of the samples, and the last fifth, to look at."""
    if len(batches) == 1:
        at = max(1, len(batches[0]) * 4 // 5)
        return [batches[0][:at]], [batches[0][at:] if at < len(batches[0]) else batches[0]]
    at = max(1, len(batches) * 4 // 5)
    return batches[:at], batches[at:] or batches[-1:]


def recover_command(
    source: ModelFlags, saved: Saved, data: Data, out: Folder, samples: Samples = 256, batch: Size = 64,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Solve the layers of a pruned model again so that it computes what the dense one does: no labels, no training."""
    new_folder(out)
    with reporting(as_json) as output:
        loaded = source.load()
        slim = _loaded_slim(loaded, saved)
        train, rest = held_out(batches_of(data, loaded, samples, batch, source.seed))
        before = agreement(slim, loaded.model, rest)
        output.step("solving the layers again")
        better = recover(slim, loaded.model, train)
        save(better, out)
        told: dict[str, Any] = {"folder": str(out), "before": before}
        told["after"] = agreement(better, loaded.model, rest)
        told["layers"] = [asdict(row) for row in recovery_report(better).layers]
        output.result(told, f"agreement with the dense model {before:.1f}% -> {told['after']:.1f}%\nsaved to {out}")


def finetune_command(
    source: ModelFlags, saved: Saved, data: Data, out: Folder, epochs: Epochs = 5, lr: Rate = 0.005,
    samples: Samples = 4096, batch: Size = 64, as_json: AsJson = False,
) -> None:  # fmt: skip
    """Train a pruned model on the outputs of the dense one: no labels. A run that was cut short goes on."""
    new_folder(out)
    with reporting(as_json) as output:
        loaded = source.load()
        slim = _loaded_slim(loaded, saved)
        train, rest = held_out(batches_of(data, loaded, samples, batch, source.seed))
        before = agreement(slim, loaded.model, rest)
        _trained(slim, loaded, train, rest, epochs, lr, out / "checkpoint", output)
        save(slim, out)
        told = {"folder": str(out), "before": before, "after": agreement(slim, loaded.model, rest)}
        output.result(told, f"agreement with the dense model {before:.1f}% -> {told['after']:.1f}%\nsaved to {out}")


def _loaded_slim(loaded: Loaded, saved: Path) -> nn.Module:
    return load(loaded.build, saved).to(next(loaded.model.parameters()).device).eval()


def _trained(
    slim: nn.Module, loaded: Loaded, train: list[Tensor], rest: list[Tensor], epochs: int, lr: float, checkpoint: Path,
    output: Output,
) -> None:  # fmt: skip
    output.step(f"training for {epochs} epochs")
    for parameter in slim.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    finetune(
        slim, train, lambda model: agreement(model, loaded.model, rest), epochs=epochs, teacher=loaded.model, soft=1.0,
        lr=lr, checkpoint=checkpoint, progress=not output.quiet,
    )  # fmt: skip


# -- all of it --------------------------------------------------------------------------------------------------------


def compress_command(
    source: ModelFlags, wanted: PlanFlags, out: Folder, samples: Samples = 256, batch: Size = 64, epochs: Epochs = 0,
    lr: Rate = 0.005,
    restart: Annotated[bool, typer.Option("--restart", help="Begin anew whatever the folder holds.")] = False,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Prune, recover, train if asked, export to ONNX, time and report; a run that was cut short goes on.

    The folder holds what structprune.load reads (plan.json, model.safetensors), model.onnx, report.html and
    benchmark.json.
    """
    if not wanted.given:
        raise typer.BadParameter("Say how much goes: --target, --ratio or --plan.")
    data = wanted.options["data"]
    if data is None:
        raise typer.BadParameter("Give --data: a folder of images, or module:function of batches, without labels.")
    # The same batches serve the criterion.
    wanted = replace(wanted, options={**wanted.options, "data": None})
    new_folder(out)
    with reporting(as_json) as output:
        loaded = source.load()
        train, rest = held_out(batches_of(data, loaded, samples, batch, source.seed))
        asked = {"model": source.model, "weights": str(source.weights), "pretrained": source.pretrained, "data": data}
        asked |= {"seed": source.seed, "samples": samples, "batch": batch, "epochs": epochs, "lr": lr}
        asked |= {"options": {name: text for name, text in wanted.options.items() if text is not None}}
        asked |= {"plan": str(wanted.plan_file)}
        run = _Compression(loaded, train, rest, out, asked, output, restart)
        told = run.go(wanted, epochs, lr, source.model)
        on = f"agreement with the dense model on {sum(map(len, rest))} held-out samples"
        lines = [f"{on}: pruned {told['pruned']:.1f}%"]
        lines += [f"{name} {told[name]:.1f}%" for name in ("recovered", "trained") if name in told]
        output.result(told, costs(run.plan.before, run.plan.after), ", ".join(lines), *run.shown, f"all in {out}")


class _Compression:
    """The steps, each of which leaves a file behind, so that the next run goes on from there."""

    def __init__(
        self, loaded: Loaded, train: list[Tensor], rest: list[Tensor], folder: Path, asked: dict[str, Any],
        output: Output, restart: bool,
    ) -> None:  # fmt: skip
        self._loaded, self._train, self._rest, self._folder = loaded, train, rest, folder
        self._output, self.shown = output, list[Any]()
        folder.mkdir(parents=True, exist_ok=True)
        self._state: dict[str, Any] = {"asked": asked}
        self.plan: Plan
        file = folder / STATE
        if file.exists() and not restart:
            before = json.loads(file.read_text(encoding="utf-8"))
            if before.get("asked") != json.loads(json.dumps(asked)):
                raise typer.BadParameter(f"{folder} holds a run with other settings; give --restart or another --out.")
            self._state = before

    def _done(self, **told: Any) -> None:
        self._state |= told
        write_text(self._folder / STATE, json.dumps(self._state, indent=1))

    def go(self, wanted: PlanFlags, epochs: int, lr: float, title: str) -> dict[str, Any]:
        """Do what is left to do."""
        model, state = self._loaded.model, self._state
        if "plan" not in state:
            self._output.step("planning")
            plan = wanted.plan(self._loaded, data=self._train)
            slim = plan.apply(model)
            verify(model, slim, plan, self._loaded.inputs).raise_for_error()
            self._done(plan=plan.to_json(), pruned=agreement(slim, model, self._rest))
        self.plan = Plan.from_json(state["plan"])
        recovery = None
        if "recovered" not in state:
            self._output.step("solving the layers again")
            slim = recover(self.plan.apply(model), model, self._train)
            recovery = recovery_report(slim)
            save(slim, self._folder)
            self._done(recovered=agreement(slim, model, self._rest))
        slim = _loaded_slim(self._loaded, self._folder)
        if epochs and "trained" not in state:
            _trained(slim, self._loaded, self._train, self._rest, epochs, lr, self._folder / "checkpoint", self._output)
            save(slim, self._folder)
            self._done(trained=agreement(slim, model, self._rest))
        self._finish(slim, recovery, title)
        return {"folder": str(self._folder), **{k: v for k, v in state.items() if k not in ("asked", "plan")}}

    def _finish(self, slim: nn.Module, recovery: Any, title: str) -> None:
        model, inputs = self._loaded.model, self._loaded.inputs
        onnx = all(map(installed, ("onnx", "onnxscript", "onnxruntime")))
        if onnx and "onnx" not in self._state:
            self._output.step("exporting")
            written = export_onnx(slim, self._folder / "model.onnx", inputs)
            self._done(onnx=str(written.path), onnx_error=written.max_relative_error)
        timed = self._folder / "benchmark.json"
        if "speedup" not in self._state or not timed.exists():
            self._output.step("timing")
            backends = ["eager", *(["onnxruntime"] if onnx and next(slim.parameters()).device.type == "cpu" else [])]
            timings = benchmark(
                {"dense": model, "slim": slim}, inputs, backends=backends, runs=20, progress=not self._output.quiet
            )
            write_text(timed, timings.to_json())
            self._done(speedup={backend: timings.speedup("slim", backend=backend).ratio for backend in backends})
        timings = Benchmark.from_json(timed.read_text(encoding="utf-8"))
        self.shown.append(timings)
        self._output.step("writing the report")
        left = float(self.plan.after.macs)
        names = [name for name in ("pruned", "recovered", "trained") if name in self._state]
        points = [(float(self.plan.before.macs), 100.0, "dense"), *((left, self._state[n], n) for n in names)]
        with torch.no_grad():
            report(
                model, inputs, self._folder / "report.html", plan=self.plan, points=points, recovery=recovery,
                point_axes=("MACs", "agreement with the dense model, %"), benchmark=timings, title=title,
            )  # fmt: skip
