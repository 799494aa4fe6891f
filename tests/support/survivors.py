"""Norms and reductions that run over the surviving channels only, and their stand-ins for the search of dead ones.

Used by the oracle. Nothing here knows a layer, a plan or the engine: each function takes the arguments of the torch
call that it replaces and a boolean mask, true where an element of the input belongs to a removed channel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def _axes(x: Tensor, dim: Any) -> tuple[int, ...]:
    """The reduced axes, counted from the front; ``None`` and ``()`` mean all of them."""
    if dim is None or (isinstance(dim, Sequence) and len(dim) == 0):
        return tuple(range(x.ndim))
    dims = dim if isinstance(dim, Sequence) else (dim,)
    return tuple(int(d) % x.ndim for d in dims)


def _moments(x: Tensor, dead: Tensor, axes: Sequence[int], correction: float = 0) -> tuple[Tensor, Tensor]:
    """Mean and variance over the survivors, axes kept; where nothing survives both are finite and unused."""
    live = (~dead).to(x.dtype)
    count = live.sum(axes, keepdim=True)
    mean = (x * live).sum(axes, keepdim=True) / count.clamp(min=1)
    spread = ((x - mean) ** 2 * live).sum(axes, keepdim=True)
    return mean, spread / (count - correction).clamp(min=1)


def _drop(x: Tensor, axes: Sequence[int], keepdim: bool) -> Tensor:
    return x if keepdim else x.squeeze(tuple(axes))


def _normalised(x: Tensor, dead: Tensor, axes: Sequence[int], eps: float) -> Tensor:
    mean, var = _moments(x, dead, axes)
    return ((x - mean) / (var + eps).sqrt()).masked_fill(dead, 0)


def mean(dead: Tensor, x: Tensor, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Tensor:
    """``torch.mean``."""
    del dtype
    axes = _axes(x, dim)
    return _drop(_moments(x, dead, axes)[0], axes, keepdim)


def var(
    dead: Tensor, x: Tensor, dim: Any = None, unbiased: bool = True, keepdim: bool = False, *, correction: Any = None
) -> Tensor:
    """``torch.var``."""
    if isinstance(dim, bool):  # torch.var(x, unbiased)
        dim, unbiased = None, dim
    axes = _axes(x, dim)
    return _drop(_moments(x, dead, axes, float(unbiased) if correction is None else correction)[1], axes, keepdim)


def std(dead: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """``torch.std``."""
    return var(dead, x, *args, **kwargs).sqrt()


def var_mean(dead: Tensor, x: Tensor, dim: Any = None, unbiased: bool = True, keepdim: bool = False, **kw: Any) -> Any:
    """``torch.var_mean``."""
    if isinstance(dim, bool):  # torch.var_mean(x, unbiased)
        dim, unbiased = None, dim
    return var(dead, x, dim, unbiased, keepdim, **kw), mean(dead, x, dim, keepdim)


def std_mean(dead: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """``torch.std_mean``."""
    variance, mean_of = var_mean(dead, x, *args, **kwargs)
    return variance.sqrt(), mean_of


def softmax(dead: Tensor, x: Tensor, dim: int = -1, *args: Any, **kwargs: Any) -> Tensor:
    """``F.softmax`` and ``torch.softmax``: a dead entry takes no share."""
    del args, kwargs
    return torch.softmax(x.masked_fill(dead, float("-inf")), dim).nan_to_num(0.0).masked_fill(dead, 0)


def _filled(function: Callable[..., Any], fill: float) -> Callable[..., Any]:
    def finite(result: Any) -> Any:
        """Where nothing survives the result is 0, not the filling."""
        if isinstance(result, tuple):
            return type(result)([finite(part) for part in result])
        return result.masked_fill(result.isinf(), 0) if result.is_floating_point() else result

    def over_survivors(dead: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return finite(function(x.masked_fill(dead, fill), *args, **kwargs))

    return over_survivors


def layer_norm(dead: Tensor, x: Tensor, shape: Sequence[int], weight: Any = None, bias: Any = None, eps: float = 1e-5):
    """``F.layer_norm``."""
    y = _normalised(x, dead, tuple(range(x.ndim - len(shape), x.ndim)), eps)
    y = y if weight is None else y * weight
    return y if bias is None else (y + bias).masked_fill(dead, 0)


def rms_norm(dead: Tensor, x: Tensor, shape: Sequence[int], weight: Any = None, eps: float | None = None) -> Tensor:
    """``F.rms_norm``."""
    axes = tuple(range(x.ndim - len(shape), x.ndim))
    square = _moments(x**2, dead, axes)[0]
    y = x * (square + (torch.finfo(x.dtype).eps if eps is None else eps)).rsqrt()
    return y if weight is None else y * weight


def group_norm(dead: Tensor, x: Tensor, groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Tensor:
    """``F.group_norm``: the survivors of each group among themselves."""
    split = (x.shape[0], groups, -1)
    y = _normalised(x.reshape(split), dead.reshape(split), (2,), eps).reshape(x.shape)
    per_channel = (1, -1) + (1,) * (x.ndim - 2)
    y = y if weight is None else y * weight.reshape(per_channel)
    return y if bias is None else (y + bias.reshape(per_channel)).masked_fill(dead, 0)


def batch_norm(
    dead: Tensor,
    x: Tensor,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """``F.batch_norm``; by its batch statistics it is how weights are standardised over their input channels."""
    if not training:
        return F.batch_norm(x, running_mean, running_var, weight, bias, False, momentum, eps)
    y = _normalised(x, dead, [axis for axis in range(x.ndim) if axis != 1], eps)
    per_channel = (1, -1) + (1,) * (x.ndim - 2)
    y = y if weight is None else y * weight.reshape(per_channel)
    return y if bias is None else (y + bias.reshape(per_channel)).masked_fill(dead, 0)


def instance_norm(
    dead: Tensor,
    x: Tensor,
    running_mean: Any = None,
    running_var: Any = None,
    weight: Any = None,
    bias: Any = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """``F.instance_norm``: the surviving positions of each channel among themselves."""
    if not use_input_stats:
        return F.instance_norm(x, running_mean, running_var, weight, bias, False, momentum, eps)
    y = _normalised(x, dead, tuple(range(2, x.ndim)), eps)
    per_channel = (1, -1) + (1,) * (x.ndim - 2)
    y = y if weight is None else y * weight.reshape(per_channel)
    return y if bias is None else (y + bias.reshape(per_channel)).masked_fill(dead, 0)


def _names(*names: str) -> list[Callable[..., Any]]:
    """The spellings of one function: in ``torch``, as a method, in ``torch.nn.functional``."""
    homes = (torch, Tensor, F)
    return [getattr(home, name) for name in names for home in homes if hasattr(home, name)]


MEAN = frozenset(_names("mean"))
GROUP_NORM = frozenset(_names("group_norm"))
# Of a parameter, these make learnt tokens, not weights.
OF_ACTIVATIONS = frozenset(_names("layer_norm", "rms_norm", "group_norm"))
OVER_SURVIVORS: dict[Callable[..., Any], Callable[..., Any]] = {
    **dict.fromkeys(MEAN, mean),
    **dict.fromkeys(_names("var"), var),
    **dict.fromkeys(_names("std"), std),
    **dict.fromkeys(_names("var_mean"), var_mean),
    **dict.fromkeys(_names("std_mean"), std_mean),
    **dict.fromkeys(_names("softmax"), softmax),
    **dict.fromkeys(_names("layer_norm"), layer_norm),
    **dict.fromkeys(_names("rms_norm"), rms_norm),
    **dict.fromkeys(_names("group_norm"), group_norm),
    **dict.fromkeys(_names("batch_norm"), batch_norm),
    F.instance_norm: instance_norm,
    **{f: _filled(f, 0.0) for f in [*_names("norm", "frobenius_norm"), torch.linalg.vector_norm, torch.linalg.norm]},
    **{f: _filled(f, float("-inf")) for f in _names("amax", "logsumexp", "topk")},
    **{f: _filled(f, float("inf")) for f in _names("amin")},
}
for _name, _fill in (("max", float("-inf")), ("min", float("inf"))):
    OVER_SURVIVORS |= {f: _filled(f, _fill) for f in _names(_name)}


def centred(dead: Tensor, x: Tensor, mean: Tensor) -> Tensor:
    """``x - mean`` of a norm written by hand: what is off stays off, and is not counted by the variance after it."""
    return (x - mean).masked_fill(dead, 0)


MINUS: dict[Callable[..., Any], Callable[..., Any]] = dict.fromkeys([*_names("sub"), Tensor.__sub__], centred)


DOTS = frozenset(_names("dot", "vdot"))
# How the norms of `torch.nn.utils` compute a weight from parameters.
NORMS_OF_WEIGHTS = DOTS | frozenset(
    [torch._weight_norm, *_names("reshape", "flatten", "view", "permute", "clone", "contiguous", "mv")]
)
DIVIDED = frozenset([
    *_names("div", "true_divide", "divide", "div_", "true_divide_", "divide_"),
    Tensor.__truediv__,
    Tensor.__itruediv__,
])  # fmt: skip


def _smooth(function: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    def meta_like(x: Tensor, *args: Any, inplace: bool = False, **kwargs: Any) -> Tensor:
        del args, kwargs
        return x.copy_(function(x)) if inplace else function(x)

    return meta_like


def _leaky(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, 0.5 * x)


# A living channel may be cut to a constant by a ReLU and then look dead; these never do that, and they send equal
# values to equal values, which is all that the search for dead channels looks at.
SMOOTH: dict[Callable[..., Any], Callable[..., Tensor]] = {
    **dict.fromkeys(_names("relu", "relu6", "hardtanh", "threshold"), _smooth(_leaky)),
    **dict.fromkeys(_names("clamp", "clamp_min", "clamp_max"), _smooth(_leaky)),
    **dict.fromkeys(_names("hardswish"), _smooth(lambda x: x * torch.sigmoid(x))),
    **dict.fromkeys(_names("hardsigmoid"), _smooth(torch.sigmoid)),
    **{f: (lambda x, mask, value: torch.where(mask, 0.5 * x + value, x)) for f in _names("masked_fill")},
    **{f: (lambda x, *a, **k: x.copy_(_leaky(x))) for f in _names("relu_", "clamp_", "clamp_min_", "clamp_max_")},
}


def _smooth_extreme(function: Callable[..., Any], sign: int) -> Callable[..., Any]:
    """A maximum as the logarithm of a sum of exponentials, and a minimum as that of the negatives.

    Behind ``x - x.max(-1, keepdim=True).values`` one entry of each row is zero, whatever the values are.
    """

    def extreme(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        exact = function(x, *args, **kwargs)
        values = exact.values if isinstance(exact, tuple) else exact
        dim = args[0] if args else kwargs.get("dim", kwargs.get("axis", ()))
        if not x.is_floating_point() or isinstance(dim, Tensor):  # ``torch.max(x, y)`` reduces nothing
            return exact
        axes = _axes(x, dim)
        smooth = sign * torch.logsumexp(sign * x, axes, keepdim=values.ndim == x.ndim)
        return type(exact)((smooth, exact.indices)) if isinstance(exact, tuple) else smooth

    return extreme


# For each, what stands for it, and for it over the survivors.
SMOOTH_EXTREMES: dict[Callable[..., Any], tuple[Callable[..., Any], Callable[..., Any]]] = {
    f: (_smooth_extreme(f, sign), _filled(_smooth_extreme(f, sign), -sign * float("inf")))
    for names, sign in ((("max", "amax"), 1), (("min", "amin"), -1))
    for f in _names(*names)
}
