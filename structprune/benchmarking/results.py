"""The result of a benchmark: the times themselves, and the statistics that are read off them."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table

from structprune.benchmarking.explain import Explanation
from structprune.schema import json_of

_RESAMPLES = 2000


@dataclass(frozen=True)
class Timing:
    """The runs of one model on one backend.

    Attributes:
        model: Name of the model, as given.
        backend: One of those that `structprune.benchmark` knows.
        seconds: Duration of each run, in the order in which they ran.
        batch_size: Samples in one run; 0 if it is not known.
        memory: Bytes that a run takes at most, with weights and inputs; None if that was not or cannot be measured.
    """

    model: str
    backend: str
    seconds: tuple[float, ...]
    batch_size: int = 0
    memory: int | None = None

    @property
    def median(self) -> float:
        """Median duration, in seconds."""
        return float(np.median(self.seconds))

    @property
    def quartiles(self) -> tuple[float, float]:
        """Lower and upper quartile of the durations, in seconds."""
        low, high = np.quantile(self.seconds, [0.25, 0.75])
        return float(low), float(high)

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """The percentile bootstrap's confidence interval of the median, in seconds.

        Example:
            >>> Timing("slim", "eager", (1.0, 1.0, 2.0, 1.0, 1.0)).interval()
            (1.0, 2.0)
        """
        runs: NDArray[np.float64] = np.array(self.seconds)
        drawn = np.random.default_rng(0).integers(len(runs), size=(_RESAMPLES, len(runs)))
        tail = (1 - confidence) / 2
        low, high = np.quantile(np.median(runs[drawn], axis=1), [tail, 1 - tail])
        return float(low), float(high)


@dataclass(frozen=True)
class Speedup:
    """How many times faster a model is than the first one, on the same backend.

    Attributes:
        ratio: Median duration of the first model divided by that of this one; above 1 is faster.
        low: Lower end of the confidence interval of the ratio.
        high: Upper end.
    """

    ratio: float
    low: float
    high: float


@dataclass(frozen=True)
class Benchmark:
    """Timings of several models under the same conditions; prints as a table.

    See `structprune.benchmark` for an example.

    Attributes:
        timings: One for each model, backend and batch size; those that are compared stand together, in the order given.
        device: Where the models ran.
        threads: How many threads one operation could use on the CPU.
        batch_size: Samples in one run; the first of several sizes.
        confidence: Level of the intervals, in (0, 1).
        macs: Multiply-accumulates of each model in one run of that batch size; empty if they were not counted.
        explanations: Why models gain less than their MACs promise, where they do.
        environment: Hardware and versions.
    """

    timings: tuple[Timing, ...]
    device: str
    threads: int
    batch_size: int
    confidence: float = 0.95
    macs: Mapping[str, int] = field(default_factory=dict[str, int])
    explanations: tuple[Explanation, ...] = ()
    environment: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """All batch sizes, in the order given."""
        return tuple(dict.fromkeys(self._size(timing) for timing in self.timings))

    def timing(self, model: str, backend: str | None = None, batch_size: int | None = None) -> Timing:
        """Look up one model's timing; the first backend and batch size if none is named.

        Raises:
            KeyError: No such model, backend or batch size was timed.
        """
        wanted = self.timings[0].backend if backend is None else backend
        size = self.batch_size if batch_size is None else batch_size
        for timing in self.timings:
            if (timing.model, timing.backend, self._size(timing)) == (model, wanted, size):
                return timing
        timed = ", ".join(f"{timing.model!r} on {timing.backend!r}" for timing in self.timings)
        sizes = "" if batch_size is None else f" at batch size {batch_size}"
        raise KeyError(f"no timing of {model!r} on {wanted!r}{sizes}; timed were {timed}")

    def speedup(self, model: str, backend: str | None = None, batch_size: int | None = None) -> Speedup:
        """Speed-up of a model against the first one, with its confidence interval.

        Raises:
            KeyError: No such model, backend or batch size was timed.
        """
        return self._speedup(self.timing(model, backend, batch_size))

    def macs_ratio(self, model: str) -> float | None:
        """How many times fewer MACs a model has than the first one; None if they were not counted.

        Raises:
            KeyError: No such model was timed.
        """
        self.timing(model)
        first = self.timings[0].model
        return self.macs[first] / self.macs[model] if self.macs.get(model) else None

    def efficiency(self, model: str, backend: str | None = None, batch_size: int | None = None) -> float | None:
        """Measured speed-up divided by the ratio of MACs: 1 if each MAC that is gone saves its share of the time.

        Raises:
            KeyError: No such model, backend or batch size was timed.
        """
        ratio = self.macs_ratio(model)
        return None if ratio is None else self.speedup(model, backend, batch_size).ratio / ratio

    def points(
        self, metric: Mapping[str, float], backend: str | None = None, batch_size: int | None = None
    ) -> list[tuple[float, float, str]]:
        """Milliseconds, metric and name of each model that `metric` names: points for `structprune.report`'s curve.

        Raises:
            KeyError: No such model, backend or batch size was timed.

        Example:
            >>> result = Benchmark((Timing("slim", "eager", (0.002, 0.002)),), "cpu", 1, 8)
            >>> result.points({"slim": 0.91})
            [(2.0, 0.91, 'slim')]
        """
        return [(1e3 * self.timing(name, backend, batch_size).median, value, name) for name, value in metric.items()]

    def _size(self, timing: Timing) -> int:
        return timing.batch_size or self.batch_size

    def _speedup(self, timing: Timing) -> Speedup:
        baseline = self.timing(self.timings[0].model, timing.backend, self._size(timing))
        return bootstrap_speedup(baseline.seconds, timing.seconds, confidence=self.confidence)

    def to_json(self) -> str:
        """All durations and statistics as a JSON object; durations in seconds, memory in bytes."""
        conditions = {
            "device": self.device,
            "threads": self.threads,
            "batch_size": self.batch_size,
            "confidence": self.confidence,
            "environment": dict(self.environment),
            "macs": dict(self.macs),
        }
        return json.dumps(
            {
                **conditions,
                "timings": [self._row(timing) for timing in self.timings],
                "explanations": [asdict(each) for each in self.explanations],
            },
            indent=2,
        )

    @classmethod
    def from_json(cls, text: str) -> Benchmark:
        """What `to_json` wrote.

        Raises:
            ValueError: The text is something else.
        """
        with json_of("a benchmark", ValueError):
            data = json.loads(text)
            timings = [
                Timing(row["model"], row["backend"], tuple(row["seconds"]), row["batch_size"], row["memory"])
                for row in data["timings"]
            ]
            notes = [Explanation(**each) for each in data["explanations"]]
            plain = {
                name: data[name] for name in ("device", "threads", "batch_size", "confidence", "macs", "environment")
            }
            return cls(timings=tuple(timings), explanations=tuple(notes), **plain)

    def _row(self, timing: Timing) -> dict[str, Any]:
        return {
            "model": timing.model,
            "backend": timing.backend,
            "batch_size": self._size(timing),
            "median": timing.median,
            "interval": list(timing.interval(self.confidence)),
            "quartiles": list(timing.quartiles),
            "throughput": self._size(timing) / timing.median,
            "memory": timing.memory,
            "speedup": asdict(self._speedup(timing)),
            "efficiency": self.efficiency(timing.model, timing.backend, self._size(timing)),
            "seconds": list(timing.seconds),
        }

    # -- for people --------------------------------------------------------------------------------------------------

    def _title(self) -> str:
        threads = f"{self.threads} thread{'s' if self.threads != 1 else ''}"
        sizes = ", ".join(map(str, self.batch_sizes))
        return f"{self.device}, {threads}, batch of {sizes}, {len(self.timings[0].seconds)} runs"

    def _cells(self, timing: Timing) -> dict[str, str]:
        """One line of the table, by heading; columns that are empty throughout are left out of it."""
        low, high = timing.interval(self.confidence)
        cells = {"model": timing.model, "backend": timing.backend}
        if len(self.batch_sizes) > 1:
            cells["batch"] = str(self._size(timing))
        cells["median ms"] = f"{timing.median * 1e3:.3f}"
        cells[f"{self.confidence:.0%} interval"] = f"{low * 1e3:.3f} to {high * 1e3:.3f}"
        cells["samples/s"] = f"{self._size(timing) / timing.median:.0f}"
        if any(each.memory is not None for each in self.timings):
            cells["peak MB"] = "" if timing.memory is None else f"{timing.memory / 1e6:.4g}"
        if timing.model != self.timings[0].model:
            speedup, ratio = self._speedup(timing), self.macs_ratio(timing.model)
            cells["speed-up"] = f"{speedup.ratio:.2f}x ({speedup.low:.2f} to {speedup.high:.2f})"
            if ratio is not None:
                cells["fewer MACs"] = f"{ratio:.2f}x"
                cells["efficiency"] = f"{speedup.ratio / ratio:.2f}"
        return cells

    def _lines(self) -> tuple[list[str], list[list[str]]]:
        lines = [self._cells(timing) for timing in self.timings]
        headings = list(max(lines, key=len))
        return headings, [[line.get(heading, "") for heading in headings] for line in lines]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The table that is printed, with the explanations below it; where it is too wide, without some columns."""
        notes = "\n".join(each.text for each in self.explanations)
        table = Table(title=self._title(), caption=notes or None, caption_justify="left")
        headings, lines = self._fitting(options.max_width)
        for heading in headings:
            # A name that is too long is folded, never cut.
            named = heading in ("model", "backend")
            table.add_column(heading, justify="left" if named else "right", no_wrap=not named, overflow="fold")
        for line in lines:
            table.add_row(*line)
        yield table

    def _fitting(self, width: int) -> tuple[list[str], list[list[str]]]:
        """The columns that fit into so many characters; the intervals go first, models and medians stay."""
        headings, lines = self._lines()
        spare = [f"{self.confidence:.0%} interval", "peak MB", "samples/s", "fewer MACs", "efficiency", "batch"]
        while _width(headings, lines) > width and any(heading in headings for heading in spare):
            gone = headings.index(next(heading for heading in spare if heading in headings))
            headings = headings[:gone] + headings[gone + 1 :]
            lines = [line[:gone] + line[gone + 1 :] for line in lines]
        if _width(headings, lines) > width:  # of speed-ups the intervals
            lines = [[cell.partition(" (")[0] for cell in line] for line in lines]
        return headings, lines

    def __repr__(self) -> str:
        """What was timed, in short; all of it is in the fields and in `to_json`."""
        names = list(dict.fromkeys(timing.model for timing in self.timings))
        return f"Benchmark({', '.join(names)}: {len(self.timings)} timings on {self.device})"

    def __str__(self) -> str:
        """The table as plain text."""
        console = Console(file=io.StringIO(), width=150, color_system=None)
        with console.capture() as capture:
            console.print(self)
        return capture.get()

    def _repr_html_(self) -> str:
        """The same for notebooks."""
        headings, lines = self._lines()
        head = "".join(f"<th>{escape(heading)}</th>" for heading in headings)
        body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in line)}</tr>" for line in lines)
        notes = "".join(f"<p>{escape(each.text)}</p>" for each in self.explanations)
        return (
            f"<table><caption>{escape(self._title())}</caption><thead><tr>{head}</tr></thead>"
            f"<tbody>{body}</tbody></table>{notes}"
        )

    def plot(self, path: str | os.PathLike[str]) -> Path:
        """Draw throughput, speed-up and memory by batch size, a column for each backend.

        Args:
            path: The file to write; its ending says which format (pdf, svg, png).

        Raises:
            MissingExtraError: Matplotlib is not installed.
        """
        from structprune.benchmarking.plots import draw

        return draw(self, Path(path))


def _width(headings: list[str], lines: list[list[str]]) -> int:
    """How many characters a table takes: three beside each cell, and one more."""
    return 1 + sum(3 + max(len(cell) for cell in column) for column in zip(headings, *lines, strict=True))


def bootstrap_speedup(
    baseline: tuple[float, ...], other: tuple[float, ...], *, confidence: float = 0.95, seed: int = 0
) -> Speedup:
    """Ratio of the medians, with the percentile bootstrap's confidence interval.

    Rounds are resampled, not runs: both models ran in each round, one right after the other, so what slowed the
    machine down for a while slowed both.

    Args:
        baseline: Durations of the first model, one for each round.
        other: Durations of the other, of the same rounds.
        confidence: Level of the interval, in (0, 1).
        seed: Of the resampling; no global random state is used.

    Example:
        >>> bootstrap_speedup((2.0, 2.0, 2.0), (1.0, 1.0, 1.0))
        Speedup(ratio=2.0, low=2.0, high=2.0)
    """
    durations: NDArray[np.float64] = np.array([baseline, other])
    first, second = np.median(durations, axis=1)
    rounds = np.random.default_rng(seed).integers(len(baseline), size=(_RESAMPLES, len(baseline)))
    resampled = np.median(durations[:, rounds], axis=2)
    tail = (1 - confidence) / 2
    low, high = np.quantile(resampled[0] / resampled[1], [tail, 1 - tail])
    return Speedup(ratio=float(first / second), low=float(low), high=float(high))
