"""Sums over the processes of ``torch.distributed``: what one rank has seen of the data, all ranks know.

A rank that fails would leave the others waiting for its part of a sum. So before every sum the ranks tell each other
whether one has failed (`failing_together`), and of which shape their part is: ranks that were given different models
or options would otherwise add up what does not belong together.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from structprune.errors import StructpruneError

T = TypeVar("T")
_APART: ContextVar[bool] = ContextVar("_APART", default=False)


def several() -> bool:
    """Whether ``torch.distributed`` is in use with more than one rank, and this one does not work `apart`."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1 and not _APART.get()


@contextmanager
def apart() -> Generator[None]:
    """In this block the rank works by itself: its sums are its own, as in a single process.

    Example:
        >>> with apart():
        ...     several()
        False
    """
    token = _APART.set(True)
    try:
        yield
    finally:
        _APART.reset(token)


def rank_and_count() -> tuple[int, int]:
    """The number of this rank, and how many there are; 0 and 1 in a single process.

    Example:
        >>> rank_and_count()
        (0, 1)
    """
    return (dist.get_rank(), dist.get_world_size()) if several() else (0, 1)


def all_reduced(tensor: Tensor) -> Tensor:
    """The sum of `tensor` over all ranks, in place, where ``torch.distributed`` is in use; else itself.

    Example:
        >>> import torch
        >>> all_reduced(torch.tensor([1.0, 2.0]))  # a single process
        tensor([1., 2.])
    """
    if several():
        nobody_failed(f"a sum of {tensor.dtype} of shape {list(tensor.shape)}")
        _reduce(tensor)
    return tensor


def gathered(value: T) -> list[T]:
    """A value of each rank, in their order, on all of them: numbers, texts, or tensors in them; pickled.

    Example:
        >>> gathered("mine")  # a single process
        ['mine']
    """
    if not several():
        return [value]
    nobody_failed("what each rank tells the others")
    told: list[T] = [value] * dist.get_world_size()
    dist.all_gather_object(told, value)
    return told


def agreed(reason: str) -> str:
    """The first reason of all ranks that is not empty, so that all do without what one of them has to do without.

    Example:
        >>> agreed("its shape is another"), agreed("")  # a single process
        ('its shape is another', '')
    """
    return next(filter(None, gathered(reason)), "")


def _reduce(tensor: Tensor, how: dist.ReduceOp.RedOpType | None = None) -> Tensor:
    # NCCL takes tensors of the device alone.
    there = tensor.cuda() if dist.get_backend() == "nccl" and not tensor.is_cuda else tensor
    dist.all_reduce(there, dist.ReduceOp.SUM if how is None else how)
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
    theirs = gathered(mine)
    union = {name: kind for named in theirs for name, kind in named.items()}
    device = next((tensor.device for tensor in tensors.values()), torch.device("cpu"))
    return {
        name: _reduce(tensors[name] if name in tensors else torch.zeros(shape, dtype=dtype, device=device))
        for name, (shape, dtype) in union.items()
    }


# -- work that is shared out ------------------------------------------------------------------------------------------


def dealt(jobs: Iterable[Callable[[], T]]) -> Iterator[T]:
    """The results of some jobs in their order, of which rank r of n does every n-th; all ranks get all results.

    The jobs of all ranks are the same, and none of them talks to other ranks.

    Example:
        >>> list(dealt([lambda: 1, lambda: 2]))  # a single process
        [1, 2]
    """
    rank, count = rank_and_count()
    left = iter(jobs)
    while some := list(islice(left, count)):
        with apart():
            mine = some[rank]() if rank < len(some) else None
        yield from gathered(mine)[: len(some)]  # pyright: ignore[reportReturnType]  # None only of those left out


class Talk(TorchDispatchMode):
    """Sees whether what runs in its block talks to other ranks: calls of ``torch.distributed`` are operations too.

    Attributes:
        heard: whether it did.
    """

    def __init__(self) -> None:
        super().__init__()
        self.heard = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation."""
        self.heard |= "c10d" in func.namespace
        return func(*args, **(kwargs or {}))


# -- failing ---------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Block:
    """What a rank knows of the block of `failing_together` that it is in."""

    raises: type[StructpruneError]
    doing: str
    summed: bool = False
    over: bool = False

    def tell(self, error: Exception | None, doing: str = "") -> None:
        """Tell the other ranks whether this one has failed and what it is about to do, and learn the same of them.

        Raises:
            StructpruneError: of the type `raises`; this rank has not failed, but another has, or is elsewhere.
        """
        self.summed = True
        place = zlib.crc32(f"{self.doing}, {doing}".encode())
        failed, most, least = _reduce(torch.tensor([int(error is not None), place, -place]), dist.ReduceOp.MAX).tolist()
        if not failed:
            if most != -least:
                self.over = True
                raise self.raises(
                    f"The ranks are not at the same place of {self.doing}: this one, {dist.get_rank()}, is at "
                    f"{doing or 'its end'}. Give all of them the same model, and the same options."
                )
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


def nobody_failed(doing: str = "a look at the others") -> None:
    """Raise here, in a block of `failing_together`, if another rank has failed in it; every sum begins with this.

    Args:
        doing: what this rank is about to do; it raises too if another is about to do something else.
    """
    block = _BLOCK.get()
    if block is not None and several():
        block.tell(None, doing)


def nobody_failed_yet(doing: str) -> None:
    """The same for what is done over and over again: not over NCCL, where the host would wait for the device."""
    if several() and dist.get_backend() != "nccl":
        nobody_failed(doing)


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
