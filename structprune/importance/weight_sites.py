"""Where the weights of layers meet their inputs, for criteria that score each weight.

`structprune.importance.sites` lists channels that may go; here every input counts, the model's own among them.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, fx

from structprune.coupling.graph import ChannelGraph
from structprune.importance.sites import Site, held_nodes, pairs_of
from structprune.ops import layer_of
from structprune.ops.arguments import tensors
from structprune.tracing.trace import describe


@dataclass(frozen=True, slots=True)
class WeightSite:
    """A use of a parameter as the weight of a layer.

    Attributes:
        name: of the parameter.
        tap: the layer's input.
        dim: the dimension of the weight, 0 or 1, that meets the input.
    """

    name: str
    tap: Site
    dim: int

    def spread(self, values: Tensor, weight: Tensor) -> Tensor:
        """A value for each entry of the weight from one for each feature of the input.

        The input of a convolution with 4 channels in 2 groups, of kernel 3, has 12 features, 3 of each channel; its
        weight of shape ``(6, 2, 3)`` reads channels 0 and 1 in rows 0 to 2, and channels 2 and 3 in rows 3 to 5.

        Args:
            values: shape ``(channels,)`` or ``(channels * kernel,)``.
            weight: of shape ``(outputs, channels of a group, *kernel)``, or with the first two exchanged.
        """
        kernel = weight.shape[2:]
        if values.numel() == self.tap.size:
            values = values.view(self.tap.size, *[1] * len(kernel))
        else:
            values = values.view(self.tap.size, *kernel)
        inside = weight.shape[self.dim]
        if inside == self.tap.size:
            return values.unsqueeze(1 - self.dim).expand(weight.shape)
        groups = self.tap.size // inside
        rows = values.unflatten(0, (groups, inside)).unsqueeze(1)
        return rows.expand(groups, weight.shape[0] // groups, inside, *kernel).reshape(weight.shape)


def weight_sites(graph: ChannelGraph) -> list[WeightSite]:
    """All uses of parameters as weights of convolutions and matrix products.

    Parameters that a weight is computed from (a weight norm) are not among them.
    """
    held = held_nodes(graph)
    found: list[WeightSite] = []
    for node in graph.trace.nodes:
        given = tensors(node)
        for pair in pairs_of(node):
            if max(pair.operand, pair.weight) >= len(given):
                continue
            x, weight = given[pair.operand], given[pair.weight]
            shape = weight.meta["shape"]
            if weight.meta["name"] != "parameter" or x in held or not _is_layer(node, len(shape)):
                continue
            sizes = x.meta["shape"]
            tap = Site(
                node.meta["index"], pair.operand, 0, pair.dim if pair.dim < 0 else pair.dim - len(sizes),
                int(sizes[pair.dim]), pair.weight, pair.weight_dim, x.meta["index"], describe(node, graph.trace),
            )  # fmt: skip
            found.append(WeightSite(str(weight.target), tap, pair.weight_dim % len(shape)))
    return found


def _is_layer(node: fx.Node, dims: int) -> bool:
    known = layer_of(node.meta["name"])
    kind = None if known is None else known.kind
    return kind in ("convolution", "transposed") or (kind in ("linear", "product") and dims == 2)
