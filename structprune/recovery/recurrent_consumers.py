"""Which recurrent layers are solved again, and why others are left: read off the trace."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import fx

from structprune.coupling.graph import ChannelGraph
from structprune.coupling.solve import Mask
from structprune.ops.recurrent import GATES
from structprune.recovery.layers import changed_operations, owned_name

CELLS = frozenset(f"{name}_cell" for name in GATES)


@dataclass(frozen=True, slots=True)
class RecurrentLayers:
    """A call of a stack of recurrent layers that is solved.

    Attributes:
        node: number of the operation.
        parameters: their names, in torch's order.
        layer: path of the module that holds them.
        refused: why it cannot be solved; empty if it can.
        sorted_by: number of the operation that sorts the samples for packing; None if none does.
    """

    node: int
    parameters: tuple[str, ...]
    layer: str
    refused: str = ""
    sorted_by: int | None = None


def recurrent_layers(
    graph: ChannelGraph, removed: Mask, begins: Collection[fx.Node] = (), without: Collection[fx.Node] = ()
) -> list[RecurrentLayers]:
    """The recurrent layers to solve once channels or operations are removed, as for `layers.consumers`."""
    changed = changed_operations(graph, removed, begins)
    nodes = [node for node in graph.trace.nodes if node in changed and node not in without]
    found = [_as_recurrent(node) for node in nodes if node.meta["name"] in GATES]
    steps = [node for node in nodes if node.meta["name"] in CELLS]
    cells = {name: node for node in reversed(steps) for name in _parameters(node)[:1]}
    why = "its steps are a loop of the forward, which is not followed; a layer such as torch.nn.LSTM is solved"
    return [*found, *(RecurrentLayers(n.meta["index"], (), name.rpartition(".")[0], why) for name, n in cells.items())]


def _as_recurrent(node: fx.Node) -> RecurrentLayers:
    """A call of recurrent layers, and why it cannot be solved if it cannot."""
    names, number = _parameters(node), node.meta["index"]
    layer = next((name.rpartition(".")[0] or name for name in names), node.name)
    lists = [arg for arg in node.args[2:4] if isinstance(arg, (tuple, list))]
    if node.kwargs or not lists:
        return RecurrentLayers(number, (), layer, "its arguments are given by name")
    own = [owned_name(weight) for weight in lists[-1]]
    if None in own:
        return RecurrentLayers(number, (), layer, "its weights are computed, or used in several places")
    return RecurrentLayers(number, tuple(map(str, own)), layer, sorted_by=_sorting(node))


def _parameters(node: fx.Node) -> list[str]:
    """Names of the tensors that it takes from the model."""
    return [str(n.target) for n in node.all_input_nodes if n.meta["name"] == "parameter"]


def _sorting(node: fx.Node) -> int | None:
    """The number of the ``index_select`` by which `torch.nn.utils.rnn.pack_padded_sequence` sorts samples, if it does.

    The operations are ``index_select``, ``_pack_padded_sequence``, its first part, and the layer.
    """
    at: object = node
    for name in ("part", "_pack_padded_sequence", "index_select"):
        at = at.args[0] if isinstance(at, fx.Node) else None
        if not isinstance(at, fx.Node) or at.meta["name"] != name:
            return None
    return at.meta["index"] if isinstance(at, fx.Node) else None
