"""Files of torch itself (``.pt2``): programs of ``torch.export`` and packages of AOTInductor, written and run."""

from __future__ import annotations

import importlib
import json
import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from structprune.checking import PATH, require
from structprune.errors import ExportError, LoadError, MissingExtraError
from structprune.export.files import by_name, tensors
from structprune.export.metadata import metadata
from structprune.export.program import FreeDims
from structprune.export.runtimes import Loaded, Runtime, last_line, quiet
from structprune.export.verified import Flat
from structprune.extras import require as required
from structprune.tracing.trace import as_call

# What stands in a file beside the program, and its keys.
FACTS = "structprune.json"
INPUTS, TORCHAO = "inputs", "torchao"
# Where the parts of an archive lie.
_PROGRAM, _PACKAGE = "/models/", "/data/aotinductor/"


def program_of(model: nn.Module, free: FreeDims, *, largest: int | None = None) -> torch.export.ExportedProgram:
    """A model as a program of ``torch.export`` from a flat list of tensors to another.

    Args:
        model: in eval mode.
        free: its inputs, and which of their dimensions are free.
        largest: the largest batch, for what plans its memory ahead.
    """
    traced = free.traced()
    size: Any = torch.export.Dim.DYNAMIC if largest is None else torch.export.Dim("batch", min=1, max=largest)
    shapes = tuple(dict.fromkeys(free_dims, size) or None for free_dims in free.dims) if any(free.dims) else None
    return torch.export.export(
        Flat(model, traced), tensors(as_call(traced)), dynamic_shapes=None if shapes is None else (shapes,)
    )


def save_program(
    program: torch.export.ExportedProgram, file: Path, model: nn.Module, names: list[str], *, torchao: bool
) -> None:
    """Write a program, with the names of its inputs and what `metadata` says of its model.

    Source lines and paths of this machine, which torch notes at each operation, are taken out.

    Args:
        program: from tensors to tensors; its example inputs are left out of the file.
        file: where it goes.
        model: what it was made from.
        names: of the inputs.
        torchao: whether operations of torchao are in it, or what makes it fast is.
    """
    program.example_inputs = None
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, GraphModule) else ():
            # Shapes and types alone are needed again.
            node.meta = {key: value for key, value in node.meta.items() if key in ("val", "tensor_meta")}
    facts = {TORCHAO: torchao, **facts_of(model, names)}
    torch.export.save(program, file, extra_files={FACTS: json.dumps(facts)})


def facts_of(model: nn.Module, names: list[str]) -> dict[str, Any]:
    """What a file says beside its program: the names of its inputs, and what `metadata` says of its model."""
    return {INPUTS: names, **metadata(model)}


# -- programs ---------------------------------------------------------------------------------------------------------


def require_torchao() -> None:
    """Import torchao, with its operations and the patterns by which Inductor finds integers.

    Raises:
        MissingExtraError: it is not installed.
    """
    with quiet():
        for module in ("torchao", "torchao.quantization.pt2e.quantizer.x86_inductor_quantizer"):
            required(module, "Quantising with torchao", "torchao")


@dataclass(frozen=True)
class _Program:
    """A program that was read: a function of tensors, and the names of its inputs."""

    run: nn.Module
    names: tuple[str, ...]


def _read_program(file: Path) -> _Program:
    """Read a program; the file is an archive that holds one.

    Raises:
        ExportError: it is not one of this package, or torch cannot read it.
        MissingExtraError: it needs torchao.
    """
    facts = _facts(file)
    if facts[TORCHAO]:
        require_torchao()
    else:
        importlib.import_module("torch.ao.quantization.fx._decomposed")  # registers operations on integers
    with quiet():
        try:
            return _Program(torch.export.load(file).module(), tuple(facts[INPUTS]))
        except (RuntimeError, ValueError, AttributeError, KeyError, AssertionError) as error:
            raise ExportError(f"torch cannot load the file: {last_line(error)}") from error


def _facts(file: Path) -> dict[str, Any]:
    with zipfile.ZipFile(file) as archive:
        name = next((name for name in archive.namelist() if name.endswith(f"/{FACTS}")), None)
        if name is None:
            raise ExportError(f"{file} was not written by structprune: it does not say what its inputs are")
        return json.loads(archive.read(name))


def _load_program(file: Path, threads: int | None) -> Loaded:
    """A program as a function of arrays; torch's own number of threads holds for it."""
    run = _read_program(file).run
    place = next((tensor.device for tensor in (*run.parameters(), *run.buffers())), torch.device("cpu"))

    def call(feed: Mapping[str, Any]) -> list[Any]:
        try:
            outputs = run(*(torch.from_numpy(array).to(place) for array in feed.values()))
        except (RuntimeError, AssertionError, ValueError) as error:
            raise ExportError(f"torch cannot run the file: {last_line(error)}") from error
        return [to_array(output) for output in outputs]

    return call


def to_array(output: Tensor) -> Any:
    """An output as an array of NumPy, which does not know bfloat16."""
    output = output.detach().cpu()
    return (output.float() if output.dtype is torch.bfloat16 else output).numpy()


PROGRAM = Runtime("torch.export", "Quantising with torchao", "torchao", (), _load_program)


# -- packages of AOTInductor ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Package:
    """A package that was opened."""

    loader: Any
    names: tuple[str, ...]
    device: torch.device

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        """Flat outputs for flat inputs; past ``AOTICompiledModel``, which parses the structure of both in each call."""
        return self.loader.boxed_run([*inputs])


def read_package(file: Path) -> _Package:
    """Open a package.

    Raises:
        ExportError: it is not one of this package, or not for this machine or this version of torch.
    """
    with quiet():
        try:
            opened = importlib.import_module("torch._inductor").aoti_load_package(str(file))
            said = opened.get_metadata()
        except (RuntimeError, ValueError, OSError) as error:
            raise ExportError(f"torch cannot load the package: {last_line(error)}") from error
    if FACTS not in said:
        raise ExportError(f"{file} was not written by structprune: it does not say what its inputs are")
    names = tuple(json.loads(said[FACTS])[INPUTS])
    return _Package(opened.loader, names, torch.device(said.get("AOTI_DEVICE_KEY", "cpu")))


def _load_package(file: Path, threads: int | None) -> Loaded:
    """A package as a function of arrays; torch's own number of threads holds for it."""
    run = read_package(file)

    def call(feed: Mapping[str, Any]) -> list[Any]:
        try:
            outputs = run(*(torch.from_numpy(array).to(run.device) for array in feed.values()))
        except RuntimeError as error:
            raise ExportError(f"torch cannot run the package: {last_line(error)}") from error
        return [to_array(output) for output in outputs]

    return call


AOTINDUCTOR = Runtime("AOTInductor", "AOTInductor", "", (), _load_package)


# -- files as modules -------------------------------------------------------------------------------------------------


class TorchModel(nn.Module):
    """A module whose forward is that of a file of torch. See `structprune.torch_model`."""

    def __init__(self, path: Path, run: Any, names: tuple[str, ...]) -> None:
        super().__init__()
        self.run = run
        self.path = path
        self.inputs = names
        self.training = False

    def train(self, mode: bool = True) -> TorchModel:
        """Modes say nothing: what a layer does was settled when the file was written."""
        self.training = mode
        return self

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Any:
        """The outputs for inputs in the order of the file, or by their names: one tensor, or a tuple of several."""
        given = by_name(self.path, self.inputs, args, kwargs)
        outputs = tuple(self.run(*(given[name] for name in self.inputs)))
        return outputs[0] if len(outputs) == 1 else outputs


def torch_model(path: str | os.PathLike[str]) -> TorchModel:
    """A ``.pt2`` file as a module that runs it, for a metric, or for `structprune.benchmark` as any other model.

    What `structprune.quantize` writes with torchao computes with integers once ``torch.compile`` or AOTInductor
    compiles it (``benchmark(backends=["compile", "aotinductor"])``); before that, torch imitates them in float. A
    package of AOTInductor runs as it is. Such files may hold code: load only those that you trust.

    Args:
        path: What `structprune.quantize(backend="torchao")` or `structprune.export_aotinductor` wrote.

    Returns:
        A module that takes tensors in the order of the file's inputs, or by their names, and gives a tensor, or a tuple
        where the file has several outputs.

    Raises:
        MissingExtraError: The file needs torchao, which is not installed.
        LoadError: The file is not there, or is none of these.

    Example::

        small = structprune.quantize(slim, "int8.pt2", images, batches, backend="torchao")
        module = structprune.torch_model(small.path)
    """
    require(locals(), LoadError, path=PATH)
    file = Path(path)
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
    except (OSError, zipfile.BadZipFile) as error:
        raise LoadError(f"{file} cannot be read as a file of torch: {error}") from error
    try:
        if any(_PROGRAM in name for name in names):
            program = _read_program(file)
            return TorchModel(file, program.run, program.names)
        if any(_PACKAGE in name for name in names):
            package = read_package(file)
            return TorchModel(file, package, package.names)
    except MissingExtraError:
        raise
    except (ExportError, ValueError, KeyError) as error:
        raise LoadError(f"{file} cannot be loaded: {error}") from error
    raise LoadError(f"{file} holds neither a program of torch.export nor a package of AOTInductor")
