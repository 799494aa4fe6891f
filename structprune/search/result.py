"""What `structprune.optimize` returns: the best network, its plan, and all that was tried."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import nn

from structprune.extras import matplotlib_figure, save_figure
from structprune.html import html_table
from structprune.planning.plan import Plan
from structprune.search.space import LEVEL, Trial, best_of, front_of


@dataclass(frozen=True, slots=True, eq=False)
class Optimized:
    """The result of a search. See `structprune.optimize` for an example.

    Attributes:
        model: the cheapest network that is good enough; None if none was found.
        plan: its plan; None likewise.
        objective: what was made small, or large.
        dense: what `evaluate` says of the whole network.
        least: what it has to say at least.
        whole: of the whole network, what the objective is: seconds, multiply-accumulates, parameters or bytes.
        trials: all that was tried, by number.
    """

    model: nn.Module | None
    plan: Plan | None
    objective: str
    dense: float
    least: float
    whole: float
    trials: tuple[Trial, ...]

    @property
    def best(self) -> Trial | None:
        """The trial that `model` comes from."""
        return best_of(self.trials)

    @property
    def front(self) -> tuple[Trial, ...]:
        """The evaluated trials than which none is both cheaper and better, the cheapest first."""
        return front_of(self.trials)

    @property
    def evaluations(self) -> int:
        """How often `evaluate` was asked of a pruned network."""
        return sum(trial.evaluated for trial in self.trials)

    @property
    def gain(self) -> float:
        """How many times cheaper the best network is; 1 if none was found."""
        best = self.best
        return 1.0 if best is None or best.cost is None else 1 / best.cost

    @property
    def points(self) -> list[tuple[float, float, str]]:
        """Cost, quality and name of the evaluated trials, for ``structprune.report(points=...)``."""
        points = [
            (t.cost * self.whole, t.quality, f"trial {t.number}")
            for t in self.trials
            if t.cost is not None and t.quality is not None
        ]
        return [(self.whole, self.dense, "dense"), *points]

    def __repr__(self) -> str:
        """The best trial; all of them are in ``print(result.table())``."""
        best = self.best
        told = f"{self.evaluations} of {len(self.trials)} trials evaluated"
        if best is None:
            return f"Optimized(nothing of at least {self.least:.4g} was found, {told})"
        return f"Optimized({self.objective} {self.gain:.2f}x better at {best.quality:.4g} of {self.dense:.4g}, {told})"

    def table(self) -> Table:
        """A line for each trial; those of the Pareto front are marked."""
        headings, lines = self._lines()
        table = Table(*headings)
        for line in lines:
            table.add_row(*line)
        return table

    def __str__(self) -> str:
        """The table as text."""
        text = io.StringIO()
        Console(file=text, width=140).print(self.table())
        return f"{self!r}\n{text.getvalue().rstrip()}"

    def _repr_html_(self) -> str:
        """The same for notebooks."""
        return html_table(*self._lines(), repr(self))

    def _lines(self) -> tuple[list[str], list[list[str]]]:
        front = {trial.number for trial in self.front}
        best = self.best
        lines: list[list[str]] = []
        for trial in self.trials:
            mark = (
                "best" if best is not None and trial.number == best.number else "front" if trial.number in front else ""
            )
            numbers = [_number(value) for value in (trial.share, trial.cost, trial.quality, trial.error)]
            state = f"{trial.state}: {trial.why}" if trial.why else trial.state
            lines.append([str(trial.number), _said(trial.point), *numbers, f"{trial.seconds:.1f}", state, mark])
        return ["trial", "choice", "MACs", self.objective, "quality", "error", "seconds", "state", ""], lines

    def plot(self, path: str | Path | None = None) -> Any:
        """Cost against quality of all evaluated trials, with the front and the least quality as lines.

        Args:
            path: a file to write to, PNG or what its ending says.

        Returns:
            The figure of Matplotlib.

        Raises:
            MissingExtraError: Matplotlib is not there.
        """
        figure = matplotlib_figure((5.0, 3.5))
        axes = figure.subplots()
        for state, colour in (("feasible", "C0"), ("infeasible", "C3")):
            some = [t for t in self.trials if t.state == state and t.evaluated]
            axes.plot([t.cost for t in some], [t.quality for t in some], "o", color=colour, label=state)
        axes.plot([t.cost for t in self.front], [t.quality for t in self.front], "-", color="C0", linewidth=0.8)
        axes.plot([1.0], [self.dense], "k*", label="dense")
        axes.axhline(self.least, color="black", linewidth=0.6, linestyle="--")
        axes.set_xlabel(f"{self.objective}, share of the dense network's")
        axes.set_ylabel("quality")
        axes.legend(fontsize=7)
        if path is not None:
            save_figure(figure, path, 150)
        return figure


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _said(point: Mapping[str, Any]) -> str:
    """What was chosen, in few words: the levels of groups as one list."""
    levels = [str(value) for name, value in point.items() if name.startswith(LEVEL)]
    others = [
        f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in point.items()
        if not name.startswith(LEVEL)
    ]
    return ", ".join([*others, *([f"levels {' '.join(levels)}"] if levels else [])])
