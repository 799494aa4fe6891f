"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file beside `path`, which it takes the place of in one step once it is whole and on the disk.

    Args:
        path: the file; its folder must exist.
        write: writes the contents to the path that it is given. If it raises, nothing is left and `path` is as it was.

    Raises:
        OSError: the folder cannot be written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_whole(Path(folder, "a.txt"), lambda draft: draft.write_text("whole"))
        ...     Path(folder, "a.txt").read_text()
        'whole'
    """
    draft = path.with_name(f".{path.name}-{secrets.token_hex(8)}")
    try:
        draft.touch()
        mode = draft.stat().st_mode
        write(draft)
        draft.chmod(mode)  # safetensors makes files that nobody else may read
        with draft.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
