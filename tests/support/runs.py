"""Forwards that the oracle watches: reductions over the survivors, and two networks run in step."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Collection, Iterable, Mapping
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from support.randomize import map_tensors
from support.survivors import (
    DIVIDED,
    DOTS,
    GROUP_NORM,
    MEAN,
    MINUS,
    NORMS_OF_WEIGHTS,
    OF_ACTIVATIONS,
    OVER_SURVIVORS,
    SMOOTH,
    SMOOTH_EXTREMES,
)

# For the input of a reduction: which of its elements belong to removed channels, if any do.
DeadOf = Callable[[Tensor], Tensor | None]


def call(model: nn.Module, inputs: Any) -> Any:
    """Run ``model`` on a tensor, a tuple (positional) or a dict (keyword), on copies, without gradients."""
    inputs = map_tensors(inputs, lambda t: t.clone())
    with torch.no_grad():
        if isinstance(inputs, Mapping):
            return model(**inputs)
        return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


class Norms:
    """Whether the module that runs takes a mean as a part of a norm that its forward writes out.

    Args:
        model: its modules are watched from now on, so this must be a copy.
        named: such norms as a plan names them, ``"block.norm (mean)"``; None if any mean may be one.
    """

    def __init__(self, model: nn.Module, named: Collection[str] | None) -> None:
        self._named, self._inside = named, [""]
        for path, module in model.named_modules():
            module.register_forward_pre_hook(lambda *_, path=path: self._inside.append(path))
            module.register_forward_hook(self._leave, always_call=True)

    def _leave(self, *_: Any) -> None:
        self._inside.pop()

    def __call__(self) -> bool:
        """For a mean that is about to be taken."""
        return self._named is None or f"{self._inside[-1] or 'the model'} (mean)" in self._named


def none_dead(x: Tensor) -> None:
    """Nothing is switched off."""
    del x


def _opened(function: Any) -> Any:
    """A Python function of torch that runs its body under the mode instead of being seen as one call."""
    spaces = {**function.__globals__, "has_torch_function": lambda _: False}
    opened = FunctionType(function.__code__, spaces, function.__name__, function.__defaults__, function.__closure__)
    opened.__kwdefaults__ = function.__kwdefaults__
    return opened


_MULTI_HEAD_ATTENTION = _opened(F.multi_head_attention_forward)


class Run(TorchFunctionMode):
    """One forward with reductions over the survivors, in one precision throughout.

    With ``smooth``, activations that cut off are replaced by some that do not. A mean counts all channels, unless
    `normalises` says that it is part of a norm. Norms of weights are those of the original weights: `whole` has the
    tensors of a model with slices switched off, each with that of the original.
    """

    def __init__(
        self,
        dead_of: DeadOf = none_dead,
        *,
        smooth: bool,
        dtype: torch.dtype = torch.float64,
        normalises: Callable[[], bool] = lambda: False,
        whole: Iterable[tuple[Tensor, Tensor]] = (),
    ) -> None:
        super().__init__()
        self.whole = {id(off): (off, original) for off, original in whole}
        self.dead_of, self.smooth, self.dtype, self.normalises = dead_of, smooth, dtype, normalises
        self.means: list[tuple[Tensor, bool]] = []
        self.widened = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replace a reduction, smooth an activation, keep the precision where a forward casts down."""
        args, kwargs = self._widen(args, dict(kwargs or {}))
        return self._of_weights(func, args, kwargs, self._run(func, args, kwargs))

    def _of_weights(self, func: Any, args: Any, kwargs: Any, result: Any) -> Any:
        """`result`, unless it is a norm of weights: these are computed from the original weights too."""
        given: list[Tensor] = []
        map_tensors((args, kwargs), given.append)
        if func not in NORMS_OF_WEIGHTS or not all(id(tensor) in self.whole for tensor in given):
            return result
        original = func(*map_tensors(args, self._original), **map_tensors(kwargs, self._original))
        if func is torch._weight_norm:
            result = torch.where(result == 0, 0, original)
        elif func in DOTS:  # what a spectral norm divides by
            result = original
        self.whole[id(result)] = result, original
        return result

    def _original(self, tensor: Tensor) -> Tensor:
        return self.whole[id(tensor)][1]

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func is Tensor.float:
            self.widened = True
            return args[0].to(self.dtype)
        if func in OVER_SURVIVORS:
            return self._statistic(func, args, kwargs)
        if func in MINUS and (known := [over for mean, over in self.means if args[1] is mean]):
            return self._reduce(func, args, kwargs, known[0])
        if func is F.multi_head_attention_forward:
            with self:
                return _MULTI_HEAD_ATTENTION(*args, **kwargs)
        if func is torch._grouped_mm and args[0].dtype is torch.float64:  # it has no kernel for these
            return _grouped_mm(*args, **kwargs)
        if func is torch._weight_norm:  # a removed filter has norm 0, and 0 / 0 is not 0
            return func(*args, **kwargs).nan_to_num(0.0)
        if func in DIVIDED and isinstance(args[1], Tensor):  # neither is 0 / 0, as for the shares of a head that is off
            hollow = (args[0] == 0) & (args[1] == 0)
            return func(*args, **kwargs).masked_fill_(hollow, 0)
        if self.smooth and func in SMOOTH and _floating(args, kwargs):
            return SMOOTH[func](*args, **kwargs)
        return func(*args, **kwargs)

    def _widen(self, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        def wide(value: Any) -> Any:
            if isinstance(value, torch.dtype) and value in (torch.float32, torch.float16, torch.bfloat16):
                self.widened = True
                return self.dtype
            return value

        return tuple(map(wide, args)), {key: wide(value) for key, value in kwargs.items()}

    def _statistic(self, func: Any, args: Any, kwargs: Any) -> Any:
        of_weights = func not in OF_ACTIVATIONS and id(args[0] if args else kwargs["input"]) in self.whole
        over = not of_weights and (func not in MEAN or self.normalises())
        result = self._reduce(func, args, kwargs, over)
        self.means += [(part, over) for part in (result if isinstance(result, tuple) else (result,))]
        return result

    def _reduce(self, func: Any, args: Any, kwargs: Any, over: bool) -> Any:
        args = list(args)
        x = args.pop(0) if args else kwargs.pop("input")
        dead = self.dead_of(x)  # asked every time, so that two runs count alike
        if over and func in OF_ACTIVATIONS:
            dead = self._removed_of_norm(func, x, [*args, *kwargs.values()], dead)
        if "axis" in kwargs:
            kwargs["dim"] = kwargs.pop("axis")
        smooth = SMOOTH_EXTREMES.get(func) if self.smooth else None
        of_all, of_survivors = smooth or (func, (OVER_SURVIVORS | MINUS)[func])
        return of_all(x, *args, **kwargs) if dead is None or not over else of_survivors(dead, x, *args, **kwargs)

    def _removed_of_norm(self, func: Any, x: Tensor, given: list[Any], dead: Tensor | None) -> Tensor | None:
        """`dead`, and the channels for which the norm's own weights were switched off."""
        for tensor in given:
            off, original = self.whole.get(id(tensor), (None, None)) if isinstance(tensor, Tensor) else (None, None)
            if off is not None and bool((gone := (off == 0) & (original != 0)).any()):
                along = gone if func not in GROUP_NORM else gone.view(1, -1, *[1] * (x.ndim - 2))
                dead = along.expand(x.shape) if dead is None else dead | along
        return dead


def _floating(args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether an activation takes numbers: what is clamped as an index stays an index."""
    return (args[0] if args else kwargs["input"]).is_floating_point()


# -------------------------------------------------------------------------------------------------- two runs in step


class _Stopped(BaseException):
    """The other run is over before this one."""


class _Follower:
    """A run in a thread of its own that moves on only when it is told to: to its next reduction, or its end."""

    def __init__(self, model: nn.Module, inputs: Any, dtype: torch.dtype, named: Collection[str] | None) -> None:
        self._model, self._inputs, self._dtype = model, inputs, dtype
        self._norms = Norms(model, named)
        self._come: queue.SimpleQueue[Tensor | BaseException | None] = queue.SimpleQueue()
        self._go: queue.SimpleQueue[Tensor | type[_Stopped] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def _wait(self) -> Tensor | None:
        told = self._go.get()
        if told is _Stopped:
            raise _Stopped
        return told

    def _meet(self, x: Tensor) -> Tensor | None:
        self._come.put(x)
        return self._wait()

    def _work(self) -> None:
        try:
            self._wait()
            with Run(self._meet, smooth=True, dtype=self._dtype, normalises=self._norms):
                call(self._model, self._inputs)
            self._come.put(None)
        except BaseException as error:  # handed to the other thread, which raises it
            self._come.put(error)

    def next(self, dead: Tensor | None) -> Tensor | None:
        """The input of its next reduction, or nothing at its end; `dead` is the answer for the one before."""
        self._go.put(dead)
        found = self._come.get()
        if isinstance(found, BaseException):
            raise found
        return found

    def stop(self) -> None:
        """End its thread wherever it stands."""
        self._go.put(_Stopped)
        self._thread.join()


Compare = Callable[[int, Tensor, Tensor], Tensor | None]


def in_step(
    pairs: tuple[nn.Module, Any],
    others: tuple[nn.Module, Any],
    compare: Compare,
    dtype: torch.dtype,
    normalises: Callable[[], bool] = lambda: False,
    named: Collection[str] | None = (),
) -> Any:
    """The output of one smooth run beside another one of other values, with what `compare` finds dead left out.

    Only one of both runs at any time. `compare` is called with the number of a reduction and the two inputs that
    meet there, as soon as both have come to it, so that later ones see what earlier ones left out. `normalises` tells
    whether a mean of the first model is part of a norm, `named` are those of the other one (see `Norms`).

    Raises:
        AssertionError: the forward takes another way with other values.
    """
    follower = _Follower(*others, dtype, named)
    position, dead = 0, None

    def meet(x: Tensor) -> Tensor | None:
        nonlocal position, dead
        y = follower.next(dead)
        assert y is not None, "the forward depends on its data"
        assert y.shape == x.shape, "the forward depends on its data"
        dead = compare(position, x, y)
        position += 1
        return dead

    try:
        with Run(meet, smooth=True, dtype=dtype, normalises=normalises):
            output = call(*pairs)
        assert follower.next(dead) is None, "the forward depends on its data"
    finally:
        follower.stop()
    return output


def _grouped_mm(x: Tensor, weight: Tensor, offs: Tensor, **_: Any) -> Tensor:
    """Each token times the weight of the expert whose stretch it stands in."""
    expert = torch.bucketize(torch.arange(len(x)), offs, right=True)
    return torch.stack([token @ weight[number] for token, number in zip(x, expert.tolist(), strict=True)])
