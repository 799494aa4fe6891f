"""`quantize`: a file of integers, by ONNX Runtime's quantiser or by torchao, calibrated and compared."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from torch import nn

from structprune.checking import FLAG, INPUTS, PATH, one_of, real, require
from structprune.errors import ExportError
from structprune.export.program import FreeDims
from structprune.export.runtimes import ONNXRUNTIME
from structprune.export.torch_files import PROGRAM, require_torchao
from structprune.export.verified import Wanted, write_verified
from structprune.forwards.batches import batches_of
from structprune.quantization import onnx_runtime, torch_ao
from structprune.tracing.trace import ExampleInputs

Scheme: TypeAlias = Literal["int8", "int8_dynamic", "int8_weights", "int4_weights"]
SCHEMES: tuple[Scheme, ...] = ("int8", "int8_dynamic", "int8_weights", "int4_weights")
Backend: TypeAlias = Literal["onnxruntime", "torchao"]
Ranges: TypeAlias = Literal["minmax", "entropy", "percentile", "squared_error"]
# How each takes ranges of activations from data.
RANGES: dict[Backend, tuple[str, ...]] = {
    "onnxruntime": tuple(onnx_runtime.RANGES),
    "torchao": tuple(torch_ao.RANGES),
}


@dataclass(frozen=True)
class Quantized:
    """A quantised file, and how far it is from the model. See `structprune.quantize` for an example.

    Attributes:
        path: The file.
        scheme: What is quantised, and how.
        backend: What quantised it.
        max_relative_error: Largest difference to the model's outputs over the examples and all batches, each divided by
            the largest magnitude of that output.
        bytes: Size of the file.
        layers: How many convolutions and matrix products have weights of eight or four bits.
        left: How many still have weights of full precision.
    """

    path: Path
    scheme: Scheme
    backend: Backend
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
    backend: Backend = "onnxruntime",
    ranges: Ranges = "minmax",
    dynamic_batch: bool = True,
    dynamic_dims: Mapping[str, Mapping[int, str]] | None = None,
    tolerance: float = 0.5,
) -> Quantized:
    """Write a model, pruned or not, as a file of integers, and say how far it is from the model.

    Recover first (`structprune.recover`), then quantise: the batches that repaired the pruned network serve here too.
    The file is run on the example, at another batch size and on all of the data, and compared with the model. Batch
    norms are folded into the layers before them.

    With ``backend="onnxruntime"`` it is an ONNX file that ONNX Runtime's quantiser makes. ONNX Runtime and OpenVINO run
    it, `structprune.onnx_model` makes a module of it, and the plans stand in its metadata as in any other
    (`structprune.onnx_info`). With ``"torchao"`` it is a program of ``torch.export`` (``.pt2``), which
    `structprune.torch_model` makes a module of, and ``torch.compile`` or `structprune.export_aotinductor` compile.

    Args:
        model: Any module that ``torch.export`` can trace. It is left as it was.
        path: Where the file goes; its folder must exist. For torchao it ends in ``.pt2``.
        example_inputs: A tensor, a tuple of positional arguments, or a dict of keyword arguments.
        data: Batches as for `structprune.recover`; the file is compared with the model on each of them. ``"int8"``
            needs them, to see the ranges of activations.
        scheme: ``"int8"``: weights and activations of eight bits, the ranges of activations taken from `data`, one
            scale for each output channel of a weight; for convolutional networks. Where this machine is an x86 without
            instructions for eight bits (VNNI), weights have seven, as sums would overflow. ``"int8_dynamic"``: matrix
            products alone, ranges of activations taken anew in each run (by torchao for each token); for transformers.
            ``"int8_weights"`` and ``"int4_weights"``: weights of matrix products alone; for language models, whose time
            is that of reading weights. 32 of them share a scale, by torchao those of eight bits a row. ONNX Runtime
            leaves linear layers on inputs of two dimensions as they are, and torchao for four bits those whose number
            of inputs is no multiple of 32 (plan with ``round_to=32``).
        backend: What quantises: ``"onnxruntime"`` or ``"torchao"``.
        ranges: How ranges of activations are taken from `data`: the extremes (``"minmax"``); by ONNX Runtime the range
            of least Kullback-Leibler divergence (``"entropy"``), or one that leaves out outliers (``"percentile"``),
            both of which hold what layers compute in memory; by torchao the range of least ``"squared_error"``.
        dynamic_batch: As in `structprune.export_onnx`.
        dynamic_dims: As in `structprune.export_onnx`.
        tolerance: Largest difference allowed, as a share of the largest output; beyond it, the result is taken for
            broken. Measure accuracy all the same.

    Returns:
        The path, the measured difference, the size, and how many layers were quantised.

    Raises:
        MissingExtraError: onnx, onnxscript or onnxruntime is not installed, or torchao.
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
    checks = {"dynamic_batch": FLAG, "scheme": one_of(SCHEMES), "tolerance": real(least=0)}
    checks |= {"backend": one_of(RANGES), "ranges": one_of(RANGES.get(backend, ()))}
    require(locals(), ExportError, path=PATH, example_inputs=INPUTS, **checks)
    if not isinstance(model, nn.Module):
        raise ExportError(f"model is a {type(model).__name__}; give the model, an nn.Module")
    if data is None and scheme == "int8":
        raise ExportError("scheme='int8' takes the ranges of activations from data=; give batches, or another scheme")
    if backend == "torchao" and Path(path).suffix != ".pt2":
        raise ExportError(f"path is {os.fspath(path)!r}; programs of torch are files that end in .pt2")
    require_torchao() if backend == "torchao" else ONNXRUNTIME.require()
    batches = [] if data is None else batches_of(model, data, None, "are no ranges to take")
    counts = (0, 0)

    def write(free: FreeDims, draft: Path) -> None:
        nonlocal counts
        if backend == "torchao":
            counts = torch_ao.write_integers(model, draft, free, batches, scheme, ranges)
        else:
            counts = onnx_runtime.write_integers(model, draft, free, dynamic_dims, batches, scheme, ranges)
        if not counts[0]:
            raise ExportError(
                f"no layer of {type(model).__name__} was quantised by scheme={scheme!r}; "
                + ("use scheme='int8', which takes convolutions too" if scheme != "int8" else "it has no weights")
            )

    wanted = Wanted(dynamic_batch, dynamic_dims or {}, batches, tolerance)
    runtime = PROGRAM if backend == "torchao" else ONNXRUNTIME
    verified = write_verified(model, path, example_inputs, wanted, write, runtime)
    return Quantized(verified.path, scheme, backend, verified.max_relative_error, verified.bytes, *counts)
