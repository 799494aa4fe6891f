"""What a device can do at its best: multiplying, moving, and starting an operation."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

_RUNS = 7
_STARTS = 200


@dataclass(frozen=True, slots=True)
class Machine:
    """Measured limits of a device, with the threads that torch uses.

    Attributes:
        macs: multiply-accumulates a second, of a large matrix product.
        bytes: bytes read and written a second, by a copy that no cache holds.
        start: seconds that an operation takes however small its tensors are, by kind: ``"convolution"``,
            ``"product"`` and ``"other"``.
    """

    macs: float
    bytes: float
    start: Mapping[str, float]


def measure_machine(device: torch.device, dtype: torch.dtype = torch.float32) -> Machine:
    """Measure a device; a tenth of a second or two.

    Args:
        device: where models run.
        dtype: the type that they compute in.
    """
    size, stretch = (4096, 1 << 28) if device.type == "cuda" else (512, 1 << 26)
    with torch.inference_mode(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        factor = torch.full((size, size), 0.5, device=device, dtype=dtype)
        source = torch.zeros(stretch, dtype=torch.uint8, device=device)
        target = torch.zeros_like(source)
        product = min(_times(lambda: factor @ factor, device))
        copy = min(_times(lambda: target.copy_(source), device))
        image, row = (torch.zeros(1, *([1] * dims), device=device, dtype=dtype) for dims in (3, 1))
        # As modules, since a model calls them so.
        start = {
            "convolution": _start(partial(nn.Conv2d(1, 1, 1, device=device, dtype=dtype), image), device),
            "product": _start(partial(nn.Linear(1, 1, device=device, dtype=dtype), row), device),
            "other": _start(partial(nn.ReLU(), row), device),
        }
    return Machine(size**3 / product, 2 * stretch / copy, start)


def _times(call: Callable[[], Tensor], device: torch.device) -> list[float]:
    # On one thread it is the process's own time that counts: other work on the machine adds nothing to it.
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter
    seconds: list[float] = []
    for _ in range(_RUNS):
        start = clock()
        call()
        _wait(device)
        seconds.append(clock() - start)
    return seconds


def _start(call: Callable[[], Tensor], device: torch.device) -> float:
    """Seconds of one call of many in a row: on a GPU, of starting it."""
    call()
    _wait(device)
    best = float("inf")
    for _ in range(_RUNS):
        start = time.perf_counter()
        for _ in range(_STARTS):
            call()
        best = min(best, (time.perf_counter() - start) / _STARTS)
        _wait(device)
    return best


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
