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

Shortcut = Callable[..., Any]


def _like(x: Tensor) -> Tensor:
    """What ``torch.empty_like`` gives; that takes 20 times as long on ``meta``."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device) if x.is_contiguous() else torch.empty_like(x)


def _same(x: Any, *_: Any, **named: Any) -> Tensor | None:
    """One tensor in, one of the same shape out."""
    plain = isinstance(x, Tensor) and x.is_floating_point() and not named.keys() & {"out", "dtype"}
    return _like(x) if plain else None


def _pointwise(x: Any, y: Any = None, **named: Any) -> Tensor | None:
    if not isinstance(x, Tensor) or named or not x.is_floating_point():
        return None
    if isinstance(y, Tensor):
        return _like(x) if y.shape == x.shape and y.dtype == x.dtype else None
    return _like(x) if isinstance(y, (int, float)) else None


def _batch_norm(x: Any, weight: Any, bias: Any, mean: Any, var: Any, training: Any, *_: Any) -> Tensor | None:
    parts = [part for part in (weight, bias, mean, var) if part is not None]
    if training or x.dim() < 2 or any(part.shape != x.shape[1:2] for part in parts):
        return None
    return _like(x) if all(part.dtype == x.dtype for part in parts) else None


def _conv(
    x: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: Any = 1
) -> Tensor | None:
    """A convolution over a batch: of 8 positions, a kernel of 3 with a stride of 2 and no padding makes 3."""
    dims = weight.dim() - 2
    if x.dim() != weight.dim() or isinstance(padding, str) or not x.is_contiguous() or x.dtype != weight.dtype:
        return None
    wrong = x.shape[1] != weight.shape[1] * groups or weight.shape[0] % groups
    if wrong or (bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != x.dtype)):
        return None
    each = [(value,) * dims if isinstance(value, int) else value for value in (stride, padding, dilation)]
    if any(len(values) != dims for values in each):
        return None
    sizes = [
        (size + 2 * pad - spread * (kernel - 1) - 1) // step + 1
        for size, kernel, step, pad, spread in zip(x.shape[2:], weight.shape[2:], *each, strict=True)
    ]
    shape = (x.shape[0], weight.shape[0], *sizes)
    return torch.empty(shape, dtype=x.dtype, device=x.device) if min(sizes) > 0 else None


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


def _recurrent(x: Any, hx: Any, weights: Any, *rest: Any) -> tuple[Tensor, ...] | None:
    """A stack of recurrent layers over padded sequences; its steps are a loop in Python on ``meta``."""
    states: list[Any] = list(hx) if isinstance(hx, (tuple, list)) else [hx]
    if x.dim() != 3 or len(rest) != 6 or not isinstance(weights, (tuple, list)):
        return None  # packed sequences hand over their lengths in place of `hx`
    layers, both, batch_first = int(rest[1]), bool(rest[4]), bool(rest[5])
    batch = x.shape[0] if batch_first else x.shape[1]
    first = weights[0]
    plain = all(state.dim() == 3 and tuple(state.shape[:2]) == (layers * (1 + both), batch) for state in states)
    if not plain or first.shape[1] != x.shape[2] or any(t.dtype != x.dtype for t in (*states, *weights)):
        return None
    # As the operation gives it: steps are outer to samples in memory.
    steps = x.shape[1] if batch_first else x.shape[0]
    out = torch.empty((steps, batch, states[0].shape[2] * (1 + both)), dtype=x.dtype, device=x.device)
    return (out.transpose(0, 1) if batch_first else out, *(_like(state) for state in states))


_UNARY = (
    "gelu", "silu", "hardswish", "hardsigmoid", "sigmoid", "tanh", "hardtanh", "relu", "relu6", "elu", "dropout",
    "leaky_relu", "mish", "roll",
)  # fmt: skip

SHORTCUTS: dict[str, Shortcut] = {
    "batch_norm": _batch_norm,
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _conv),
    "layer_norm": _layer_norm,
    "linear": _linear,
    "scaled_dot_product_attention": _attention,
    **dict.fromkeys(("add", "sub", "mul"), _pointwise),
    "cat": _cat,
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), _recurrent),
    "_grouped_mm": _grouped,
    **dict.fromkeys(_UNARY, _same),
}


def shape_of_result(name: str, inplace: bool, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result of an operation on ``meta`` tensors: a tensor, several in a tuple, or None if it has to run itself."""
    if inplace:
        return args[0] if name in _UNARY and args else None
    shortcut = SHORTCUTS.get(name)
    return None if shortcut is None or not args else shortcut(*args, **kwargs)
