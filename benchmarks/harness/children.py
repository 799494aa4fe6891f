"""One process for each piece of work, with a limit on its time and memory.

The process is forked, so that what the parent has imported need not be imported again. Work reports what it knows as
it goes; what was reported before the process died or was stopped is kept.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import re
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from harness import ROOT

Report = Callable[[dict[str, Any]], None]
Work = Callable[[Report], None]

MEMORY_LIMIT = 14 << 30


class OverTime(BaseException):
    """A part of the work took longer than it may; no ``except Exception`` of a library swallows it."""


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise `OverTime` inside the block once it has used `seconds` of the processor."""

    def ring(_number: int, _frame: Any) -> None:
        raise OverTime(f"over {seconds:g} s")

    before = signal.signal(signal.SIGPROF, ring)
    # Rings again each second, should a bare `except` have swallowed the first.
    signal.setitimer(signal.ITIMER_PROF, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def without_folders(text: str) -> str:
    """`text` with file names that begin at the package, whatever folder it is installed in."""
    return re.sub(r"/\S*?/site-packages/", "", text).replace(f"{ROOT}/", "")


def one_line(error: BaseException, length: int = 300) -> str:
    """Type and message of an error on one line."""
    text = without_folders(" ".join(f"{type(error).__name__}: {error}".split()))
    return text if len(text) <= length else text[: length - 1] + "…"


def source_of(error: BaseException, package: str) -> str:
    """The innermost line of `package` that the error passed through, or the innermost of all in brackets."""
    frames = traceback.extract_tb(error.__traceback__)
    inside = [frame for frame in frames if frame.filename.startswith(str(ROOT / package))]
    if not frames:
        return ""
    frame = (inside or frames)[-1]
    text = f"{without_folders(frame.filename)}:{frame.lineno} in {frame.name}"
    return text if inside else f"({text})"


def _child(work: Work, pipe: multiprocessing.connection.Connection) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_LIMIT, MEMORY_LIMIT))
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    try:
        work(pipe.send)
    except BaseException as error:  # whatever ends the process is its result
        pipe.send({"died": one_line(error), "died_at": source_of(error, "structprune")})
    pipe.close()
    os._exit(0)


def run_apart(work: Work, limit: float) -> dict[str, Any]:
    """Everything that `work` reported, merged, with ``died`` where it did not come to its end.

    Args:
        work: called in a process of its own with a function that takes dicts of facts.
        limit: seconds after which the process is killed.
    """
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    sys.stdout.flush()
    process = context.Process(target=_child, args=(work, theirs))
    process.start()
    theirs.close()
    found: dict[str, Any] = {}
    end = time.monotonic() + limit
    while True:
        if not ours.poll(max(0.0, end - time.monotonic())):
            process.kill()
            found["died"] = f"killed after {limit:g} s"
            break
        try:
            found.update(ours.recv())
        except EOFError:
            break
    process.join()
    if process.exitcode not in (0, None) and "died" not in found:
        found["died"] = f"the process ended with code {process.exitcode}"
    return found
