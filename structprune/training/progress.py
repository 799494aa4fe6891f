"""The progress bar of `finetune`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager


@contextmanager
def bar(progress: bool | None, epochs: int) -> Generator[Callable[..., None]]:
    """A function of the epochs done, a score if there is a new one, and the share of the running epoch."""
    if not (sys.stderr.isatty() if progress is None else progress):
        yield lambda _done, _score, _share=0.0: None
        return
    # Here, since importing rich takes longer than most plans.
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=console.is_terminal) as drawn:
        task = drawn.add_task("fine-tuning", total=epochs)

        def show(done: int, score: float | None, share: float = 0.0) -> None:
            said = None if score is None else f"epoch {done}/{epochs}: {score:.2f}"
            drawn.update(task, completed=done + share, description=said)

        yield show
