"""From a module to a program of ONNX operations in memory: exported, its dimensions named, and cleared of traces."""

from __future__ import annotations

import importlib
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from structprune.errors import ExportError

# Dimension -> name, for each input.
Dims = Sequence[Mapping[int, str]]


def program_of(
    wrapper: nn.Module, inputs: Sequence[Tensor], names: Sequence[str], dims: Dims, opset: int | None
) -> Any:
    """The module as an ``onnx_ir`` program, made by ``torch.onnx``.

    Args:
        wrapper: takes the inputs one by one, all in one ``*args``.
        inputs: tensors to trace it with.
        names: of the inputs.
        dims: dimensions to leave free, by input; those of one name are of one size.
        opset: ONNX operator set; the exporter's own choice if None.

    Raises:
        ExportError: the exporter refuses it, writes another operator set, or finds that a dimension is not free.
    """
    free = any(dims)
    shapes = tuple(dict.fromkeys(found, torch.export.Dim.DYNAMIC) or None for found in dims)

    def exported(optimize: bool) -> Any:
        with warnings.catch_warnings():
            # torch's exporter copies a class that torch itself has deprecated; nothing that a user could act on.
            warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)`", category=FutureWarning)
            # Hooks that compute a weight, as spectral_norm's, set it anew in each forward; what is written is compared.
            warnings.filterwarnings("ignore", message=r"The tensor attributes? .* assigned during export")
            return torch.onnx.export(
                wrapper,
                tuple(inputs),
                dynamo=True,
                verbose=False,
                input_names=list(names),
                dynamic_shapes=(shapes,) if free else None,
                opset_version=opset,
                optimize=optimize,
            )

    try:
        program = exported(optimize=True)
    except importlib.import_module("onnx_ir.passes").PassError:
        # The optimizer of onnxscript stumbles over some programs that are right; runtimes optimize on their own.
        program = exported(optimize=False)
    written = int(program.model.opset_imports[""])
    if opset is not None and written != opset:
        raise ExportError(
            f"the exporter cannot write operator set {opset} for this model: it wrote {written}; leave opset= out, or "
            "ask for a later one"
        )
    _name_dims(program.model, names, dims)
    _clear(program.model)
    return program


def _values(model: Any) -> Iterator[Any]:
    """All values of a program, those inside of branches and functions included."""
    yield from model.graph.inputs
    for node in model.graph.all_nodes():
        yield from node.outputs
    for function in model.functions.values():
        yield from function.inputs
        for node in function.all_nodes():
            yield from node.outputs


def _name_dims(model: Any, names: Sequence[str], dims: Dims) -> None:
    """Give free dimensions the names that were asked for, wherever they appear."""
    given: dict[str, str] = {}
    for value, name, found in zip(model.graph.inputs, names, dims, strict=True):
        for dim, wanted in found.items():
            symbol = getattr(value.shape[dim], "value", None)
            if symbol is None:
                raise ExportError(
                    f"dimension {dim} of {name!r} was to be free as {wanted!r}, but the model fixes it to "
                    f"{value.shape[dim]}; leave the name out, or pass dynamic_batch=False if it is the batch"
                )
            if given.setdefault(symbol, wanted) != wanted:
                raise ExportError(
                    f"dimension {dim} of {name!r} is named {wanted!r}, but in this model it always equals "
                    f"{given[symbol]!r}; give both one name"
                )
    if not given:
        return
    shape = importlib.import_module("onnx_ir").Shape
    pattern = re.compile("|".join(rf"\b{re.escape(symbol)}\b" for symbol in given))
    for value in _values(model):
        if value.shape is None:
            continue
        new = [getattr(dim, "value", dim) for dim in value.shape]
        # A dimension may be computed from others: `2*s3 + 1`.
        renamed = [pattern.sub(lambda m: given[m[0]], dim) if isinstance(dim, str) else dim for dim in new]
        if renamed != new:
            value.shape = shape(renamed)


def _clear(model: Any) -> None:
    """Take out what the exporter notes at each operation: source lines and paths of the machine that it ran on."""
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
    for value in (*_values(model), *model.graph.initializers.values()):
        value.metadata_props.clear()
        value.doc_string = None
    model.graph.metadata_props.clear()
    model.graph.doc_string = None
    for function in model.functions.values():
        function.metadata_props.clear()
        for node in function.all_nodes():
            node.metadata_props.clear()
            node.doc_string = None
