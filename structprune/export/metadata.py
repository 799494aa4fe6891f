"""What an ONNX file says of itself: its inputs and outputs, and of which plans its model is the result."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import nn

from structprune.checking import PATH
from structprune.checking import require as require_arguments
from structprune.coupling.costs import Cost
from structprune.errors import LoadError
from structprune.export.files import require
from structprune.planning.plan import plans_of
from structprune.schema import FormError, record, texts

# Keys of the file's metadata.
VERSION, PLANS, BEFORE, AFTER = (f"structprune.{key}" for key in ("version", "plans", "before", "after"))
Shape = tuple[int | str, ...]


@dataclass(frozen=True)
class OnnxInfo:
    """What an ONNX file says of itself.

    Attributes:
        path: The ONNX file.
        bytes: Size of the file, with that of its external weights if it has any.
        opset: Version of the ONNX operator set.
        inputs: Shape of each input by name; a dimension that is free is a string, its name.
        outputs: The same of each output.
        version: Of structprune that wrote the file; None if it was written by something else.
        digests: Of the plans by which the model was pruned (`Plan.digest`), the first one first.
        before: Cost of the model before the first plan, on the example inputs of that plan; None if it was not pruned.
        after: Cost behind the last plan, on the example inputs of that one.

    See `structprune.onnx_info` for an example.
    """

    path: Path
    bytes: int
    opset: int
    inputs: Mapping[str, Shape]
    outputs: Mapping[str, Shape]
    version: str | None
    digests: tuple[str, ...]
    before: Cost | None
    after: Cost | None


def metadata(model: nn.Module) -> dict[str, str]:
    """What is written into the file of a model: the version, and what its plans say."""
    entries = {VERSION: version("structprune")}
    if plans := plans_of(model):
        entries[PLANS] = json.dumps([plan.digest for plan in plans])
        entries[BEFORE] = json.dumps(asdict(plans[0].before))
        entries[AFTER] = json.dumps(asdict(plans[-1].after))
    return entries


def onnx_info(path: str | os.PathLike[str]) -> OnnxInfo:
    """Read what an ONNX file says of itself; weights in a second file are not read.

    Args:
        path: An ONNX file, written by `export_onnx` or by anything else.

    Returns:
        Inputs, outputs and operator set; digests of the plans and costs where `export_onnx` wrote them.

    Raises:
        MissingExtraError: onnx is not installed.
        LoadError: There is no such file, or it is no ONNX file, or its metadata was changed.

    Example:
        >>> import tempfile, torch, structprune
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> slim = structprune.prune(model, torch.randn(1, 4), ratio=0.5)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = structprune.export_onnx(slim, f"{folder}/slim.onnx", torch.randn(1, 4))
        ...     info = structprune.onnx_info(f"{folder}/slim.onnx")
        >>> info.before.params, info.after.params, info.inputs
        (58, 30, {'input': ('batch', 4)})
    """
    require_arguments(locals(), LoadError, path=PATH)
    onnx = require("onnx")
    path = Path(path)
    refusals = (importlib.import_module("google.protobuf.message").DecodeError, OSError)
    try:
        model = onnx.load(path, load_external_data=False)
    except refusals as error:
        raise LoadError(f"{path} cannot be read as an ONNX file: {error}") from error
    if not model.graph.node:
        raise LoadError(f"{path} is no ONNX file: it holds no operations")
    opsets = [imported.version for imported in model.opset_import if imported.domain in ("", "ai.onnx")]
    written = {entry.key: entry.value for entry in model.metadata_props}
    try:
        said = (
            written.get(VERSION),
            texts(json.loads(written.get(PLANS, "[]"))),
            record(Cost, json.loads(written[BEFORE])) if BEFORE in written else None,
            record(Cost, json.loads(written[AFTER])) if AFTER in written else None,
        )
    except (ValueError, RecursionError, FormError) as error:
        raise LoadError(f"the metadata of {path} that structprune wrote was changed: {error}") from error
    size = path.stat().st_size + sum(file.stat().st_size for file in _external(model, path))
    return OnnxInfo(path, size, max(opsets, default=0), _shapes(model.graph.input), _shapes(model.graph.output), *said)


def _external(model: Any, path: Path) -> Iterable[Path]:
    """The files beside this one that hold weights of it."""
    named = {
        entry.value for tensor in model.graph.initializer for entry in tensor.external_data if entry.key == "location"
    }
    beside = {path.parent / Path(name).name for name in named}
    return (file for file in beside if file.is_file())


def _shapes(values: Iterable[Any]) -> dict[str, Shape]:
    return {
        value.name: tuple(
            dim.dim_value if dim.HasField("dim_value") else dim.dim_param or "?"
            for dim in value.type.tensor_type.shape.dim
        )
        for value in values
    }
