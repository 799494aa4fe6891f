"""What a pruned network must compute: the original with the removed channels switched off.

The oracle shares nothing with the engine but ``plan.removed``. It zeroes every removed slice of a copy of the
original, runs the **unmodified** forward, and compares. Only a norm or a mean over a thinned axis cannot be had that
way, as its count changes; there it runs over the survivors (``support.survivors``).

Which elements of such a norm's input are dead is found by experiment, not by following the graph: an element is dead
when it stays the same whatever values the surviving weights and the inputs take, and did change while nothing was
switched off (so zero padding is not taken for it).
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from support.randomize import double, floating_tensors, jitter, map_tensors, perturbed
from support.survivors import MINUS, OVER_SURVIVORS, SMOOTH

__all__ = ["call", "check", "double", "floating_tensors", "jitter", "reference", "relative_error", "switch_off"]

Removed = Mapping[str, Mapping[int, Sequence[int]]]


class HasRemoved(Protocol):
    """The one thing that the oracle takes from a plan."""

    @property
    def removed(self) -> Removed:
        """Tensor name -> dimension -> removed original indices."""
        ...


def call(model: nn.Module, inputs: Any) -> Any:
    """Run ``model`` on a tensor, a tuple (positional) or a dict (keyword), on copies, without gradients."""
    inputs = map_tensors(inputs, lambda t: t.clone())
    with torch.no_grad():
        if isinstance(inputs, Mapping):
            return model(**inputs)
        return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


# ------------------------------------------------------------------------------------------------- the reference run


class _Run(TorchFunctionMode):
    """One forward with reductions over the survivors; notes the input of each and whether precision was kept up."""

    def __init__(self, dead: Sequence[Tensor | None], *, smooth: bool) -> None:
        super().__init__()
        self.dead, self.smooth = dead, smooth
        self.seen: list[Tensor] = []
        self.means: list[Tensor] = []
        self.widened = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replace a reduction, smooth an activation, keep float64 where a forward casts down."""
        args, kwargs = self._widen(func, args, dict(kwargs or {}))
        if func is Tensor.float:
            self.widened = True
            return args[0].to(torch.float64)
        if func in OVER_SURVIVORS:
            result = self._reduce(func, args, kwargs)
            self.means += result if isinstance(result, tuple) else (result,)
            return result
        if func in MINUS and any(args[1] is mean for mean in self.means):
            return self._reduce(func, args, kwargs)
        if func is F.multi_head_attention_forward:  # let the mode see what it is made of
            with patch.object(F, "has_torch_function", lambda _: False), self:
                return func(*args, **kwargs)
        if func is torch._weight_norm:  # a removed filter has norm 0, and 0 / 0 is not 0
            return func(*args, **kwargs).nan_to_num(0.0)
        if self.smooth and func in SMOOTH:
            return SMOOTH[func](*args, **kwargs)
        return func(*args, **kwargs)

    def _widen(self, func: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        def wide(value: Any) -> Any:
            if isinstance(value, torch.dtype) and value in (torch.float32, torch.float16, torch.bfloat16):
                self.widened = True
                return torch.float64
            return value

        return tuple(map(wide, args)), {key: wide(value) for key, value in kwargs.items()}

    def _reduce(self, func: Any, args: Any, kwargs: Any) -> Any:
        args = list(args)
        x = args.pop(0) if args else kwargs.pop("input")
        position = len(self.seen)
        self.seen.append(x.detach().clone())
        dead = self.dead[position] if position < len(self.dead) else None
        if dead is None:
            return func(x, *args, **kwargs)
        assert dead.shape == x.shape, f"call {position} ({func}) saw {tuple(x.shape)}, expected {tuple(dead.shape)}"
        if "axis" in kwargs:
            kwargs["dim"] = kwargs.pop("axis")
        return (OVER_SURVIVORS | MINUS)[func](dead, x, *args, **kwargs)


def _observe(model: nn.Module, inputs: Any, dead: Sequence[Tensor | None]) -> list[Tensor]:
    with _Run(dead, smooth=True) as run:
        call(model, inputs)
    return run.seen


def _dead_elements(same: Tensor, natural: Tensor) -> Tensor | None:
    """Elements that never change: surely dead where they once did, and in a slice of nothing else also its padding."""
    surely = same & ~natural
    if not surely.any():
        return None
    dead = surely
    for axis in range(dead.ndim):
        others = [a for a in range(dead.ndim) if a != axis]
        if others:
            dead = dead | (same.amin(others, keepdim=True) & surely.amax(others, keepdim=True))
    return dead


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    return a is not None and b is not None and torch.equal(a, b)


def switch_off(model: nn.Module, removed: Removed) -> nn.Module:
    """A copy of ``model`` with every removed slice set to zero."""
    model = copy.deepcopy(model)
    tensors = floating_tensors(model)
    with torch.no_grad():
        for name, dims in removed.items():
            for dim, indices in dims.items():
                if name in tensors:
                    tensors[name].index_fill_(dim, torch.as_tensor(list(indices), dtype=torch.long), 0.0)
    return model


def reference(original: nn.Module, removed: Removed, inputs: Any) -> tuple[Any, bool]:
    """The output of the original with the removed channels off, and whether its forward casts below float64."""
    moved = perturbed(inputs, seed=7)
    other = jitter(copy.deepcopy(original), seed=90_001)
    off, other_off = switch_off(original, removed), switch_off(other, removed)
    whole = [_observe(original, inputs, ()), _observe(other, moved, ())]
    assert [t.shape for t in whole[0]] == [t.shape for t in whole[1]], "the forward depends on its data"
    natural = [a == b for a, b in zip(*whole, strict=True)]

    dead: list[Tensor | None] = [None] * len(natural)
    for _ in range(20):  # a norm without weights hides its dead channels until its own are known
        pair = [_observe(off, inputs, dead), _observe(other_off, moved, dead)]
        assert [t.shape for t in pair[0]] == [t.shape for t in natural], "the forward depends on its data"
        found = [_dead_elements(a == b, n) for a, b, n in zip(*pair, natural, strict=True)]
        if all(f is d or _equal(f, d) for f, d in zip(found, dead, strict=True)):
            break
        dead = found
    with _Run(dead, smooth=False) as run:
        output = call(off, inputs)
    return output, run.widened


# --------------------------------------------------------------------------------------------------------- comparing


def leaves(tree: Any, path: str = "output") -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a nested output (dicts, sequences, dataclasses) with where it stands."""
    if isinstance(tree, Tensor):
        yield path, tree
    elif isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from leaves(value, f"{path}[{key!r}]")
    elif isinstance(tree, list | tuple):
        for position, value in enumerate(tree):
            yield from leaves(value, f"{path}[{position}]")
    elif dataclasses.is_dataclass(tree):
        for field in dataclasses.fields(tree):
            yield from leaves(getattr(tree, field.name), f"{path}.{field.name}")


def relative_error(slim: Any, expected: Any) -> float:
    """Largest ``max|a - b| / max|b|`` over the tensors of two outputs; infinite if they differ in form."""
    got, want = list(leaves(slim)), list(leaves(expected))
    if [p for p, _ in got] != [p for p, _ in want] or not want:
        return math.inf
    worst = 0.0
    for (_, a), (_, b) in zip(got, want, strict=True):
        if a.shape != b.shape or a.dtype != b.dtype:
            return math.inf
        if not a.is_floating_point():
            worst = worst if torch.equal(a, b) else math.inf
            continue
        if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
            return math.inf
        if a.numel():
            gap, scale = float((a - b).abs().max()), float(b.abs().max())
            worst = max(worst, 0.0 if gap == 0 else gap / scale if scale else math.inf)
    return worst


def _expected_shapes(original: nn.Module, removed: Removed) -> dict[str, list[int]]:
    """The shape that each tensor should be left with; names of one tied tensor are one tensor."""
    tensors = floating_tensors(original)
    gone: dict[tuple[int, int], set[int]] = {}
    for name, dims in removed.items():
        for dim, indices in dims.items():
            if name in tensors:
                gone.setdefault((id(tensors[name]), dim), set()).update(indices)
    return {
        name: [size - len(gone.get((id(tensor), dim), ())) for dim, size in enumerate(tensor.shape)]
        for name, tensor in tensors.items()
    }


def check(
    original: nn.Module, slim: nn.Module, plan: HasRemoved, inputs: Any, tol: float = 1e-10, *, matters: bool = True
) -> None:
    """Assert that ``slim`` is the original with the plan's channels switched off.

    With ``matters`` also that it makes a difference which channels are off; a comparison of two networks that ignore
    them would prove nothing.
    """
    got = {name: list(tensor.shape) for name, tensor in floating_tensors(slim).items()}
    shapes = _expected_shapes(original, plan.removed)
    wrong = {name: (got.get(name), shape) for name, shape in shapes.items() if got.get(name) != shape}
    assert not wrong, f"shapes that do not fit plan.removed (got, expected): {wrong}"

    expected, widened = reference(original, plan.removed, inputs)
    if widened:
        with _Run((), smooth=False):
            output = call(slim, inputs)
    else:
        output = call(slim, inputs)
    found = relative_error(output, expected)
    assert found <= tol, (
        f"relative error {found:.3g} > {tol:g} against the original with these channels off: "
        + ", ".join(f"{name}{ {d: tuple(i) for d, i in dims.items()} }" for name, dims in plan.removed.items())
    )
    if plan.removed and matters:  # a ReLU may have cut these very channels off by itself, so look through smooth ones
        with _Run((), smooth=True):
            changed = relative_error(call(switch_off(original, plan.removed), inputs), call(original, inputs))
        assert changed > 1e-6, "switching these channels off changes nothing, so the comparison proves nothing"
