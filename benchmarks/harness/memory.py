"""Peak memory of this process, from what the kernel counts."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def _read(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def peak_above(function: Callable[[], Any]) -> tuple[int, int]:
    """Bytes that `function` needed at most above what was there before, and the peak of the whole process.

    Linux alone: the counter of the peak is set back through ``/proc/self/clear_refs``.
    """
    _CLEAR.write_text("5")
    before = _read("VmRSS")
    result = function()
    peak = _read("VmHWM")
    del result
    return max(0, peak - before), peak


def own_peak_above(function: Callable[[], Any]) -> int:
    """Bytes of its own that the process held at most while `function` ran, above what it held before.

    Pages of mapped files are not counted, since the system drops them when memory is short. The kernel keeps no peak of
    the rest, so a thread looks every few milliseconds. Linux alone.
    """
    before, done, sizes = _read("RssAnon"), threading.Event(), [0]

    def look() -> None:
        while not done.wait(0.005):
            sizes.append(_read("RssAnon"))

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try:
        function()
    finally:
        done.set()
        watcher.join()
    return max(0, max(sizes) - before)
