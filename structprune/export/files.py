"""An ONNX file by itself: the names of its inputs, a session that runs it, and its distance to the model."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from structprune.errors import ExportError
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


def check(file: Path) -> None:
    """Validate the file against the ONNX specification, shapes included."""
    checker = importlib.import_module("onnx.checker")
    shape_inference = importlib.import_module("onnx.shape_inference")
    try:
        checker.check_model(str(file), full_check=True)
    except (checker.ValidationError, shape_inference.InferenceError) as error:
        raise ExportError(f"the exporter wrote an invalid ONNX file for {file.name}: {error}") from error


def compare(
    model: nn.Module, inputs: ExampleInputs, file: Path, names: Sequence[str], limit: float, at: str = ""
) -> float:
    """Largest relative error of the file on these inputs.

    Args:
        model: the model that was written.
        inputs: of any size that the file is meant for.
        file: the ONNX file.
        names: of the inputs.
        limit: the largest error allowed.
        at: says in messages which inputs these are; their batch size, if not given.

    Raises:
        ExportError: It is above the limit, or ONNX Runtime refuses the file or the inputs.
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
    actual = _run(file, dict(zip(names, tensors((args, kwargs)), strict=True)), where)
    if len(actual) != len(expected):
        raise ExportError(f"{where}: the ONNX file has {len(actual)} outputs, the model {len(expected)}")
    worst = 0.0
    for index, (ours, theirs) in enumerate(zip(expected, actual, strict=True)):
        if ours.shape != theirs.shape:
            raise ExportError(
                f"{where}: output {index} has shape {tuple(theirs.shape)} in ONNX Runtime and {tuple(ours.shape)} in "
                "PyTorch; the forward depends on the size of its inputs, so export with dynamic_batch=False, and "
                "without dynamic_dims"
            )
        error = relative_error(ours, theirs)
        # Written so that an error that is no number fails as well.
        if not error <= limit:
            raise ExportError(
                f"{where}: output {index} differs by {error:.3g} of its largest magnitude between PyTorch and ONNX "
                f"Runtime, more than {limit:.3g}; export an eval-mode model whose outputs do not depend on random "
                "numbers, or pass a larger tolerance= if this accuracy is enough"
            )
        worst = max(worst, error)
    return worst


def session(file: Path, *, threads: int | None = None, provider: str = "CPUExecutionProvider") -> Any:
    """Load the file into ONNX Runtime.

    Args:
        file: The ONNX file.
        threads: How many threads one operation may use; ONNX Runtime's own choice if not given.
        provider: The execution provider, which must be one of ``onnxruntime.get_available_providers()``.
    """
    runtime = require("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 3  # what it could not simplify is no concern of the reader's; errors are raised anyway
    if threads is not None:
        options.intra_op_num_threads = threads
    # Threads that wait by spinning would take the cores from whatever runs next, and these files are run in turns.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return runtime.InferenceSession(str(file), options, providers=[provider])


def to_numpy(inputs: dict[str, Tensor]) -> dict[str, Any]:
    """The inputs as ONNX Runtime takes them.

    Raises:
        ExportError: A tensor is of bfloat16, which NumPy does not know.
    """
    for name, tensor in inputs.items():
        if tensor.dtype is torch.bfloat16:
            raise ExportError(
                f"input {name!r} is of bfloat16, which ONNX Runtime cannot be given from Python; export "
                "model.float() with float32 inputs, or model.half() with float16 inputs"
            )
    return {name: tensor.detach().cpu().numpy() for name, tensor in inputs.items()}


def _run(file: Path, inputs: dict[str, Tensor], where: str) -> list[Tensor]:
    """Run the file on the CPU."""
    failures = importlib.import_module("onnxruntime.capi.onnxruntime_pybind11_state")
    refusals = (
        failures.Fail,
        failures.InvalidArgument,
        failures.InvalidGraph,
        failures.NotImplemented,
        failures.RuntimeException,
    )
    arrays = to_numpy(inputs)
    try:
        outputs = session(file).run(None, arrays)
    except refusals as error:
        raise ExportError(f"{where}: ONNX Runtime cannot run the file: {error}") from error
    return [torch.as_tensor(output) for output in outputs]


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
