"""Models as files of ExecuTorch and LiteRT, the runtimes of phones, known to compute what the model computes."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from torch import nn

from structprune.checking import INPUTS, PATH, require, whole
from structprune.errors import ExportError
from structprune.export.files import tensors
from structprune.export.program import FreeDims
from structprune.export.runtimes import EXECUTORCH, LITERT
from structprune.export.torch_files import program_of
from structprune.export.verified import Export, Flat, Wanted, converting, write_verified
from structprune.extras import require as required
from structprune.inputs import batch_size
from structprune.tracing.trace import ExampleInputs, as_call

# A file with a free batch is tried at batches of one and of three at least.
_LEAST_FREE = 3


def export_executorch(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: ExampleInputs,
    *,
    largest_batch: int | None = None,
    check_inputs: Iterable[ExampleInputs] = (),
    tolerance: float | None = None,
) -> Export:
    """Write a model as an ExecuTorch program, lowered to XNNPACK, and prove that ExecuTorch computes the same with it.

    Operations that XNNPACK does not know run on ExecuTorch's portable kernels.

    Args:
        model: Any module that ``torch.export`` can trace.
        path: Where the ``.pte`` file goes; its folder must exist.
        example_inputs: A tensor, a tuple of positional arguments, or a dict of keyword arguments. Their sizes are those
            of the program, which plans its memory ahead.
        largest_batch: Leave the batch free up to this size, at least 3 and at least that of the example; memory is kept
            for as many. Without it, the batch is that of the example.
        check_inputs: More inputs on which the file has to agree with the model.
        tolerance: Largest relative error allowed; by default as in `structprune.export_onnx`.

    Returns:
        Path, measured error and size.

    Raises:
        MissingExtraError: executorch is not installed.
        ExportError: The model cannot be exported, or ExecuTorch computes something else; or there cannot be a file at
            `path`.

    Example::

        structprune.export_executorch(slim, "slim.pte", images)
    """
    require(locals(), ExportError, path=PATH, example_inputs=INPUTS, largest_batch=whole(_LEAST_FREE).or_none)
    _check_suffix(path, ".pte", "ExecuTorch programs")
    if largest_batch is not None and largest_batch < batch_size(example_inputs):
        raise ExportError(f"largest_batch is {largest_batch}, and the example has {batch_size(example_inputs)} samples")

    def write(free: FreeDims, draft: Path) -> None:
        with converting(model, "ExecuTorch"):
            exir = required("executorch.exir", "ExecuTorch", "executorch")
            xnnpack = required("executorch.backends.xnnpack.partition.xnnpack_partitioner", "ExecuTorch", "executorch")
            program = program_of(model, free, largest=largest_batch)
            edge = exir.to_edge_transform_and_lower(program, partitioner=[xnnpack.XnnpackPartitioner()])
            draft.write_bytes(edge.to_executorch().buffer)

    wanted = Wanted(largest_batch is not None, {}, check_inputs, tolerance)
    return write_verified(model, path, example_inputs, wanted, write, EXECUTORCH)


def export_litert(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: ExampleInputs,
    *,
    check_inputs: Iterable[ExampleInputs] = (),
    tolerance: float | None = None,
) -> Export:
    """Write a model as a LiteRT file (TensorFlow Lite), and prove that LiteRT computes the same with it.

    Sizes are those of the example: the converter refuses free ones for many operations.

    Args:
        model: Any module that ``torch.export`` can trace.
        path: Where the ``.tflite`` file goes; its folder must exist.
        example_inputs: A tensor, a tuple of positional arguments, or a dict of keyword arguments.
        check_inputs: More inputs on which the file has to agree with the model.
        tolerance: Largest relative error allowed; by default as in `structprune.export_onnx`.

    Returns:
        Path, measured error and size.

    Raises:
        MissingExtraError: litert-torch is not installed.
        ExportError: The model cannot be exported, or LiteRT computes something else; or there cannot be a file at
            `path`.

    Example::

        structprune.export_litert(slim, "slim.tflite", images)
    """
    require(locals(), ExportError, path=PATH, example_inputs=INPUTS)
    _check_suffix(path, ".tflite", "LiteRT files")

    def write(free: FreeDims, draft: Path) -> None:
        with converting(model, "LiteRT"):
            litert = required("litert_torch", "LiteRT", "litert")
            flat = Flat(model, free.traced())
            litert.convert(flat, tensors(as_call(free.traced()))).export(str(draft))

    return write_verified(model, path, example_inputs, Wanted(False, {}, check_inputs, tolerance), write, LITERT)


def _check_suffix(path: str | os.PathLike[str], suffix: str, what: str) -> None:
    if Path(path).suffix != suffix:
        raise ExportError(f"path is {os.fspath(path)!r}; {what} are files that end in {suffix}")
