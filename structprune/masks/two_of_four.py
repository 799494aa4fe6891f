"""2:4 sparse weights in the form that NVIDIA's sparse tensor cores compute with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.sparse import to_sparse_semi_structured

from structprune.checking import MODEL, require
from structprune.errors import PlanError, UnsupportedModelError
from structprune.masks.torch_masks import hooks_of, masked_tensors
from structprune.tracing.state import join
from structprune.wrapping import prunable

# What the kernels of torch take: rows and columns of a weight are multiples of these.
MULTIPLES = {torch.float16: (32, 64), torch.bfloat16: (32, 64), torch.float32: (32, 32), torch.int8: (32, 128)}


def fits_blocks(weight: torch.Tensor, n: int = 2, m: int = 4) -> bool:
    """Whether of each `m` entries along the second dimension at most `n` differ from zero.

    Example:
        >>> fits_blocks(torch.tensor([[1.0, 0.0, 0.0, 2.0]])), fits_blocks(torch.tensor([[1.0, 3.0, 0.0, 2.0]]))
        (True, False)
    """
    if weight.dim() < 2 or weight.shape[1] % m:
        return False
    blocks = weight.detach().movedim(1, -1).unflatten(-1, (-1, m))
    return bool(((blocks != 0).sum(-1) <= n).all())


@dataclass(frozen=True)
class TwoOfFour:
    """How far a linear layer is from running on sparse tensor cores. See `two_of_four_layers` for an example.

    Attributes:
        name: Of the weight.
        shape: Outputs and inputs.
        blocks: How many blocks of four inputs that follow each other it has; 0 where its inputs are no multiple of 4.
        exact: In how many of these exactly two weights are zero.
        over: In how many more than two are left.
        reasons: Why the kernels do not take it, and what to do; none if they do.
    """

    name: str
    shape: tuple[int, int]
    blocks: int
    exact: int
    over: int
    reasons: tuple[str, ...]


def two_of_four_layers(model: nn.Module, *, dtype: torch.dtype = torch.float16) -> tuple[TwoOfFour, ...]:
    """What of a model's linear layers could run on sparse tensor cores, and why the others could not; on any device.

    Channels and weights go together: prune first, to widths in the multiples that the kernels take (``round_to=64``
    for half precision), then put two of each four weights to zero and train with the masks attached.

    Args:
        model: pruned or not; weights that are masked are looked at as their layers use them.
        dtype: in which the model is to run on the GPU.

    Raises:
        PlanError: the kernels know no such dtype.

    Example:
        >>> from structprune.masks import Saliency
        >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        >>> undo = Saliency.magnitude(model).n_of_m(2, 4).apply(model)
        >>> for layer in two_of_four_layers(model):
        ...     print(layer.name, layer.exact == layer.blocks, layer.reasons)
        0.weight True ()
        2.weight True ('its 10 outputs are no multiple of 32', 'its 32 inputs are no multiple of 64')
    """
    require(locals(), model=MODEL)
    if dtype not in MULTIPLES:
        raise PlanError(f"dtype is {dtype}; sparse tensor cores take {', '.join(map(str, MULTIPLES))}.")
    inner = prunable(model)
    linear = {join(path, "weight") for path, module in inner.named_modules() if type(module) is nn.Linear}
    held = {name: weight for name, weight in masked_tensors(inner).items() if name in linear}
    return tuple(_looked_at(name, weight, dtype) for name, weight in held.items())


def _looked_at(name: str, weight: torch.Tensor, dtype: torch.dtype) -> TwoOfFour:
    outputs, inputs = weight.shape
    left = torch.zeros(0) if inputs % 4 else (weight.unflatten(1, (-1, 4)) != 0).sum(-1)
    over = int((left > 2).sum())
    reasons = [
        f"its {count} {what} are no multiple of {step}"
        for what, count, step in zip(("outputs", "inputs"), weight.shape, MULTIPLES[dtype], strict=True)
        if count % step
    ]
    if over:
        reasons.append(
            f"{over} of its {left.numel()} blocks of four hold more than two weights; apply Saliency.n_of_m(2, 4)"
        )
    return TwoOfFour(name, (outputs, inputs), left.numel(), int((left == 2).sum()), over, tuple(reasons))


def semi_structured(model: nn.Module) -> list[str]:
    """Convert the weights of linear layers that are 2:4 sparse to torch's semi-structured tensors, in place.

    Their matrix products then run on sparse tensor cores. For inference: such weights are not trained or pruned.
    Other layers stay as they are: convolutions, weights that are not 2:4, and those of a size that the kernels lack;
    `two_of_four_layers` says why, without a GPU too.

    Args:
        model: on a CUDA device, with masks that are made permanent (`structprune.masks.remove`).

    Returns:
        The names of the weights that were converted.

    Raises:
        PlanError: a weight is still masked, or none is 2:4 sparse; the model is as it was.
        UnsupportedModelError: a weight that is 2:4 sparse is not on a CUDA device; the model is as it was.
    """
    inner = prunable(model, inplace=True)
    for path, module in inner.named_modules():
        for hook in hooks_of(module):
            raise PlanError(f"'{path}.{hook._tensor_name}' is still masked. Call structprune.masks.remove first.")
    linear = {join(path, "weight"): m for path, m in inner.named_modules() if type(m) is nn.Linear}
    weights = {name: w for name, w in masked_tensors(inner).items() if name in linear and fits_blocks(w)}
    if not weights:
        raise PlanError("No weight of a linear layer is 2:4 sparse. Apply Saliency.n_of_m(2, 4) first.")
    for name, weight in weights.items():
        if weight.device.type != "cuda":
            raise UnsupportedModelError(
                f"{name!r} is on {weight.device}: semi-structured tensors are of CUDA alone. Here structprune.masks."
                "two_of_four_layers checks what the kernels would take."
            )
    fitting = [
        name
        for name, weight in weights.items()
        if weight.dtype in MULTIPLES and not _looked_at(name, weight, weight.dtype).reasons
    ]
    for name in fitting:
        linear[name].weight = nn.Parameter(to_sparse_semi_structured(weights[name]), requires_grad=False)
    return fitting
