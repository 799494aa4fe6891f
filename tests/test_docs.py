"""The documentation: every Python block runs, every page is reachable, and what it says is in the code."""

from __future__ import annotations

import ast
import builtins
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from support.pages import Run, blocks
from torch import nn
from typer.main import get_command

import structprune.errors
from structprune.benchmarking.backends import BACKENDS
from structprune.cli.app import app
from structprune.importance.base import CRITERIA
from structprune.ops import OPS
from structprune.tracing.opaque import OPAQUE

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").rglob("*.md"))


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A page runs in a folder of its own, and what it registers is gone afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    # Tables of latency need not be good ones.
    monkeypatch.setattr("structprune.latency.measure.SECONDS", 1.0)
    tables: list[tuple[dict[Any, Any], dict[Any, Any]]] = [
        (table, dict(table)) for table in (OPS, OPAQUE, CRITERIA, BACKENDS)
    ]
    yield
    for table, before in tables:
        table.clear()
        table.update(before)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT / "docs").as_posix())
def test_page(page: Path) -> None:
    Run(page).run()


def small_resnet50() -> nn.Module:
    """One block in each stage: the layers that the README speaks of are there, with the widths that they have."""
    return torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, [1, 1, 1, 1], num_classes=10)


def test_readme(monkeypatch: pytest.MonkeyPatch) -> None:
    """The README runs on a small network and small images; its reader has data and an optimizer of his own."""
    page = ROOT / "README.md"
    model = small_resnet50()
    waiting = [model]
    monkeypatch.setattr(torchvision.models, "resnet50", lambda: waiting.pop() if waiting else small_resnet50())
    images = torch.randn(12, 3, 32, 32).split(4)
    given = {
        "images": images,
        "loader": [(batch, torch.randint(10, (4,))) for batch in images],
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
    }
    text = page.read_text()
    assert "224, 224" in text
    Run(page, given, text.replace("224, 224", "32, 32")).run()


def _texts() -> list[str]:
    """Every string of the package, with what is filled in marked; strings that stand side by side are one."""
    found = []
    for file in sorted((ROOT / "structprune").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [str(part.value) if isinstance(part, ast.Constant) else "\0" for part in node.values]
                found.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def _quoted(page: Path) -> Iterator[str]:
    """The messages and reasons that the page explains."""
    for block in blocks(page.read_text()):
        if block.language == "text" and not block.note:
            kind, _, message = block.code.strip().partition(": ")
            assert hasattr(structprune.errors, kind) or hasattr(builtins, kind), f"{page}:{block.line}: {kind}?"
            yield message
    yield from re.findall(r"^\| `(.+?)` \|", page.read_text(), re.MULTILINE)


def test_messages_that_are_explained_are_still_in_the_code() -> None:
    texts, messages = _texts(), list(_quoted(ROOT / "docs" / "troubleshooting.md"))
    assert len(messages) > 40
    for message in messages:
        # What differs is written as three dots, between quotation marks where the message shows a name.
        parts = [part for part in re.split(r"'?\.\.\.'?", message) if part.strip(" .,:;()'")]
        pattern = re.compile(".*?".join(map(re.escape, parts)), re.DOTALL)
        assert parts, message
        assert any(pattern.search(text) for text in texts), f"nothing says: {message}"


def _shell_lines() -> Iterator[str]:
    """Commands of this project that the pages show."""
    for page in (ROOT / "README.md", *PAGES):
        for block in blocks(page.read_text()):
            if block.language in ("", "bash", "sh"):
                lines = block.code.replace("\\\n", " ").splitlines()
                yield from (line for line in lines if line.startswith(("structprune ", "make ")))


@pytest.mark.parametrize("line", sorted(set(_shell_lines())))
def test_commands_exist(line: str) -> None:
    program, name, *args = shlex.split(line, comments=True)
    if program == "make":
        assert re.search(rf"^{name}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return
    command = get_command(app).commands[name]
    options = {option for parameter in command.params for option in parameter.opts}
    unknown = {arg.partition("=")[0] for arg in args if arg.startswith("-")} - options - {"--help"}
    assert not unknown
