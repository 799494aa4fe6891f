"""ONNX files that are known to compute what the model computes.

The file is written by ``torch.onnx`` into a temporary folder, checked by ``onnx.checker``, run by ONNX Runtime on the
example inputs and on another batch size, and only then moved to where it was asked for.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from structprune.checking import FLAG, INPUTS, PATH, shown, whole
from structprune.checking import require as require_arguments
from structprune.errors import ExportError
from structprune.export.files import check, tensors
from structprune.export.metadata import metadata
from structprune.export.program import FreeDims, program_of
from structprune.export.runtimes import ONNXRUNTIME
from structprune.export.verified import Flat, Wanted, write_verified
from structprune.tracing.trace import ExampleInputs, as_call, require_running

# Beyond 2 GiB a protobuf cannot hold the weights; they then go into a second file beside the first.
_EXTERNAL_DATA_ABOVE = 1_800_000_000


@dataclass(frozen=True)
class OnnxExport:
    """What was written and how well it agrees with the model. See `structprune.export_onnx` for an example.

    Attributes:
        path: The ONNX file.
        opset: Version of the ONNX operator set.
        max_relative_error: Largest difference to the model's outputs, over all outputs and batch sizes tried, each
            divided by the largest magnitude of that output.
        bytes: Size of the file, with that of its external weights if it has any.
    """

    path: Path
    opset: int
    max_relative_error: float
    bytes: int


def export_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: ExampleInputs,
    *,
    dynamic_batch: bool = True,
    dynamic_dims: Mapping[str, Mapping[int, str]] | None = None,
    check_inputs: Iterable[ExampleInputs] = (),
    opset: int | None = None,
    tolerance: float | None = None,
) -> OnnxExport:
    """Write a model as an ONNX file, and prove that ONNX Runtime computes the same with it.

    The model is exported in eval mode and left as it was. An existing file is replaced only by one that passed. The
    file says which plans made the model and what it costs (`onnx_info`); source lines and paths of this machine, which
    the exporter notes at each operation, are taken out.

    Args:
        model: Any module that ``torch.export`` can trace.
        path: Where the file goes; its folder must exist. A link is followed.
        example_inputs: A tensor, a tuple of positional arguments, or a dict of keyword arguments; arguments may be
            nested, and those that are no tensors become constants of the file.
        dynamic_batch: Leave dimension 0 of every input that is as long as the batch free, under the name ``batch``. The
            file is then also run at another batch size: 1, or 3 where the example is a single sample.
        dynamic_dims: Further dimensions to leave free: name of an input (that of the argument; a tensor inside one has
            its path after it) -> dimension -> name. Dimensions of one name are of one size. The file is then also run
            with each name at twice its size, or at half of it where the model itself does not run at twice.
        check_inputs: More inputs like the example, of other sizes, on which the file has to agree with the model. Given
            these, the names of `dynamic_dims` are tried at no other sizes.
        opset: ONNX operator set; the exporter's own choice if not given.
        tolerance: Largest relative error allowed; by default 1e-4 for a float32 model, 1e-6 for float64, 1e-2 for
            float16, 1e-1 for one with weights of eight bits.

    Returns:
        Path, operator set, measured error and size.

    Raises:
        MissingExtraError: onnx, onnxscript or onnxruntime is not installed.
        ExportError: The model cannot be exported, the file is invalid, or it computes something else; or a dimension is
            not free, or the operator set not possible; or there cannot be a file at `path`.

    Example:
        >>> import tempfile
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     result = export_onnx(model, f"{folder}/model.onnx", torch.randn(2, 4))
        >>> result.max_relative_error < 1e-4
        True
    """
    require_arguments(locals(), ExportError, path=PATH, example_inputs=INPUTS, dynamic_batch=FLAG)
    _check_opset(opset)
    wanted = Wanted(dynamic_batch, dynamic_dims or {}, check_inputs, tolerance)
    written_opset = 0

    def write(free: FreeDims, draft: Path) -> None:
        nonlocal written_opset
        written_opset = write_onnx(model, free, draft, opset)

    verified = write_verified(model, path, example_inputs, wanted, write, ONNXRUNTIME)
    return OnnxExport(verified.path, written_opset, verified.max_relative_error, verified.bytes)


def _check_opset(opset: object) -> None:
    if opset is not None and not whole(1).fits(opset):
        raise ExportError(f"opset is {shown(opset)}; give the number of an operator set")


def write_onnx(model: nn.Module, free: FreeDims, file: Path, opset: int | None = None) -> int:
    """Write a model as an ONNX file that is sound, but not yet compared; returns the operator set.

    Raises:
        ExportError: the exporter refuses the model, or what it writes is no valid ONNX file.
    """
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    traced = free.traced()
    try:
        program = program_of(Flat(model, traced), tensors(as_call(traced)), free.names, free.dims, opset)
    except torch.onnx.OnnxExporterError as error:
        require_running(model, traced, ExportError)
        advice = "; if its forward fixes the batch size, pass dynamic_batch=False" if free.dynamic_batch else ""
        raise ExportError(
            f"{type(model).__name__} cannot be exported to ONNX{advice}. The exporter says: {_cause(error)}"
        ) from error
    program.model.metadata_props.update(metadata(model))
    program.save(file, external_data=weights > _EXTERNAL_DATA_ABOVE)
    check(file)
    return int(program.model.opset_imports[""])


def _cause(error: BaseException) -> str:
    """First line of the innermost error: the exporter's own text is a page of general advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
