"""What was measured, as a table of the report."""

from __future__ import annotations

from html import escape

from structprune.benchmarking import Benchmark, Speedup, Timing
from structprune.reporting.charts import EMPTY, bar, number_cell, table
from structprune.reporting.text import element


def benchmark_table(found: Benchmark) -> str:
    """Measured medians, throughput, memory and gains; and why no more is gained."""
    slowest = max(timing.median for timing in found.timings)
    several = len(found.batch_sizes) > 1
    rows = [_row(found, timing, slowest, several) for timing in found.timings]
    headings = ["model", "backend", *(["batch"] if several else []), "median and interval, ms", "samples/s", "peak MB"]
    notes = "".join(element("li", escape(each.text)) for each in found.explanations)
    return table([*headings, "speed-up", "efficiency"], rows, caption=_caption(found)) + (
        element("ul", notes, class_="notes") if notes else ""
    )


def _caption(found: Benchmark) -> str:
    threads = f"{found.threads} thread{'s' if found.threads != 1 else ''}"
    where = [str(found.environment[key]) for key in ("gpu", "processor") if found.environment.get(key)]
    return (
        f"{(where or [found.device])[0]}, {threads}, batch of {', '.join(map(str, found.batch_sizes))}: medians of "
        f"{len(found.timings[0].seconds)} runs in turns, with {found.confidence:.0%} intervals"
    )


def _row(found: Benchmark, timing: Timing, slowest: float, several: bool) -> list[str]:
    size = timing.batch_size or found.batch_size
    low, high = (1e3 * end for end in timing.interval(found.confidence))
    gains = [EMPTY_GAIN, EMPTY_GAIN]
    if timing.model != found.timings[0].model:
        gain = found.speedup(timing.model, timing.backend, size)
        share = found.efficiency(timing.model, timing.backend, size)
        gains = [_gain(gain), EMPTY if share is None else number_cell(share, f"{share:.2f}")]
    return [
        element("th", escape(timing.model), scope="row"),
        element("td", escape(timing.backend)),
        *([number_cell(size, str(size))] if several else []),
        bar((timing.median, timing.median), slowest, f"{1e3 * timing.median:.3g}, {low:.3g} to {high:.3g}"),
        number_cell(size / timing.median, f"{size / timing.median:.4g}"),
        EMPTY if timing.memory is None else number_cell(timing.memory, f"{timing.memory / 1e6:.4g}"),
        *gains,
    ]


EMPTY_GAIN = element("td", data_value=1)


def _gain(gain: Speedup) -> str:
    return element("td", f"{gain.ratio:.2f}x, {gain.low:.2f} to {gain.high:.2f}", data_value=f"{gain.ratio:.6g}")
