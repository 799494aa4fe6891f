"""Sums over the processes of ``torch.distributed``: what one rank has seen of the data, all ranks know.

A rank that fails would leave the others waiting for its part of a sum. So before every sum the ranks tell each other
whether one has failed (`failing_together`).
"""

from __future__ import annotations

from collections.abc import Generator, Hashable
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor
from torch import distributed as dist

from structprune.errors import StructpruneError


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
        nobody_failed()
        _reduce(tensor)
    return tensor


def _reduce(tensor: Tensor) -> Tensor:
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
    nobody_failed()
    mine = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    theirs: list[dict[Hashable, tuple[tuple[int, ...], torch.dtype]]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(theirs, mine)
    union = {name: kind for named in theirs for name, kind in named.items()}
    device = next((tensor.device for tensor in tensors.values()), torch.device("cpu"))
    return {
        name: _reduce(tensors[name] if name in tensors else torch.zeros(shape, dtype=dtype, device=device))
        for name, (shape, dtype) in union.items()
    }


# -- failing ---------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Block:
    """What a rank knows of the block of `failing_together` that it is in."""

    raises: type[StructpruneError]
    doing: str
    summed: bool = False
    over: bool = False

    def tell(self, error: Exception | None) -> None:
        """Tell the other ranks whether this one has failed, and learn the same of them.

        Raises:
            StructpruneError: of the type `raises`; this rank has not failed, but another has.
        """
        self.summed = True
        if not int(_reduce(torch.tensor(int(error is not None)))):
            return
        self.over = True
        told: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(told, None if error is None else f"{type(error).__name__}: {error}")
        if error is None:
            rank, why = next((rank, why) for rank, why in enumerate(told) if why is not None)
            raise self.raises(
                f"Rank {rank} of {len(told)} failed in {self.doing}, so this one stops too: every rank has to give "
                f"its share. What rank {rank} says: {why}"
            )


_BLOCK: ContextVar[_Block | None] = ContextVar("_BLOCK", default=None)


def nobody_failed() -> None:
    """Raise here, in a block of `failing_together`, if another rank has failed in it; every sum begins with this."""
    block = _BLOCK.get()
    if block is not None:
        block.tell(None)


@contextmanager
def failing_together(raises: type[StructpruneError], doing: str) -> Generator[None]:
    """Where one rank leaves this block by an error, the others raise too instead of waiting for its part of a sum.

    Every rank has to enter it, and to take the same sums inside; where there may be none, call `nobody_failed`. A block
    within another is a part of that one. In a single process it does nothing.

    Args:
        raises: what the ranks raise that have not failed themselves; the message names the rank and its error.
        doing: what fails, for that message.

    Example:
        >>> import torch
        >>> with failing_together(StructpruneError, "counting"):  # a single process
        ...     all_reduced(torch.tensor(2))
        tensor(2)
    """
    if not several() or _BLOCK.get() is not None:
        yield
        return
    block = _Block(raises, doing)
    token = _BLOCK.set(block)
    try:
        yield
        # Without sums so far, what happens here may concern this rank alone.
        if block.summed:
            block.tell(None)
    except Exception as error:  # whatever it is, the other ranks must know of it; raised again here
        if not block.over:
            block.tell(error)
        raise
    finally:
        _BLOCK.reset(token)
