"""Ways of running a model: each turns it, with its inputs, into a call without arguments."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn

from structprune.export import export_onnx
from structprune.onnx_file import input_names, require, session, tensors, to_numpy
from structprune.tracing.trace import ExampleInputs, as_call

Call: TypeAlias = Callable[[], Any]


def eager(model: nn.Module, inputs: ExampleInputs, device: torch.device, threads: int, folder: Path) -> Call:
    """The model as it is."""
    args, kwargs = as_call(inputs)
    return lambda: model(*args, **kwargs)


def compiled(model: nn.Module, inputs: ExampleInputs, device: torch.device, threads: int, folder: Path) -> Call:
    """Through ``torch.compile``, specialised to these shapes; compilation happens in the first call."""
    args, kwargs = as_call(inputs)
    # Models of one class share compiled code's cache. Unless told otherwise, the second one's other widths would be
    # taken for dynamic shapes, and it would run slower for it.
    call = torch.compile(model, dynamic=False)
    return lambda: call(*args, **kwargs)


def onnxruntime(model: nn.Module, inputs: ExampleInputs, device: torch.device, threads: int, folder: Path) -> Call:
    """Exported to ONNX, checked, and run by ONNX Runtime.

    Raises:
        MissingExtraError: onnx, onnxscript or onnxruntime is not installed.
        ExportError: The model cannot be exported faithfully.
        ValueError: The installed ONNX Runtime cannot run on the device.
    """
    provider = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}.get(device.type, "none")
    available = require("onnxruntime").get_available_providers()
    if provider not in available:
        raise ValueError(
            f"the installed ONNX Runtime cannot run on {device}: it offers {', '.join(available)}; install a build "
            "for this device, or leave 'onnxruntime' out of backends="
        )
    file = export_onnx(model, folder / "model.onnx", inputs, dynamic_batch=False).path
    feed = to_numpy(dict(zip(input_names(model, inputs), tensors(as_call(inputs)), strict=True)))
    run = session(file, threads=threads, provider=provider).run
    return lambda: run(None, feed)


BACKENDS: dict[str, Callable[[nn.Module, ExampleInputs, torch.device, int, Path], Call]] = {
    "eager": eager,
    "compile": compiled,
    "onnxruntime": onnxruntime,
}
