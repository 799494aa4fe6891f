"""Installs the lowest versions that pyproject.toml declares into an environment of their own and runs the core tests.

    python .ci/lowest.py                          # or: make lowest
    python .ci/lowest.py --torch 2.13.0+cpu       # where the lowest torch is not to be had, or only with CUDA

torch is a large download where pip is offered a build with CUDA; an index with builds for the CPU alone saves that.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).parent.parent
EXTRAS = ("cli", "onnx", "plot")
# One file or more for each step from model to file. Those that need other packages skip themselves or are left out.
TESTS = (
    "architecture", "axes_and_targets", "bad_arguments", "cli_errors", "controls", "cost_model",
    "couplings", "files", "grouped_choices", "history", "importance_compose", "io", "literal_sizes", "masks",
    "materialize", "operations", "options", "oracle", "recalibrate", "recovery_least_squares", "refusals", "replay",
    "schema", "sections", "sensitivity", "slices", "verify",
)  # fmt: skip


def lowest(project: dict[str, object]) -> list[str]:
    """The requirements with their lower bounds as exact versions: ``rich>=13.7`` becomes ``rich==13.7``.

    Raises:
        SystemExit: one has no lower bound.
    """
    optional = project["optional-dependencies"]
    assert isinstance(optional, dict)
    wanted = [*project["dependencies"], *(line for extra in EXTRAS for line in optional[extra])]  # type: ignore[misc]  # lists of strings, as TOML has them
    if unbounded := [line for line in wanted if ">=" not in line]:
        sys.exit(f"pyproject.toml gives no lower bound: {', '.join(unbounded)}")
    return [re.sub(r">=([^,; ]+).*", r"==\1", line) for line in wanted]


def main() -> None:
    """Make the environment and run the tests in it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv-lowest", help="where the environment is made")
    parser.add_argument("--torch", help="this version instead of the lowest")
    parser.add_argument("--jobs", default=os.environ.get("JOBS", "2"))
    args = parser.parse_args()
    pins = lowest(tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"])
    if args.torch:
        pins = [pin for pin in pins if not pin.startswith("torch==")] + [f"torch=={args.torch}"]
    known = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    runner = [line for line in known if re.match(r"(pytest|pytest-xdist|hypothesis|expecttest)==", line)]
    venv.create(args.venv, with_pip=True)
    python = args.venv / ("Scripts" if os.name == "nt" else "bin") / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", *pins, *runner], check=True)
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", "-e", ROOT], check=True)
    shown = (
        "import importlib.metadata as m, sys; print('Python', sys.version.split()[0], *(f'{p} {m.version(p)}' for p in "
    )
    names = [pin.partition("==")[0] for pin in pins]
    subprocess.run([python, "-c", f"{shown}{names!r}), sep=', ')"], check=True)
    files = [str(ROOT / "tests" / f"test_{name}.py") for name in TESTS]
    # Old packages call what new ones have deprecated: typer click, Matplotlib pyparsing.
    quiet = ("-W", "ignore::DeprecationWarning")
    done = subprocess.run([python, "-m", "pytest", "-q", "-n", args.jobs, *quiet, *files], cwd=ROOT, check=False)
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
