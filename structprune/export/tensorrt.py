"""Models as engines of TensorRT, built from ONNX on the GPU that is to run them, and compared with the model."""

from __future__ import annotations

import importlib
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from structprune.checking import INPUTS, PATH, require, whole
from structprune.errors import ExportError
from structprune.export.files import tensors
from structprune.export.onnx import write_onnx
from structprune.export.program import FreeDims
from structprune.export.runtimes import Loaded, Runtime
from structprune.export.verified import Export, Wanted, write_verified
from structprune.extras import installed
from structprune.inputs import batch_size
from structprune.tracing.trace import ExampleInputs, as_call

# A file with a free batch is tried at batches of one and of three at least.
_LEAST_FREE = 3


def export_tensorrt(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: ExampleInputs,
    *,
    largest_batch: int | None = None,
    check_inputs: Iterable[ExampleInputs] = (),
    tolerance: float | None = None,
) -> Export:
    """Build an engine of TensorRT in float32 without TF32, and prove that it computes what the model computes.

    An engine is for the GPU and the version of TensorRT that built it. The project's own tests have no GPU: there this
    function is only known to refuse. What it writes is compared like any other file before it takes its place.

    Args:
        model: Any module that ``torch.export`` can trace.
        path: Where the ``.engine`` file goes; its folder must exist.
        example_inputs: A tensor, a tuple of positional arguments, or a dict of keyword arguments. Their sizes are those
            of the engine.
        largest_batch: Leave the batch free up to this size, at least 3 and at least that of the example.
        check_inputs: More inputs on which the engine has to agree with the model.
        tolerance: Largest relative error allowed; by default as in `structprune.export_onnx`.

    Returns:
        Path, measured error and size.

    Raises:
        MissingExtraError: onnx or onnxscript is not installed.
        ExportError: There is no NVIDIA GPU here, or no TensorRT; the model cannot be exported, TensorRT does not know
            an operation, or it computes something else; or there cannot be a file at `path`.

    Example::

        structprune.export_tensorrt(slim, "slim.engine", images, largest_batch=64)
    """
    require(locals(), ExportError, path=PATH, example_inputs=INPUTS, largest_batch=whole(_LEAST_FREE).or_none)
    if Path(path).suffix != ".engine":
        raise ExportError(f"path is {os.fspath(path)!r}; engines of TensorRT are files that end in .engine")
    if largest_batch is not None and largest_batch < batch_size(example_inputs):
        raise ExportError(f"largest_batch is {largest_batch}, and the example has {batch_size(example_inputs)} samples")
    if lacking := tensorrt_lacking():
        raise ExportError(
            f"no engine of TensorRT can be built here: {lacking}. Write ONNX (export_onnx, or --to onnx), and build "
            "the engine where it is to run: trtexec --onnx=model.onnx --saveEngine=model.engine"
        )

    def write(free: FreeDims, draft: Path) -> None:
        with tempfile.TemporaryDirectory() as folder:
            middle = Path(folder) / "model.onnx"
            write_onnx(model, free, middle)
            draft.write_bytes(_engine(middle, free, largest_batch))

    wanted = Wanted(largest_batch is not None, {}, check_inputs, tolerance)
    return write_verified(model, path, example_inputs, wanted, write, TENSORRT)


def tensorrt_lacking() -> str:
    """Why there is no TensorRT here; nothing if there is."""
    if not torch.cuda.is_available():
        return f"TensorRT runs on NVIDIA GPUs, and torch {torch.__version__} finds none"
    if not installed("tensorrt"):
        return "the package tensorrt is not installed (pip install tensorrt)"
    return ""


def _engine(file: Path, free: FreeDims, largest: int | None) -> bytes:
    """An ONNX file as an engine."""
    trt = importlib.import_module("tensorrt")
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(file)):
        raise ExportError(f"TensorRT cannot read the model: {parser.get_error(0).desc()}")
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)
    if largest is not None:
        profile = builder.create_optimization_profile()
        for name, tensor, dims in zip(free.names, tensors(as_call(free.inputs)), free.dims, strict=True):
            sizes = [[size if 0 in dims else tensor.shape[0]] for size in (1, tensor.shape[0], largest)]
            profile.set_shape(name, *((*size, *tensor.shape[1:]) for size in sizes))
        config.add_optimization_profile(profile)
    built = builder.build_serialized_network(network, config)
    if built is None:
        raise ExportError("TensorRT cannot build an engine of the model; its log says why")
    return bytes(built)


def _load(file: Path, threads: int | None) -> Loaded:
    """An engine as a function of arrays."""
    trt = importlib.import_module("tensorrt")
    engine = trt.Runtime(trt.Logger(trt.Logger.ERROR)).deserialize_cuda_engine(file.read_bytes())
    if engine is None:
        raise ExportError("TensorRT cannot load the engine: it was built by another version, or for another GPU")
    context = engine.create_execution_context()
    names = [engine.get_tensor_name(number) for number in range(engine.num_io_tensors)]
    results = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.OUTPUT]

    def run(feed: Mapping[str, Any]) -> list[Any]:
        held = {name: torch.from_numpy(array).cuda().contiguous() for name, array in feed.items()}
        for name, tensor in held.items():
            if not context.set_input_shape(name, tuple(tensor.shape)):
                raise ExportError(f"TensorRT cannot run the engine: {name!r} has the shape {list(tensor.shape)}")
        for name in results:
            kind = torch.from_numpy(np.zeros(1, trt.nptype(engine.get_tensor_dtype(name)))).dtype
            held[name] = torch.empty(tuple(context.get_tensor_shape(name)), dtype=kind, device="cuda")
        for name, tensor in held.items():
            context.set_tensor_address(name, tensor.data_ptr())
        stream = torch.cuda.current_stream()
        if not context.execute_async_v3(stream.cuda_stream):
            raise ExportError("TensorRT cannot run the engine; its log says why")
        stream.synchronize()
        return [held[name].cpu().numpy() for name in results]

    return run


TENSORRT = Runtime("TensorRT", "TensorRT", "onnx", ("onnx", "onnxscript"), _load)
