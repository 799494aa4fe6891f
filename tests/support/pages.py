"""Runs the Python blocks of a Markdown page, one after the other in one namespace, as a reader would.

What a block needs beyond that stands in the page, in comments that nobody sees:

- ``<!-- setup`` ... ``-->``: code that runs where it stands; a page whose blocks use `model` makes one there;
- ``<!-- not run: REASON -->`` above a block: it cannot run where the tests do, for the reason given;
- ``<!-- raises: PlanError -->`` above a block: running it must raise this exception of `structprune.errors`;
- ``<!-- output -->`` above a ``text`` block: this is what the block above it prints; ``...`` stands for anything;
- ``<!-- output: about -->``: the same, but numbers may be others.
"""

from __future__ import annotations

import contextlib
import doctest
import io
import re
import sys
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import structprune.errors

_PIECE = re.compile(
    r"^<!-- setup\n(?P<setup>.*?)^-->$"
    r"|^(?:(?P<indent>[ ]*)<!-- (?P<note>not run|raises|output)(?::[ ]*(?P<said>[^\n]*?))? -->\n+)?"
    r"(?P<space>[ ]*)```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^(?P=space)```",
    re.MULTILINE | re.DOTALL,
)
_NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?")
_FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@dataclass(frozen=True)
class Block:
    """A fenced block, or the code of a setup comment.

    Attributes:
        language: ``"python"`` for setup too.
        code: what stands inside, with its indentation removed.
        line: the number of its first line in the page, from 1.
        note: ``"not run"``, ``"raises"``, ``"output"`` or nothing: what the comment above says.
        said: what follows the colon there.
    """

    language: str
    code: str
    line: int
    note: str = ""
    said: str = ""


def blocks(text: str) -> list[Block]:
    """All blocks of a page, in order.

    Raises:
        ValueError: a comment that looks like one of those above stands over no block.
    """
    found = []
    for piece in _PIECE.finditer(text):
        kind = "setup" if piece["setup"] is not None else "code"
        line = text.count("\n", 0, piece.start(kind)) + 1
        if kind == "setup":
            found.append(Block("python", piece["setup"], line))
        else:
            code = textwrap.dedent(piece["code"])
            found.append(Block(piece["language"], code, line, piece["note"] or "", piece["said"] or ""))
    written = len(re.findall(r"^[ ]*<!-- (?:setup|not run|raises|output)\b", text, re.MULTILINE))
    understood = text.count("\n<!-- setup\n") + text.startswith("<!-- setup\n") + sum(bool(b.note) for b in found)
    if written != understood:
        raise ValueError(f"{written} comments speak of blocks, and {understood} of them stand where they should")
    return found


class Run:
    """A page as it runs.

    Args:
        path: the page; its lines are those that tracebacks show.
        given: names that its reader has already, for a page that cannot hold comments of its own.
        text: what to run in place of the page's text, line for line.
    """

    def __init__(self, path: Path, given: Mapping[str, Any] | None = None, text: str | None = None) -> None:
        self.path = path
        self._text = path.read_text() if text is None else text
        self._module = ModuleType(f"page_{path.stem.replace('-', '_').lower()}")
        vars(self._module).update(given or {})

    def run(self) -> None:
        """Run all blocks.

        Raises:
            AssertionError: a block printed something else, raised nothing, or is left out for no reason.
        """
        sys.modules[self._module.__name__] = self._module
        try:
            printed = io.StringIO()
            for block in blocks(self._text):
                if block.language == "python":
                    printed = io.StringIO()
                    with contextlib.redirect_stdout(printed):
                        self._python(block)
                elif block.note == "output":
                    _compare(block, printed.getvalue(), self.path)
        finally:
            del sys.modules[self._module.__name__]

    def _python(self, block: Block) -> None:
        if block.note == "not run":
            assert len(block.said.split()) > 3, f"{self.path}:{block.line}: say why the block is not run"
            return
        # As many empty lines as stand above, so that tracebacks name the line of the page.
        code = compile("\n" * (block.line - 1) + block.code, str(self.path), "exec", dont_inherit=True)
        if block.note != "raises":
            exec(code, vars(self._module))
            return
        error = getattr(structprune.errors, block.said)
        try:
            exec(code, vars(self._module))
        except error as caught:
            vars(self._module)["error"] = caught
            sys.stdout.write(f"{caught}\n")
        else:
            raise AssertionError(f"{self.path}:{block.line}: {block.said} was not raised")


def _compare(block: Block, printed: str, path: Path) -> None:
    wanted = block.code
    if block.said:
        assert block.said == "about", f"{path}:{block.line}: {block.said!r} says nothing"
        # Tables are as wide as their numbers.
        wanted, printed = (re.sub(r"[─━┏┓┳┡┩╇└┘┴├┤┼┬┌┐]+", "-", _NUMBER.sub("#", text)) for text in (wanted, printed))
    checker, example = doctest.OutputChecker(), doctest.Example("", wanted)
    if not checker.check_output(example.want, printed, _FLAGS):
        difference = checker.output_difference(example, printed, _FLAGS)
        raise AssertionError(f"{path}:{block.line}: it prints something else\n{difference}")
