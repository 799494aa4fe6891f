"""Models as OpenVINO's own files, known to compute what the model computes."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import nn

from structprune.checking import FLAG, INPUTS, PATH, require
from structprune.errors import ExportError
from structprune.export.onnx import write_onnx
from structprune.export.program import FreeDims
from structprune.export.runtimes import OPENVINO, last_line
from structprune.export.verified import Export, Wanted, write_verified
from structprune.extras import require as required
from structprune.tracing.trace import ExampleInputs


def export_openvino(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: ExampleInputs,
    *,
    dynamic_batch: bool = True,
    dynamic_dims: Mapping[str, Mapping[int, str]] | None = None,
    check_inputs: Iterable[ExampleInputs] = (),
    tolerance: float | None = None,
) -> Export:
    """Write a model as OpenVINO's intermediate representation, and prove that OpenVINO computes the same with it.

    The model becomes ONNX in memory of its own, which OpenVINO reads. Two files are written: ``path``, which ends in
    ``.xml``, and its weights beside it, in ``.bin``. They are run on the CPU in float32, at the sizes that
    `structprune.export_onnx` tries, before they take their place. See `structprune.export_onnx` for an example.

    Where the processor has bfloat16, OpenVINO itself
    computes in it unless told ``{"INFERENCE_PRECISION_HINT": "f32"}``. What `structprune.onnx_info` tells of a pruned
    model stands in the ``.xml`` file too, under ``rt_info``.

    Args:
        model: Any module that ``torch.export`` can trace.
        path: Where the ``.xml`` file goes; its folder must exist.
        example_inputs: A tensor, a tuple of positional arguments, or a dict of keyword arguments.
        dynamic_batch: As in `structprune.export_onnx`, and so are the others.
        dynamic_dims: Further dimensions to leave free.
        check_inputs: More inputs, of other sizes, on which the files have to agree with the model.
        tolerance: Largest relative error allowed.

    Returns:
        Path, measured error, and the size of both files.

    Raises:
        MissingExtraError: openvino, onnx or onnxscript is not installed.
        ExportError: The model cannot be exported, OpenVINO does not know an operation, or it computes something else;
            or there cannot be a file at `path`.
    """
    require(locals(), ExportError, path=PATH, example_inputs=INPUTS, dynamic_batch=FLAG)
    if Path(path).suffix != ".xml":
        raise ExportError(f"path is {os.fspath(path)!r}; OpenVINO reads files that end in .xml")

    def write(free: FreeDims, draft: Path) -> None:
        # Only now is it known that openvino is there.
        openvino = required("openvino", "OpenVINO", "openvino")
        with tempfile.TemporaryDirectory() as folder:
            middle = Path(folder) / "model.onnx"
            write_onnx(model, free, middle)
            try:
                read = openvino.Core().read_model(str(middle))
            except RuntimeError as error:
                raise ExportError(f"OpenVINO cannot read {type(model).__name__}: {last_line(error)}") from error
            openvino.save_model(read, str(draft), compress_to_fp16=False)

    wanted = Wanted(dynamic_batch, dynamic_dims or {}, check_inputs, tolerance)
    return write_verified(model, path, example_inputs, wanted, write, OPENVINO)
