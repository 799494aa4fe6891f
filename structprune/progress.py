"""Bars that show how far long work is, on a terminal only."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def shown(
    items: Iterable[T], what: str, total: int | None = None, *, progress: bool | None = None, still: bool = False
) -> Iterator[T]:
    """The items, while a bar on the standard error says how many were taken.

    Args:
        items: what is worked through.
        what: what is done, in words.
        total: how many there are; by default their length, if they have one.
        progress: whether to show a bar; by default if the standard error is a terminal.
        still: draw between items only, so that nothing else runs while an item is timed.

    Example:
        >>> list(shown([1, 2], "counting", progress=False))
        [1, 2]
    """
    if not (sys.stderr.isatty() if progress is None else progress):
        yield from items
        return
    # Here, since importing rich takes longer than most plans.
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    length = getattr(items, "__len__", None)
    total = total if total is not None or length is None else int(length())
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=console.is_terminal, auto_refresh=not still) as bar:
        task = bar.add_task(what, total=total)
        for item in items:
            yield item
            bar.advance(task)
            if still:
                bar.refresh()
