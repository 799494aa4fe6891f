"""Running calls in turns and timing each run."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from itertools import chain, islice
from typing import Any

import torch
from torch import nn

from structprune.benchmarking.backends import WAITING, Call
from structprune.errors import StructpruneError
from structprune.export.files import tensors
from structprune.progress import shown
from structprune.tracing.state import collection_paused
from structprune.tracing.trace import ExampleInputs, as_call, require_running


def device_of(example_inputs: ExampleInputs) -> torch.device:
    """Where the inputs are: the device of the first tensor."""
    given = tensors(as_call(example_inputs))
    return given[0].device if given else torch.device("cpu")


def known_device(given: torch.device | str) -> torch.device:
    """The device of this name.

    Raises:
        ValueError: torch knows none, or this machine has none.
    """
    try:
        device = torch.device(given)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:
        raise ValueError(f"device is {given!r}, which is not there: {str(error).splitlines()[0]}") from error
    return device


def placed(model: nn.Module, device: torch.device) -> nn.Module:
    """The model itself if it is on the device, else a copy that is."""
    state = chain(model.parameters(), model.buffers())
    # "cuda" means the current one of several.
    if all(tensor.device.type == device.type and device.index in (None, tensor.device.index) for tensor in state):
        return model
    return copy.deepcopy(model).to(device)


def _call(model: nn.Module, example_inputs: ExampleInputs) -> Any:
    """Run a model on its inputs."""
    args, kwargs = as_call(example_inputs)
    return model(*args, **kwargs)


@contextmanager
def said_if_not_running(models: Iterable[nn.Module], example_inputs: ExampleInputs) -> Generator[None]:
    """If something fails inside, and a model does not run on its inputs at all, say that.

    Raises:
        ValueError: a model does not run on its inputs.
    """
    try:
        yield
    except StructpruneError:
        raise
    except Exception:  # a backend may raise anything
        for model in models:
            require_running(model, example_inputs, ValueError, _call)
        raise


def interleaved(
    calls: Mapping[str, Call],
    clock: Callable[[Call, torch.device], float],
    device: torch.device,
    *,
    runs: int,
    warmup: int,
    what: str = "",
    progress: bool | None = False,
) -> dict[str, list[float]]:
    """Durations in seconds of each call, run in turns; `progress` shows a bar that says `what`."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    rounds = iter(shown(range(warmup + runs), what, progress=progress, still=True))
    for _ in islice(rounds, warmup):
        for call in calls.values():
            call()
    with collection_paused():
        for _ in rounds:
            for name, call in calls.items():
                seconds[name].append(clock(call, device))
    return seconds


def cpu_clock(call: Call, device: torch.device) -> float:
    """Seconds of the CPU that this process spends on a call: with one thread, the time that it takes undisturbed."""
    start = time.process_time()
    call()
    return time.process_time() - start


def clock_of(backend: str, device: torch.device) -> Callable[[Call, torch.device], float]:
    """What times a call of this backend: events on the stream for torch on CUDA, else the wall clock."""
    return _cuda_clock if device.type == "cuda" and backend not in WAITING else _wall_clock


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
