"""Draws the pictures of "How it works": ``python docs/assets/draw.py`` writes them beside this file.

They follow the reader's colour scheme by a media query, and have a background of their own, so that they can be read
wherever they are shown.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from itertools import pairwise
from pathlib import Path

STYLE = """
  text { font: 13px system-ui, sans-serif; fill: #22262e; }
  .small { font-size: 11.5px; fill: #596273; }
  .name { font-weight: 600; }
  .mono { font-family: ui-monospace, monospace; font-size: 12px; }
  .mid { text-anchor: middle; }
  .end { text-anchor: end; }
  .page { fill: #fbfcfe; stroke: #d8dde7; }
  .box { fill: #eaeef7; stroke: #9aa5ba; }
  .cell { fill: #dfe4ee; }
  .first { fill: #d9531e; }
  .second { fill: #2b6fc4; }
  .both { fill: #7d3fa0; }
  .line { fill: none; stroke: #7c879b; stroke-width: 1.5; }
  .tip { fill: #7c879b; }
  @media (prefers-color-scheme: dark) {
    text { fill: #e4e7ee; }
    .small { fill: #a5aebf; }
    .page { fill: #1c2029; stroke: #3a4252; }
    .box { fill: #2a3140; stroke: #5b677e; }
    .cell { fill: #3a4354; }
    .first { fill: #f08a55; }
    .second { fill: #6aa7f0; }
    .both { fill: #bd8be0; }
    .line { stroke: #8f9bb1; }
    .tip { fill: #8f9bb1; }
  }
"""
CELL, GAP = 13, 2


class Picture:
    """An SVG under construction.

    Args:
        width: in pixels.
        height: in pixels.
        title: what it shows, for those who cannot see it.
    """

    def __init__(self, width: int, height: int, title: str) -> None:
        self._size = width, height
        self._title = title
        self._parts: list[str] = []

    def text(self, x: float, y: float, words: str, kind: str = "") -> None:
        """A line of text whose baseline starts (or, with kind ``mid``, is centred) at a point."""
        self._parts.append(f'<text x="{x:g}" y="{y:g}" class="{kind}">{words}</text>')

    def rect(self, x: float, y: float, width: float, height: float, kind: str, radius: float = 2) -> None:
        """A rectangle."""
        self._parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius:g}" class="{kind}"/>'
        )

    def path(self, points: str, tip: bool = True) -> None:
        """A line, with an arrowhead at its end."""
        end = ' marker-end="url(#tip)"' if tip else ""
        self._parts.append(f'<path d="{points}" class="line"{end}/>')

    def cells(
        self, x: float, y: float, rows: int, columns: int, first: Iterable[tuple[int, int]] = (),
        second: Iterable[tuple[int, int]] = (),
    ) -> None:  # fmt: skip
        """A matrix; cells of `first` and `second` are coloured, those of both in a third colour."""
        one, two = set(first), set(second)
        for row in range(rows):
            for column in range(columns):
                at = (row, column)
                kind = ("cell", "first", "second", "both")[(at in one) + 2 * (at in two)]
                self.rect(x + column * (CELL + GAP), y + row * (CELL + GAP), CELL, CELL, kind)

    def svg(self) -> str:
        """The file's text."""
        width, height = self._size
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">\n'
            f"<title>{self._title}</title>\n<style>{STYLE}</style>\n"
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" '
            'markerUnits="userSpaceOnUse" orient="auto"><path d="M0 0L8 4L0 8z" class="tip"/></marker></defs>\n'
            f'<rect x=".5" y=".5" width="{width - 1}" height="{height - 1}" rx="8" class="page"/>\n'
            + "\n".join(self._parts)
            + "\n</svg>\n"
        )


def extent(count: int) -> int:
    """How long so many cells are."""
    return count * (CELL + GAP) - GAP


def row(number: int, columns: int) -> set[tuple[int, int]]:
    """The cells of a row."""
    return {(number, column) for column in range(columns)}


def column(number: int, rows: int) -> set[tuple[int, int]]:
    """The cells of a column."""
    return {(each, number) for each in range(rows)}


def pipeline() -> Picture:
    """From a model to a smaller one."""
    steps = [
        ("trace", "record the forward,", "without data"),
        ("channels", "how operations", "relate them"),
        ("groups", "slices that live or", "die together"),
        ("importance", "one score", "for each channel"),
        ("plan", "what goes, written", "down as data"),
        ("surgery", "slice, repair,", "rewrite"),
        ("verify", "against the original,", "switched off"),
        ("recover, train", "solve layers again,", "fine-tune"),
    ]
    picture = Picture(880, 300, "From a model to a smaller one in eight steps")
    width, height, left, step = 170, 84, 36, 208
    for number, (name, first, second) in enumerate(steps):
        line, place = divmod(number, 4)
        x, y = left + place * step, 36 + line * 128
        picture.rect(x, y, width, height, "box", 8)
        picture.text(x + width / 2, y + 27, name, "mid name")
        picture.text(x + width / 2, y + 50, first, "mid small")
        picture.text(x + width / 2, y + 67, second, "mid small")
        if place:
            picture.path(f"M{x - step + width + 4} {y + height / 2}H{x - 4}")
    right, under = left + 3 * step + width / 2, 36 + height
    picture.path(f"M{right} {under + 3}v19H{left + width / 2}V{under + 41}")
    said = "The first four read the model; surgery works on a copy, and is done wholly or not at all."
    picture.text(left, 284, said, "small")
    return picture


def block() -> Picture:
    """The slices that go with a channel inside a residual block, and with one of the stream around it."""
    n, inner, stream = 6, 2, 4
    size = extent(n)
    picture = Picture(880, 330, "A residual block: the slices that go with one channel")
    top, xs = 96, {"stem": 36, "conv1": 196, "bn1": 326, "conv2": 416, "bn2": 546, "next": 756}
    picture.cells(xs["stem"], top, n, 3, second=row(stream, 3))
    picture.cells(xs["conv1"], top, n, n, first=row(inner, n), second=column(stream, n))
    picture.cells(xs["bn1"], top, n, 1, first=row(inner, 1))
    picture.cells(xs["conv2"], top, n, n, first=column(inner, n), second=row(stream, n))
    picture.cells(xs["bn2"], top, n, 1, second=row(stream, 1))
    picture.cells(xs["next"], top, n, n, second=column(stream, n))
    for name, across in (("stem", 3), ("conv1", n), ("bn1", 1), ("conv2", n), ("bn2", 1), ("next", n)):
        picture.text(xs[name] + extent(across) / 2, top + size + 22, name, "mid mono")
    middle = top + size / 2
    flow = [("stem", 3), ("conv1", n), ("bn1", 1), ("conv2", n), ("bn2", 1)]
    for (one, across), (two, _) in pairwise(flow):
        picture.path(f"M{xs[one] + extent(across) + 6} {middle}H{xs[two] - 6}")
    plus = 660
    picture.path(f"M{xs['bn2'] + extent(1) + 6} {middle}H{plus - 15}")
    picture.path(f"M{plus + 14} {middle}H{xs['next'] - 6}")
    picture.rect(plus - 12, middle - 12, 24, 24, "box", 12)
    picture.text(plus, middle + 5, "+", "mid name")
    start = (xs["stem"] + extent(3) + xs["conv1"]) / 2
    picture.path(f"M{start} {middle}V56H{plus}V{middle - 15}")
    picture.text((start + plus) / 2, 46, "shortcut", "mid small")
    picture.text(36, 28, "Rows of a weight are its output channels, columns its input channels.", "small")
    legend = top + size + 62
    picture.rect(36, legend - 11, CELL, CELL, "first")
    picture.text(58, legend, "channel 2 of conv1: a filter, its entries in the batch norm, and what conv2 reads of it")
    picture.rect(36, legend + 13, CELL, CELL, "second")
    picture.text(58, legend + 24, "channel 4 of the stream: whatever writes to the sum, and whatever reads it")
    picture.rect(36, legend + 37, CELL, CELL, "both")
    picture.text(58, legend + 48, "entries that go with either")
    return picture


def grid() -> Picture:
    """Axes of a projection as a grid of heads and head size."""
    heads, size, columns = 4, 4, 8
    picture = Picture(880, 372, "The rows of a projection are a grid of heads and head size")
    head, entry = 1, 2

    def projection(x: float, rows: Collection[int], kind: str) -> None:
        found = {(each, c) for each in rows for c in range(columns)}
        picture.cells(x, 62, heads * size, columns, **{kind: found})
        for number in range(heads):
            y = 62 + number * size * (CELL + GAP)
            picture.path(f"M{x - 8} {y}v{extent(size)}", tip=False)
            picture.text(x - 14, y + extent(size) / 2 + 4, f"head {number}", "small end")

    def cells(x: float, y: float, found: Collection[tuple[int, int]], kind: str, words: str) -> None:
        picture.cells(x, y, heads, size, **{kind: found})
        picture.text(x + extent(size) / 2, y - 10, "head size", "mid small")
        picture.text(x - 10, y + extent(heads) / 2 + 4, "heads", "small end")
        picture.text(x + extent(size) / 2, y + extent(heads) + 22, words, "mid small")

    picture.text(80, 36, "A head goes: rows side by side", "name")
    projection(80, range(head * size, (head + 1) * size), "first")
    cells(330, 150, {(head, c) for c in range(size)}, "first", "a row of the grid")
    picture.path(f"M{80 + extent(columns) + 14} 178H272")
    picture.text(232, 168, "view", "mid mono")
    picture.text(520, 36, "An entry of all heads goes: every fourth row", "name")
    projection(520, [entry + h * size for h in range(heads)], "second")
    cells(770, 150, {(h, entry) for h in range(heads)}, "second", "a column of the grid")
    picture.path(f"M{520 + extent(columns) + 14} 178H712")
    picture.text(672, 168, "view", "mid mono")
    said = "Query, key and value share the rows and columns of this grid, and the output projection reads its cells."
    picture.text(36, 346, said, "small")
    return picture


def sections() -> Picture:
    """A cut into halves that must stay equally long."""
    picture = Picture(880, 210, "Two halves keep equally many channels, each its own")
    y = 60
    picture.text(36, 36, "chunk(2)", "mono")
    picture.cells(36, y, 1, 12, first={(0, 1), (0, 4)}, second={(0, 6), (0, 9)})
    picture.path(f"M{36 + extent(12) + 12} {y + 6}H286V{y - 8}H336")
    picture.path(f"M286 {y + 6}V{y + 46}H336")
    picture.cells(346, y - 14, 1, 6, first={(0, 1), (0, 4)})
    picture.cells(346, y + 40, 1, 6, second={(0, 0), (0, 3)})
    picture.text(456, y - 3, "loses channels 1 and 4", "small")
    picture.text(456, y + 51, "loses channels 0 and 3 of its own", "small")
    picture.cells(36, y + 66, 1, 8)
    picture.text(36 + extent(8) + 14, y + 77, "8 are left; chunk(2) cuts them in the middle: 4 and 4", "small")
    said = "The numbers must agree, since the smaller network cuts in the middle too; the choices need not."
    picture.text(36, 188, said, "small")
    return picture


PICTURES = {"pipeline": pipeline, "block": block, "grid": grid, "sections": sections}

if __name__ == "__main__":
    for name, draw in PICTURES.items():
        (Path(__file__).parent / f"{name}.svg").write_text(draw().svg())
