"""Timing operations in a runtime of ONNX files: many at once in one file, each read off its profile by itself.

A convolution that stands alone pays for turning its input into the blocked layout and its output back, which inside a
network it does not. In the profile these are nodes of their own, so they are left out.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np

from structprune.benchmarking.nodes import NODE_TIMERS, NodeTimer, NodeTimes
from structprune.errors import PlanError
from structprune.export.files import require
from structprune.latency.eager import Point, nearly_least, shapes
from structprune.latency.specs import OpSpec
from structprune.progress import shown

OPSET, IR = 18, 9
# Weights lie in the file, which a protobuf bounds; so many bytes go into one.
FILE_BYTES = 200_000_000
FILE_POINTS = 160
# Nodes are named after the point that they belong to; a node that a runtime makes is named after its output.
_OURS = re.compile(r"^p(\d+)_")


def time_in_runtime(points: Sequence[Point], backend: str, threads: int, runs: int, seconds: float) -> list[float]:
    """The time of each point in seconds on the CPU.

    Args:
        points: operations and widths.
        backend: one of `structprune.benchmarking.nodes.NODE_TIMERS`.
        threads: how many threads an operation may use.
        runs: how often each runs after one run that does not count.
        seconds: once so much time is spent, three runs of each are enough.

    Raises:
        MissingExtraError: onnx or the runtime is not installed.
        PlanError: the runtime does not know the type of an operation's tensors.
    """
    times: list[float] = []
    pieces = _pieces(points)
    for piece in shown(pieces, f"timing {len(points)} operations in {backend}", still=True):
        times += _time_piece(piece, NODE_TIMERS[backend], threads, runs, seconds * len(piece) / max(1, len(points)))
    return times


def _pieces(points: Sequence[Point]) -> list[list[Point]]:
    pieces: list[list[Point]] = [[]]
    size = 0
    for spec, widths in points:
        bytes_ = 4 * prod(shapes(spec, widths)[1])
        if pieces[-1] and (size + bytes_ > FILE_BYTES or len(pieces[-1]) >= FILE_POINTS):
            pieces.append([])
            size = 0
        pieces[-1].append((spec, widths))
        size += bytes_
    return [piece for piece in pieces if piece]


class _File:
    """An ONNX file in the making, with a node or a few for each point."""

    def __init__(self) -> None:
        self._onnx = require("onnx")
        self.nodes: list[Any] = []
        self.weights: list[Any] = []
        self.inputs: dict[str, tuple[int, tuple[int, ...], Any]] = {}
        self.outputs: list[Any] = []

    def input(self, position: int, shape: tuple[int, ...], dtype: Any, own: str = "") -> str:
        """An input of the file; points whose operand has the same shape share it, but for what is their `own`."""
        name = f"x{position}_{np.dtype(dtype).name}_" + "x".join(map(str, shape)) + own
        self.inputs[name] = position, shape, dtype
        return name

    def weight(self, number: int, shape: tuple[int, ...], dtype: Any) -> str:
        """The constant of a point, which no other has: of nodes that compute the same, ONNX Runtime keeps one."""
        values = _numbers(prod(shape), dtype).reshape(shape) * dtype(1 + number / 1024)
        self.weights.append(self._onnx.numpy_helper.from_array(values, f"w{number}"))
        return f"w{number}"

    def node(self, op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        """An operation, named after its output."""
        made = self._onnx.helper.make_node(op, inputs, [output], name=output, **attributes)
        self.nodes.append(made)
        return output

    def bytes(self) -> bytes:
        """The file."""
        helper = self._onnx.helper
        kinds = {name: helper.np_dtype_to_tensor_dtype(np.dtype(dtype)) for name, (_, _, dtype) in self.inputs.items()}
        inputs = [helper.make_tensor_value_info(n, kinds[n], shape) for n, (_, shape, _) in self.inputs.items()]
        graph = helper.make_graph(self.nodes, "operations", inputs, self.outputs, self.weights)
        opset = helper.make_opsetid("", OPSET)
        return helper.make_model(graph, opset_imports=[opset], ir_version=IR).SerializeToString()

    def result(self, name: str, dtype: Any) -> None:
        """Something small that depends on all of `name`, so that it is computed and need not be kept."""
        out = f"r{len(self.outputs)}"
        self.nodes.append(self._onnx.helper.make_node("ReduceMax", [name], [out], name=out, keepdims=0))
        kind = self._onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        self.outputs.append(self._onnx.helper.make_tensor_value_info(out, kind, None))


def _numbers(count: int, dtype: Any) -> Any:
    return ((np.arange(count) % 13 - 6) / 8).astype(dtype)


def _dtype(spec: OpSpec) -> Any:
    if spec.dtype not in ("float16", "float32", "float64"):
        raise PlanError(
            f"Runtimes of ONNX files cannot be timed with {spec.dtype}; convert the model and the inputs to float32 "
            "or float16."
        )
    return np.dtype(spec.dtype).type


def _add(file: _File, number: int, point: Point) -> None:
    spec, widths = point
    dtype, dims, name = _dtype(spec), shapes(spec, widths), f"p{number}_"
    x = file.input(0, dims[0], dtype)
    if spec.kind == "matmul":
        right = _transposed(dims[1]) if spec.option("weight") else dims[1]
        w = file.weight(number, right, dtype) if spec.option("weight") else file.input(1, right, dtype, name)
        y = file.node("MatMul", [x, w], f"{name}y")
    elif spec.kind == "attention":
        key, value = file.input(1, _transposed(dims[1]), dtype, name), file.input(2, dims[2], dtype)
        scores = file.node("MatMul", [x, key], f"{name}scores")
        shares = file.node("Softmax", [scores], f"{name}shares", axis=-1)
        y = file.node("MatMul", [shares, value], f"{name}y")
    else:
        w = file.weight(number, dims[1], dtype)
        op = "ConvTranspose" if spec.transposed else "Conv"
        y = file.node(op, [x, w], f"{name}y", **_attributes(spec, widths))
        y = file.node("GlobalAveragePool", [y], f"g{number}")  # in the blocked layout, so that nothing is turned back
    file.result(y, dtype)


def _transposed(shape: tuple[int, ...]) -> tuple[int, ...]:
    return *shape[:-2], shape[-1], shape[-2]


def _attributes(spec: OpSpec, widths: tuple[int, ...]) -> dict[str, Any]:
    attributes: dict[str, Any] = {
        "group": spec.at(widths)["groups"],
        "strides": list(spec.option("stride")),
        "dilations": list(spec.option("dilation")),
    }
    padding = spec.option("padding")
    if padding == "same":
        attributes["auto_pad"] = "SAME_LOWER"
    elif padding != "valid":
        attributes["pads"] = [*padding, *padding]
    if spec.transposed:
        attributes["output_padding"] = list(spec.option("output_padding"))
    return attributes


def _time_piece(points: Sequence[Point], timer: NodeTimer, threads: int, runs: int, seconds: float) -> list[float]:
    file = _File()
    for number, point in enumerate(points):
        _add(file, number, point)
    room: dict[tuple[int, Any], int] = {}
    for position, shape, dtype in file.inputs.values():
        room[position, dtype] = max(room.get((position, dtype), 0), prod(shape))
    numbers = {key: _numbers(count, key[1]) for key, count in room.items()}
    feed = {n: numbers[i, dtype][: prod(shape)].reshape(shape) for n, (i, shape, dtype) in file.inputs.items()}
    return by_point(timer(file.bytes(), feed, threads, runs, seconds), len(points))


def by_point(times: NodeTimes, points: int) -> list[float]:
    """Seconds of each point: its nodes' times added up run by run.

    Raises:
        PlanError: a point does not appear, so the runtime names its nodes in a way that is not known here.
    """
    nodes: list[list[list[float]]] = [[] for _ in range(points)]
    for name, seconds in times.seconds.items():
        hit = _OURS.match(name)
        if hit and not times.kinds[name].startswith("Reorder"):
            nodes[int(hit[1])].append(seconds)
    of_points: list[float] = []
    for number, durations in enumerate(nodes):
        if not durations:
            raise PlanError(
                f"The runtime's profile does not tell the time of operation {number}: it has merged it with another "
                "or names it otherwise. Use backend='eager', and report the model and the version of the runtime."
            )
        of_points.append(float(nearly_least(np.sum(durations, axis=0))))
    return of_points
