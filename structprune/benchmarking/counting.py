"""What the layers of a model compute and move, counted on its trace."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

from torch import fx, nn

from structprune.coupling.costs import is_view, node_macs
from structprune.coupling.propagate import Channels, propagate
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
        >>> found = count_model(nn.Sequential(nn.Linear(4, 8), nn.ReLU()), torch.zeros(2, 4))
        >>> found["0"].macs, found["0"].bytes, found["0"].operations, found["1"].bytes
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
        found = tuple(getattr(module, name, None) for name in names)
        if all(isinstance(width, int) for width in found):
            return tuple(int(width) for width in found if width is not None)
    return ()
