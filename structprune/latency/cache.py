"""Latency tables on disk: one file for each device, backend, number of threads and set of versions."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from structprune.benchmarking.nodes import NODE_TIMERS
from structprune.errors import PlanError
from structprune.files import locked, write_text
from structprune.hardware import installed
from structprune.latency.table import SCHEMA, LatencyTable


def cache_folder() -> Path:
    """Where tables are kept unless another folder is named: ``structprune/latency`` in the user's cache folder."""
    if named := os.environ.get("XDG_CACHE_HOME"):
        base = Path(named)
    elif local := os.environ.get("LOCALAPPDATA"):
        base = Path(local)
    elif platform.system() == "Darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path.home() / ".cache"
    return base / "structprune" / "latency"


def conditions(backend: str, device: torch.device, threads: int) -> dict[str, Any]:
    """What the times depend on beside the operation."""
    versions = {"torch": str(torch.__version__)}
    if backend in NODE_TIMERS:
        # Unknown where it is a build of another name, such as onnxruntime-gpu.
        versions[backend] = installed(backend) or "unknown"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    # Compiled models call the same convolutions and products, so they share the times of eager mode.
    measured = "eager" if backend in ("compile", "aotinductor") else backend
    # A table measured at other lengths is another table.
    versions["table"] = str(SCHEMA)
    return {"backend": measured, "device": device.type, "name": name, "threads": threads, "versions": versions}


def processor() -> str:
    """The model of the CPU, as exactly as the platform tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    wanted = ("vendor_id", "cpu family", "model", "model name", "stepping", "CPU implementer", "CPU part")
    described: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() in wanted:
            described.setdefault(name.strip(), value.strip())
    return " ".join(described.values()) or platform.machine()


def path_for(folder: Path, held: Mapping[str, Any]) -> Path:
    """The file for tables of these conditions."""
    digest = hashlib.sha256(json.dumps(dict(held), sort_keys=True).encode()).hexdigest()[:16]
    return folder / f"{held['backend']}-{held['device']}-{digest}.json"


def load(folder: Path, held: Mapping[str, Any]) -> LatencyTable:
    """The table measured under these conditions, or an empty one; a damaged file counts for none, with a warning."""
    path = path_for(folder, held)
    try:
        table = LatencyTable.from_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return LatencyTable(dict(held))
    except (PlanError, UnicodeDecodeError, OSError) as error:
        warnings.warn(
            f"The latency table {path} cannot be used and is measured anew: {error}", RuntimeWarning, stacklevel=2
        )
        return LatencyTable(dict(held))
    if dict(table.conditions) != dict(held):
        warnings.warn(
            f"The latency table {path} was measured under other conditions than its name says; it is measured anew.",
            RuntimeWarning,
            stacklevel=2,
        )
        return LatencyTable(dict(held))
    return table


def save(folder: Path, table: LatencyTable) -> Path:
    """Write the table whole or not at all; what another process has measured meanwhile is kept.

    Raises:
        OSError: the folder cannot be written.
    """
    path = path_for(folder, table.conditions)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):  # what another process has just measured is not lost
        if path.exists():
            table.grids = load(folder, table.conditions).grids | table.grids
        write_text(path, table.to_json())
    return path
