"""Writing a file so that it is there only if what runs it computes what the model computes."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from structprune.checking import INPUTS, real, shown
from structprune.errors import ExportError, MissingExtraError
from structprune.export.files import compare, tensors, to_numpy
from structprune.export.program import FreeDims
from structprune.export.runtimes import Runtime, last_line, quiet
from structprune.files import drafts_in, put, target_of
from structprune.inputs import evaluating
from structprune.tracing.trace import ExampleInputs, as_call

# How far the largest difference may be, as a share of the largest output.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 1e-2, torch.int8: 5e-2}


@dataclass(frozen=True)
class Export:
    """What was written and how well it agrees with the model. See `structprune.export_onnx` for an example.

    Attributes:
        path: The file.
        max_relative_error: Largest difference to the model's outputs, over all outputs and sizes tried, each divided
            by the largest magnitude of that output.
        bytes: Size of the file, with that of the files beside it that it needs.
    """

    path: Path
    max_relative_error: float
    bytes: int


class Flat(nn.Module):
    """A model as a function from a flat list of tensors to a flat list of tensors, which is what a file is."""

    def __init__(self, model: nn.Module, example_inputs: ExampleInputs) -> None:
        super().__init__()
        self.model = model
        leaves, self.spec = pytree.tree_flatten(as_call(example_inputs))
        self.constants = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self.is_tensor = [isinstance(leaf, Tensor) for leaf in leaves]
        # Not `eval()`: the caller holds the model's modes, and this wrapper has none of its own.
        self.training = False

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """All tensors of the outputs, in flat order."""
        given = iter(inputs)
        pairs = zip(self.is_tensor, self.constants, strict=True)
        leaves = [next(given) if is_tensor else constant for is_tensor, constant in pairs]
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return tensors(self.model(*args, **kwargs))


@dataclass(frozen=True)
class Wanted:
    """What is asked of a file; see `structprune.export_onnx` for each."""

    dynamic_batch: bool
    dynamic_dims: Mapping[str, Mapping[int, str]]
    check_inputs: Iterable[ExampleInputs]
    tolerance: float | None


def write_verified(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: ExampleInputs,
    wanted: Wanted,
    write: Callable[[FreeDims, Path], None],
    runtime: Runtime,
) -> Export:
    """Write a file into a temporary folder, compare it with the model at several sizes, and move it where it belongs.

    Args:
        model: what is written; it runs in eval mode and is left as it was.
        path: where the file goes.
        example_inputs: what the model is called on.
        wanted: free dimensions, further inputs to try, tolerance.
        write: writes the file, and others beside it if it needs them.
        runtime: what runs the file.

    Raises:
        MissingExtraError: the runtime, or what writes for it, is not installed.
        ExportError: an option cannot be used, the model cannot be written, or the file computes something else.
    """
    _check(model, wanted)
    runtime.require()
    try:
        target = target_of(Path(path))
    except (OSError, TypeError) as error:
        raise ExportError(f"cannot write {path}: {error}") from error
    free = FreeDims.of(model, example_inputs, wanted.dynamic_batch, wanted.dynamic_dims)
    limit = _default_tolerance(model) if wanted.tolerance is None else wanted.tolerance
    to_numpy(dict(zip(free.names, tensors(as_call(example_inputs)), strict=True)), runtime.name)  # or refused at once
    with evaluating(model), drafts_in(target.parent) as folder:
        draft = folder / target.name
        write(free, draft)
        trials = [*free.batches(), *((inputs, "check_inputs") for inputs in wanted.check_inputs)]
        if len(trials) == len(free.batches()):
            trials += free.other_sizes(model)
        try:
            run = runtime.load(draft, None)
        except ExportError as error:
            raise ExportError(f"{type(model).__name__}: {error}") from error
        error = max(compare(model, inputs, run, runtime.name, free.names, limit, at) for inputs, at in trials)
        written = list(folder.iterdir())
        total = sum(file.stat().st_size for file in written)
        # The weights before the file that points to them.
        for file in sorted(written, key=lambda file: file == draft):
            put(file, target.parent / file.name)
    return Export(path=Path(path), max_relative_error=error, bytes=total)


@contextmanager
def converting(model: nn.Module, runtime: str) -> Generator[None]:
    """What a converter raises, which may be anything that its passes raise, as an `ExportError`."""
    try:
        with quiet():
            yield
    except (MissingExtraError, ExportError):
        raise
    except Exception as error:  # as the docstring says: each of many passes has errors of its own
        raise ExportError(
            f"{type(model).__name__} cannot be written for {runtime}: {type(error).__name__}: {last_line(error)}"
        ) from error


def _check(model: object, wanted: Wanted) -> None:
    inputs, tolerance = wanted.check_inputs, wanted.tolerance
    if not isinstance(model, nn.Module):
        raise ExportError(f"model is a {type(model).__name__}; give the model, an nn.Module")
    if not isinstance(inputs, Iterable) or isinstance(inputs, (Tensor, Mapping, str)):
        raise ExportError(f"check_inputs is a {type(inputs).__name__}; give a list of inputs like the example")
    if not isinstance(inputs, Iterator) and not all(map(INPUTS.fits, inputs)):
        raise ExportError(f"check_inputs holds something else than inputs; {INPUTS.allowed}")
    if tolerance is not None and not real(least=0).fits(tolerance):
        raise ExportError(f"tolerance is {shown(tolerance)}; give the largest relative error allowed")


def _default_tolerance(model: nn.Module) -> float:
    """The loosest one that a dtype of the model asks for; a model without parameters is taken for float32."""
    kinds = {tensor.dtype for tensor in model.parameters() if tensor.is_floating_point()} or {torch.float32}
    # Where activations are rounded to integers, the least difference before that may round to the next one.
    kinds |= {tensor.dtype for tensor in chain(model.parameters(), model.buffers()) if tensor.dtype is torch.int8}
    return max(_TOLERANCE.get(dtype, _TOLERANCE[torch.float32]) for dtype in kinds)
