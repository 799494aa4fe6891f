"""Programs that run model files: how each is started, given inputs, and told which threads it may use."""

from __future__ import annotations

import importlib
import logging
import warnings
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch

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
        with quiet():
            for module in self.modules:
                required(module, self.title, self.extra)


@contextmanager
def quiet() -> Generator[None]:
    """Without warnings, and without what is logged below an error: converters tell of their steps."""
    disabled = logging.root.manager.disable
    handlers = list(logging.root.handlers)
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        # `logging.warning` gives the root logger a handler where it has none.
        for handler in [each for each in logging.root.handlers if each not in handlers]:
            logging.root.removeHandler(handler)


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


# -- runtimes of phones ----------------------------------------------------------------------------------------------


def _load_executorch(file: Path, threads: int | None) -> Loaded:
    with quiet():
        bindings = required("executorch.extension.pybindings.portable_lib", "ExecuTorch", "executorch")
        runtime = required("executorch.runtime", "ExecuTorch", "executorch").Runtime.get()
    # One pool of threads serves the process.
    if threads is not None and bindings._threadpool_get_thread_count() != threads:
        bindings._unsafe_reset_threadpool(threads)
    try:
        # The method keeps its program alive.
        method = runtime.load_program(str(file)).load_method("forward")
    except RuntimeError as error:
        raise ExportError(f"ExecuTorch cannot load the file: {last_line(error)}") from error

    def run(feed: Mapping[str, Any]) -> list[Any]:
        try:
            return [each.numpy() for each in method.execute([torch.from_numpy(array) for array in feed.values()])]
        except RuntimeError as error:
            raise ExportError(f"ExecuTorch cannot run the file: {last_line(error)}") from error

    return run


def _load_litert(file: Path, threads: int | None) -> Loaded:
    library = required("ai_edge_litert.interpreter", "LiteRT", "litert")
    try:
        interpreter = library.Interpreter(str(file), num_threads=threads)
        interpreter.allocate_tensors()
    except (RuntimeError, ValueError) as error:
        raise ExportError(f"LiteRT cannot load the file: {last_line(error)}") from error
    ((signature, names),) = interpreter.get_signature_list().items()
    runner = interpreter.get_signature_runner(signature)
    inputs, outputs = (sorted(names[side], key=_number) for side in ("inputs", "outputs"))

    def run(feed: Mapping[str, Any]) -> list[Any]:
        try:
            results = runner(**dict(zip(inputs, feed.values(), strict=True)))
        except (RuntimeError, ValueError) as error:
            raise ExportError(f"LiteRT cannot run the file: {last_line(error)}") from error
        return [results[name] for name in outputs]

    return run


def _number(name: str) -> int:
    """The place of an input or output of LiteRT, which is the number that its name ends in."""
    return int(name.rpartition("_")[2])


def last_line(error: Exception) -> str:
    """What an error of C++ says: its first lines name sources of the library."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


ONNXRUNTIME = Runtime("ONNX Runtime", "ONNX", "onnx", ("onnx", "onnxscript", "onnxruntime"), _load_onnx)
OPENVINO = Runtime("OpenVINO", "OpenVINO", "openvino", ("openvino", "onnx", "onnxscript"), _load_openvino)

EXECUTORCH = Runtime("ExecuTorch", "ExecuTorch", "executorch", ("executorch",), _load_executorch)
LITERT = Runtime("LiteRT", "LiteRT", "litert", ("ai_edge_litert", "litert_torch"), _load_litert)
# By the names of backends.
RUNTIMES = {"onnxruntime": ONNXRUNTIME, "openvino": OPENVINO, "executorch": EXECUTORCH, "litert": LITERT}


def copied(outputs: list[Any]) -> list[Any]:
    """Outputs that later runs leave alone."""
    return [np.array(output) for output in outputs]
