"""Quantisation after pruning: an ONNX file of integers, by ONNX Runtime's quantiser, calibrated and compared."""

from __future__ import annotations

import importlib
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from torch import nn

from structprune.checking import FLAG, INPUTS, PATH, one_of, real, require
from structprune.errors import ExportError
from structprune.export.files import input_names, tensors, to_numpy
from structprune.export.onnx import export_onnx
from structprune.export.program import FreeDims
from structprune.export.runtimes import ONNXRUNTIME, quiet, refusals
from structprune.export.verified import Wanted, write_verified
from structprune.recovery.batches import batches_of
from structprune.tracing.trace import ExampleInputs, as_call

Scheme: TypeAlias = Literal["int8", "int8_dynamic", "int8_weights", "int4_weights"]
SCHEMES: tuple[Scheme, ...] = ("int8", "int8_dynamic", "int8_weights", "int4_weights")
RANGES = {"minmax": "MinMax", "entropy": "Entropy", "percentile": "Percentile"}
# Weights of so many inputs share one scale, where weights alone are quantised.
BLOCK = 32
# The kinds of numbers in an ONNX file that have eight bits or four.
_NARROW = ("UINT8", "INT8", "UINT4", "INT4")
_WEIGHTY = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_INTEGER = ("MatMulInteger", "ConvInteger", "MatMulNBits", "QLinearConv", "QLinearMatMul")


@dataclass(frozen=True)
class Quantized:
    """A quantised file, and how far it is from the model. See `structprune.quantize` for an example.

    Attributes:
        path: The ONNX file.
        scheme: What is quantised, and how.
        max_relative_error: Largest difference to the model's outputs over the examples and all batches, each divided by
            the largest magnitude of that output.
        bytes: Size of the file.
        layers: How many convolutions and matrix products have weights of eight or four bits.
        left: How many still have weights of full precision.
    """

    path: Path
    scheme: Scheme
    max_relative_error: float
    bytes: int
    layers: int
    left: int


def quantize(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: ExampleInputs,
    data: Iterable[Any] | None = None,
    *,
    scheme: Scheme = "int8",
    ranges: Literal["minmax", "entropy", "percentile"] = "minmax",
    dynamic_batch: bool = True,
    dynamic_dims: Mapping[str, Mapping[int, str]] | None = None,
    tolerance: float = 0.5,
) -> Quantized:
    """Write a model, pruned or not, as an ONNX file of integers, and say how far it is from the model.

    Recover first (`structprune.recover`), then quantise: the batches that repaired the pruned network serve here too.
    The model is exported and compared as by `structprune.export_onnx`; batch norms are folded into the layers before
    them; ONNX Runtime's quantiser does the rest. ONNX Runtime and OpenVINO run the result, `structprune.onnx_model`
    makes a module of it, and the plans stand in its metadata as in any other (`structprune.onnx_info`).

    Args:
        model: Any module that ``torch.export`` can trace. It is left as it was.
        path: Where the file goes; its folder must exist.
        example_inputs: A tensor, a tuple of positional arguments, or a dict of keyword arguments.
        data: Batches as for `structprune.recover`; the file is compared with the model on each of them. ``"int8"``
            needs them, to see the ranges of activations.
        scheme: ``"int8"``: weights and activations of eight bits, the ranges of activations taken from `data`, one
            scale for each output channel of a weight; for convolutional networks. ``"int8_dynamic"``: matrix products
            alone, ranges of activations taken anew in each run; for transformers. ``"int8_weights"`` and
            ``"int4_weights"``: weights of matrix products alone, 32 to a scale; for language models, whose time is that
            of reading weights. Both leave linear layers on inputs of two dimensions as they are.
        ranges: How ranges of activations are taken from `data`: the extremes, the range of least Kullback-Leibler
            divergence, or one that leaves out outliers. All but the first hold what layers compute in memory.
        dynamic_batch: As in `structprune.export_onnx`.
        dynamic_dims: As in `structprune.export_onnx`.
        tolerance: Largest difference allowed, as a share of the largest output; beyond it, the result is taken for
            broken. Measure accuracy all the same.

    Returns:
        The path, the measured difference, the size, and how many layers were quantised.

    Raises:
        MissingExtraError: onnx, onnxscript or onnxruntime is not installed.
        RecoveryError: The data holds no batch, or the model cannot be called on one.
        ExportError: The model cannot be exported, nothing in it can be quantised by the scheme, or the result is
            further off than `tolerance`.

    Example:
        >>> import tempfile, torch, structprune
        >>> model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4))
        >>> batches = [torch.randn(8, 16) for _ in range(4)]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     result = structprune.quantize(model, f"{folder}/m.onnx", batches[0], batches)
        >>> result.layers, result.left, result.max_relative_error < 0.1
        (2, 0, True)
    """
    checks = {"dynamic_batch": FLAG, "scheme": one_of(SCHEMES), "ranges": one_of(RANGES), "tolerance": real(least=0)}
    require(locals(), ExportError, path=PATH, example_inputs=INPUTS, **checks)
    if not isinstance(model, nn.Module):
        raise ExportError(f"model is a {type(model).__name__}; give the model, an nn.Module")
    if data is None and scheme == "int8":
        raise ExportError("scheme='int8' takes the ranges of activations from data=; give batches, or another scheme")
    ONNXRUNTIME.require()
    batches = [] if data is None else batches_of(model, data, None, "are no ranges to take")
    counts = (0, 0)

    def write(free: FreeDims, draft: Path) -> None:
        nonlocal counts
        names = input_names(model, example_inputs)
        with tempfile.TemporaryDirectory() as folder, quiet():
            exact = Path(folder) / "exact.onnx"
            export_onnx(model, exact, example_inputs, dynamic_batch=dynamic_batch, dynamic_dims=dynamic_dims)
            folded = _folded(exact)
            try:
                _QUANTISERS[scheme](folded, draft, _Feeds(names, batches), ranges)
            except refusals() as error:
                raise ExportError(f"{type(model).__name__} cannot run on a batch of the data: {error}") from error
        counts = _counts(draft)
        if not counts[0]:
            raise ExportError(
                f"no layer of {type(model).__name__} was quantised by scheme={scheme!r}; "
                + ("use scheme='int8', which takes convolutions too" if scheme != "int8" else "it has no weights")
            )

    wanted = Wanted(dynamic_batch, dynamic_dims or {}, batches, tolerance)
    verified = write_verified(model, path, example_inputs, wanted, write, ONNXRUNTIME)
    return Quantized(verified.path, scheme, verified.max_relative_error, verified.bytes, *counts)


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
        activation_type=library.QuantType.QInt8,
        weight_type=library.QuantType.QInt8,
        calibrate_method=getattr(library.CalibrationMethod, RANGES[ranges]),
    )


def _dynamic(folded: Path, draft: Path, feeds: _Feeds, ranges: str) -> None:
    library = importlib.import_module("onnxruntime.quantization")
    # Convolutions of integers whose ranges are found in each run are slower than those of floats.
    library.quantize_dynamic(str(folded), str(draft), per_channel=True, op_types_to_quantize=["MatMul", "Gemm"])


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
    dequantised = {
        node.output[0]: node.input[0] for node in graph.node if node.op_type == "DequantizeLinear" and node.input
    }
    quantised = left = 0
    for node in graph.node:
        weights = [name for name in (dequantised.get(each, each) for each in node.input) if name in large]
        narrow = any(kinds[name] in _NARROW for name in weights)
        if narrow and node.op_type in (*_WEIGHTY, *_INTEGER):
            quantised += 1
        elif weights and node.op_type in _WEIGHTY:
            left += 1
    return quantised, left
