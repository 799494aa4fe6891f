"""What the machine is, and the widths that it runs fast."""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import sys
from collections.abc import Callable, Iterable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

# Channels that kernels take at a time. 16 floats fill a vector register of a CPU, the blocked convolutions of ONNX
# Runtime and oneDNN pad to it, and they compute up to four such blocks at once. Tensor cores of a GPU take tiles of 64
# in half precision, of 32 otherwise.
CPU_STEP = 16
CUDA_STEPS = {torch.float16: 64, torch.bfloat16: 64}
CUDA_STEP = 32
# Each time that so many bytes were allocated, it is looked whether more than so many of them are free and kept.
LOOK_AFTER, LEFT_FREE = 1 << 26, 1 << 28


def step_of(device: torch.device | None, dtype: torch.dtype = torch.float32) -> int:
    """The number of channels of which widths should be a multiple.

    Args:
        device: where the model runs; a CPU if not given.
        dtype: type of its weights.

    Example:
        >>> step_of(torch.device("cpu"))
        16
    """
    if device is not None and device.type == "cuda":
        return CUDA_STEPS.get(dtype, CUDA_STEP)
    return CPU_STEP


def processor() -> str:
    """The processor's name; Linux tells it in a file only."""
    listing = Path("/proc/cpuinfo")
    if listing.exists():
        for line in listing.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


class _Heap:
    """What is known of the heap of this process, in bytes.

    Attributes:
        allocated: since the size of the process was last looked at.
        least: the smallest size since freed memory was last given back.
    """

    allocated = 0
    least = 0


def allocated(size: int) -> None:
    """Note that so many bytes were allocated, and give freed memory back to the system where the C library keeps much.

    That of GNU has a heap for each thread, and what is freed in the middle of one stays with it. Batches that run side
    by side, each in a thread, would hold twice what they need. To get it anew takes time, so a part is left.
    """
    _Heap.allocated += size
    trim = _trim()
    if _Heap.allocated < LOOK_AFTER or trim is None:
        return
    _Heap.allocated = 0
    now = _resident()
    _Heap.least = min(_Heap.least, now)
    if now > _Heap.least + LEFT_FREE:
        trim(0)
        _Heap.least = _resident()


def _resident() -> int:
    """Bytes of this process that are in memory; Linux tells them in pages."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * mmap.PAGESIZE


@cache
def _trim() -> Callable[[int], int] | None:
    """``malloc_trim`` of the GNU C library; None under another one."""
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


def installed(package: str) -> str | None:
    """The version of a package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def environment(device: torch.device, packages: Iterable[str] = ()) -> dict[str, Any]:
    """Hardware and versions, for what was measured here; nothing that names the machine or its user.

    Args:
        device: where models run.
        packages: whose versions are told beside those of Python, torch and this package, if they are installed.
    """
    told: dict[str, Any] = {
        "processor": processor(),
        "cores": os.cpu_count(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "system": platform.system(),
    }
    if device.type == "cuda":
        told |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    told |= {"python": platform.python_version(), "torch": str(torch.__version__)}
    known = {name: installed(name) for name in ("structprune", *packages)}
    return told | {name: number for name, number in known.items() if number is not None}
