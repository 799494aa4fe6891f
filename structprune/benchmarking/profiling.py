"""Where the time of a run goes: by operation, and by the module whose forward runs it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.autograd.profiler import profile, record_function
from torch.nn.modules import module as modules

from structprune.benchmarking.nodes import NodeTimer, NodeTimes
from structprune.export.files import require

_MARK = "structprune module "
_RUNS = 5
_WEIGHTY = ("Conv", "ConvTranspose", "Gemm", "MatMul")
# Read when the profiler starts for the first time: without it, it writes lines of its own to the standard error.
_LOG = "KINETO_LOG_LEVEL"


@dataclass(frozen=True, slots=True)
class Spent:
    """Time of one kind of operation in one layer.

    Attributes:
        layer: path of the innermost module whose forward runs it; ``""`` for the model itself.
        operation: its name, as the backend tells it.
        seconds: of one forward: the least of several, as other work on the machine only ever adds time.
        calls: how often it runs in one forward.
    """

    layer: str
    operation: str
    seconds: float
    calls: int


@dataclass(frozen=True, slots=True)
class Profile:
    """Where the time of a run goes.

    Attributes:
        spent: time by layer and operation.
        seconds: of a whole run while this was measured; None if it says nothing about a run that is not profiled.
    """

    spent: tuple[Spent, ...]
    seconds: float | None = None


def by_layer(spent: Iterable[Spent]) -> dict[str, float]:
    """Seconds of each layer, those that take most first.

    Example:
        >>> by_layer([Spent("a", "relu", 1.0, 1), Spent("b", "conv2d", 4.0, 1), Spent("a", "add", 2.0, 1)])
        {'b': 4.0, 'a': 3.0}
    """
    seconds: dict[str, float] = {}
    for each in spent:
        seconds[each.layer] = seconds.get(each.layer, 0.0) + each.seconds
    return dict(sorted(seconds.items(), key=lambda item: -item[1]))


# -- torch ------------------------------------------------------------------------------------------------------------


@contextmanager
def _marked(model: nn.Module) -> Generator[None]:
    """While this holds, the profiler sees a range around each module's forward; the model itself gets no hooks."""
    paths = {module: path for path, module in model.named_modules()}
    ranges: list[record_function] = []

    def enter(module: nn.Module, _args: Any) -> None:
        if module in paths:
            ranges.append(record_function(_MARK + paths[module]))
            ranges[-1].__enter__()

    def leave(module: nn.Module, _args: Any, _result: Any) -> None:
        if module in paths and ranges:
            ranges.pop().__exit__(None, None, None)

    before = modules.register_module_forward_pre_hook(enter)
    after = modules.register_module_forward_hook(leave, always_call=True)
    try:
        yield
    finally:
        before.remove()
        after.remove()


@contextmanager
def quiet_profiler() -> Generator[None]:
    """While this holds, torch's profiler starts and stops without a word, unless the user asked for its log."""
    given = os.environ.get(_LOG)
    os.environ.setdefault(_LOG, "99")
    try:
        yield
    finally:
        if given is None:
            os.environ.pop(_LOG, None)


def profile_torch(model: nn.Module, call: Callable[[], Any], device: torch.device) -> Profile:
    """What the operations of a model take in eager mode, by torch's profiler.

    On CUDA it is the time of their kernels that counts, on the CPU their own.

    Args:
        model: the model that `call` runs.
        call: one forward.
        device: where it runs.
    """
    runs: list[dict[tuple[str, str], tuple[float, int]]] = []
    cuda = device.type == "cuda"
    with _marked(model), quiet_profiler():
        for _ in range(_RUNS):
            profiler: Any = profile(use_device="cuda" if cuda else None)
            with profiler:
                call()
                if cuda:
                    torch.cuda.synchronize(device)
            runs.append(_sums(profiler.function_events or (), cuda))
    keys = [key for key in runs[0] if all(key in run for run in runs)]
    return Profile(
        tuple(
            Spent(layer, name, min(run[layer, name][0] for run in runs) * 1e-6, runs[0][layer, name][1])
            for layer, name in keys
        )
    )


def _sums(events: Iterable[Any], cuda: bool) -> dict[tuple[str, str], tuple[float, int]]:
    """Microseconds and calls by layer and operation, where an operation is what a module's forward calls itself."""
    sums: dict[tuple[str, str], tuple[float, int]] = {}
    for event in events:
        if event.is_async or event.name.startswith(_MARK):
            continue
        outer = top = event
        while outer is not None and not outer.name.startswith(_MARK):
            top, outer = outer, outer.cpu_parent
        if outer is None:
            continue
        key = outer.name.removeprefix(_MARK), top.name.removeprefix("aten::")
        time, calls = sums.get(key, (0.0, 0))
        mine = event.self_device_time_total if cuda else event.self_cpu_time_total
        sums[key] = time + mine, calls + (event is top)
    return sums


# -- files of ONNX -----------------------------------------------------------------------------------------------------


def profile_file(file: Path, feed: Mapping[str, Any], threads: int, paths: Iterable[str], timer: NodeTimer) -> Profile:
    """What the nodes of an ONNX file take; fused ones count for the layer of the weight.

    Args:
        file: the ONNX file, written by `structprune.export_onnx`.
        feed: its inputs.
        threads: how many threads a node may use.
        paths: paths of the model's modules.
        timer: times the nodes.
    """
    times = timer(str(file), feed, threads, _RUNS, float("inf"))
    return by_module(times, require("onnx").load(str(file), load_external_data=False).graph, paths)


class _Nodes:
    """The nodes of an ONNX file, and the layers that they belong to by what the exporter notes beside them."""

    def __init__(self, graph: Any, paths: Iterable[str]) -> None:
        self._weights = {tensor.name for tensor in graph.initializer if len(tensor.dims) > 1}
        self._paths = set(paths)
        self._makes = {value: node for node in graph.node for value in node.output}
        self._named = {node.name: node for node in graph.node}

    def of_event(self, name: str) -> Any:
        """The node that a node of the optimized file is named after: by its name or its result; None if it is new."""
        base = name.removeprefix("fused ").removesuffix("_nchwc").split("/")[0]
        return self._named.get(base) or self._makes.get(base)

    def weighty(self, node: Any) -> bool:
        """Whether a node multiplies with a weight."""
        return node.op_type in _WEIGHTY and any(name in self._weights for name in node.input)

    def behind(self, node: Any, taken: set[str]) -> Any:
        """The nearest node before this one that multiplies with a weight and is not `taken`."""
        queue, seen = [node], {node.name}
        while queue:
            each = queue.pop(0)
            if self.weighty(each) and each.name not in taken:
                return each
            makers = [self._makes[name] for name in each.input if name in self._makes]
            queue += [maker for maker in makers if maker.name not in seen]
            seen.update(maker.name for maker in makers)
        return node

    def layer(self, node: Any) -> str:
        """The module that holds a node's weight, else the innermost one whose forward it stems from."""
        if self.weighty(node):
            owners = (_inside(name).rpartition(".")[0] for name in node.input if name in self._weights)
            if holder := next((owner for owner in owners if owner in self._paths), ""):
                return holder
        notes = {entry.key: entry.value for entry in node.metadata_props}
        scopes = re.findall(r"'([^']*)'", notes.get("pkg.torch.onnx.name_scopes", ""))
        return next((path for scope in reversed(scopes) if (path := _inside(scope)) in self._paths), "")


def _inside(name: str) -> str:
    """A name in the exported wrapper as one of the model that it holds."""
    return name.removeprefix("model").removeprefix(".")


def by_module(times: NodeTimes, graph: Any, paths: Iterable[str]) -> Profile:
    """Times by layer and operation.

    Args:
        times: of the nodes that a runtime has made of the graph.
        graph: of the ONNX file as it was exported.
        paths: paths of the model's modules.
    """
    nodes = _Nodes(graph, paths)
    origins = {name: nodes.of_event(name) for name in times.seconds}
    taken = {node.name for node in origins.values() if node is not None and nodes.weighty(node)}
    sums: dict[tuple[str, str], tuple[float, int]] = {}
    for name, each in times.seconds.items():
        node, kind = origins[name], times.kinds[name].removeprefix("Fused")
        if node is not None and kind in _WEIGHTY and not nodes.weighty(node):
            node = nodes.behind(node, taken)
            taken.add(node.name)
        key = "" if node is None else nodes.layer(node), times.kinds[name]
        time, calls = sums.get(key, (0.0, 0))
        sums[key] = time + min(each), calls + 1
    spent = tuple(Spent(layer, name, time, calls) for (layer, name), (time, calls) in sums.items())
    whole = times.whole
    return Profile(spent, _whole([each for each in times.seconds.values() if len(each) == len(whole)], whole, spent))


def _whole(times: Sequence[Sequence[float]], whole: Sequence[float], spent: Iterable[Spent]) -> float | None:
    """The time of a run that spends `spent` in its nodes; by shares, since other work may disturb any of the runs."""
    if not times or not whole:
        return None
    share = float(np.median(np.sum(times, axis=0) / whole))
    return sum(each.seconds for each in spent) / share
