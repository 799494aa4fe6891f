"""What the benchmarks of the zoo's models share: their first options, and what an earlier run has found."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from support.torchvision_shim import make_torchvision_importable

from harness import RESULTS


def parser(description: str | None, *, only: str, limit: float, name: str) -> argparse.ArgumentParser:
    """A parser of ``--only``, ``--limit`` and ``--output``.

    Args:
        description: of the program.
        only: what ``--only`` takes, for its help.
        limit: seconds for one model, if nothing else is said.
        name: of the files in the folder of results.
    """
    found = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--only", default="", help=only)
    found.add_argument("--limit", type=float, default=limit, help="seconds for one model")
    found.add_argument("--output", default=str(RESULTS / name), help="where to write, without a suffix")
    return found


def begun(options: argparse.Namespace) -> tuple[Path, dict[str, Any]]:
    """The JSON file to write, and what it holds already by model; one thread, and a torchvision that imports."""
    torch.set_num_threads(1)
    make_torchvision_importable()
    path = Path(options.output).with_suffix(".json")
    return path, json.loads(path.read_text())["models"] if path.exists() else {}
