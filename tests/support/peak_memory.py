"""The peak of memory of a piece of code, in a process of its own: what other tests hold or free would move it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

_BEFORE = """
from pathlib import Path
import torch, structprune
from torch import nn

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024

torch.set_num_threads(1)
"""
# Pages of mapped files, which the system drops when memory is short, are not counted. There is no counter of the peak.
_WITHOUT_FILES = """
import threading
done, sizes = threading.Event(), []

def look():
    while not done.wait(0.002):
        lines = Path("/proc/self/status").read_text().splitlines()
        sizes.append(next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024)

def peak():
    if not sizes:
        threading.Thread(target=look, daemon=True).start()
        while not sizes:
            pass
        return sizes[0]
    done.set()
    return max(sizes)
"""
_BETWEEN = """
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = peak()
"""
_AFTER = """
print((peak() - before) / weights)
"""

needs_proc = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="the peak of memory is read from Linux's /proc"
)


def peak_over_weights(prepare: str, measured: str, with_heaps: bool = False, with_files: bool = True) -> float:
    """How far the process grew while `measured` ran, over ``weights``, a number of bytes that `prepare` sets.

    Each tensor has pages of its own, which go back when it is freed, so that no heap with holes is measured; those that
    the threads of a process really have are there `with_heaps`. Mapped files count if `with_files`.
    """
    given = os.environ | ({} if with_heaps else {"MALLOC_MMAP_THRESHOLD_": "65536"})
    command = [
        sys.executable,
        "-c",
        _BEFORE + prepare + ("" if with_files else _WITHOUT_FILES) + _BETWEEN + measured + _AFTER,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=given)
    return float(done.stdout)
