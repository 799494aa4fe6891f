"""Files that are there whole or not at all, and folders that one process at a time writes to."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import stat
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# A folder of this name and 16 hexadecimal digits holds a file that is being written. A killed process leaves it.
DRAFTS = ".structprune-"
_LOCK = f"{DRAFTS}lock"
# How often, and how many seconds apart, a file that another process has open on Windows is tried again.
_TRIES, _WAIT = 100, 0.02


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file to a folder beside `path`, whose place it takes in one step once it is whole and on the disk.

    A link is followed: the file that it leads to is written. Who may read an existing file stays as it is.

    Args:
        path: the file; its folder must exist.
        write: writes the contents to the path that it is given, which has the same name. If it raises, nothing is left
            and `path` is as it was.

    Raises:
        OSError: the folder cannot be written, or `path` is a device, a pipe or a folder.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_whole(Path(folder, "a.txt"), lambda draft: draft.write_text("whole", encoding="utf-8"))
        ...     Path(folder, "a.txt").read_text(encoding="utf-8")
        'whole'
    """
    target = target_of(path)
    with drafts_in(target.parent) as folder:
        draft = folder / target.name
        draft.touch()
        mode = draft.stat().st_mode
        write(draft)
        draft.chmod(mode)  # safetensors makes files that nobody else may read
        put(draft, target)


def put(draft: Path, target: Path) -> None:
    """Let a file that is whole take the place of `target`, once it is on the disk; who may read that stays as it is."""
    with draft.open("r+b") as file:  # Windows brings a file to the disk only through a handle that may write
        os.fsync(file.fileno())
    if target.exists():
        draft.chmod(stat.S_IMODE(target.stat().st_mode))
    replace(draft, target)


@contextmanager
def drafts_in(folder: Path) -> Generator[Path]:
    """A new folder inside `folder` for files that are being written; it is removed at the end."""
    drafts = folder / f"{DRAFTS}{secrets.token_hex(8)}"
    drafts.mkdir(mode=0o700)
    try:
        yield drafts
    finally:
        shutil.rmtree(drafts, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write text in UTF-8, whole or not at all; see `write_whole`."""
    write_whole(path, lambda draft: draft.write_text(text, encoding="utf-8"))


def target_of(path: Path) -> Path:
    """The file that `path` leads to through links, which exists or can be made.

    Raises:
        OSError: it is a device, a pipe or a folder, or its folder does not exist.
    """
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "The folder does not exist; create it first", str(path.parent))
    with contextlib.suppress(FileNotFoundError):
        require_regular(target)
    return target


def require_regular(path: Path) -> None:
    """Check that a file is one: opening a pipe would wait, and replacing a device would remove it.

    Raises:
        FileNotFoundError: there is none.
        OSError: it is a device, a pipe or a folder.
    """
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "This is a folder; give the path of a file", str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "This is a device or a pipe; give the path of a regular file", str(path))


def replace(source: Path, target: Path) -> None:
    """``os.replace``, which on Windows waits for readers that have the target open."""
    for _ in range(_TRIES if sys.platform == "win32" else 0):
        with contextlib.suppress(PermissionError):
            os.replace(source, target)
            return
        time.sleep(_WAIT)
    os.replace(source, target)


def remove_drafts(folder: Path) -> None:
    """Remove what killed processes were writing to a folder; call it while holding `locked`."""
    for draft in folder.glob(f"{DRAFTS}{'[0-9a-f]' * 16}"):
        shutil.rmtree(draft, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Bring the names of a folder's files to the disk, so that a later switch never overtakes them in a power cut."""
    if sys.platform == "win32":  # there are no handles of folders, and NTFS keeps the order itself
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(folder: Path) -> Generator[None]:
    """Keep other processes and threads that ask for the same from writing to `folder` meanwhile; wait for them.

    The system releases the lock when a process ends, however it ends. Where a file system cannot lock a folder (a
    network drive), a file in it is locked, which stays; where it can lock nothing, this does nothing.
    """
    if sys.platform == "win32":
        import msvcrt

        with open(folder / _LOCK, "a+b") as file:
            while True:
                with contextlib.suppress(OSError):  # it is tried for ten seconds
                    msvcrt.locking(file.fileno(), msvcrt.LK_LOCK, 1)
                    break
            try:
                yield
            finally:
                file.seek(0)
                msvcrt.locking(file.fileno(), msvcrt.LK_UNLCK, 1)
        with contextlib.suppress(OSError):  # another process has it open
            os.unlink(folder / _LOCK)
        return
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError:
            os.close(descriptor)
            descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
            with contextlib.suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        # Not by closing alone: a process forked meanwhile shares the lock.
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)
