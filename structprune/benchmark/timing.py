"""Running models in turns and timing each run."""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from structprune.benchmark.backends import BACKENDS, Call
from structprune.benchmark.results import Benchmark, Timing
from structprune.inputs import batch_size as batch_size_of
from structprune.inputs import evaluating, resize_batch
from structprune.onnx_file import tensors
from structprune.tracing.state import collection_paused
from structprune.tracing.trace import ExampleInputs, as_call


def benchmark(
    models: Mapping[str, nn.Module],
    example_inputs: ExampleInputs,
    *,
    backends: Sequence[str] = ("eager",),
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    threads: int | None = None,
    runs: int = 50,
    warmup: int = 5,
) -> Benchmark:
    """Time models against each other.

    They run in turns, A B A B, so that a slow spell of the machine falls on all of them. Models run in eval mode
    without gradients and are left as they were, and so are the caller's thread count and random state.

    Args:
        models: Name to model; the first is what the others are compared with.
        example_inputs: A tensor, a tuple of positional arguments, or a dict of keyword arguments.
        backends: Any of ``"eager"``, ``"compile"`` (``torch.compile``) and ``"onnxruntime"``.
        batch_size: Samples in one run; those given are repeated or cut. As given, if not set.
        device: Where to run, on copies of the models that are elsewhere; where the inputs are, if not set.
        threads: Threads that an operation may use on the CPU; as many as torch uses now, if not set.
        runs: Timed runs of each model on each backend, at least 2.
        warmup: Runs before those, not timed; compilation falls into the first.

    Returns:
        All durations in seconds, with medians, quartiles and speed-ups; prints as a table. On CUDA, durations are
        those between two events on the stream, except for ONNX Runtime, whose calls return when all is done.

    Raises:
        ValueError: No models, an unknown backend, or a count that is too small.
        MissingExtraError: A backend's package is not installed.

    Example:
        >>> wide, narrow = nn.Linear(64, 256), nn.Linear(64, 64)
        >>> result = benchmark({"wide": wide, "narrow": narrow}, torch.randn(8, 64), runs=5)
        >>> [timing.model for timing in result.timings], result.batch_size
        (['wide', 'narrow'], 8)
    """
    _validate(models, backends, runs=runs, warmup=warmup, threads=threads)
    where = torch.device(device) if device is not None else device_of(example_inputs)
    inputs = pytree.tree_map_only(Tensor, lambda tensor: tensor.to(where), example_inputs)
    if batch_size is not None:
        inputs = resize_batch(inputs, batch_size)
    placed = {name: _placed(model, where) for name, model in models.items()}
    timings: list[Timing] = []
    with evaluating(*placed.values()), threads_set(threads) as count, tempfile.TemporaryDirectory() as folder:
        for backend in backends:
            calls: dict[str, Call] = {}
            for index, (name, model) in enumerate(placed.items()):
                own = Path(folder) / f"{backend}-{index}"
                own.mkdir()
                calls[name] = BACKENDS[backend](model, inputs, where, count, own)
            clock = clock_of(backend, where)
            seconds = interleaved(calls, clock, where, runs=runs, warmup=warmup)
            timings += [Timing(model=name, backend=backend, seconds=tuple(seconds[name])) for name in calls]
    return Benchmark(timings=tuple(timings), device=str(where), threads=count, batch_size=batch_size_of(inputs))


def _validate(
    models: Mapping[str, nn.Module], backends: Sequence[str], *, runs: int, warmup: int, threads: int | None
) -> None:
    if not models:
        raise ValueError("there is no model to time; pass a dict of names and models")
    unknown = [backend for backend in backends if backend not in BACKENDS]
    # A string is a sequence too, of letters.
    if isinstance(backends, str) or unknown or not backends:
        raise ValueError(f"backends must be a sequence of names out of {', '.join(BACKENDS)}; got {backends!r}")
    for name, value, least in (("runs", runs, 2), ("warmup", warmup, 0), ("threads", threads, 1)):
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}; got {value}")


def device_of(example_inputs: ExampleInputs) -> torch.device:
    """Where the inputs are: the device of the first tensor."""
    found = tensors(as_call(example_inputs))
    return found[0].device if found else torch.device("cpu")


def _placed(model: nn.Module, device: torch.device) -> nn.Module:
    """The model itself if it is on the device, else a copy that is."""
    state = chain(model.parameters(), model.buffers())
    # "cuda" means the current one of several.
    if all(tensor.device.type == device.type and device.index in (None, tensor.device.index) for tensor in state):
        return model
    return copy.deepcopy(model).to(device)


def interleaved(
    calls: Mapping[str, Call],
    clock: Callable[[Call, torch.device], float],
    device: torch.device,
    *,
    runs: int,
    warmup: int,
) -> dict[str, list[float]]:
    """Durations in seconds of each call, run in turns."""
    for _ in range(warmup):
        for call in calls.values():
            call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    with collection_paused():
        for _ in range(runs):
            for name, call in calls.items():
                seconds[name].append(clock(call, device))
    return seconds


def clock_of(backend: str, device: torch.device) -> Callable[[Call, torch.device], float]:
    """What times a call of this backend: events on the stream for torch on CUDA, else the wall clock."""
    return _cuda_clock if device.type == "cuda" and backend != "onnxruntime" else _wall_clock


def _wall_clock(call: Call, device: torch.device) -> float:
    _synchronize(device)
    start = time.perf_counter()
    call()
    _synchronize(device)
    return time.perf_counter() - start


def _cuda_clock(call: Call, device: torch.device) -> float:
    with torch.cuda.device(device):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3


def _synchronize(device: torch.device) -> None:
    """Wait for an accelerator; the CPU returns when it is done."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


@contextmanager
def threads_set(count: int | None) -> Generator[int]:
    """Let torch use so many threads; yields how many it uses."""
    before = torch.get_num_threads()
    try:
        if count is not None:
            torch.set_num_threads(count)
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
