"""Run torch-pruning's own test files on structprune's adapter, and on torch-pruning itself.

The files come from a checkout of torch-pruning; those of 1.6.1 were last run. Each is run as a script in a process of
its own, so that those that test without functions count too. ``test_backward.py`` is only imported: as a script it
trains all of torchvision's largest models.

    python benchmarks/torch_pruning_tests.py FOLDER [--on ours,theirs] [--random-weights]

With ``--random-weights``, models that the files ask for with weights from the network are made without them.
"""

from __future__ import annotations

import argparse
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import harness  # noqa: F401  # finds tests/support
import torch
from support.torchvision_shim import make_torchvision_importable

ONLY_IMPORTED = ("test_backward.py",)
SECONDS = 900


def run_file(file: Path, on: str, random_weights: bool) -> None:
    """One test file in this process, over the adapter or over torch-pruning."""
    make_torchvision_importable()
    if on == "ours":
        from support.as_torch_pruning import adapter_as_torch_pruning

        sys.modules.update(adapter_as_torch_pruning())
    if random_weights:
        from torchvision.models import WeightsEnum

        def no_weights(cls: type, obj: object) -> None:
            torch.manual_seed(0)  # a model that is made twice has the same weights, as if they had been loaded

        WeightsEnum.verify = classmethod(no_weights)
    os.chdir(tempfile.mkdtemp())  # some save what they made where they are run
    runpy.run_path(str(file), run_name="imported" if file.name in ONLY_IMPORTED else "__main__")


def outcome(file: Path, on: str, random_weights: bool) -> str:
    """An empty text if a file passes, else the last line that it printed."""
    command = [sys.executable, __file__, str(file), "--on", on, *(["--random-weights"] if random_weights else [])]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return f"not done after {SECONDS} s"
    return "" if done.returncode == 0 else (done.stderr.strip().splitlines() or ["failed"])[-1]


def main() -> None:
    """Run all files of a folder, or one that is given, and print what comes of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="torch-pruning's folder of tests")
    parser.add_argument("--on", default="ours,theirs", help="ours, theirs or both")
    parser.add_argument("--random-weights", action="store_true", help="make pretrained models without their weights")
    asked = parser.parse_args()
    path = asked.path.resolve()
    if path.is_file():
        run_file(path, asked.on, asked.random_weights)
        return
    files = sorted(path.glob("test_*.py"))
    for on in asked.on.split(","):
        passed = 0
        for file in files:
            wrong = outcome(file, on, asked.random_weights)
            passed += not wrong
            sys.stdout.write(f"{on:<7} {file.name:<42} {wrong or 'passed'}\n")
            sys.stdout.flush()
        sys.stdout.write(f"{on}: {passed} of {len(files)} pass\n")


if __name__ == "__main__":
    main()
