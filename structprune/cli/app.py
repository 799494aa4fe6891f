"""The commands plan, prune, sensitivity, benchmark, export, report and info; others are added to them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast

import typer
from torch import nn

from structprune.benchmarking import Benchmark, benchmark, layer_times
from structprune.benchmarking.backends import BACKENDS
from structprune.cli.exporting import export_command
from structprune.cli.improving import compress_command, finetune_command, recover_command
from structprune.cli.info import describe_machine, describe_model, model_tables, onnx_tables
from structprune.cli.models import Loaded, named_object, parse_points, parse_stages
from structprune.cli.options import AsJson, File, ModelFlags, PlanFlags, SlimFlags, among, command, new_file, new_folder
from structprune.cli.output import Output, costs, reporting
from structprune.cli.searching import optimize_command
from structprune.dependency_graph import DependencyGraph
from structprune.export.metadata import onnx_info
from structprune.extras import require
from structprune.io import save
from structprune.planning.plan import Plan
from structprune.planning.sensitivities import RATIOS, Sensitivity, sensitivity
from structprune.reporting import report
from structprune.surgery.verify import Report, verify

T = TypeVar("T")

_CLOCKS = ("wall", "process")

app = typer.Typer(
    name="structprune",
    help="Make trained PyTorch networks smaller and faster by removing whole channels.",
    epilog="Exit codes: 0 done, 1 unexpected error, 2 wrong usage, 3 an extra is missing, 4 refused, 5 not exact.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"structprune {version('structprune')}")
        raise typer.Exit


@app.callback()
def about(
    shown: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Make trained PyTorch networks smaller and faster by removing whole channels."""


@command(app, "plan")
def plan_command(source: ModelFlags, wanted: PlanFlags, out: File = None, as_json: AsJson = False) -> None:
    """Decide which channels go; nothing is changed."""
    new_file(out)
    with reporting(as_json) as output:
        decided = wanted.plan(source.load())
        if out is not None:
            out.write_text(decided.to_json(), encoding="utf-8")
        output.result(
            decided.to_json(), *([decided.table()] if out is None else [costs(decided.before, decided.after)])
        )


@command(app, "prune")
def prune_command(
    source: ModelFlags,
    wanted: PlanFlags,
    folder: Annotated[Path, typer.Option("--out", "-o", help="Folder for plan.json and model.safetensors.")],
    check: Annotated[bool, typer.Option("--verify/--no-verify", help="Compare with the original.")] = True,
    as_json: AsJson = False,
) -> None:
    """Remove channels, verify the result and save it to a folder that structprune.load reads."""
    new_folder(folder)
    with reporting(as_json) as output:
        loaded = source.load()
        decided = wanted.plan(loaded)
        slim = decided.apply(loaded.model)
        verification = verify(loaded.model, slim, decided, loaded.inputs) if check else None
        if verification is not None:
            verification.raise_for_error()
        save(slim, folder)
        data = {"folder": str(folder), "digest": decided.digest, "before": asdict(decided.before)}
        data |= {"after": asdict(decided.after), "verification": _verified(verification)}
        output.result(
            data, costs(decided.before, decided.after), f"{verification or 'not verified'}\nsaved to {folder}"
        )


def _verified(verification: Report | None) -> dict[str, Any] | None:
    return None if verification is None else {"ok": verification.ok, **asdict(verification)}


@command(app, "sensitivity")
def sensitivity_command(
    source: ModelFlags,
    metric: Annotated[str, typer.Option(help="module:function of (model, loader); a number, more is better.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="JSON file; a run that was cut short goes on from it.")],
    loader: Annotated[
        str | None, typer.Option(help="module:function that makes the loader; without it, the example inputs.")
    ] = None,
    ratio: Annotated[list[float] | None, typer.Option("--ratio", "-r", help="Share to try, repeated.")] = None,
    importance: Annotated[str, typer.Option(help="A criterion by name, or module:object.")] = "l2",
    ignore: Annotated[list[str] | None, typer.Option(help="Layer to leave whole, repeated.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw a heat map too; needs the extra plot.")] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Measure anew whatever the file holds.")] = False,
    as_json: AsJson = False,
) -> None:
    """Measure how a metric of yours falls when each group alone is pruned."""
    new_file(out)
    with reporting(as_json) as output:
        if plot is not None:
            _require_matplotlib()  # before hours of measuring
        loaded = source.load()
        measure = named_object(metric)
        data = loaded.inputs if loader is None else named_object(loader)()
        if restart:
            out.unlink(missing_ok=True)
        curves = sensitivity(
            loaded.model,
            loaded.inputs,
            data,
            measure,
            ratios=tuple(ratio) if ratio else RATIOS,
            importance=named_object(importance) if ":" in importance else importance,
            ignore=ignore or (),
            checkpoint=out,
            progress=not output.quiet,
        )
        out.write_text(curves.to_json(), encoding="utf-8")
        if plot is not None:
            curves.plot(plot)
        output.result(curves.to_json(), curves.table() if curves.curves else "No group may lose channels.")


def _require_matplotlib() -> None:
    require("matplotlib.figure", "Drawing", "plot")


@command(app, "benchmark")
def benchmark_command(
    source: ModelFlags,
    wanted: SlimFlags,
    backend: Annotated[
        list[str] | None,
        typer.Option("--backend", "--backends", "-b", help=f"{', '.join(BACKENDS)}.", autocompletion=among(BACKENDS)),
    ] = None,
    batch_size: Annotated[
        list[int] | None, typer.Option("--batch-size", "--batch-sizes", help="Samples in one run, repeated.", min=1)
    ] = None,
    channels_last: Annotated[
        bool, typer.Option("--channels-last", help="Eager with channels-last tensors too.")
    ] = False,
    threads: Annotated[int | None, typer.Option(help="Threads of the CPU.", min=1)] = None,
    runs: Annotated[int, typer.Option(help="Timed runs of each.", min=2)] = 50,
    warmup: Annotated[int, typer.Option(help="Runs before those.", min=0)] = 5,
    clock: Annotated[
        str, typer.Option(help="wall, or process: time on the CPU, with --threads 1.", autocompletion=among(_CLOCKS))
    ] = "wall",
    explain: Annotated[
        bool, typer.Option("--explain/--no-explain", help="Count MACs, and say why pruning gains no more.")
    ] = True,
    plot: Annotated[Path | None, typer.Option(help="Draw it too; needs the extra plot.", dir_okay=False)] = None,
    out: File = None,
    as_json: AsJson = False,
) -> None:
    """Time the model against its smaller self, in turns, and say why pruning gains no more."""
    new_file(out)
    chosen = [*(backend or ["eager"]), *(["channels_last"] if channels_last else [])]
    if clock not in _CLOCKS or (clock == "process" and threads != 1):
        raise typer.BadParameter(f"--clock is {clock!r}; give wall, or with --threads 1 process.")
    if unknown := [name for name in chosen if name not in BACKENDS]:
        raise typer.BadParameter(f"There is no backend {unknown[0]!r}; known are {', '.join(BACKENDS)}.")
    with reporting(as_json) as output:
        loaded = source.load()
        models = {"dense": loaded.model, "slim": wanted.slim(loaded)}
        timings = benchmark(
            models,
            loaded.inputs,
            backends=list(dict.fromkeys(chosen)),
            batch_sizes=batch_size or None,
            threads=threads,
            runs=runs,
            warmup=warmup,
            clock="process" if clock == "process" else "wall",
            explanations=explain,
            progress=not output.quiet,
        )
        if plot is not None:
            timings.plot(plot)
        if out is not None:
            out.write_text(timings.to_json(), encoding="utf-8")
        output.result(timings.to_json(), cast("Any", timings))


command(app, "export")(export_command)


def _decided(loaded: Loaded, wanted: PlanFlags, check: bool) -> tuple[Plan | None, nn.Module | None, Report | None]:
    """The plan that was asked for, the smaller model and what `verify` says of it; None for each if none was."""
    if not wanted.given:
        return None, None, None
    decided = wanted.plan(loaded)
    slim = decided.apply(loaded.model)
    return decided, slim, verify(loaded.model, slim, decided, loaded.inputs) if check else None


def _from_file(made: Callable[[str], T], file: Path | None) -> T | None:
    return None if file is None else made(file.read_text(encoding="utf-8"))


@command(app, "report")
def report_command(
    source: ModelFlags,
    file: Annotated[Path, typer.Argument(help="The HTML file to write.", show_default=False)],
    wanted: PlanFlags,
    curves: Annotated[
        Path | None, typer.Option("--sensitivity", help="JSON of `structprune sensitivity`.", exists=True)
    ] = None,
    points: Annotated[
        Path | None, typer.Option(help="JSON list of [cost, accuracy] or [cost, accuracy, label].", exists=True)
    ] = None,
    measured: Annotated[
        Path | None, typer.Option("--benchmark", help="JSON of `structprune benchmark`.", exists=True)
    ] = None,
    stages: Annotated[
        Path | None, typer.Option("--chain", help="JSON list of stages, from dense to what is shipped.", exists=True)
    ] = None,
    times: Annotated[
        str | None,
        typer.Option(
            help="Measure each layer's time on this backend, before and after.", autocompletion=among(BACKENDS)
        ),
    ] = None,
    check: Annotated[bool, typer.Option("--verify/--no-verify", help="Compare with the original.")] = True,
    title: Annotated[str | None, typer.Option(help="Heading of the page.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write one HTML file that shows the graph, the plan, and what was measured."""
    if times is not None and times not in BACKENDS:
        raise typer.BadParameter(f"There is no backend {times!r}; known are {', '.join(BACKENDS)}.")
    new_file(file)
    with reporting(as_json) as output:
        loaded = source.load()
        decided, slim, verification = _decided(loaded, wanted, check)
        timed = [] if times is None else [loaded.model] if slim is None else [loaded.model, slim]
        written = report(
            loaded.model,
            loaded.inputs,
            file,
            plan=decided,
            verification=verification,
            sensitivity=_from_file(Sensitivity.from_json, curves),
            points=() if points is None else parse_points(points),
            times=[layer_times(each, loaded.inputs, backend=times or "eager") for each in timed],
            benchmark=_from_file(Benchmark.from_json, measured),
            chain=() if stages is None else parse_stages(stages),
            title=title or source.model,
        )
        size = written.stat().st_size
        data = {"path": str(written), "bytes": size, "verification": _verified(verification)}
        output.result(data, *([str(verification)] if verification else []), f"{written}: {size:,} bytes")
        if verification is not None:
            verification.raise_for_error()


command(app, "compress")(compress_command)
command(app, "recover")(recover_command)
command(app, "finetune")(finetune_command)
command(app, "optimize")(optimize_command)


@command(app, "info")
def info_command(
    model: Annotated[
        str | None, typer.Argument(help="A model, or an ONNX file; without one, the machine alone.")
    ] = None,
    inputs: Annotated[list[str] | None, typer.Option("--input", "-i", help="Shape of an input, repeated.")] = None,
    device: Annotated[str, typer.Option(help="Where the model goes.")] = "cpu",
    layer: Annotated[list[str] | None, typer.Option(help="Explain this layer, repeated.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show versions and hardware, or what of a model is coupled and pinned, or of which plans an ONNX file came."""
    with reporting(as_json) as output:
        if model is None:
            _show_machine(output)
            return
        if model.endswith(".onnx"):
            said = onnx_info(model)
            output.result({**asdict(said), "path": str(said.path)}, *onnx_tables(said))
            return
        loaded = ModelFlags(model=model, inputs=inputs, device=device).load()
        graph = DependencyGraph(loaded.model, loaded.inputs)
        data = describe_model(graph)
        explained = {name: graph.explain(name) for name in layer or ()}
        output.result(data | {"layers": explained}, *(explained.values() if layer else model_tables(data)))


def _show_machine(output: Output) -> None:
    data = describe_machine()
    lines = [f"{key}: {it if isinstance(it, str) else json.dumps(it)}" for key, it in data["hardware"].items()]
    versions = [f"{name} {version}" for name, version in data["versions"].items()]
    extras = [
        f"{name}: {'ready' if not it['missing'] else 'missing ' + ', '.join(it['missing'])}"
        for name, it in data["extras"].items()
    ]
    output.result(data, "\n".join(versions), "\n".join(lines), "extras\n  " + "\n  ".join(extras))
