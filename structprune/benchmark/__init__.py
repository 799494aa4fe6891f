"""Timing of models against each other: interleaved runs, medians, how sure the gain is, and what limits it."""

from structprune.benchmark.explain import Explanation
from structprune.benchmark.layers import layer_times
from structprune.benchmark.results import Benchmark, Speedup, Timing
from structprune.benchmark.run import benchmark

__all__ = ["Benchmark", "Explanation", "Speedup", "Timing", "benchmark", "layer_times"]
