"""Models compiled ahead by AOTInductor: packages of machine code that run without Python, compared with the model."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from structprune.checking import FLAG, INPUTS, PATH, require
from structprune.errors import ExportError
from structprune.export.program import FreeDims
from structprune.export.runtimes import quiet
from structprune.export.torch_files import AOTINDUCTOR, FACTS, facts_of, program_of
from structprune.export.verified import Export, Wanted, converting, write_verified
from structprune.tracing.trace import ExampleInputs

# More models of one class than anyone times at once.
_MANY = 2**16


def export_aotinductor(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: ExampleInputs,
    *,
    dynamic_batch: bool = True,
    dynamic_dims: Mapping[str, Mapping[int, str]] | None = None,
    check_inputs: Iterable[ExampleInputs] = (),
    tolerance: float | None = None,
) -> Export:
    """Compile a model by AOTInductor into a package, and prove that the package computes the same.

    The package is machine code with the weights in it. Python runs it by `structprune.torch_model`, C++ by
    ``torch::inductor::AOTIModelPackageLoader``, with the version of torch that wrote it, on processors that have the
    instructions of this one, or on GPUs of this kind if the model is on one. It uses as many threads as it is let. What
    `structprune.quantize` wrote with torchao becomes arithmetic on integers here. torch writes paths of this machine
    into it.

    Args:
        model: Any module that ``torch.export`` can trace, or one of `structprune.torch_model`.
        path: Where the ``.pt2`` file goes; its folder must exist.
        example_inputs: A tensor, a tuple of positional arguments, or a dict of keyword arguments.
        dynamic_batch: As in `structprune.export_onnx`, and so are the others.
        dynamic_dims: Further dimensions to leave free.
        check_inputs: More inputs, of other sizes, on which the package has to agree with the model.
        tolerance: Largest relative error allowed.

    Returns:
        Path, measured error and size.

    Raises:
        ExportError: There is no C++ compiler, the model cannot be exported or compiled, or the package computes
            something else; or there cannot be a file at `path`.

    Example::

        structprune.export_aotinductor(slim, "slim.pt2", images)
        scores = structprune.torch_model("slim.pt2")(images)
    """
    require(locals(), ExportError, path=PATH, example_inputs=INPUTS, dynamic_batch=FLAG)
    if Path(path).suffix != ".pt2":
        raise ExportError(f"path is {os.fspath(path)!r}; packages of AOTInductor are files that end in .pt2")
    wanted = Wanted(dynamic_batch, dynamic_dims or {}, check_inputs, tolerance)
    return write_package(model, path, example_inputs, wanted, {"cpp.dynamic_threads": True})


def write_package(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: ExampleInputs,
    wanted: Wanted,
    options: Mapping[str, Any],
) -> Export:
    """Compile a model into a package that computes the same; see `export_aotinductor`.

    Args:
        model: what is compiled; it runs in eval mode and is left as it was.
        path: where the package goes.
        example_inputs: what the model is called on.
        wanted: free dimensions, further inputs to try, tolerance.
        options: more options of Inductor.
    """
    if lacking := compiler_lacking():
        raise ExportError(f"AOTInductor compiles with a C++ compiler, and {lacking}")

    def write(free: FreeDims, draft: Path) -> None:
        with converting(model, "AOTInductor"), frozen():
            inductor = importlib.import_module("torch._inductor")
            facts = {"aot_inductor.metadata": {FACTS: json.dumps(facts_of(model, free.names))}}
            inductor.aoti_compile_and_package(
                program_of(model, free), package_path=str(draft), inductor_configs={**options, **facts}
            )

    return write_verified(model, path, example_inputs, wanted, write, AOTINDUCTOR)


@contextmanager
def frozen() -> Generator[None]:
    """Let Inductor take weights for constants: they are laid out as kernels want them, and integers stay integers."""
    with importlib.import_module("torch._inductor.config").patch(freezing=True):
        yield


def compiler_lacking() -> str:
    """Why Inductor has no C++ compiler, and what to do; nothing if it has one."""
    builder, errors = (importlib.import_module(f"torch._inductor.{name}") for name in ("cpp_builder", "exc"))
    try:
        builder.get_cpp_compiler()
    except (errors.InvalidCxxCompiler, RuntimeError) as error:
        tried = ", ".join(name for name in builder.config.cpp.cxx if name) if sys.platform != "win32" else "cl"
        return (
            f"torch finds none (tried {tried}: {type(error).__name__}); install one (Debian: apt install g++, macOS: "
            "xcode-select --install, Windows: the Build Tools for Visual Studio), or name it in the variable CXX"
        )
    return ""


def compiled_now(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """A model by ``torch.compile``, specialised to these inputs, with its weights as constants; compiled at once.

    Models of one class share compiled code's cache. Unless told otherwise, the second one's other widths would be taken
    for dynamic shapes, and it would run slower for it; and the ninth would not be compiled at all.
    """
    compiled = torch.compile(model, dynamic=False)
    limits: dict[str, Any] = {"recompile_limit": _MANY, "accumulated_recompile_limit": _MANY}
    # Inductor warns of its own code, which copies a tensor in an old way.
    with quiet(), frozen(), torch._dynamo.config.patch(limits):
        compiled(*args, **kwargs)
    return compiled
