"""The command line; `main` is the console script. Nothing else of the package needs typer."""

from __future__ import annotations

import sys

MISSING_EXTRA = 3


def main() -> None:
    """Run ``structprune``; exits with a code of its own for each kind of failure (see docs/cli.md)."""
    try:
        from structprune.cli.app import app
    except ModuleNotFoundError as error:
        if error.name != "typer":
            raise
        sys.stderr.write("The command line needs typer: pip install 'structprune[cli]'\n")
        sys.exit(MISSING_EXTRA)
    app(prog_name="structprune")
