"""Shapes of common results, known without running the operation.

On the ``meta`` device many operations find the shape of their result through decompositions in Python, which takes most
of the time of a trace. The few here are answered at once; where the arguments are not as plain as expected, the
operation itself runs, and raises the user's own error if they are wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Shortcut = Callable[..., Tensor | None]


def _same(x: Any, *_: Any, **named: Any) -> Tensor | None:
    """One tensor in, one of the same shape out."""
    plain = isinstance(x, Tensor) and x.is_floating_point() and not named.keys() & {"out", "dtype"}
    return torch.empty_like(x) if plain else None


def _pointwise(x: Any, y: Any = None, **named: Any) -> Tensor | None:
    if not isinstance(x, Tensor) or named or not x.is_floating_point():
        return None
    if isinstance(y, Tensor):
        return torch.empty_like(x) if y.shape == x.shape and y.dtype == x.dtype else None
    return torch.empty_like(x) if isinstance(y, (int, float)) else None


def _batch_norm(x: Any, weight: Any, bias: Any, mean: Any, var: Any, training: Any, *_: Any) -> Tensor | None:
    parts = [part for part in (weight, bias, mean, var) if part is not None]
    if training or x.dim() < 2 or any(part.shape != x.shape[1:2] for part in parts):
        return None
    return torch.empty_like(x) if all(part.dtype == x.dtype for part in parts) else None


def _layer_norm(x: Any, shape: Any, weight: Any = None, bias: Any = None, *_: Any, **__: Any) -> Tensor | None:
    parts = [part for part in (weight, bias) if isinstance(part, Tensor)]
    inner = tuple(x.shape[x.dim() - len(shape) :])
    if inner != tuple(int(size) for size in shape) or any(part.shape != inner for part in parts):
        return None
    same = all(part.dtype == x.dtype for part in parts)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device) if same else None


def _linear(x: Any, weight: Any, bias: Any = None, **named: Any) -> Tensor | None:
    if named or x.dim() < 2 or weight.dim() != 2 or x.shape[-1] != weight.shape[1] or x.dtype != weight.dtype:
        return None
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != x.dtype):
        return None
    return torch.empty((*x.shape[:-1], weight.shape[0]), dtype=x.dtype, device=x.device)


def _attention(q: Any, k: Any, v: Any, mask: Any = None, *rest: Any, **named: Any) -> Tensor | None:
    plain = mask is None and named.get("attn_mask") is None and not named.get("enable_gqa") and len(rest) < 4
    if not plain or q.dim() != 4 or k.dim() != 4 or v.dim() != 4 or not q.dtype == k.dtype == v.dtype:
        return None
    if q.shape[:2] != k.shape[:2] or k.shape[:3] != v.shape[:3] or q.shape[3] != k.shape[3]:
        return None
    # As the fused kernels give it: heads are inner to tokens in memory.
    out = torch.empty((q.shape[0], q.shape[2], q.shape[1], v.shape[3]), dtype=q.dtype, device=q.device)
    return out.transpose(1, 2)


def _cat(tensors: Any, dim: Any = 0, **named: Any) -> Tensor | None:
    first = tensors[0]
    at = int(dim) % first.dim()
    rest = (*first.shape[:at], *first.shape[at + 1 :])
    for t in tensors:
        if t.dtype != first.dtype or (*t.shape[:at], *t.shape[at + 1 :]) != rest:
            return None
    shape = (*first.shape[:at], sum(t.shape[at] for t in tensors), *first.shape[at + 1 :])
    return None if named else torch.empty(shape, dtype=first.dtype, device=first.device)


def _grouped(x: Any, weight: Any, offs: Any = None, **named: Any) -> Tensor | None:
    """On ``meta`` the operation insists on half precision."""
    rest = any(value is not None for value in named.values())
    if rest or offs is None or x.dim() != 2 or weight.dim() != 3 or x.shape[1] != weight.shape[1]:
        return None
    same = x.dtype == weight.dtype and offs.shape == weight.shape[:1]
    return torch.empty((x.shape[0], weight.shape[2]), dtype=x.dtype, device=x.device) if same else None


_UNARY = (
    "gelu", "silu", "hardswish", "hardsigmoid", "sigmoid", "tanh", "hardtanh", "relu", "relu6", "elu", "dropout",
    "leaky_relu", "mish", "roll",
)  # fmt: skip

SHORTCUTS: dict[str, Shortcut] = {
    "batch_norm": _batch_norm,
    "layer_norm": _layer_norm,
    "linear": _linear,
    "scaled_dot_product_attention": _attention,
    **dict.fromkeys(("add", "sub", "mul"), _pointwise),
    "cat": _cat,
    "_grouped_mm": _grouped,
    **dict.fromkeys(_UNARY, _same),
}


def shape_of_result(name: str, inplace: bool, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The result of an operation on ``meta`` tensors, or None if the operation itself has to say."""
    if inplace:
        return args[0] if name in _UNARY and args else None
    shortcut = SHORTCUTS.get(name)
    return None if shortcut is None or not args else shortcut(*args, **kwargs)
