"""The time of each node of an ONNX file, as the runtime that runs it tells."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from structprune.export.files import require
from structprune.export.runtimes import openvino_model, session_options

_KERNEL = "_kernel_time"
# OpenVINO tells the mean over all runs since it has compiled a file, in whole microseconds: after so many runs it is
# compiled anew, so that a slow spell falls on one mean and not on all.
_RUNS_OF_A_MEAN = 3
# Operations of OpenVINO under the names that they have in ONNX.
_ONNX_NAMES = {"Convolution": "Conv", "Deconvolution": "ConvTranspose", "FullyConnected": "Gemm"}


@dataclass(frozen=True)
class NodeTimes:
    """Times of the nodes of an ONNX file, after the runtime has fused them.

    Attributes:
        seconds: by node, of each run or of each few runs; the node that others are fused into stands for them.
        kinds: the operation of each node.
        whole: seconds of each whole run while this was measured; nothing where the runtime does not tell.
    """

    seconds: dict[str, list[float]] = field(default_factory=dict[str, list[float]])
    kinds: dict[str, str] = field(default_factory=dict[str, str])
    whole: list[float] = field(default_factory=list[float])


def onnxruntime_nodes(
    file: bytes | str, feed: Mapping[str, Any], threads: int, runs: int, seconds: float, provider: str | None = None
) -> NodeTimes:
    """By ONNX Runtime's profiler; see `NODE_TIMERS`.

    Args:
        file: the ONNX file, or its path.
        feed: its inputs.
        threads: how many threads a node may use.
        runs: how often it runs after one run that does not count.
        seconds: once so much time is spent, three runs are enough.
        provider: the execution provider; the CPU's if not given.
    """
    with tempfile.TemporaryDirectory() as folder:
        options = session_options(threads)
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        runtime = require("onnxruntime")
        session = runtime.InferenceSession(file, options, providers=[provider or "CPUExecutionProvider"])
        began = time.perf_counter()
        for number in range(runs + 1):
            session.run(None, dict(feed))
            if number >= 3 and time.perf_counter() - began > seconds:
                break
        return read_events(json.loads(Path(session.end_profiling()).read_text(encoding="utf-8")))


def read_events(events: Sequence[Any]) -> NodeTimes:
    """From the events of a profile of ONNX Runtime, durations in microseconds; its first run warms up."""
    times = NodeTimes()
    for event in events:
        name = event.get("name", "")
        if event.get("cat") == "Node" and name.endswith(_KERNEL):
            node = name.removesuffix(_KERNEL)
            times.seconds.setdefault(node, []).append(float(event["dur"]) * 1e-6)
            times.kinds[node] = event["args"]["op_name"]
        elif name == "model_run":
            times.whole.append(float(event["dur"]) * 1e-6)
    seconds = {node: each[1:] or each for node, each in times.seconds.items()}
    return NodeTimes(seconds, times.kinds, times.whole[1:] or times.whole)


def openvino_nodes(file: bytes | str, feed: Mapping[str, Any], threads: int, runs: int, seconds: float) -> NodeTimes:
    """By OpenVINO's counters; see `NODE_TIMERS`. Each time is the mean of a few runs."""
    times = NodeTimes()
    began = time.perf_counter()
    for number in range(max(1, -(-runs // _RUNS_OF_A_MEAN))):
        if number and time.perf_counter() - began > seconds:
            break
        request = openvino_model(file, threads, counting=True).create_infer_request()
        request.infer(dict(feed))
        first = {each.node_name: each.real_time.total_seconds() for each in request.profiling_info}
        for _ in range(_RUNS_OF_A_MEAN):
            request.infer(dict(feed))
        for each in request.profiling_info:
            if each.exec_type == "undef" or each.node_type in ("Parameter", "Result", "Constant"):
                continue  # fused into another, or nothing to compute
            name = str(each.node_name).removesuffix("/WithoutBiases")
            # The first run warms up, and is taken out of the mean again. The mean was rounded down, by half a
            # microsecond as a rule.
            total = (1 + _RUNS_OF_A_MEAN) * (each.real_time.total_seconds() + 0.5e-6) - first[each.node_name] - 0.5e-6
            times.seconds.setdefault(name, []).append(max(total / _RUNS_OF_A_MEAN, 1e-7))
            kind = str(each.node_type)
            times.kinds[name] = _ONNX_NAMES.get(kind, kind)
    return times


# An ONNX file (or its path), its inputs, threads, how many runs, and seconds after which few runs are enough, to the
# times of its nodes. Runtimes name a node after the one of the file that it stems from.
NodeTimer = Callable[[bytes | str, Mapping[str, Any], int, int, float], NodeTimes]
NODE_TIMERS: dict[str, NodeTimer] = {"onnxruntime": onnxruntime_nodes, "openvino": openvino_nodes}
