"""Timing operations in torch: each at several widths, in turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from structprune.latency.specs import OpSpec
from structprune.progress import shown

Point = tuple[OpSpec, tuple[int, ...]]
# Of the runs of an operation nearly the fastest counts: other work on the machine only ever adds time.
QUANTILE = 0.1


def nearly_least(times: np.ndarray) -> np.ndarray:
    """What counts of several runs, shape ``(runs, ...)``; one that was measured, since the next may be far off."""
    return np.quantile(times, QUANTILE, axis=0, method="lower")


def shapes(spec: OpSpec, widths: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The shapes of an operation's operands at these widths: input and weight, or both factors, or q, k and v."""
    at = spec.at(widths)
    if spec.kind == "matmul":
        if spec.option("weight"):
            return [(at["rows"], at["in"]), (at["out"], at["in"])]
        return [(at["batch"], at["rows"], at["in"]), (at["batch"], at["in"], at["out"])]
    if spec.kind == "attention":
        lead = at["batch"], at["heads"]
        size = at["size"]
        value = size if spec.full["value"] == spec.full["size"] else at["value"]
        return [(*lead, at["query"], size), (*lead, at["key"], size), (*lead, at["key"], value)]
    image = tuple(length for name, length in at.items() if name[0] == "x")
    kernel = tuple(length for name, length in at.items() if name[0] == "k")
    first, second = (at["in"], at["out"]) if spec.transposed else (at["out"], at["in"])
    return [(at["n"], at["groups"] * at["in"], *image), (at["groups"] * first, second, *kernel)]


def call_of(spec: OpSpec, widths: tuple[int, ...], operands: Sequence[Tensor]) -> Callable[[], Tensor]:
    """The operation on these operands."""
    if spec.kind == "matmul":
        if spec.option("weight"):
            return lambda: F.linear(operands[0], operands[1])
        return lambda: torch.matmul(operands[0], operands[1])
    if spec.kind == "attention":
        causal = spec.option("causal", False)
        return lambda: F.scaled_dot_product_attention(operands[0], operands[1], operands[2], is_causal=causal)
    names = ["stride", "padding", "dilation", *(["output_padding"] if spec.transposed else [])]
    options = {name: spec.option(name) for name in names}
    groups = spec.at(widths)["groups"]
    function = getattr(F, spec.kind)
    return lambda: function(operands[0], operands[1], None, groups=groups, **options)


@dataclass
class Buffers:
    """Numbers for operands: all of them are views of one stretch of memory for each position."""

    device: torch.device
    _held: dict[tuple[int, str], Tensor] = field(default_factory=dict[tuple[int, str], Tensor])

    def reserve(self, points: Sequence[Point]) -> None:
        """Have room for the largest operand of all points."""
        need: dict[tuple[int, str], int] = {}
        for spec, widths in points:
            for position, shape in enumerate(shapes(spec, widths)):
                key = position, spec.dtype
                need[key] = max(need.get(key, 0), prod(shape))
        for (position, dtype), numel in need.items():
            # Neither zeros nor numbers so small that arithmetic on them is slow; no generator is touched.
            values = torch.arange(numel, device=self.device).remainder_(13).sub_(6).to(getattr(torch, dtype))
            self._held[position, dtype] = values.div_(8)

    def operands(self, point: Point) -> list[Tensor]:
        """The operands of a point."""
        spec, widths = point
        sizes = shapes(spec, widths)
        return [self._held[i, spec.dtype][: prod(shape)].view(shape) for i, shape in enumerate(sizes)]


def time_eager(points: Sequence[Point], device: torch.device, runs: int, seconds: float) -> list[float]:
    """The time of each point in seconds, by torch itself, with as many threads as it is set to use.

    Args:
        points: operations and widths.
        device: where they run.
        runs: how often each runs after one run that does not count.
        seconds: once so much time is spent, three runs of each are enough.
    """
    buffers = Buffers(device)
    buffers.reserve(points)
    calls = [call_of(*point, buffers.operands(point)) for point in points]
    times: list[list[float]] = []
    began = time.perf_counter()
    with torch.inference_mode():
        for call in calls:
            call()
        clock = time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
        for number in shown(range(runs), f"timing {len(points)} operations", still=True):
            if number >= 3 and time.perf_counter() - began > seconds:
                break
            times.append([_once(call, device, clock) for call in calls])
    return nearly_least(np.array(times)).tolist()


def _once(call: Callable[[], Tensor], device: torch.device, clock: Callable[[], float]) -> float:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    start = clock()
    call()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return clock() - start
