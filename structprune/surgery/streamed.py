"""Running a model on weights that are made as they are asked for: switched off, in another precision, one at a time.

While the two networks are compared, neither is copied. Each weight of the model gives way to a stand-in of the same
shape that takes no memory; a mode sees each operation that takes one, and hands it the weight itself: with the removed
slices zero, in the precision of the comparison. So no more than one large weight exists twice at any time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import _pop_mode_temporarily

from structprune.ops import op_of
from structprune.surgery.edits import RemovedSlice, Rescale
from structprune.surgery.slicing import rescaled, zero
from structprune.tracing.calls import CallMode
from structprune.tracing.opaque import opaque_of, watch_scripted
from structprune.tracing.shadow import shadow_of
from structprune.tracing.state import held_tensors
from structprune.tracing.trace import map_tensors
from structprune.tracing.vocabulary import Call, Kind

# Smaller tensors are changed beforehand: they are many, and take little memory.
SMALL = 2**16
# Weights made for one operation are kept for the next ones as long as all of them take no more bytes than this.
KEPT = 2**24
# Products with a larger weight are computed by so many bytes of its rows at a time.
PIECE = 2**24


class Streamed(CallMode):
    """Hands operations the weights that stand-ins stand for, and holds random draws still.

    Args:
        kind: the type that floating tensors have in this run; None leaves them as they are.

    Attributes:
        drawn: names of the operations that drew random numbers.
    """

    def __init__(self, kind: torch.dtype | None) -> None:
        super().__init__(op_of)
        self._kind = kind
        self._sources: dict[int, tuple[Tensor, list[RemovedSlice]]] = {}
        self._rescales: dict[int, list[Rescale]] = {}
        self._made: dict[int, Tensor] = {}
        self._written: dict[int, Tensor] = {}
        self._alive: list[Tensor] = []
        self.drawn: set[str] = set()

    def meta_like(self, tensor: Tensor, slices: list[RemovedSlice], unseen: bool) -> Tensor:
        """What the model holds in place of `tensor` during the run.

        A parameter that does not change is itself. A small one, one of a class of its own, and one that is used where
        the mode does not see it (`unseen`) are changed at once; so are buffers, since forwards write into them.
        """
        parameter = isinstance(tensor, nn.Parameter)
        changes = (tensor.is_floating_point() or tensor.is_complex()) and (
            bool(slices) or self._kind_of(tensor) != tensor.dtype
        )
        if parameter and not changes:
            return tensor
        if not parameter or unseen or type(tensor) is not nn.Parameter or _bytes(tensor) <= SMALL:
            made = self._changed(tensor, slices, fresh=True)
            return nn.Parameter(made, requires_grad=False) if parameter else made
        # An operation that the mode does not see must not go unnoticed: with NaN, the comparison fails.
        nothing = torch.full((1,), float("nan"), dtype=self._kind_of(tensor), device=tensor.device)
        made = nn.Parameter(nothing.expand(tensor.shape), requires_grad=False)
        self._sources[id(made)] = tensor, slices
        self._alive.append(made)
        return made

    def _kind_of(self, tensor: Tensor) -> torch.dtype:
        return self._kind if self._kind is not None and tensor.is_floating_point() else tensor.dtype

    def round_like(self, tensor: Tensor, rescales: list[Rescale]) -> None:
        """Let `tensor` have the rounding that multiplying it in half precision leaves in the pruned model."""
        if self._kind is not None and tensor.dtype != self._kind:
            self._rescales[id(tensor)] = rescales

    def _changed(self, tensor: Tensor, slices: Iterable[RemovedSlice], fresh: bool = False) -> Tensor:
        """`tensor` in the precision of the run, with the removed slices zero."""
        result = rounded(tensor.detach(), self._rescales.get(id(tensor), []), self._kind_of(tensor))
        removed = list(slices) if tensor.is_floating_point() or tensor.is_complex() else []
        if (removed or fresh) and result.data_ptr() == tensor.data_ptr():
            result = result.clone()
        for sliced in removed:
            zero(result, sliced)
        return result

    # -- the mode ------------------------------------------------------------------------------------------------

    def __enter__(self) -> Streamed:
        """From now on the mode sees each call."""
        watch_scripted(1)
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        """Calls are no longer seen."""
        watch_scripted(-1)
        super().__exit__(*error)

    def scripted(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A scripted function runs as it is, on the weights themselves."""
        args, kwargs = map_tensors(self._weight, (args, kwargs))
        with _pop_mode_temporarily():
            return function(*args, **kwargs)

    def _seen(self, call: Call, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one call of the torch API on the weights themselves."""
        if call.kind is Kind.SIZE:
            return func(*args, **kwargs)
        by_pieces = self._by_pieces(call, func, args, kwargs) if self._sources else None
        if by_pieces is not None:
            return by_pieces
        if call.inplace and args and id(args[0]) in self._sources:
            self._written[id(args[0])] = self._weight(args[0])
        if self._sources:
            args, kwargs = map_tensors(self._weight, args), map_tensors(self._weight, kwargs)
        still = held_still(call.name, func, args, kwargs)
        if still is None:
            return func(*args, **kwargs)
        self.drawn.add(call.name.removeprefix("python."))
        return still

    def _weight(self, tensor: Tensor) -> Tensor:
        """The weight that `tensor` stands for; another tensor itself."""
        source = self._sources.get(id(tensor))
        if source is None:
            return tensor
        weight = self._written.get(id(tensor), self._made.get(id(tensor)))
        if weight is None:
            weight = self._changed(*source)
            if _bytes(weight) <= KEPT:
                while sum(map(_bytes, self._made.values())) + _bytes(weight) > KEPT:
                    del self._made[next(iter(self._made))]  # the one made first
                self._made[id(tensor)] = weight
        return weight

    def _by_pieces(self, call: Call, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """Looking up rows of a large table, or a product with it, without the whole of it; None for anything else."""
        at = {"embedding": 0, "linear": 1}.get(call.name, len(args))
        source = self._sources.get(id(args[at])) if at < len(args) else None
        if source is None or id(args[at]) in self._written:
            return None
        weight, slices = source
        if not self._is_large(weight):
            return None
        if call.name == "embedding" and all(sliced.dim for sliced in slices):
            entries = func(weight, *map_tensors(self._weight, args[1:]), **kwargs).to(self._kind_of(weight))
            for sliced in slices:
                entries.index_fill_(-1, torch.tensor(sliced.removed, device=entries.device), 0)
            return entries
        if call.name == "embedding":
            return None
        rest = [self._weight(t) if isinstance(t, Tensor) else t for t in (args[0], *args[2:], *kwargs.values())]
        return self._linear(rest[0], weight, slices, next((b for b in rest[1:] if b is not None), None))

    def _is_large(self, weight: Tensor) -> bool:
        """Whether a matrix takes more than a piece; one that is rounded first is taken as a whole."""
        large = weight.numel() * self._kind_of(weight).itemsize > PIECE
        return large and weight.dim() == 2 and id(weight) not in self._rescales

    def _linear(self, x: Tensor, weight: Tensor, slices: list[RemovedSlice], bias: Tensor | None) -> Tensor:
        """A product with so many rows of the weight at a time as `PIECE` bytes hold."""
        kind = self._kind_of(weight)
        gone = torch.zeros(weight.shape[0], dtype=torch.bool, device=weight.device)
        columns: list[RemovedSlice] = []
        for sliced in slices:
            if sliced.dim:
                columns.append(sliced)
            else:
                gone[list(sliced.removed)] = True
        rows = max(1, PIECE // (weight.shape[1] * kind.itemsize))
        result = x.new_empty((*x.shape[:-1], weight.shape[0]))
        for start in range(0, weight.shape[0], rows):
            part = self._changed(weight[start : start + rows], columns)
            off = gone[start : start + rows]
            some = None if bias is None else bias[start : start + rows]
            result[..., start : start + rows] = nn.functional.linear(
                x, part.masked_fill(off[:, None], 0) if bool(off.any()) else part, some
            )
        return result


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def rounded(tensor: Tensor, rescales: list[Rescale], kind: torch.dtype) -> Tensor:
    """`tensor` in the type `kind`, multiplied in its own type and divided again."""
    result = tensor
    for rescale in rescales:
        result = rescaled(result, rescale, [])
    result = result.to(kind)
    for rescale in reversed(rescales):
        result = rescaled(result, replace(rescale, factor=1 / rescale.factor), [])
    return result


def streamed(
    model: nn.Module,
    slices: Iterable[RemovedSlice] = (),
    kind: torch.dtype | None = None,
    rescales: Iterable[Rescale] = (),
) -> tuple[nn.Module, Streamed]:
    """A shadow of `model` that computes as if `slices` were zero, and the mode that has to be active while it runs.

    Args:
        model: the model; it is left as it was.
        slices: slices of its tensors that are zero; a plan names a tied tensor once.
        kind: the type that floating tensors have; None leaves them as they are.
        rescales: what the pruned model is multiplied by; here it is only rounded as there, if `kind` is another type.
    """
    mode = Streamed(kind)
    held = held_tensors(model)
    removed: dict[int, list[RemovedSlice]] = {}
    for sliced in slices:
        removed.setdefault(id(held[sliced.tensor].tensor), []).append(sliced)
    factors: dict[int, list[Rescale]] = {}
    for rescale in rescales:
        factors.setdefault(id(held[rescale.tensor].tensor), []).append(rescale)
    # What runs inside a module that is taken as a whole is not seen by a mode.
    unseen = {
        id(inside.tensor)
        for module in model.modules()
        if opaque_of(module) is not None
        for inside in held_tensors(module).values()
    }

    def stand_in(_: str, tensor: Tensor) -> Tensor:
        if id(tensor) in factors:
            mode.round_like(tensor, factors[id(tensor)])
        return mode.meta_like(tensor, removed.get(id(tensor), []), id(tensor) in unseen)

    return shadow_of(model, stand_in, tracked=False).model, mode


# -- random numbers in a forward, held still: two networks of different width cannot draw the same ones --------------
# While two networks are compared, a draw gives one number for the whole tensor, so that channels that are kept get the
# same in both; dropout passes on what it gets, and a coin gives its probability.

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
