"""Random numbers in a forward, held still: two networks of different width cannot draw the same ones.

While two networks are compared, a draw gives one number for the whole tensor, so that channels that are kept get the
same in both; dropout passes on what it gets, and a coin gives its probability.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Result = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


def _like(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    one: Tensor = func(args[0].new_empty(1), *args[1:], **kwargs)
    return one.expand(args[0].shape).clone()


def _fresh(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """``rand(2, 3)``, ``randn((2, 3))``, ``randint(low, high, size=(2, 3))``."""
    shape = func(*args, **{**kwargs, "device": "meta", "generator": None}).shape  # nothing is drawn there
    if getattr(func, "__name__", "") == "randint":
        one: Tensor = func(*args, **{**kwargs, "size": (1,)}) if "size" in kwargs else func(*args[:-1], (1,), **kwargs)
    else:
        one = func(1, **{key: value for key, value in kwargs.items() if key != "size"})
    return one.expand(shape).clone()


def _filled(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """``x.uniform_()``: written into the first argument."""
    target: Tensor = args[0]
    return target.copy_(func(target.new_empty(1), *args[1:], **kwargs).expand(target.shape))


def _normal(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """``x.normal_()``, or ``torch.normal(mean, std)`` of tensors and numbers."""
    if getattr(func, "__name__", "") == "normal_":
        return _filled(func, args, kwargs)
    given = dict(zip(("mean", "std", "size"), args, strict=False)) | kwargs
    mean, std = given.get("mean", 0.0), given.get("std", 1.0)
    if isinstance(mean, Tensor) or isinstance(std, Tensor):
        like: Tensor = mean if isinstance(mean, Tensor) else std
        return mean + std * torch.randn(1, dtype=like.dtype, device=like.device)
    size: Any = given["size"]
    return mean + std * _fresh(torch.randn, (size,), {k: v for k, v in kwargs.items() if k not in given})


def _coin(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The probability: ``bernoulli(p)`` has it in each entry, ``bernoulli(x, 0.3)`` and ``x.bernoulli_(0.3)`` apart."""
    x: Tensor = args[0] if args else kwargs["input"]
    inplace = getattr(func, "__name__", "") == "bernoulli_"
    chance: Any = (*args, kwargs.get("p", 0.5 if inplace else None))[1]
    if inplace:
        return x.copy_(torch.as_tensor(chance))
    return x.clone() if chance is None else torch.full_like(x, chance)


def _dropout(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``dropout(x, p, train)`` and its kinds."""
    given = dict(zip(("input", "p", "train"), args, strict=False)) | kwargs
    if not given.get("train"):
        return None
    name = getattr(func, "__name__", "")
    x: Tensor = given["input"]
    if name.startswith("native_dropout"):
        return x.clone(), torch.ones_like(x, dtype=torch.bool)
    return x if name.endswith("_") else x.clone()


def _attention(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``scaled_dot_product_attention(query, key, value, attn_mask, dropout_p)``."""
    if len(args) > 4 and args[4]:
        return func(*args[:4], 0.0, *args[5:], **kwargs)
    return func(*args, **{**kwargs, "dropout_p": 0.0}) if kwargs.get("dropout_p") else None


def _leaky(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``rrelu(x, lower, upper, training)``: the slope that it takes in eval mode."""
    given = dict(zip(("input", "lower", "upper", "training"), args, strict=False)) | kwargs
    return func(**{**given, "training": False}) if given.get("training") else None


def _gumbel(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """``gumbel_softmax(logits, tau, hard, eps, dim)``: the same noise in all of them leaves the softmax."""
    given: dict[str, Any] = {"tau": 1.0, "hard": False, "dim": -1}
    given |= dict(zip(("logits", "tau", "hard", "eps", "dim"), args, strict=False)) | kwargs
    logits: Tensor = given["logits"]
    soft = (logits / given["tau"]).softmax(given["dim"])
    if not given["hard"]:
        return soft
    return torch.zeros_like(soft).scatter_(given["dim"], soft.argmax(given["dim"], keepdim=True), 1.0)


_DRAWS: dict[str, Result] = {
    **dict.fromkeys(("rand_like", "randn_like", "randint_like"), _like),
    **dict.fromkeys(("rand", "randn", "randint"), _fresh),
    **dict.fromkeys(("uniform", "exponential", "random", "cauchy", "geometric", "log_normal"), _filled),
    "normal": _normal,
    "bernoulli": _coin,
    "poisson": lambda func, args, kwargs: args[0].clone(),
    **dict.fromkeys(
        ("dropout", "alpha_dropout", "feature_dropout", "feature_alpha_dropout", "native_dropout"), _dropout
    ),
    "scaled_dot_product_attention": _attention,
    "rrelu": _leaky,
    **dict.fromkeys(("gumbel_softmax", "python.gumbel_softmax"), _gumbel),
}


def held_still(name: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result of a random operation, whatever the number of channels; None if the operation is not random.

    Args:
        name: its canonical name.
        func: the operation.
        args: its positional arguments.
        kwargs: its keyword arguments.
    """
    draw = _DRAWS.get(name)
    return None if draw is None else draw(func, args, kwargs)
