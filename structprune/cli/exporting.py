"""The command that writes files for runtimes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from structprune.cli.models import Loaded, parse_dimensions
from structprune.cli.options import AsJson, ModelFlags, SlimFlags, among, new_file
from structprune.cli.output import reporting
from structprune.export.aotinductor import export_aotinductor
from structprune.export.language_models import export_gguf
from structprune.export.mobile import export_executorch, export_litert
from structprune.export.onnx import export_onnx
from structprune.export.openvino import export_openvino
from structprune.export.tensorrt import export_tensorrt

Write = Callable[[Any, Path, Loaded, Mapping[str, Any]], Any]
# For each format, what writes it, and which of the command's options it takes.
FORMATS: dict[str, tuple[Write, tuple[str, ...]]] = {
    "onnx": (
        lambda model, file, loaded, options: export_onnx(model, file, loaded.inputs, **options),
        ("dynamic_batch", "dynamic_dims", "opset", "tolerance"),
    ),
    "openvino": (
        lambda model, file, loaded, options: export_openvino(model, file, loaded.inputs, **options),
        ("dynamic_batch", "dynamic_dims", "tolerance"),
    ),
    "executorch": (
        lambda model, file, loaded, options: export_executorch(model, file, loaded.inputs, **options),
        ("largest_batch", "tolerance"),
    ),
    "litert": (
        lambda model, file, loaded, options: export_litert(model, file, loaded.inputs, **options),
        ("tolerance",),
    ),
    "aotinductor": (
        lambda model, file, loaded, options: export_aotinductor(model, file, loaded.inputs, **options),
        ("dynamic_batch", "dynamic_dims", "tolerance"),
    ),
    "tensorrt": (
        lambda model, file, loaded, options: export_tensorrt(model, file, loaded.inputs, **options),
        ("largest_batch", "tolerance"),
    ),
    "gguf": (lambda model, file, loaded, options: export_gguf(model, file), ()),
}
FLAGS = {"dynamic_batch": "--no-dynamic-batch", "dynamic_dims": "--dynamic"}


def export_command(
    source: ModelFlags,
    file: Annotated[Path, typer.Argument(help="The file to write.", show_default=False)],
    wanted: SlimFlags,
    to: Annotated[str, typer.Option(help=f"{', '.join(FORMATS)}.", autocompletion=among(FORMATS))] = "onnx",
    dense: Annotated[bool, typer.Option("--dense", help="Export the model as it is.")] = False,
    dynamic_batch: Annotated[bool, typer.Option(help="Leave the batch free (onnx, openvino, aotinductor).")] = True,
    dynamic: Annotated[
        list[str] | None,
        typer.Option(help="Further free dimension, INPUT:DIM=NAME, repeated (as for the batch).", metavar="DIMENSION"),
    ] = None,
    largest_batch: Annotated[
        int | None, typer.Option(help="Leave the batch free up to this size (executorch, tensorrt).", min=3)
    ] = None,
    opset: Annotated[int | None, typer.Option(help="Operator set (onnx).")] = None,
    tolerance: Annotated[float | None, typer.Option(help="Largest relative error allowed.", min=0)] = None,
    as_json: AsJson = False,
) -> None:
    """Write a file of a saved or pruned model for a runtime, checked in it; needs the extra of that name."""
    if to not in FORMATS:
        raise typer.BadParameter(f"--to is {to!r}; known are {', '.join(FORMATS)}.")
    write, taken = FORMATS[to]
    new_file(file)
    with reporting(as_json) as output:
        options = {
            "dynamic_batch": None if dynamic_batch else False,
            "dynamic_dims": parse_dimensions(dynamic) if dynamic else None,
            "largest_batch": largest_batch,
            "opset": opset,
            "tolerance": tolerance,
        }
        given = {name: value for name, value in options.items() if value is not None}
        if unused := next((name for name in given if name not in taken), None):
            flag = FLAGS.get(unused, f"--{unused.replace('_', '-')}")
            raise typer.BadParameter(f"--to {to} takes no {flag}.")
        loaded = source.load()
        written = write(loaded.model if dense else wanted.slim(loaded), file, loaded, given)
        data = {**asdict(written), "path": str(written.path)}
        opset_said = f", opset {written.opset}" if to == "onnx" else ""
        text = (
            f"{written.path}: {written.bytes:,} bytes{opset_said}, max relative error {written.max_relative_error:.1e}"
        )
        output.result(data, text + (" in ONNX Runtime" if to == "onnx" else ""))
