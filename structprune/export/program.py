"""From a module to a program of ONNX operations in memory: exported, its dimensions named, and cleared of traces."""

from __future__ import annotations

import importlib
import logging
import re
import warnings
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from structprune.checking import is_whole
from structprune.errors import ExportError
from structprune.export.files import input_names, tensors
from structprune.inputs import batch_size, is_batched, resize_batch, resize_dims
from structprune.tracing.trace import ExampleInputs, as_call

# Dimension -> name, for each input.
Dims = Sequence[Mapping[int, str]]


@contextmanager
def _without_torchvision() -> Generator[None]:
    """Torch's exporter warns in each export where torchvision, of which nothing may be used, is not installed."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")

    def matters(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("torchvision is not installed")

    logger.addFilter(matters)
    try:
        yield
    finally:
        logger.removeFilter(matters)


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
    shapes = tuple(dict.fromkeys(free_dims, torch.export.Dim.DYNAMIC) or None for free_dims in dims)

    def exported(optimize: bool) -> Any:
        with warnings.catch_warnings(), _without_torchvision():
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
    for value, name, free_dims in zip(model.graph.inputs, names, dims, strict=True):
        for dim, wanted in free_dims.items():
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


# -- which dimensions of the inputs of an ONNX file are free, and inputs of other sizes to try it with ---------------

BATCH = "batch"


@dataclass(frozen=True)
class FreeDims:
    """The free dimensions of the example inputs of a model.

    Attributes:
        inputs: The example inputs.
        dynamic_batch: Whether the batch is free.
        names: Name of each tensor, in flat order.
        dims: Dimension -> name, for each tensor.
        wanted: Names besides the batch.
    """

    inputs: ExampleInputs
    dynamic_batch: bool
    names: list[str]
    dims: list[dict[int, str]]
    wanted: tuple[str, ...]

    @classmethod
    def of(
        cls, model: nn.Module, inputs: ExampleInputs, dynamic_batch: bool, dynamic_dims: Mapping[str, Mapping[int, str]]
    ) -> FreeDims:
        """Check what was asked for against the example inputs.

        Raises:
            ExportError: An input or dimension is not there, or dimensions of one name are not of one size in the
                example, or of size 1.
        """
        wanted_dims: Any = dynamic_dims
        if not isinstance(wanted_dims, Mapping) or not all(isinstance(d, Mapping) for d in wanted_dims.values()):
            raise ExportError(
                f"dynamic_dims is {wanted_dims!r}; give a dict of inputs and their dimensions, such as "
                "{'tokens': {1: 'time'}}"
            )
        names = input_names(model, inputs)
        if unknown := sorted(dynamic_dims.keys() - set(names)):
            raise ExportError(f"dynamic_dims names the input {unknown[0]!r}; the inputs are {', '.join(names)}")
        size = batch_size(inputs)
        dims: list[dict[int, str]] = []
        sizes: dict[str, int] = {}
        for name, tensor in zip(names, tensors(as_call(inputs)), strict=True):
            free_here = {0: BATCH} if dynamic_batch and is_batched(tensor, size) else {}
            for dim, wanted in dynamic_dims.get(name, {}).items():
                _check(name, tuple(tensor.shape), dim, wanted, sizes)
                free_here[dim] = wanted
            dims.append(free_here)
        return cls(inputs, dynamic_batch, names, dims, tuple(sizes))

    def traced(self) -> Any:
        """Inputs to trace the model with: a single sample would be taken for a batch that is always 1."""
        single = self.dynamic_batch and batch_size(self.inputs) == 1
        return resize_batch(self.inputs, 2) if single else self.inputs

    def batches(self) -> list[tuple[Any, str]]:
        """The example, and the same with another batch size if that is free; with no further words on what they are."""
        size = batch_size(self.inputs)
        sizes = [size, 3 if size == 1 else 1] if self.dynamic_batch else [size]
        return [(resize_batch(self.inputs, each), "") for each in sizes]

    def other_sizes(self, model: nn.Module) -> list[tuple[Any, str]]:
        """Inputs with one of the names at twice its size or at half of it, and what they are; for each name.

        Raises:
            ExportError: The model itself runs at neither.
        """
        return [self._other_size(model, name) for name in self.wanted]

    def _other_size(self, model: nn.Module, name: str) -> tuple[Any, str]:
        shapes = [tuple(tensor.shape) for tensor in tensors(as_call(self.inputs))]
        places = [{dim for dim, given in free_here.items() if given == name} for free_here in self.dims]
        now = next(shape[dim] for shape, free_here in zip(shapes, places, strict=True) for dim in free_here)
        problem = ""
        for size in (2 * now, now // 2):
            other = resize_dims(self.inputs, [dict.fromkeys(free_here, size) for free_here in places])
            args, kwargs = as_call(other)
            try:
                model(*args, **kwargs)
            except Exception as error:  # a forward may raise anything at a size that it is not made for
                problem = f"{type(error).__name__}: {error}"
                continue
            return other, f"{name} = {size}"
        raise ExportError(
            f"{name!r} was to be free, but {type(model).__name__} itself runs neither at {2 * now} nor at {now // 2} "
            f"({problem}); pass inputs of another size in check_inputs, or leave the name out of dynamic_dims"
        )


def _check(name: str, shape: tuple[int, ...], dim: int, wanted: str, sizes: dict[str, int]) -> None:
    if not is_whole(dim) or not 0 <= dim < len(shape):
        raise ExportError(f"dynamic_dims names dimension {dim} of {name!r}, whose shape is {list(shape)}")
    if not isinstance(cast("object", wanted), str) or not wanted.isidentifier():
        raise ExportError(
            f"dynamic_dims names a dimension of {name!r} {wanted!r}; give letters, digits and underscores"
        )
    if shape[dim] < 2:
        raise ExportError(
            f"dimension {dim} of {name!r} has size {shape[dim]} in the example, which the exporter would take for a "
            "constant; give an example in which it is at least 2"
        )
    if wanted != BATCH and sizes.setdefault(wanted, shape[dim]) != shape[dim]:
        raise ExportError(
            f"dynamic_dims gives the name {wanted!r} to dimensions of size {sizes[wanted]} and {shape[dim]}"
        )
