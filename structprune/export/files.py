"""A model file by itself: the names of its inputs, whether it is sound, and its distance to the model."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from structprune.errors import ExportError
from structprune.export.runtimes import Loaded, copied
from structprune.extras import require as required
from structprune.inputs import batch_size
from structprune.tracing.trace import ExampleInputs, as_call


def require(module: str) -> Any:
    """Import an optional module, or say which extra brings it."""
    return required(module, "ONNX", "onnx")


def tensors(tree: Any) -> tuple[Tensor, ...]:
    """All tensors of nested inputs or outputs, in flat order."""
    return tuple(leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor))


def input_names(model: nn.Module, example_inputs: ExampleInputs) -> list[str]:
    """A name for every tensor, in flat order: the argument's own, with the path inside it where it is nested."""
    args, kwargs = as_call(example_inputs)
    parameters = inspect.signature(model.forward).parameters.values()
    positional = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    positional += [f"input_{index}" for index in range(len(positional), len(args))]
    names: list[str] = []
    for name, value in [*zip(positional, args, strict=False), *kwargs.items()]:
        for path, leaf in pytree.tree_flatten_with_path(value)[0]:
            if isinstance(leaf, Tensor):
                names.append("_".join([name, *(str(getattr(key, "key", getattr(key, "idx", key))) for key in path)]))
    return names


def by_name(
    path: Path, names: Sequence[str], args: Sequence[Tensor], kwargs: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The inputs of a file by their names, given in its order or by name.

    Raises:
        ExportError: there are too many, one is missing, or one has another name.
    """
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    if len(args) > len(names) or given.keys() != {*names}:
        raise ExportError(f"{path} takes the inputs {', '.join(names)}; got {', '.join(given)}")
    return given


def check(file: Path) -> None:
    """Validate the file against the ONNX specification, shapes included."""
    checker = importlib.import_module("onnx.checker")
    shape_inference = importlib.import_module("onnx.shape_inference")
    try:
        checker.check_model(str(file), full_check=True)
    except (checker.ValidationError, shape_inference.InferenceError) as error:
        raise ExportError(f"the exporter wrote an invalid ONNX file for {file.name}: {error}") from error


def compare(
    model: nn.Module, inputs: ExampleInputs, run: Loaded, runtime: str, names: Sequence[str], limit: float, at: str = ""
) -> float:
    """Largest relative error of a file on these inputs.

    Args:
        model: the model that was written.
        inputs: of any size that the file is meant for.
        run: the file, loaded by what runs it.
        runtime: the name of that.
        names: of the inputs.
        limit: the largest error allowed.
        at: says in messages which inputs these are; their batch size, if not given.

    Raises:
        ExportError: It is above the limit, or the runtime refuses the inputs.
    """
    where = f"{type(model).__name__} at {at or f'batch size {batch_size(inputs)}'}"
    args, kwargs = as_call(inputs)
    try:
        expected = tensors(model(*args, **kwargs))
    except RuntimeError as error:
        raise ExportError(
            f"{where}: the model itself does not run ({error}); if its forward fixes the batch size, export with "
            "dynamic_batch=False"
        ) from error
    arrays = to_numpy(dict(zip(names, tensors((args, kwargs)), strict=True)), runtime)
    try:
        actual = [torch.as_tensor(output) for output in copied(run(arrays))]
    except ExportError as error:
        raise ExportError(f"{where}: {error}") from error
    if len(actual) != len(expected):
        raise ExportError(f"{where}: the file has {len(actual)} outputs, the model {len(expected)}")
    return max(
        (_error(where, runtime, pair, index, limit) for index, pair in enumerate(zip(expected, actual, strict=True))),
        default=0.0,
    )


def _error(where: str, runtime: str, pair: tuple[Tensor, Tensor], index: int, limit: float) -> float:
    """The relative error of one output."""
    ours, theirs = pair
    if ours.shape != theirs.shape:
        raise ExportError(
            f"{where}: output {index} has shape {tuple(theirs.shape)} in {runtime} and {tuple(ours.shape)} in "
            "PyTorch; the forward depends on the size of its inputs, so export with dynamic_batch=False, and "
            "without dynamic_dims"
        )
    error = relative_error(ours, theirs)
    # Written so that an error that is no number fails as well.
    if not error <= limit:
        raise ExportError(
            f"{where}: output {index} differs by {error:.3g} of its largest magnitude between PyTorch and {runtime}, "
            f"more than {limit:.3g}; export an eval-mode model whose outputs do not depend on random numbers, or pass "
            "a larger tolerance= if this accuracy is enough"
        )
    return error


def to_numpy(inputs: dict[str, Tensor], runtime: str = "ONNX Runtime") -> dict[str, Any]:
    """The inputs as a runtime takes them.

    Raises:
        ExportError: A tensor is of bfloat16, which NumPy does not know.
    """
    for name, tensor in inputs.items():
        if tensor.dtype is torch.bfloat16:
            raise ExportError(
                f"input {name!r} is of bfloat16, which {runtime} cannot be given from Python; export "
                "model.float() with float32 inputs, or model.half() with float16 inputs"
            )
    return {name: tensor.detach().cpu().numpy() for name, tensor in inputs.items()}


def relative_error(expected: Tensor, actual: Tensor) -> float:
    """Largest difference divided by the largest finite magnitude expected.

    Infinities and NaNs count as equal where both have the same one, and as an infinite error elsewhere.

    Args:
        expected: Reference, any shape and dtype.
        actual: Same shape.

    Example:
        >>> relative_error(torch.tensor([1.0, 4.0]), torch.tensor([1.0, 3.0]))
        0.25
    """
    ours, theirs = expected.detach().cpu().double(), actual.detach().cpu().double()
    finite = ours.isfinite()
    if not torch.allclose(ours[~finite], theirs[~finite], rtol=0, atol=0, equal_nan=True):
        return float("inf")
    if not finite.any():
        return 0.0
    difference = (ours[finite] - theirs[finite]).abs().max().item()
    if difference == 0:
        return 0.0
    scale = ours[finite].abs().max().item()
    return difference / scale if scale > 0 else float("inf")
