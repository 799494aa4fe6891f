"""Models in half precision that compute in float32 and hold no more memory than they had.

Half precision cannot tell the errors that are left from its own rounding, and conjugate gradients do not converge in
it. A float32 copy of each model would take twice their memory. So a parameter is replaced by a `Widened` tensor, which
says that it is in float32 and makes a float32 copy of itself for each operation that it takes part in.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from structprune.hardware import allocated
from structprune.tracing.state import held_tensors, swapped_tensors

HALF = (torch.float16, torch.bfloat16)
_SAME = (torch.ops.aten.detach.default, torch.ops.aten.alias.default)


class Widened(Tensor):
    """A tensor in half precision that takes part in operations in float32. What is written into it is rounded.

    Args:
        stored: the tensor; it is shared.

    Example:
        >>> weight = Widened(torch.ones(2, 3, dtype=torch.bfloat16))
        >>> weight.dtype, (weight * 2).dtype, weight.stored.dtype
        (torch.float32, torch.float32, torch.bfloat16)
        >>> weight.copy_(torch.full((2, 3), 0.3)).stored[0, 0].item()
        0.30078125
    """

    stored: Tensor

    def __new__(cls, stored: Tensor) -> Widened:
        """A tensor without memory of its own."""
        return Tensor._make_wrapper_subclass(
            cls, stored.shape, strides=stored.stride(), dtype=torch.float32, device=stored.device
        )

    def __init__(self, stored: Tensor) -> None:
        self.stored = stored

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Leave an operation as it is: it comes to `__torch_dispatch__`."""
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation on float32 copies; what it writes into is rounded."""
        if func in _SAME:
            return cls(args[0].stored)
        if func is torch.ops.aten.clone.default and not kwargs:
            return cls(args[0].stored.clone())
        if func is torch.ops.aten.copy_.default and isinstance(args[0], cls):
            source = args[1].stored if isinstance(args[1], cls) else args[1]
            args[0].stored.copy_(source)
            return args[0]
        if func is torch.ops.aten.embedding.default and isinstance(args[0], cls):
            return func(args[0].stored, *args[1:], **(kwargs or {})).float()  # not the whole table
        copies: dict[int, tuple[Widened, Tensor]] = {}

        def wide(tensor: Widened) -> Tensor:
            return copies.setdefault(id(tensor), (tensor, tensor.stored.float()))[1]

        result = func(*tree_map_only(cls, wide, args), **tree_map_only(cls, wide, kwargs or {}))
        allocated(sum(copy.nbytes for _, copy in copies.values()))
        if func._schema.is_mutable:
            for tensor, copy in copies.values():
                tensor.stored.copy_(copy)
        return result

    def __repr__(self, **_: Any) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]  # takes what Tensor's does
        """The tensor that it widens."""
        return f"Widened({self.stored!r})"


def wide(tensor: Tensor) -> Tensor:
    """The tensor itself; in float32 if it is in half precision: a parameter without a copy, a buffer as a copy."""
    if tensor.dtype not in HALF:
        return tensor
    if not isinstance(tensor, nn.Parameter):
        return tensor.detach().float()  # a forward may write into parts of it
    return nn.Parameter(Widened(tensor.detach()), requires_grad=tensor.requires_grad)


@contextmanager
def widened(original: nn.Module, recovered: nn.Module) -> Generator[bool]:
    """Both models compute in float32 if any of their tensors is in half precision; yields whether one is.

    What is written into the parameters of `recovered` is rounded at once; its buffers are rounded at the end.
    """
    before = {name: held.tensor for name, held in held_tensors(recovered).items()}
    others = (held.tensor for held in held_tensors(original).values())
    if all(tensor.dtype not in HALF for tensor in (*before.values(), *others)):
        yield False
        return
    with swapped_tensors(original, wide, track=False), swapped_tensors(recovered, wide, track=False):
        yield True
        for name, held in held_tensors(recovered).items():
            if name in before and not isinstance(held.tensor, Widened):
                before[name].data.copy_(held.tensor)
