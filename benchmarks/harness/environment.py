"""On what the numbers were taken: versions, processor, threads; nothing that names a machine."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("structprune", "torch", "torch-pruning", "torchvision", "timm", "transformers", "numpy", "scipy")


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def environment() -> dict[str, Any]:
    """Versions, processor and threads."""
    return {
        "python": platform.python_version(),
        **{package: _version(package) for package in _PACKAGES},
        "processor": _processor(),
        "threads": torch.get_num_threads(),
    }


def as_line(facts: dict[str, Any]) -> str:
    """The same in one line of Markdown."""
    return ", ".join(f"{name} {value}" for name, value in facts.items())
