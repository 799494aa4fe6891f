"""`benchmark`: models against each other, in turns, under the same conditions."""

from __future__ import annotations

import tempfile
from collections.abc import Generator, Mapping, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from structprune.benchmarking.backends import BACKENDS, WAITING, Run
from structprune.benchmarking.counting import Counted, count_model
from structprune.benchmarking.explain import POOR, Explanation, Side, explain
from structprune.benchmarking.machine import Machine, measure_machine
from structprune.benchmarking.results import Benchmark, Speedup, Timing, bootstrap_speedup
from structprune.benchmarking.timing import (
    clock_of,
    cpu_clock,
    device_of,
    interleaved,
    known_device,
    placed,
    said_if_not_running,
    threads_set,
)
from structprune.checking import FLAG, INPUTS, require, whole
from structprune.errors import StructpruneError
from structprune.hardware import environment, step_of
from structprune.inputs import batch_size as batch_size_of
from structprune.inputs import evaluating, resize_batch
from structprune.tracing.trace import ExampleInputs

_PACKAGES = {
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu", "onnx"),
    "openvino": ("openvino", "onnx"),
    "executorch": ("executorch",),
    "litert": ("litert-torch", "ai-edge-litert"),
    "tensorrt": ("tensorrt", "torch-tensorrt"),
}

# What is no faster than this is called no gain.
NOTHING = 1.05


def benchmark(
    models: Mapping[str, nn.Module],
    example_inputs: ExampleInputs,
    *,
    backends: Sequence[str] = ("eager",),
    batch_size: int | None = None,
    batch_sizes: Sequence[int] | None = None,
    device: torch.device | str | None = None,
    threads: int | None = None,
    runs: int = 50,
    warmup: int = 5,
    clock: Literal["wall", "process"] = "wall",
    memory: bool = True,
    explanations: bool = True,
    progress: bool | None = None,
) -> Benchmark:
    """Time models against each other, and tell what they gain, what memory they take, and why they gain no more.

    They run in turns, A B A B, so that when the machine is slow for a while, all of them are. Models run in eval mode
    without gradients and are left as they were, and so are the caller's thread count and random state.

    Args:
        models: Name to model; the first is what the others are compared with.
        example_inputs: A tensor, a tuple of positional arguments, or a dict of keyword arguments.
        backends: Any of ``"eager"``, ``"channels_last"`` (eager, with images and kernels laid out channel by channel),
            ``"compile"`` (``torch.compile``) and ``"aotinductor"``, both with weights as constants, ``"onnxruntime"``,
            ``"openvino"``, ``"executorch"``, ``"litert"`` and, on CUDA, ``"tensorrt"``.
        batch_size: Samples in one run; those given are repeated or cut. As given, if not set.
        batch_sizes: Several such sizes, in place of one.
        device: Where to run, on copies of the models that are elsewhere; where the inputs are, if not set.
        threads: Threads that an operation may use on the CPU; as many as torch uses now, if not set.
        runs: Timed runs of each model on each backend, at least 2.
        warmup: Runs before those, not timed.
        clock: ``"process"`` counts the time that this process has the CPU, in place of the time that passes: where
            others use the machine too, that is what a run would take alone. With one thread on the CPU only.
        memory: Measure the peak of memory too, by one run more of each model.
        explanations: Count MACs, so that efficiencies are told; and where a model gains less than they promise, profile
            it to find out why.
        progress: Show a bar for each backend; by default if the standard error is a terminal. It moves between runs.

    Returns:
        All durations in seconds, with medians, intervals, speed-ups and efficiencies; prints as a table. On CUDA,
        durations are those between two events on the stream, except for ONNX Runtime, whose calls return when all is
        done.

    Raises:
        ValueError: No models, an unknown backend, a count that is too small, or a device that is not there.
        BackendError: A backend cannot use the device, or lacks a compiler or a provider.
        MissingExtraError: A backend's package is not installed.

    Example:
        >>> wide, narrow = nn.Linear(64, 256), nn.Linear(64, 64)
        >>> result = benchmark({"wide": wide, "narrow": narrow}, torch.randn(8, 64), runs=5)
        >>> [timing.model for timing in result.timings], result.batch_size, result.macs_ratio("narrow")
        (['wide', 'narrow'], 8, 4.0)
    """
    require(locals(), ValueError, example_inputs=INPUTS, memory=FLAG, explanations=FLAG, progress=FLAG.or_none)
    _validate(models, backends, batch_size, batch_sizes, runs=runs, warmup=warmup, threads=threads)
    where = known_device(device) if device is not None else device_of(example_inputs)
    inputs = pytree.tree_map_only(Tensor, lambda tensor: tensor.to(where), example_inputs)
    sizes = batch_sizes or [batch_size_of(inputs) if batch_size is None else batch_size]
    there = {name: placed(model, where) for name, model in models.items()}
    timings: list[Timing] = []
    notes: list[Explanation] = []
    macs: dict[str, int] = {}
    with evaluating(*there.values()), threads_set(threads) as count, tempfile.TemporaryDirectory() as folder:
        _check_clock(clock, count, where)
        for size in sizes:
            round_ = _Round(there, resize_batch(inputs, size), where, count, size, clock, explanations)
            macs = macs or round_.macs
            for backend in backends:
                with said_if_not_running(there.values(), inputs):
                    timed = round_.run(
                        backend, Path(folder), runs=runs, warmup=warmup, memory=memory, progress=progress
                    )
                timings += timed
                notes += round_.explained
    order = {backend: number for number, backend in enumerate(backends)}
    facts = environment(where, (name for backend in backends for name in _PACKAGES.get(backend, ())))
    return Benchmark(
        timings=tuple(sorted(timings, key=lambda timing: order[timing.backend])),
        device=str(where),
        threads=count,
        batch_size=sizes[0],
        macs=macs,
        explanations=tuple(sorted(notes, key=lambda note: order[note.backend])),
        environment=facts | {"clock": clock},
    )


class _Round:
    """All models at one batch size."""

    def __init__(
        self,
        models: Mapping[str, nn.Module],
        inputs: ExampleInputs,
        device: torch.device,
        threads: int,
        size: int,
        clock: str,
        counting: bool,
    ) -> None:
        self._models, self._inputs, self._device, self._threads, self._size = models, inputs, device, threads, size
        self._clock, self._counting = clock, counting
        self.explained: list[Explanation] = []

    @cached_property
    def _counted(self) -> dict[str, dict[str, Counted]]:
        """What the layers of each model take; nothing if one of them cannot be traced."""
        try:
            return {name: count_model(model, self._inputs) for name, model in self._models.items()}
        except StructpruneError:
            return {}

    @property
    def macs(self) -> dict[str, int]:
        """Multiply-accumulates of each model, if they can be counted."""
        counted = self._counted if self._counting else {}
        return {name: sum(layer.macs for layer in layers.values()) for name, layers in counted.items()}

    @cached_property
    def _dtype(self) -> torch.dtype:
        tensors_ = chain.from_iterable(model.parameters() for model in self._models.values())
        return next((tensor.dtype for tensor in tensors_ if tensor.is_floating_point()), torch.float32)

    @cached_property
    def _machine(self) -> Machine:
        return measure_machine(self._device, self._dtype)

    def run(
        self, backend: str, folder: Path, *, runs: int, warmup: int, memory: bool, progress: bool | None
    ) -> list[Timing]:
        """Time all models on one backend; then measure memory, and explain what is left to explain."""
        calls: dict[str, Run] = {}
        for index, (name, model) in enumerate(self._models.items()):
            own = folder / f"{backend}-{self._size}-{index}"
            own.mkdir()
            calls[name] = BACKENDS[backend](model, self._inputs, self._device, self._threads, own)
        clock = cpu_clock if self._clock == "process" else clock_of(backend, self._device)
        seconds = interleaved(
            calls, clock, self._device, runs=runs, warmup=warmup, what=f"timing on {backend}", progress=progress
        )
        timings = [
            Timing(name, backend, tuple(seconds[name]), self._size, call.memory() if memory else None)
            for name, call in calls.items()
        ]
        self.explained = [*self._explain(backend, calls, timings)] if self._counting else []
        return timings

    def _explain(self, backend: str, calls: Mapping[str, Run], timings: Sequence[Timing]) -> Generator[Explanation]:
        """Ask of each model but the first why it gains no more, if it gains less than its MACs promise."""
        first, *others = timings
        dense: Side | None = None
        for timing in others:
            ratio = self.macs[first.model] / max(1, self.macs[timing.model]) if self.macs else 0.0
            speedup = bootstrap_speedup(first.seconds, timing.seconds)
            if ratio <= 1 or (speedup.low > 1 and speedup.ratio >= POOR * ratio):
                continue
            dense = dense or self._side(first, calls[first.model])
            yield explain(
                timing.model,
                backend,
                self._size,
                dense,
                self._side(timing, calls[timing.model]),
                self._machine,
                step_of(self._device, self._dtype),
                gain=_gain(speedup, ratio),
                starts_counted=backend not in WAITING and self._device.type == "cpu",
            )

    def _side(self, timing: Timing, call: Run) -> Side:
        return Side(timing.median, self._counted[timing.model], call.profile())


def _gain(speedup: Speedup, ratio: float) -> str:
    """The gain in words."""
    if speedup.ratio < NOTHING:
        verdict = "pruning brings nothing here"
    elif speedup.low <= 1:
        verdict = "the runs differ too much to show a gain"
    else:
        verdict = "pruning brings less than its MACs promise"
    return (
        f"{verdict}: {speedup.ratio:.2f}x as fast ({speedup.low:.2f} to {speedup.high:.2f}) for {ratio:.2f}x fewer "
        "MACs."
    )


def _check_clock(clock: str, threads: int, device: torch.device) -> None:
    if clock not in ("wall", "process") or (clock == "process" and (threads > 1 or device.type != "cpu")):
        raise ValueError(
            f"clock is {clock!r} with {threads} threads on {device}; give 'wall', or on one thread of the CPU 'process'"
        )


def _validate(
    models: Mapping[str, nn.Module],
    backends: Sequence[str],
    batch_size: int | None,
    batch_sizes: Sequence[int] | None,
    **counts: int | None,
) -> None:
    _check_models(models)
    # A string is a sequence too, of letters.
    named = isinstance(backends, Sequence) and not isinstance(backends, str)
    known = named and all(isinstance(backend, str) and backend in BACKENDS for backend in backends)
    if not known or not backends or len({*backends}) < len(backends):
        raise ValueError(
            f"backends must be a sequence of different names out of {', '.join(BACKENDS)}; got {backends!r}"
        )
    _check_batch_sizes(batch_size, batch_sizes)
    for name, least in (("runs", 2), ("warmup", 0), ("threads", 1)):
        value = counts[name]
        wanted = value is not None or name != "threads"
        if wanted and not whole(least).fits(value):
            raise ValueError(f"{name} must be a whole number of at least {least}; got {value!r}")


def _check_models(models: Mapping[str, nn.Module]) -> None:
    if not isinstance(models, Mapping):
        raise ValueError(f"models is a {type(models).__name__}; pass a dict of names and models: {{'pruned': model}}")
    for name, model in models.items():
        if not isinstance(name, str) or not name or not isinstance(model, nn.Module):
            kinds = f"{type(name).__name__} to {type(model).__name__}"
            raise ValueError(f"models holds a {kinds}; pass a dict of names and models: {{'pruned': model}}")
    if not models:
        raise ValueError("there is no model to time; pass a dict of names and models")


def _check_batch_sizes(batch_size: int | None, batch_sizes: Sequence[int] | None) -> None:
    sizes = () if batch_sizes is None else batch_sizes
    if not isinstance(sizes, Sequence) or not all(map(_is_size, (1 if batch_size is None else batch_size, *sizes))):
        raise ValueError(
            f"batch_size must be a whole number of at least 1, and batch_sizes a sequence of them; got {batch_size!r} "
            f"and {batch_sizes!r}"
        )
    if batch_sizes is not None and (
        batch_size is not None or not batch_sizes or len({*batch_sizes}) < len(batch_sizes)
    ):
        raise ValueError(
            f"batch_sizes must be different sizes, and batch_size not be given as well; got {batch_sizes!r} and "
            f"{batch_size!r}"
        )


def _is_size(value: Any) -> bool:
    return whole(1).fits(value)
