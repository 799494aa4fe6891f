"""Programs that run model files: how each is started, given inputs, and told which threads it may use."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from structprune.errors import ExportError
from structprune.extras import require as required

# A file that is loaded: arrays by the names of the inputs -> the outputs in order.
Loaded: TypeAlias = Callable[[Mapping[str, Any]], list[Any]]


@dataclass(frozen=True)
class Runtime:
    """A program that runs files of one format.

    Attributes:
        name: of the program, in messages.
        title: what needs the extra, in messages.
        extra: brings it.
        modules: what is imported of it, and to write its files.
        load: opens a file on the CPU, with so many threads an operation (its own choice if None).
    """

    name: str
    title: str
    extra: str
    modules: tuple[str, ...]
    load: Callable[[Path, int | None], Loaded]

    def require(self) -> None:
        """Import all that it needs.

        Raises:
            MissingExtraError: some of it is not installed.
        """
        for module in self.modules:
            required(module, self.title, self.extra)


# -- ONNX Runtime -----------------------------------------------------------------------------------------------------


def session(file: Path, *, threads: int | None = None, provider: str = "CPUExecutionProvider") -> Any:
    """Load an ONNX file into ONNX Runtime.

    Args:
        file: The ONNX file.
        threads: How many threads one operation may use; ONNX Runtime's own choice if not given.
        provider: The execution provider, which must be one of ``onnxruntime.get_available_providers()``.
    """
    runtime = required("onnxruntime", "ONNX", "onnx")
    return runtime.InferenceSession(str(file), session_options(threads), providers=[provider])


def session_options(threads: int | None) -> Any:
    """How ONNX Runtime is to run a file, with so many threads an operation."""
    options = required("onnxruntime", "ONNX", "onnx").SessionOptions()
    options.log_severity_level = 3  # what it could not simplify is no concern of the reader's; errors are raised anyway
    if threads is not None:
        options.intra_op_num_threads = threads
    # Threads that wait by spinning would take the cores from whatever runs next, and these files are run in turns.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def refusals() -> tuple[type[Exception], ...]:
    """What ONNX Runtime raises for files and inputs that it does not take."""
    failures = importlib.import_module("onnxruntime.capi.onnxruntime_pybind11_state")
    return (
        failures.Fail,
        failures.InvalidArgument,
        failures.InvalidGraph,
        failures.InvalidProtobuf,
        failures.NoSuchFile,
        failures.NotImplemented,
        failures.RuntimeException,
    )


def _load_onnx(file: Path, threads: int | None) -> Loaded:
    try:
        opened = session(file, threads=threads)
    except refusals() as error:
        raise ExportError(f"ONNX Runtime cannot load the file: {error}") from error

    def run(feed: Mapping[str, Any]) -> list[Any]:
        try:
            return opened.run(None, dict(feed))
        except refusals() as error:
            raise ExportError(f"ONNX Runtime cannot run the file: {error}") from error

    return run


# -- OpenVINO ---------------------------------------------------------------------------------------------------------


def openvino_model(file: str | bytes, threads: int | None = None, *, counting: bool = False) -> Any:
    """A file (OpenVINO's own or ONNX) compiled by OpenVINO for the CPU, in float32 throughout.

    Args:
        file: the path of the ``.xml`` or ``.onnx`` file, or the bytes of an ONNX file.
        threads: how many threads one operation may use; OpenVINO's own choice if not given.
        counting: whether it counts the time of each operation.

    Raises:
        RuntimeError: OpenVINO refuses the file.
    """
    core = required("openvino", "OpenVINO", "openvino").Core()
    # Where the processor has bfloat16, OpenVINO would round to it unasked. Pinned threads would take a core from what
    # runs beside them in turns.
    options: dict[str, Any] = {
        "INFERENCE_PRECISION_HINT": "f32",
        "NUM_STREAMS": 1,
        "ENABLE_CPU_PINNING": False,
        "PERF_COUNT": counting,
    }
    if threads is not None:
        options["INFERENCE_NUM_THREADS"] = threads
    return core.compile_model(core.read_model(file), "CPU", options)


def _load_openvino(file: Path, threads: int | None) -> Loaded:
    try:
        compiled = openvino_model(str(file), threads)
    except RuntimeError as error:
        raise ExportError(f"OpenVINO cannot load the file: {last_line(error)}") from error
    request = compiled.create_infer_request()

    def run(feed: Mapping[str, Any]) -> list[Any]:
        try:
            # Inputs are read where they lie, which is safe as the call waits for the result.
            request.infer(dict(feed), share_inputs=True)
        except RuntimeError as error:
            raise ExportError(f"OpenVINO cannot run the file: {last_line(error)}") from error
        # Looked at, not copied: the next run overwrites them.
        return [tensor.data for tensor in request.output_tensors]

    return run


def last_line(error: Exception) -> str:
    """What an error of C++ says: its first lines name sources of the library."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


ONNXRUNTIME = Runtime("ONNX Runtime", "ONNX", "onnx", ("onnx", "onnxscript", "onnxruntime"), _load_onnx)
OPENVINO = Runtime("OpenVINO", "OpenVINO", "openvino", ("openvino", "onnx", "onnxscript"), _load_openvino)

# By the names of backends.
RUNTIMES = {"onnxruntime": ONNXRUNTIME, "openvino": OPENVINO}


def copied(outputs: list[Any]) -> list[Any]:
    """Outputs that later runs leave alone."""
    return [np.array(output) for output in outputs]
