"""Packages that are optional: imported when they are used, and what is said where one is missing."""

from __future__ import annotations

import importlib
from typing import Any

from structprune.errors import MissingExtraError


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


def matplotlib_figure(size: tuple[float, float]) -> Any:
    """An empty figure of Matplotlib, so many inches wide and high.

    Raises:
        MissingExtraError: Matplotlib is not installed.
    """
    return require("matplotlib.figure", "Drawing", "plot").Figure(figsize=size, layout="constrained")
