"""Ways of running a model: each turns it, with its inputs, into something to call, that tells what a call takes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from structprune.benchmarking.memory import held_bytes, peak_of_run, peak_of_session
from structprune.benchmarking.nodes import NODE_TIMERS, onnxruntime_nodes
from structprune.benchmarking.profiling import Profile, profile_file, profile_torch
from structprune.benchmarking.session_memory import LOAD
from structprune.errors import BackendError
from structprune.export.aotinductor import compiled_now, compiler_lacking, write_package
from structprune.export.files import input_names, require, tensors, to_numpy
from structprune.export.mobile import export_executorch, export_litert
from structprune.export.onnx import export_onnx
from structprune.export.openvino import export_openvino
from structprune.export.runtimes import RUNTIMES, session
from structprune.export.torch_files import read_package
from structprune.export.verified import Wanted
from structprune.tracing.trace import ExampleInputs, as_call

Call: TypeAlias = Callable[[], Any]
_LAYOUTS = {4: torch.channels_last, 5: torch.channels_last_3d}


class Run(Protocol):
    """A model that is ready to run on its inputs."""

    def __call__(self) -> Any:
        """One forward."""
        ...

    def memory(self) -> int | None:
        """Bytes that a forward takes at most, with weights and inputs; None where that cannot be told."""
        ...

    def profile(self) -> Profile:
        """What its operations take, or those of the same model in eager mode where kernels are fused across layers."""
        ...


class TorchRun:
    """A model that torch runs.

    Args:
        model: the model.
        inputs: what it is called on.
        device: where both are.
        call: what runs it; the model itself if not given.
    """

    def __init__(
        self, model: nn.Module, inputs: ExampleInputs, device: torch.device, call: Callable[..., Any] | None = None
    ) -> None:
        self._model, self._inputs, self._device = model, inputs, device
        self._args, self._kwargs = as_call(inputs)
        self._run = model if call is None else call

    def __call__(self) -> Any:
        """One forward."""
        return self._run(*self._args, **self._kwargs)

    def memory(self) -> int:
        """Weights, inputs, and what torch's allocator gives at most; what kernels keep to themselves is not seen."""
        return held_bytes(self._model, self._inputs) + peak_of_run(self, self._device)

    def profile(self) -> Profile:
        """What each operation takes in eager mode."""
        return profile_torch(self._model, lambda: self._model(*self._args, **self._kwargs), self._device)


class SessionRun:
    """An ONNX file that ONNX Runtime runs.

    Args:
        model: what was exported.
        inputs: what it is called on.
        device: where it runs.
        threads: how many threads a node may use on the CPU.
        file: the ONNX file.
        provider: the execution provider.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: ExampleInputs,
        device: torch.device,
        threads: int,
        file: Path,
        provider: str,
    ) -> None:
        self._eager = TorchRun(model, inputs, device)
        self._paths = [path for path, _ in model.named_modules()]
        self._device, self._threads, self._file, self._provider = device, threads, file, provider
        self._feed = to_numpy(dict(zip(input_names(model, inputs), tensors(as_call(inputs)), strict=True)))
        self._session = session(file, threads=threads, provider=provider)
        if provider not in self._session.get_providers():
            raise BackendError(
                f"ONNX Runtime offers {provider} but could not start it on {device}; its log says why (mostly a "
                "library of the wrong version). Repair the installation, or leave it out of backends="
            )
        self._binding = None if device.type == "cpu" else bound(self._session, self._feed, device)

    def __call__(self) -> Any:
        """One forward; inputs and outputs stay on the device."""
        if self._binding is None:
            return self._session.run(None, self._feed)
        self._session.run_with_iobinding(self._binding)
        return self._binding.synchronize_outputs()

    def memory(self) -> int | None:
        """What the file's weights, its inputs and ONNX Runtime's arena take, with the code that it loads; CPU only."""
        if self._device.type != "cpu":
            return None
        return peak_of_session("onnxruntime", self._file, self._feed, self._threads)

    def profile(self) -> Profile:
        """What each node takes; with TensorRT, which fuses the network into one, what eager operations take."""
        if self._provider.startswith("Tensorrt"):
            return self._eager.profile()
        timer = partial(onnxruntime_nodes, provider=self._provider)
        return profile_file(self._file, self._feed, self._threads, self._paths, timer)


class FileRun:
    """A model's file that a runtime other than ONNX Runtime runs on the CPU.

    Args:
        backend: the name of the runtime, one of `structprune.export.runtimes.RUNTIMES`.
        model: what was exported.
        inputs: what it is called on.
        threads: how many threads an operation may use.
        file: the file.
    """

    def __init__(self, backend: str, model: nn.Module, inputs: ExampleInputs, threads: int, file: Path) -> None:
        self._backend, self._model, self._inputs = backend, model, inputs
        self._threads, self._file = threads, file
        names, given = input_names(model, inputs), tensors(as_call(inputs))
        self._feed = to_numpy(dict(zip(names, given, strict=True)), RUNTIMES[backend].name)
        self._run = RUNTIMES[backend].load(file, threads)

    def __call__(self) -> Any:
        """One forward."""
        return self._run(self._feed)

    def memory(self) -> int | None:
        """What the file's weights, its inputs and the runtime take, with the code that it loads; not of all known."""
        if self._backend not in LOAD:
            return None
        return peak_of_session(self._backend, self._file, self._feed, self._threads)

    def profile(self) -> Profile:
        """What each node of the same model as ONNX takes in this runtime, or each operation in eager mode."""
        if self._backend not in NODE_TIMERS:
            return TorchRun(self._model, self._inputs, torch.device("cpu")).profile()
        paths = [path for path, _ in self._model.named_modules()]
        file = export_onnx(self._model, self._file.with_suffix(".onnx"), self._inputs, dynamic_batch=False).path
        return profile_file(file, self._feed, self._threads, paths, NODE_TIMERS[self._backend])


def bound(runtime_session: Any, feed: dict[str, Any], device: torch.device) -> Any:
    """A binding of a session's inputs and outputs to memory of a device, so that no run copies them."""
    value = require("onnxruntime").OrtValue
    where = device.type, device.index or 0
    binding = runtime_session.io_binding()
    for name, array in feed.items():
        binding.bind_ortvalue_input(name, value.ortvalue_from_numpy(array, *where))
    for output in runtime_session.get_outputs():
        binding.bind_output(output.name, *where)
    return binding


def eager(model: nn.Module, inputs: ExampleInputs, device: torch.device, threads: int, folder: Path) -> TorchRun:
    """The model as it is."""
    return TorchRun(model, inputs, device)


def channels_last(
    model: nn.Module, inputs: ExampleInputs, device: torch.device, threads: int, folder: Path
) -> TorchRun:
    """A copy of the model, and inputs, whose images and kernels lie in memory channel by channel."""
    placed = copy.deepcopy(model)
    for tensor in chain(placed.parameters(), placed.buffers()):
        tensor.data = _channels_last(tensor.data)
    return TorchRun(placed, pytree.tree_map_only(Tensor, _channels_last, inputs), device)


def _channels_last(tensor: Tensor) -> Tensor:
    layout = _LAYOUTS.get(tensor.ndim)
    return tensor if layout is None else tensor.contiguous(memory_format=layout)


def compiled(model: nn.Module, inputs: ExampleInputs, device: torch.device, threads: int, folder: Path) -> TorchRun:
    """Through ``torch.compile``, specialised to these shapes, with weights as constants.

    Raises:
        BackendError: There is no C++ compiler, which it needs on the CPU.
    """
    if device.type == "cpu" and (lacking := compiler_lacking()):
        raise BackendError(f"torch.compile needs a C++ compiler, and {lacking}; or leave 'compile' out of backends=")
    args, kwargs = as_call(inputs)
    return TorchRun(model, inputs, device, compiled_now(model, args, kwargs))


def aotinductor(model: nn.Module, inputs: ExampleInputs, device: torch.device, threads: int, folder: Path) -> TorchRun:
    """Compiled ahead by AOTInductor into a package for these shapes, checked, and run.

    Raises:
        BackendError: There is no C++ compiler.
        ExportError: The model cannot be exported or compiled faithfully.
    """
    if lacking := compiler_lacking():
        raise BackendError(f"AOTInductor needs a C++ compiler, and {lacking}; or leave 'aotinductor' out of backends=")
    file = write_package(model, folder / "model.pt2", inputs, Wanted(False, {}, (), None), {}).path
    package, given = read_package(file), tensors(as_call(inputs))
    return TorchRun(model, inputs, device, lambda *_, **__: package(*given))


def onnxruntime(
    model: nn.Module, inputs: ExampleInputs, device: torch.device, threads: int, folder: Path
) -> SessionRun:
    """Exported to ONNX, checked, and run by ONNX Runtime.

    Raises:
        MissingExtraError: onnx, onnxscript or onnxruntime is not installed.
        ExportError: The model cannot be exported faithfully.
        BackendError: The installed ONNX Runtime cannot run on the device.
    """
    provider = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}.get(device.type, "none")
    available = require("onnxruntime").get_available_providers()
    if provider not in available:
        raise BackendError(
            f"the installed ONNX Runtime cannot run on {device}: it offers {', '.join(available)}; install a build "
            "for this device, or leave 'onnxruntime' out of backends="
        )
    return _exported(model, inputs, device, threads, folder, provider)


def _on_the_cpu(runtime: str, device: torch.device) -> None:
    if device.type != "cpu":
        raise BackendError(f"{runtime} runs on the CPU here, and the inputs are on {device}; pass device='cpu'")


def openvino(model: nn.Module, inputs: ExampleInputs, device: torch.device, threads: int, folder: Path) -> FileRun:
    """Exported to OpenVINO, checked, and run by it on the CPU, in float32.

    Raises:
        MissingExtraError: openvino, onnx or onnxscript is not installed.
        ExportError: The model cannot be exported faithfully.
        BackendError: The inputs are not on the CPU.
    """
    _on_the_cpu("OpenVINO", device)
    file = export_openvino(model, folder / "model.xml", inputs, dynamic_batch=False).path
    return FileRun("openvino", model, inputs, threads, file)


def executorch(model: nn.Module, inputs: ExampleInputs, device: torch.device, threads: int, folder: Path) -> FileRun:
    """Exported to ExecuTorch with XNNPACK, checked, and run by it on the CPU.

    Raises:
        MissingExtraError: executorch is not installed.
        ExportError: The model cannot be exported faithfully.
        BackendError: The inputs are not on the CPU.
    """
    _on_the_cpu("ExecuTorch", device)
    return FileRun("executorch", model, inputs, threads, export_executorch(model, folder / "model.pte", inputs).path)


def litert(model: nn.Module, inputs: ExampleInputs, device: torch.device, threads: int, folder: Path) -> FileRun:
    """Exported to LiteRT, checked, and run by it on the CPU.

    Raises:
        MissingExtraError: litert-torch is not installed.
        ExportError: The model cannot be exported faithfully.
        BackendError: The inputs are not on the CPU.
    """
    _on_the_cpu("LiteRT", device)
    return FileRun("litert", model, inputs, threads, export_litert(model, folder / "model.tflite", inputs).path)


def tensorrt(model: nn.Module, inputs: ExampleInputs, device: torch.device, threads: int, folder: Path) -> Run:
    """By TensorRT: through ONNX Runtime if it offers that, else through ``torch_tensorrt``.

    Raises:
        BackendError: The device is no GPU, or neither of both is installed.
        MissingExtraError: onnx or onnxscript is not installed.
        ExportError: The model cannot be exported faithfully.
    """
    if device.type != "cuda":
        raise BackendError(f"TensorRT runs on a CUDA device, and the inputs are on {device}; pass device='cuda'")
    provider = "TensorrtExecutionProvider"
    if find_spec("onnxruntime") and provider in require("onnxruntime").get_available_providers():
        return _exported(model, inputs, device, threads, folder, provider)
    if find_spec("torch_tensorrt"):
        require("torch_tensorrt")  # registers itself with torch.compile
        return TorchRun(model, inputs, device, torch.compile(model, backend="tensorrt", dynamic=False))
    raise BackendError(
        "TensorRT is not here: the installed ONNX Runtime offers no TensorrtExecutionProvider, and torch_tensorrt is "
        "not installed; install onnxruntime-gpu with TensorRT, or torch-tensorrt, or leave 'tensorrt' out of backends="
    )


def _exported(
    model: nn.Module, inputs: ExampleInputs, device: torch.device, threads: int, folder: Path, provider: str
) -> SessionRun:
    file = export_onnx(model, folder / "model.onnx", inputs, dynamic_batch=False).path
    return SessionRun(model, inputs, device, threads, file, provider)


BACKENDS: dict[str, Callable[[nn.Module, ExampleInputs, torch.device, int, Path], Run]] = {
    "eager": eager,
    "channels_last": channels_last,
    "compile": compiled,
    "aotinductor": aotinductor,
    "onnxruntime": onnxruntime,
    "openvino": openvino,
    "executorch": executorch,
    "litert": litert,
    "tensorrt": tensorrt,
}
# Those whose calls return when all is done, on a GPU too.
WAITING = tuple(RUNTIMES)
