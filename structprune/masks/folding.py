"""Constants that removed channels leave behind, and the biases that take them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from structprune.coupling.graph import ChannelGraph
from structprune.coupling.solve import Mask
from structprune.masks.layer_calls import Layer
from structprune.masks.states import State
from structprune.ops.arguments import arguments
from structprune.tracing.trace import describe

_LAYERS = (
    nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class Fold:
    """A constant for each channel of a layer's result that goes into a tensor of the model.

    Attributes:
        layer: path of the layer.
        tensor: name of its bias, or of the running mean of the batch norm behind it; None if it has neither and gets a
            bias.
        amount: what is added to that tensor, float64.
        channels: how many constant channels of the input it stands for.
    """

    layer: str
    tensor: str | None
    amount: Tensor
    channels: int


class Places:
    """Where the constant of a layer's result can go.

    Args:
        graph: the coupled channels of the network.
    """

    def __init__(self, graph: ChannelGraph) -> None:
        self._graph = graph

    def missing(self, layer: Layer) -> str | None:
        """Why a layer cannot take a constant; None if it can."""
        where = describe(layer.node, self._graph.trace)
        for node in self._targets(layer):
            if len(self._users(node)) == 1:
                return None
            return f"it is a constant, and the bias of {where} serves other operations too"
        if self._module(layer) is None or len(self._users(layer.weight)) > 1:
            return f"it is a constant, and {where} has no bias that could take it"
        return None

    def compensation(self, layer: Layer, weight: Tensor, constants: Tensor, kept: Tensor) -> Fold | None:
        """The constants of a layer's input as one for each channel of its result; None if they add nothing.

        Args:
            layer: a call of it.
            weight: its weight in float64.
            constants: shaped as a state of the input; 0 where a channel stays.
            kept: which channels of the result stay, shape ``(channels,)``.
        """
        amount = layer.added(constants, weight)[0].reshape(-1) * kept
        if not bool((amount != 0).any()):
            return None
        path = str(layer.weight.target).rpartition(".")[0]
        read = by_channel(layer.read(weight, kept), layer.dim) != 0
        count = int((read & (by_channel(constants.abs(), layer.dim) != 0)).sum())
        for node in self._targets(layer):
            # The batch norm subtracts its mean.
            return Fold(path, str(node.target), amount if layer.bias is not None else -amount, count)
        return Fold(path, None, amount, count)

    def _users(self, node: fx.Node) -> list[fx.Node]:
        """The operations of the forward in eval mode that take a tensor."""
        return [user for user in node.users if user.op == "output" or user.meta["index"] < len(self._graph.trace.nodes)]

    def _targets(self, layer: Layer) -> Iterator[fx.Node]:
        """The tensor that can take a constant: the layer's bias, or the mean of the batch norm behind it."""
        if layer.bias is not None:
            yield layer.bias
            return
        users = self._users(layer.node)
        if len(users) == 1 and users[0].op != "output" and users[0].meta["name"] == "batch_norm":
            given = arguments(users[0])
            mean = given.get("running_mean")
            if given.get("input") is layer.node and not given.get("training") and isinstance(mean, fx.Node):
                yield mean

    def _module(self, layer: Layer) -> nn.Module | None:
        """The layer of torch that could be given a bias; None if what runs is anything else."""
        path, _, name = str(layer.weight.target).rpartition(".")
        module = self._graph.model.get_submodule(path)
        call = layer.node.meta["call"]
        plain = name == "weight" and type(module).forward in [kind.forward for kind in _LAYERS]
        runs = call >= 0 and self._graph.trace.calls[call].path == path
        return module if plain and runs and isinstance(module, _LAYERS) and module.bias is None else None


def part_of_state(state: State, layer: Layer, which: Mask) -> Tensor:
    """The constants of the channels `which` of a layer's input, shaped as its state; 0 elsewhere."""
    shape = [-1 if d == layer.dim % state.value.dim() else 1 for d in range(state.value.dim())]
    return state.value * torch.from_numpy(which).double().view(shape)


def by_channel(x: Tensor, dim: int) -> Tensor:
    """Sums over all dimensions but one."""
    return x.movedim(dim, 0).flatten(1).sum(1) if x.dim() > 1 else x


def all_by_channel(x: Tensor, dim: int, size: int) -> Tensor:
    """Whether all are set at each index of a dimension; a state has size 1 where a dimension holds no channels."""
    each = x.movedim(dim, 0).flatten(1).all(1) if x.dim() > 1 else x
    return each.expand(size)
