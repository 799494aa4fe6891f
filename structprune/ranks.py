"""Sums over the processes of ``torch.distributed``: what one rank has seen of the data, all ranks know."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor
from torch import distributed as dist


def several() -> bool:
    """Whether ``torch.distributed`` is in use with more than one rank."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def all_reduced(tensor: Tensor) -> Tensor:
    """The sum of `tensor` over all ranks, in place, where ``torch.distributed`` is in use; else itself.

    Example:
        >>> import torch
        >>> all_reduced(torch.tensor([1.0, 2.0]))  # a single process
        tensor([1., 2.])
    """
    if several():
        # NCCL takes tensors of the device alone.
        there = tensor.cuda() if dist.get_backend() == "nccl" and not tensor.is_cuda else tensor
        dist.all_reduce(there)
        if there is not tensor:
            tensor.copy_(there)
    return tensor


def all_summed(tensors: dict[Hashable, Tensor]) -> dict[Hashable, Tensor]:
    """Named tensors summed over all ranks; one that a rank does not have (a class that it never saw) counts as zero.

    The names come in the same order on every rank.
    """
    if not several():
        return tensors
    mine = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    theirs: list[dict[Hashable, tuple[tuple[int, ...], torch.dtype]]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(theirs, mine)
    union = {name: kind for found in theirs for name, kind in found.items()}
    device = next((tensor.device for tensor in tensors.values()), torch.device("cpu"))
    return {
        name: all_reduced(tensors[name] if name in tensors else torch.zeros(shape, dtype=dtype, device=device))
        for name, (shape, dtype) in union.items()
    }
