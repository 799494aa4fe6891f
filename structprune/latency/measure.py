"""`Latency`: where and how time is measured; and the timers that do it."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import torch
from torch import nn

from structprune.benchmarking.backends import BACKENDS, Call
from structprune.benchmarking.nodes import NODE_TIMERS
from structprune.benchmarking.timing import clock_of, cpu_clock, device_of, interleaved, threads_set
from structprune.checking import PATH, Check, instance, one_of, require, whole
from structprune.errors import PlanError
from structprune.export.runtimes import RUNTIMES
from structprune.inputs import evaluating
from structprune.latency.cache import cache_folder, conditions, load, save
from structprune.latency.eager import Point, time_eager
from structprune.latency.runtimes import time_in_runtime
from structprune.latency.specs import OpSpec
from structprune.latency.table import LatencyTable
from structprune.tracing.trace import ExampleInputs

# What measuring a table may take, in seconds, once every operation has run a few times.
SECONDS = 60.0
# Those whose operations can be timed one by one.
LATENCY_BACKENDS = ("eager", "compile", "aotinductor", *NODE_TIMERS)


@runtime_checkable
class Timer(Protocol):
    """Measures time on some device; write one to plan for a device that is not this machine."""

    def operations(self, points: Sequence[Point]) -> Sequence[float]:
        """Seconds of each operation (`structprune.latency.specs.OpSpec`) at the lengths of its axes given with it."""
        ...

    def networks(self, models: Sequence[nn.Module], example_inputs: ExampleInputs) -> Sequence[float]:
        """Seconds of each model on the example inputs; the first is the whole one."""
        ...


@dataclass(frozen=True)
class Latency:
    """Where and how the time of a network is measured, for ``target={"latency": ...}``.

    Args:
        backend: ``"eager"``, ``"compile"`` (``torch.compile``), ``"aotinductor"``, ``"onnxruntime"`` or ``"openvino"``.
        threads: how many threads an operation may use on the CPU; as many as torch uses now, if not given.
        runs: how often each network and each operation is run.
        cache: the folder where tables are kept; the user's cache folder if not given, none if False.
        timer: measures instead of this machine; then nothing is kept, and backend and threads say nothing.

    Raises:
        PlanError: there is no such backend, or a number is too small.

    Example:
        >>> Latency(backend="onnxruntime", threads=1).backend
        'onnxruntime'
    """

    backend: str = "eager"
    threads: int | None = None
    runs: int = 15
    cache: str | Path | Literal[False] | None = None
    timer: Timer | None = None

    def __post_init__(self) -> None:
        folder = Check(
            lambda value: value is False or value is None or PATH.fits(value), "give a folder, None or False"
        )
        timer = instance(Timer, "give an object with the methods of structprune.latency.measure.Timer").or_none
        counts = {"threads": whole(1).or_none, "runs": whole(3)}
        require(vars(self), backend=one_of(LATENCY_BACKENDS), cache=folder, timer=timer, **counts)

    def table(self, specs: Sequence[OpSpec], timer: Timer, device: torch.device) -> LatencyTable:
        """A table that holds `specs`: what was kept is read, the rest is measured and kept."""
        if self.timer is not None or self.cache is False:
            table = LatencyTable({"backend": self.backend})
            table.measure(specs, timer.operations)
            return table
        folder = Path(self.cache) if self.cache is not None else cache_folder()
        table = load(folder, conditions(self.backend, device, self.threads or torch.get_num_threads()))
        if table.measure(specs, timer.operations):
            save(folder, table)
        return table


class DeviceTimer:
    """Measures on this machine. Models that were timed once are kept ready, so that none is exported twice.

    Args:
        latency: how to measure.
        example_inputs: where they are, models and operations run.
        models: the whole model; its weights must be where the inputs are.
    """

    def __init__(self, latency: Latency, example_inputs: ExampleInputs) -> None:
        self._latency = latency
        self.device = device_of(example_inputs)
        if latency.backend in NODE_TIMERS and self.device.type != "cpu":
            raise PlanError(
                f"Operations of {RUNTIMES[latency.backend].name} are timed on the CPU only, and the inputs are on "
                f"{self.device}. Move model and inputs to the CPU, or measure with backend='eager'."
            )
        if self.device.type == "meta":
            raise PlanError("The example inputs are on the meta device, where nothing takes time. Give real ones.")
        self._stack = ExitStack()
        self._folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory()))
        self._calls: dict[nn.Module, Call] = {}

    def __enter__(self) -> DeviceTimer:
        return self

    def __exit__(self, *_: object) -> None:
        self._calls.clear()
        self._stack.close()

    def operations(self, points: Sequence[Point]) -> list[float]:
        """Seconds of each operation alone; of compiled models those of eager mode, whose kernels they call."""
        with threads_set(self._latency.threads) as threads:
            if self._latency.backend in NODE_TIMERS:
                return time_in_runtime(points, self._latency.backend, threads, self._latency.runs, SECONDS)
            return time_eager(points, self.device, self._latency.runs, SECONDS)

    def networks(self, models: Sequence[nn.Module], example_inputs: ExampleInputs) -> list[float]:
        """Seconds of each model: the median run of the first, times the median ratio of the others to it.

        They run in turns, so that what slows the machine down for a while slows all of them. With one thread on the
        CPU it is the process's own time that counts, to which other work on the machine adds little.
        """
        with evaluating(*models), threads_set(self._latency.threads) as threads:
            for model in models:
                if model not in self._calls:
                    own = self._folder / str(len(self._calls))
                    own.mkdir()
                    build = BACKENDS[self._latency.backend]
                    self._calls[model] = build(model, example_inputs, self.device, threads, own)
            calls = {str(number): self._calls[model] for number, model in enumerate(models)}
            alone = self.device.type == "cpu" and threads == 1
            clock = cpu_clock if alone else clock_of(self._latency.backend, self.device)
            seconds = interleaved(calls, clock, self.device, runs=self._latency.runs, warmup=2)
        times = np.array([seconds[str(number)] for number in range(len(models))])
        return (float(np.median(times[0])) * np.median(times / times[0], axis=1)).tolist()
