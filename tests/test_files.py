"""Files that users ask for: there whole or not at all, where links lead to, and never in the place of a device."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import structprune
from structprune.errors import ExportError
from structprune.files import DRAFTS, locked, replace, write_text

MODEL = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
X = torch.zeros(2, 4)

WRITERS: dict[str, Callable[[Path], Any]] = {
    "report.html": lambda path: structprune.report(MODEL, X, path),
    "widths.svg": lambda path: structprune.plot_widths(MODEL, X, path),
    "graph.png": lambda path: structprune.plot_graph(MODEL, X, path),
    "curve.pdf": lambda path: structprune.plot_curve([(2.0, 0.5), (1.0, 0.4)], path),
    "model.onnx": lambda path: structprune.export_onnx(MODEL, path, X),
}
each_writer = pytest.mark.parametrize("name", WRITERS)


@each_writer
def test_a_link_is_followed(tmp_path: Path, name: str) -> None:
    (tmp_path / "there").mkdir()
    target, link = tmp_path / "there" / f"target{Path(name).suffix}", tmp_path / name
    target.write_text("old")
    target.chmod(0o640)
    link.symlink_to(target)
    WRITERS[name](link)
    assert link.is_symlink()
    assert target.stat().st_size > 100
    assert target.stat().st_mode & 0o777 == 0o640, "who may read it stays as it was"
    assert [path.name for path in target.parent.iterdir()] == [target.name]


@each_writer
def test_what_is_no_regular_file_is_refused(tmp_path: Path, name: str) -> None:
    """A pipe stands for a device: opening it would wait, and replacing it would remove it."""
    pipe, folder = tmp_path / name, tmp_path / f"folder-{name}"
    os.mkfifo(pipe)
    folder.mkdir()
    for path, message in (
        (pipe, "device or a pipe"),
        (folder, "is a folder"),
        (tmp_path / "no" / name, "does not exist; create it first"),
    ):
        with pytest.raises((OSError, ExportError), match=message):
            WRITERS[name](path)
    assert pipe.is_fifo()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([pipe.name, folder.name])


@each_writer
def test_a_full_disk_leaves_what_was_there(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / name
    path.write_text("old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        WRITERS[name](path)
    assert path.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_figure_without_an_ending_is_written_where_it_was_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "curve"
    structprune.plot_curve([(2.0, 0.5), (1.0, 0.4)], path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_file_is_synchronised_through_a_handle_that_may_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows refuses the others."""
    fcntl = pytest.importorskip("fcntl")
    modes = []
    monkeypatch.setattr(os, "fsync", lambda handle: modes.append(fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE))
    write_text(tmp_path / "a", "whole")
    assert modes == [os.O_RDWR]


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    order = []

    def second() -> None:
        with locked(tmp_path):
            order.append("second")

    other = threading.Thread(target=second)
    with locked(tmp_path):
        other.start()
        other.join(0.2)
        order.append("first")
    other.join()
    assert order == ["first", "second"]
    assert list(tmp_path.iterdir()) == [], "no file stays"


def test_a_folder_that_cannot_be_locked_has_a_file_that_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a network drive, which locks only what is open for writing."""
    fcntl = pytest.importorskip("fcntl")
    real, locks = fcntl.flock, []

    def flock(handle: int, operation: int) -> None:
        if os.path.isdir(f"/dev/fd/{handle}"):
            raise OSError(errno.EBADF, "Bad file descriptor")
        locks.append(operation)
        real(handle, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked(tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == [f"{DRAFTS}lock"]
    assert locks == [fcntl.LOCK_EX, fcntl.LOCK_UN]


def test_on_windows_a_file_that_a_reader_has_open_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = os.replace, []

    def open_at_first(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) < 3:
            raise PermissionError(errno.EACCES, "The process cannot access the file")
        real(source, target)

    (tmp_path / "draft").write_text("whole")
    monkeypatch.setattr(os, "replace", open_at_first)
    monkeypatch.setattr("structprune.files.sys", SimpleNamespace(platform="win32"))
    replace(tmp_path / "draft", tmp_path / "a")
    assert (tmp_path / "a").read_text() == "whole"
    assert len(calls) == 3
