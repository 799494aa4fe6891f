"""What a pruned network must compute: the original with the removed channels switched off.

The oracle shares nothing with the engine but ``plan.removed`` and the names of norms. It zeroes every removed slice
of a copy of the original, runs the **unmodified** forward, and compares. Only a norm over a thinned axis cannot be had
that way, as its count changes; there it runs over the survivors (``support.survivors``). A mean is part of such a norm
only in a module for which ``plan.settings["over_survivors"]`` says so: everywhere else it counts all channels. Weights
that are normalised over their inputs keep the norms of the original.

Which elements of such a norm's input are dead is found by experiment, not by following the graph: an element is dead
when it stays the same whatever values the surviving weights and the inputs take, and did change while nothing was
switched off (so zero padding is not taken for it).
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from support.randomize import double, exchanged, floating_tensors, jitter, perturbed
from support.runs import Norms, Run, call, in_step

__all__ = ["Oracle", "call", "check", "double", "floating_tensors", "jitter", "relative_error", "switch_off"]

Removed = Mapping[str, Mapping[int, Sequence[int]]]


class HasRemoved(Protocol):
    """What the oracle takes from a plan."""

    @property
    def removed(self) -> Removed:
        """Tensor name -> dimension -> removed original indices."""
        ...

    @property
    def settings(self) -> Mapping[str, Any]:
        """Under ``"over_survivors"`` the norms that run over the channels that stay, by module and operation."""
        ...


# ------------------------------------------------------------------------------------------------- the reference run


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


def _switch_off(model: nn.Module, removed: Removed) -> nn.Module:
    """Set every removed slice of ``model`` to zero, in place; integers that are indices or masks stay."""
    tensors = floating_tensors(model) | {n: t for n, t in model.named_parameters() if t.is_complex()}
    with torch.no_grad():
        for name, dims in removed.items():
            for dim, indices in dims.items():
                if name in tensors:
                    tensors[name].index_fill_(dim, torch.as_tensor(list(indices), dtype=torch.long), 0.0)
    return model


def switch_off(model: nn.Module, removed: Removed) -> nn.Module:
    """A copy of ``model`` with every removed slice set to zero."""
    return _switch_off(copy.deepcopy(model), removed)


class Expected(NamedTuple):
    """What the original computes with channels off.

    Attributes:
        output: of the unmodified forward.
        widened: whether the forward casts down; a pruned network is then to be run by `Oracle.output`.
        changed: how far the channels move the output; where they do not, equality proves nothing. Activations are
            smooth for this: a ReLU may have cut these very channels off by itself.
    """

    output: Any
    widened: bool
    changed: float


class Oracle:
    """What one network computes with any of its channels off.

    Args:
        original: jittered, in evaluation mode, all in one floating type; not changed.
        inputs: a tensor, a tuple (positional) or a dict (keyword) of the same type.
    """

    def __init__(self, original: nn.Module, inputs: Any) -> None:
        self.original, self.inputs = original, inputs
        self.dtype = next((t.dtype for t in floating_tensors(original).values()), torch.float64)
        self._moved = perturbed(inputs, seed=7)
        self._natural: list[Tensor] = []
        self._whole = in_step((original, inputs), (self._other(), self._moved), self._note_natural, self.dtype)

    def _other(self) -> nn.Module:
        return exchanged(copy.deepcopy(self.original), 90_001, self.dtype).train(self.original.training)

    def _note_natural(self, position: int, x: Tensor, y: Tensor) -> None:
        del position
        self._natural.append(x == y)

    def expect(self, removed: Removed, norms: Collection[str] | None = ()) -> Expected:
        """The original with the slices `removed` switched off.

        `norms` are the modules whose means are parts of norms, as a plan names them; None if any mean may be.
        """
        off, other = switch_off(self.original, removed), _switch_off(self._other(), removed)
        masks: list[Tensor | None] = []

        def dead_of(position: int, x: Tensor, y: Tensor) -> Tensor | None:
            assert position < len(self._natural), "the forward depends on its data"
            natural = self._natural[position]
            assert natural.shape == x.shape, "the forward depends on its data"
            masks.append(_dead_elements(x == y, natural))
            return masks[-1]

        normalises = Norms(off, norms)
        smooth = in_step((off, self.inputs), (other, self._moved), dead_of, self.dtype, normalises, norms)
        del other
        remaining = iter(masks)

        def known(x: Tensor) -> Tensor | None:
            dead = next(remaining)
            assert dead is None or dead.shape == x.shape, "the forward depends on its data"
            return dead

        originals = floating_tensors(self.original)
        whole = [(tensor, originals[name]) for name, tensor in floating_tensors(off).items() if name in originals]
        with Run(known, smooth=False, dtype=self.dtype, normalises=normalises, whole=whole) as run:
            output = call(off, self.inputs)
        changed = relative_error(smooth, self._whole) if removed else 0.0
        return Expected(output, run.widened, changed)

    def output(self, slim: nn.Module, widened: bool) -> Any:
        """What a pruned network computes; in full precision where the reference was kept so."""
        if not widened:
            return call(slim, self.inputs)
        with Run(smooth=False, dtype=self.dtype):
            return call(slim, self.inputs)


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

    oracle = Oracle(original, inputs)
    expected = oracle.expect(plan.removed, plan.settings.get("over_survivors", ()))
    found = relative_error(oracle.output(slim, expected.widened), expected.output)
    assert found <= tol, (
        f"relative error {found:.3g} > {tol:g} against the original with these channels off: "
        + ", ".join(f"{name}{ {d: tuple(i) for d, i in dims.items()} }" for name, dims in plan.removed.items())
    )
    if plan.removed and matters:
        assert expected.changed > 1e-6, "switching these channels off changes nothing, so the comparison proves nothing"
