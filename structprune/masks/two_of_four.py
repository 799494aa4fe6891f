"""2:4 sparse weights in the form that NVIDIA's sparse tensor cores compute with."""

from __future__ import annotations

import torch
from torch import nn
from torch.sparse import to_sparse_semi_structured

from structprune.errors import PlanError, UnsupportedModelError
from structprune.masks.torch_masks import hooks_of, masked_tensors
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


def semi_structured(model: nn.Module) -> list[str]:
    """Convert the weights of linear layers that are 2:4 sparse to torch's semi-structured tensors, in place.

    Their matrix products then run on sparse tensor cores. For inference: such weights are not trained or pruned.
    Other layers stay as they are: convolutions, weights that are not 2:4, and those of a size that the kernels lack.

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
    linear = {f"{path}.weight".lstrip("."): m for path, m in inner.named_modules() if type(m) is nn.Linear}
    weights = {name: w for name, w in masked_tensors(inner).items() if name in linear and fits_blocks(w)}
    if not weights:
        raise PlanError("No weight of a linear layer is 2:4 sparse. Apply Saliency.n_of_m(2, 4) first.")
    fitting: list[str] = []
    for name, weight in weights.items():
        if weight.device.type != "cuda":
            raise UnsupportedModelError(f"{name!r} is on {weight.device}: semi-structured tensors are of CUDA alone.")
        rows, columns = MULTIPLES.get(weight.dtype, (0, 0))
        if rows and weight.shape[0] % rows == 0 and weight.shape[1] % columns == 0:
            fitting.append(name)
    for name in fitting:
        linear[name].weight = nn.Parameter(to_sparse_semi_structured(weights[name]), requires_grad=False)
    return fitting
