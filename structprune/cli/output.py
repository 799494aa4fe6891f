"""What commands print, and the code with which they exit."""

from __future__ import annotations

import json
import sys
from collections.abc import Generator
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict
from enum import IntEnum
from typing import Any, TextIO

import typer
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from structprune.coupling.costs import Cost
from structprune.errors import ExportError, MissingExtraError, StructpruneError, VerificationError


class Exit(IntEnum):
    """Exit codes; 0 is success, and 1 an unexpected error, with its traceback."""

    USAGE = 2
    MISSING_EXTRA = 3
    REFUSED = 4
    WRONG = 5


class Output:
    """Where results go: a table for people, or with ``--json`` one JSON document and nothing else.

    What models and their libraries print goes to the standard error, so that it never mixes with results.

    Args:
        as_json: whether JSON is wanted.
        stream: where results go.
    """

    def __init__(self, as_json: bool, stream: TextIO) -> None:
        self._as_json = as_json
        self._stream = stream
        self._console = Console(file=stream)

    def result(self, data: Any, *shown: RenderableType) -> None:
        """Print `data` as JSON, or `shown`."""
        if self._as_json:
            self._stream.write(f"{data if isinstance(data, str) else json.dumps(data, indent=1)}\n")
            return
        for part in shown:
            self._console.print(part, highlight=False, markup=False)

    def step(self, what: str) -> None:
        """Say what is being done, on the standard error; nothing with ``--json``."""
        if not self._as_json:
            Console(stderr=True).print(f"{what} ...", highlight=False, markup=False, style="dim")

    @property
    def quiet(self) -> bool:
        """Whether a progress bar would disturb."""
        return self._as_json or not sys.stderr.isatty()


@contextmanager
def reporting(as_json: bool) -> Generator[Output]:
    """Hold the standard output free for results, and turn the library's refusals into messages and exit codes."""
    stream = sys.stdout
    try:
        with redirect_stdout(sys.stderr):
            yield Output(as_json, stream)
    except MissingExtraError as error:
        _fail(error, Exit.MISSING_EXTRA)
    except (VerificationError, ExportError) as error:
        _fail(error, Exit.WRONG)
    except StructpruneError as error:
        _fail(error, Exit.REFUSED)


def _fail(error: Exception, code: Exit) -> None:
    Console(stderr=True).print(
        Text.assemble((f"{type(error).__name__}: ", "bold red"), str(error)), soft_wrap=True, highlight=False
    )
    raise typer.Exit(code) from error


def costs(before: Cost, after: Cost) -> Table:
    """Costs before and after as a table."""
    table = Table("", "before", "after", "kept")
    for column in table.columns[1:]:
        column.justify = "right"
    left = asdict(after)
    for name, value in asdict(before).items():
        share = f"{left[name] / value:.1%}" if value else ""
        table.add_row(name.replace("_", " "), f"{value:,}", f"{left[name]:,}", share)
    return table
