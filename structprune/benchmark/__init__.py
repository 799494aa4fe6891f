"""Timing of models against each other: interleaved runs, medians, and how sure one can be of the speed-up."""

from structprune.benchmark.results import Benchmark, Speedup, Timing
from structprune.benchmark.timing import benchmark

__all__ = ["Benchmark", "Speedup", "Timing", "benchmark"]
