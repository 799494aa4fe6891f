"""What the layers of a model compute and move, counted on its trace."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from structprune.benchmarking.backends import BACKENDS
from structprune.benchmarking.profiling import by_layer
from structprune.benchmarking.timing import device_of, known_device, placed, said_if_not_running, threads_set
from structprune.checking import INPUTS, MODEL, one_of, require, whole
from structprune.coupling.costs import is_view, node_macs
from structprune.coupling.propagate import Channels, propagate
from structprune.inputs import evaluating, resize_batch
from structprune.ops import op_of
from structprune.tracing.trace import ExampleInputs, trace
from structprune.wrapping import prunable

_NO_OPERATION = frozenset({"parameter", "constant", "input", "part"})
_KINDS = {
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), "convolution"),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), "convolution"),
    **dict.fromkeys(("linear", "matmul", "mm", "bmm", "addmm", "baddbmm"), "product"),
}


@dataclass(frozen=True, slots=True)
class Counted:
    """What the operations that a module's own forward runs take.

    Attributes:
        macs: multiply-accumulates.
        bytes: what they read and write: inputs, weights and results, each once for each operation.
        operations: how many of each kind: ``"convolution"``, ``"product"`` and ``"other"``; views are none.
        widths: input and output channels of the weight of a convolution or linear layer; else empty.
    """

    macs: int
    bytes: int
    operations: dict[str, int]
    widths: tuple[int, ...]


def count_model(model: nn.Module, inputs: ExampleInputs) -> dict[str, Counted]:
    """Count each layer of a model, by its path.

    Raises:
        TraceError: the forward cannot be recorded.

    Example:
        >>> import torch
        >>> counted = count_model(nn.Sequential(nn.Linear(4, 8), nn.ReLU()), torch.zeros(2, 4))
        >>> counted["0"].macs, counted["0"].bytes, counted["0"].operations, counted["1"].bytes
        (64, 256, {'product': 1}, 128)
    """
    model = prunable(model)
    recorded = trace(model, inputs, operations=op_of)
    channels = propagate(recorded)
    modules = dict(model.named_modules())
    macs: dict[str, int] = {}
    moved: dict[str, int] = {}
    kinds: dict[str, dict[str, int]] = {}
    for node in recorded.nodes:
        name = node.meta["name"]
        if is_view(node) or name in _NO_OPERATION:
            continue
        call = node.meta["call"]
        path = recorded.calls[call].path if call >= 0 else ""
        macs[path] = macs.get(path, 0) + node_macs(node, channels, lambda axis: axis.size)
        moved[path] = moved.get(path, 0) + sum(_bytes(each, channels) for each in (node, *node.all_input_nodes))
        kind, mine = _KINDS.get(name, "other"), kinds.setdefault(path, {})
        mine[kind] = mine.get(kind, 0) + 1
    return {path: Counted(macs[path], moved[path], kinds[path], _widths(modules.get(path))) for path in macs}


def _bytes(node: fx.Node, channels: Channels) -> int:
    rows = channels.axes[node.meta["index"]]
    dtype = node.meta.get("dtype")
    if not isinstance(rows, tuple) or dtype is None or not isinstance(node.meta.get("shape"), tuple):
        return 0  # several results at once: each is counted where it is used
    return prod(row.size for row in rows) * dtype.itemsize


def _widths(module: Any) -> tuple[int, ...]:
    """Channels on both sides of a layer."""
    sides = (("in_channels", "out_channels"), ("in_features", "out_features"))
    for names in sides:
        widths = tuple(getattr(module, name, None) for name in names)
        if all(isinstance(width, int) for width in widths):
            return tuple(int(width) for width in widths if width is not None)
    return ()


# -- `layer_times`: where the time of one model goes, layer by layer -------------------------------------------------


def layer_times(
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    backend: str = "eager",
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    threads: int | None = None,
) -> dict[str, float]:
    """Measure how long the operations of each layer take, by the profiler of torch or of ONNX Runtime.

    An operation belongs to the innermost module whose forward runs it, ``""`` being the model itself; what ONNX Runtime
    has fused, to the layer whose weight it multiplies with. Backends that fuse operations across layers (``"compile"``,
    ``"aotinductor"``, ``"tensorrt"``) tell nothing of layers: for them the times of eager mode are given. The model is
    left as it was.

    Args:
        model: The model.
        example_inputs: A tensor, a tuple of positional arguments, or a dict of keyword arguments.
        backend: ``"eager"``, ``"channels_last"``, ``"compile"``, ``"aotinductor"``, ``"onnxruntime"``, ``"openvino"``,
            ``"executorch"``, ``"litert"`` or ``"tensorrt"``.
        batch_size: Samples in one run; those given are repeated or cut. As given, if not set.
        device: Where to run, on a copy of the model if it is elsewhere; where the inputs are, if not set.
        threads: Threads that an operation may use on the CPU; as many as torch uses now, if not set.

    Returns:
        Seconds of one forward by layer, the greatest first.

    Raises:
        ValueError: There is no such backend.
        BackendError: It cannot use the device, or lacks a compiler or a provider.
        MissingExtraError: A backend's package is not installed.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 8))
        >>> sorted(layer_times(model, torch.randn(32, 64)))
        ['0', '1', '2']
    """
    counts = {"batch_size": whole(1).or_none, "threads": whole(1).or_none}
    require(locals(), ValueError, model=MODEL, example_inputs=INPUTS, backend=one_of(BACKENDS), **counts)
    where = known_device(device) if device is not None else device_of(example_inputs)
    inputs = pytree.tree_map_only(Tensor, lambda tensor: tensor.to(where), example_inputs)
    if batch_size is not None:
        inputs = resize_batch(inputs, batch_size)
    model = placed(model, where)
    with evaluating(model), threads_set(threads) as count, tempfile.TemporaryDirectory() as folder:
        with said_if_not_running([model], inputs):
            run = BACKENDS[backend](model, inputs, where, count, Path(folder))
            run()
        return by_layer(run.profile().spent)
