"""An ONNX file as a module, so that it is measured by whatever measures the model that it came from."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from structprune.checking import PATH, require, whole
from structprune.errors import ExportError, LoadError
from structprune.export.files import by_name, to_numpy
from structprune.export.runtimes import ONNXRUNTIME, copied, refusals, session


class OnnxModel(nn.Module):
    """A module whose forward is that of an ONNX file, on the CPU by ONNX Runtime. See `structprune.onnx_model`."""

    def __init__(self, path: Path, threads: int | None) -> None:
        super().__init__()
        try:
            self._session = session(path, threads=threads)
        except refusals() as error:
            raise LoadError(f"{path} cannot be loaded by {ONNXRUNTIME.name}: {error}") from error
        self.path = path
        self.inputs = tuple(node.name for node in self._session.get_inputs())

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Any:
        """The outputs for inputs in the order of the file, or by their names: one tensor, or a tuple of several."""
        given = by_name(self.path, self.inputs, args, kwargs)
        try:
            results = self._session.run(None, to_numpy(given))
        except refusals() as error:
            raise ExportError(f"{ONNXRUNTIME.name} cannot run {self.path}: {error}") from error
        outputs = tuple(torch.from_numpy(output) for output in copied(results))
        return outputs[0] if len(outputs) == 1 else outputs


def onnx_model(path: str | os.PathLike[str], *, threads: int | None = None) -> OnnxModel:
    """An ONNX file as a module that runs it, so that a metric or `structprune.benchmark` takes it as any other model.

    Args:
        path: An ONNX file, such as `structprune.export_onnx` or `structprune.quantize` writes.
        threads: How many threads one operation may use; ONNX Runtime's own choice if not given.

    Returns:
        A module without parameters. It takes tensors in the order of the file's inputs, or by their names, and gives a
        tensor, or a tuple where the file has several outputs.

    Raises:
        MissingExtraError: onnxruntime is not installed.
        LoadError: The file is not there, or ONNX Runtime does not take it.

    Example:
        >>> import tempfile, structprune
        >>> model, x = nn.Linear(4, 2), torch.randn(3, 4)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     again = onnx_model(structprune.export_onnx(model, f"{folder}/m.onnx", x).path)
        >>> torch.allclose(again(x), model(x), atol=1e-6)
        True
    """
    require(locals(), LoadError, path=PATH, threads=whole(1).or_none)
    return OnnxModel(Path(path), threads)
