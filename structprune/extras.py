"""Packages that are optional: imported when they are used, and what is said where one is missing."""

from __future__ import annotations

import importlib
import importlib.util
import os
from pathlib import Path
from typing import Any

from structprune.errors import MissingExtraError
from structprune.files import write_whole


def missing_extra(what: str, package: str, extra: str) -> MissingExtraError:
    """The error that tells which extra brings a package.

    Example:
        >>> print(missing_extra("Drawing", "matplotlib", "plot"))
        Drawing needs the package 'matplotlib', which is not installed: pip install 'structprune[plot]'
    """
    return MissingExtraError(
        f"{what} needs the package {package!r}, which is not installed: pip install 'structprune[{extra}]'"
    )


def require(module: str, what: str, extra: str) -> Any:
    """Import a module of an optional package.

    Args:
        module: its full name.
        what: needs it, for the message.
        extra: brings it.

    Raises:
        MissingExtraError: the package is not installed.
        ModuleNotFoundError: it is, but lacks something else.
    """
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name not in (package, module):
            raise
        raise missing_extra(what, package, extra) from error


def installed(module: str) -> bool:
    """Whether a module of an optional package can be imported; it is not."""
    return importlib.util.find_spec(module) is not None


def matplotlib_figure(size: tuple[float, float]) -> Any:
    """An empty figure of Matplotlib, so many inches wide and high.

    Raises:
        MissingExtraError: Matplotlib is not installed.
    """
    return require("matplotlib.figure", "Drawing", "plot").Figure(figsize=size, layout="constrained")


def save_figure(figure: Any, path: str | os.PathLike[str], dpi: int) -> Path:
    """Write a figure of Matplotlib, whole or not at all; the ending of `path` says which format, PNG where it has none.

    Raises:
        OSError: the folder cannot be written, or `path` is a device, a pipe or a folder.
        ValueError: the ending is none of a format that Matplotlib writes.
    """
    file = Path(path)
    kind = file.suffix.removeprefix(".") or "png"
    known = figure.canvas.get_supported_filetypes()
    if kind.lower() not in known:
        raise ValueError(f"path ends in {file.suffix!r}; a figure can be written as {', '.join(sorted(known))}.")
    write_whole(file, lambda draft: figure.savefig(draft, dpi=dpi, format=kind))
    return file
