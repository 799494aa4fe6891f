"""ONNX files of integers, by ONNX Runtime's quantiser."""

from __future__ import annotations

import importlib
import platform
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from structprune.errors import ExportError
from structprune.export.files import tensors, to_numpy
from structprune.export.onnx import export_onnx
from structprune.export.program import FreeDims
from structprune.export.runtimes import quiet, refusals
from structprune.tracing.trace import as_call

RANGES = {"minmax": "MinMax", "entropy": "Entropy", "percentile": "Percentile"}
# Weights of so many inputs share one scale, where weights alone are quantised.
BLOCK = 32
# The kinds of numbers in an ONNX file that have eight bits or four.
_NARROW = ("UINT8", "INT8", "UINT4", "INT4")
_WEIGHTY = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_INTEGER = ("MatMulInteger", "ConvInteger", "MatMulNBits", "QLinearConv", "QLinearMatMul")


def write_integers(
    model: nn.Module,
    draft: Path,
    free: FreeDims,
    dynamic_dims: Mapping[str, Mapping[int, str]] | None,
    batches: list[Any],
    scheme: str,
    ranges: str,
) -> tuple[int, int]:
    """Write an ONNX file of integers.

    Args:
        model: in eval mode.
        draft: where the file goes.
        free: the inputs, and whether their batch is free.
        dynamic_dims: further dimensions to leave free.
        batches: what ranges of activations are taken from.
        scheme: one of those of `structprune.quantize`.
        ranges: one of `RANGES`.

    Returns:
        How many layers of the file have integers for weights, and how many have not.

    Raises:
        ExportError: the model cannot be exported, or cannot run on a batch.
    """
    with tempfile.TemporaryDirectory() as folder, quiet():
        exact = Path(folder) / "exact.onnx"
        export_onnx(model, exact, free.inputs, dynamic_batch=free.dynamic_batch, dynamic_dims=dynamic_dims)
        try:
            _QUANTISERS[scheme](_folded(exact), draft, _Feeds(free.names, batches), ranges)
        except refusals() as error:
            raise ExportError(f"{type(model).__name__} cannot run on a batch of the data: {error}") from error
    counts = _counts(draft)
    _compact(draft)
    return counts


class _Feeds:
    """Batches as ONNX Runtime's calibration asks for them: one by one, and None when there are no more."""

    def __init__(self, names: list[str], batches: list[Any]) -> None:
        self._names, self._batches = names, batches
        self._left = self._all()

    def _all(self) -> Iterator[dict[str, Any]]:
        for batch in self._batches:
            yield to_numpy(dict(zip(self._names, tensors(as_call(batch)), strict=True)))

    def get_next(self) -> dict[str, Any] | None:
        """The next batch."""
        return next(self._left, None)

    def rewind(self) -> None:
        """Begin anew."""
        self._left = self._all()


def _folded(exact: Path) -> Path:
    """The file with batch norms folded into weights, which changes their ranges, and constants computed."""
    preprocess = importlib.import_module("onnxruntime.quantization.shape_inference").quant_pre_process
    onnx = importlib.import_module("onnx")
    folded = exact.with_name("folded.onnx")
    preprocess(str(exact), str(folded), skip_symbolic_shape=True)
    model = onnx.load(folded)
    # Weights are transposed later, and shapes that are noted would then be wrong; they are inferred again.
    del model.graph.value_info[:]
    onnx.save(model, folded)
    return folded


def _static(folded: Path, draft: Path, feeds: _Feeds, ranges: str) -> None:
    library = importlib.import_module("onnxruntime.quantization")
    library.quantize_static(
        str(folded),
        str(draft),
        feeds,
        quant_format=library.QuantFormat.QDQ,
        per_channel=True,
        # Of x86, instructions multiply unsigned by signed numbers: with signed ones int8 is slower than float there.
        activation_type=library.QuantType.QUInt8,
        weight_type=library.QuantType.QInt8,
        reduce_range=_overflows(),
        calibrate_method=getattr(library.CalibrationMethod, RANGES[ranges]),
    )


def _overflows() -> bool:
    """Whether products of eight bits are added in pairs in sixteen, which weights of seven bits do not overflow."""
    return platform.machine().lower() in ("x86_64", "amd64") and not torch.cpu._is_vnni_supported()


def _dynamic(folded: Path, draft: Path, feeds: _Feeds, ranges: str) -> None:
    library = importlib.import_module("onnxruntime.quantization")
    # Convolutions of integers whose ranges are found in each run are slower than those of floats.
    library.quantize_dynamic(
        str(folded), str(draft), per_channel=True, reduce_range=_overflows(), op_types_to_quantize=["MatMul", "Gemm"]
    )


def _weights(bits: int) -> Any:
    def write(folded: Path, draft: Path, feeds: _Feeds, ranges: str) -> None:
        library = importlib.import_module("onnxruntime.quantization.matmul_nbits_quantizer")
        onnx = importlib.import_module("onnx")
        quantiser = library.MatMulNBitsQuantizer(onnx.load(folded), bits=bits, block_size=BLOCK, is_symmetric=True)
        quantiser.process()
        onnx.save(quantiser.model.model, draft)

    return write


_QUANTISERS = {"int8": _static, "int8_dynamic": _dynamic, "int8_weights": _weights(8), "int4_weights": _weights(4)}


def _counts(file: Path) -> tuple[int, int]:
    """How many layers of a file have integers for weights, and how many have not."""
    onnx = importlib.import_module("onnx")
    graph = onnx.load(file).graph
    kinds = {each.name: onnx.TensorProto.DataType.Name(each.data_type) for each in graph.initializer}
    large = {each.name for each in graph.initializer if len(each.dims) > 1}
    dequantisers = [node for node in graph.node if node.op_type == "DequantizeLinear" and node.input]
    sources = {node.output[0]: node.input[0] for node in dequantisers}
    quantised = left = 0
    for node in graph.node:
        weights = large.intersection(sources.get(each, each) for each in node.input)
        narrow = any(kinds[name] in _NARROW for name in weights)
        if narrow and node.op_type in (*_WEIGHTY, *_INTEGER):
            quantised += 1
        elif weights and node.op_type in _WEIGHTY:
            left += 1
    return quantised, left


def _compact(file: Path) -> None:
    """Leave out what makes a file of a small network large: long names of scales, and zeros that many layers share.

    Weights, inputs, outputs and the nodes that compute keep their names. Graphs inside of nodes see the names around
    them, so that files with branches stay as they are.
    """
    onnx = importlib.import_module("onnx")
    model = onnx.load(file)
    graph = model.graph
    if any(each.type == onnx.AttributeProto.GRAPH for node in graph.node for each in node.attribute):
        return
    del graph.value_info[:]
    kept = {value.name for value in (*graph.input, *graph.output)}
    kept |= {each.name for each in graph.initializer if len(each.dims) > 1}
    names = {name: name for name in ("", *kept)}  # an input that is left out has no name; new ones are no identifiers
    names |= _shared_constants(graph, kept, onnx.numpy_helper.to_array)
    for node in graph.node:
        for values in (node.input, node.output):
            values[:] = [names.setdefault(name, f"v.{len(names)}") for name in values]
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            node.name = ""
    onnx.save(model, file)


def _shared_constants(graph: Any, kept: set[str], as_array: Any) -> dict[str, str]:
    """Give the held tensors but those in `kept` short names, and equal ones of them one tensor; new names by old."""
    names: dict[str, str] = {}
    first: dict[Any, str] = {}
    for each in [each for each in graph.initializer if each.name not in kept]:
        held = each.data_type, tuple(each.dims), as_array(each).tobytes()
        seen = held in first
        names[each.name] = each.name = first.setdefault(held, f"c.{len(first)}")
        if seen:
            graph.initializer.remove(each)
    return names
