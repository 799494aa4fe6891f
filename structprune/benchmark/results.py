"""What a benchmark found: the times themselves, and the statistics that are read off them."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

_RESAMPLES = 2000


@dataclass(frozen=True)
class Timing:
    """The runs of one model on one backend.

    Attributes:
        model: Name of the model, as given.
        backend: ``"eager"``, ``"compile"`` or ``"onnxruntime"``.
        seconds: Duration of each run, in the order in which they ran.
    """

    model: str
    backend: str
    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median duration, in seconds."""
        return float(np.median(self.seconds))

    @property
    def quartiles(self) -> tuple[float, float]:
        """Lower and upper quartile of the durations, in seconds."""
        low, high = np.quantile(self.seconds, [0.25, 0.75])
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
        timings: One for each model and backend; the models of a backend stand together, in the order given.
        device: Where the models ran.
        threads: How many threads one operation could use on the CPU.
        batch_size: Samples in one run.
        confidence: Level of the intervals of the speed-ups, in (0, 1).
    """

    timings: tuple[Timing, ...]
    device: str
    threads: int
    batch_size: int
    confidence: float = 0.95

    def timing(self, model: str, backend: str | None = None) -> Timing:
        """Look up one model's timing; the first backend if none is named.

        Raises:
            KeyError: No such model or backend was timed.
        """
        wanted = self.timings[0].backend if backend is None else backend
        for timing in self.timings:
            if (timing.model, timing.backend) == (model, wanted):
                return timing
        timed = ", ".join(f"{timing.model!r} on {timing.backend!r}" for timing in self.timings)
        raise KeyError(f"no timing of {model!r} on {wanted!r}; timed were {timed}")

    def speedup(self, model: str, backend: str | None = None) -> Speedup:
        """Speed-up of a model against the first one, with its confidence interval.

        Raises:
            KeyError: No such model or backend was timed.
        """
        timing = self.timing(model, backend)
        baseline = self.timing(self.timings[0].model, timing.backend)
        return bootstrap_speedup(baseline.seconds, timing.seconds, confidence=self.confidence)

    def to_json(self) -> str:
        """All durations and statistics as a JSON object; durations in seconds."""
        rows: list[dict[str, Any]] = []
        for timing in self.timings:
            speedup = self.speedup(timing.model, timing.backend)
            rows.append(
                {
                    "model": timing.model,
                    "backend": timing.backend,
                    "median": timing.median,
                    "quartiles": list(timing.quartiles),
                    "speedup": {"ratio": speedup.ratio, "low": speedup.low, "high": speedup.high},
                    "seconds": list(timing.seconds),
                }
            )
        conditions = {
            "device": self.device,
            "threads": self.threads,
            "batch_size": self.batch_size,
            "confidence": self.confidence,
        }
        return json.dumps({**conditions, "timings": rows}, indent=2)

    def __rich__(self) -> Table:
        """The table that is printed."""
        threads = f"{self.threads} thread{'s' if self.threads != 1 else ''}"
        runs = len(self.timings[0].seconds)
        table = Table(title=f"{self.device}, {threads}, batch of {self.batch_size}, {runs} runs")
        table.add_column("model")
        table.add_column("backend")
        for heading in ("median ms", "quartiles ms", "samples/s", "speed-up", f"{self.confidence:.0%} interval"):
            table.add_column(heading, justify="right")
        for timing in self.timings:
            low, high = timing.quartiles
            cells = [
                timing.model,
                timing.backend,
                f"{timing.median * 1e3:.3f}",
                f"{low * 1e3:.3f} to {high * 1e3:.3f}",
                f"{self.batch_size / timing.median:.0f}",
            ]
            if timing.model != self.timings[0].model:
                speedup = self.speedup(timing.model, timing.backend)
                cells += [f"{speedup.ratio:.2f}x", f"{speedup.low:.2f} to {speedup.high:.2f}"]
            table.add_row(*cells)
        return table

    def __str__(self) -> str:
        """The table as plain text."""
        console = Console(file=io.StringIO(), width=120, color_system=None)
        with console.capture() as capture:
            console.print(self)
        return capture.get()


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
