"""Channels of one layer alone; what stands before and behind it is left to the caller, who sees to it that it fits."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm

from structprune.checking import FLAG, INDICES, instance, require, shown
from structprune.errors import PlanError
from structprune.surgery.apply import apply
from structprune.surgery.edits import AttributeEdit, Edits, RemovedSlice
from structprune.tracing.state import held_tensors

# Of outputs and of inputs: the dimension of the weight that they stand in, and the attribute that counts them.
Side = tuple[int, str]
_SIDES: dict[type[nn.Module], tuple[Side, Side]] = {
    _ConvNd: ((0, "out_channels"), (1, "in_channels")),
    nn.Linear: ((0, "out_features"), (1, "in_features")),
    _BatchNorm: ((0, "num_features"), (0, "num_features")),
    _InstanceNorm: ((0, "num_features"), (0, "num_features")),
    nn.PReLU: ((0, "num_parameters"), (0, "num_parameters")),
    nn.Embedding: ((1, "embedding_dim"), (1, "embedding_dim")),
}


def is_depthwise(layer: nn.Module) -> bool:
    """Whether a layer is a convolution whose every output has a group of its own."""
    return isinstance(layer, _ConvNd) and layer.groups == layer.out_channels > 1


def side(layer: nn.Module, outputs: bool = True) -> Side | None:
    """The dimension of a layer's weight that its outputs or inputs stand in, and the attribute that counts them.

    Args:
        layer: a convolution, a linear layer, a norm, an embedding or a PReLU; of others it is not known.
        outputs: whether outputs are meant, or inputs.

    Example:
        >>> side(nn.Linear(2, 3), outputs=False), side(nn.ConvTranspose2d(2, 3, 1))
        ((1, 'in_features'), (1, 'out_channels'))
    """
    both = next((sides for kind, sides in _SIDES.items() if isinstance(layer, kind)), None)
    if both is None:
        return None
    (dim, name), (other, _) = both if outputs else both[::-1]
    if is_depthwise(layer):
        return 0, name
    return (other if getattr(layer, "transposed", False) else dim), name


def remove_channels(layer: nn.Module, indices: Sequence[int], *, outputs: bool = True) -> nn.Module:
    """Remove outputs or inputs from one layer alone, in place.

    Args:
        layer: a convolution, a linear layer, a batch or instance norm, an embedding or a PReLU.
        indices: of the channels, counted from 0; in any order, and once or several times.
        outputs: whether outputs are meant, or inputs.

    Returns:
        The layer.

    Raises:
        PlanError: the indices are not some of the channels, or channels of this layer cannot be removed alone.

    Example:
        >>> remove_channels(nn.Linear(4, 8), [0, 5])
        Linear(in_features=4, out_features=6, bias=True)
    """
    require(locals(), layer=instance(nn.Module, "give a layer"), indices=INDICES, outputs=FLAG)
    this, other = side(layer, outputs), side(layer, not outputs)
    grouped = not is_depthwise(layer) and getattr(layer, "groups", 1) > 1
    if this is None or other is None or grouped or "weight" not in layer._parameters:
        raise PlanError(
            f"Channels of {shown(layer)} cannot be removed from it alone. Let a graph do it, which knows what goes "
            "with them: structprune.DependencyGraph(model, x).prune_group(layer, indices)."
        )
    size, gone = int(getattr(layer, this[1])), tuple(sorted({int(index) for index in indices}))
    if gone and (gone[0] < 0 or gone[-1] >= size or len(gone) == size):
        raise PlanError(f"indices is {shown(list(indices))}; give some of the channels 0 to {size - 1}, and not all.")
    shared = this[0] == other[0]
    names = _counting(layer) if shared else {this[1]}
    slices = _slices(layer, this[0], size, gone, outputs or shared) if gone else ()
    edits = tuple(AttributeEdit("", (name,), size, size - len(gone)) for name in sorted(names))
    return apply(layer, Edits(slices, edits, (), (), (), None, None), inplace=True)


def _counting(layer: nn.Module) -> set[str]:
    """The attributes that count the channels of a layer whose outputs are its inputs."""
    sides = [each for each in (side(layer, True), side(layer, False)) if each is not None]
    return {name for _, name in sides} | ({"groups"} if is_depthwise(layer) else set())


def _slices(layer: nn.Module, dim: int, size: int, gone: tuple[int, ...], outputs: bool) -> tuple[RemovedSlice, ...]:
    """What is cut out of the weight and, with outputs, of what else has one entry for each."""
    held = {name: each.tensor for name, each in held_tensors(layer).items()}
    return tuple(
        RemovedSlice(name, dim if name == "weight" else 0, size, gone)
        for name, tensor in held.items()
        if name == "weight" or (outputs and tensor.shape == (size,))
    )
