"""Timing of models against each other: interleaved runs, medians, how sure the gain is, and what limits it."""

from structprune.benchmarking.counting import layer_times
from structprune.benchmarking.explain import Explanation
from structprune.benchmarking.results import Benchmark, Speedup, Timing
from structprune.benchmarking.run import benchmark

__all__ = ["Benchmark", "Explanation", "Speedup", "Timing", "benchmark", "layer_times"]
