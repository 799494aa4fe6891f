"""Saved tensors put into a model: checked against it by name, shape and kind of number."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from structprune.errors import LoadError
from structprune.tracing.state import held_tensors

# A model may be saved in one of these and built in another; eight bits are too few to compute with.
_REAL = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
_COMPLEX = {torch.complex32, torch.complex64, torch.complex128}


def fill(model: nn.Module, tensors: dict[str, Tensor], folder: Path) -> None:
    """Give the model's parameters and buffers the saved values, with their types; all of them, and nothing else.

    Args:
        model: of the shapes that were saved; its tensors may be on the ``meta`` device.
        tensors: the saved ones, by name.
        folder: where they come from, for messages.

    Raises:
        LoadError: they are not those of the model.
    """
    held = model.state_dict(keep_vars=True)
    missing, unknown = sorted(held.keys() - tensors.keys()), sorted(tensors.keys() - held.keys())
    if missing or unknown:
        raise LoadError(
            f"The tensors in {folder} are not those of the model that build_model makes: "
            f"missing {missing[:5]}, unknown {unknown[:5]}."
        )
    for name, old in held.items():
        _fitting(name, old, tensors[name], folder)
    if _make(model, tensors):
        held = model.state_dict(keep_vars=True)
    given: dict[int, str] = {}
    with torch.no_grad():
        for name, old in held.items():
            first = given.setdefault(id(old), name)
            if not _same(tensors[first], tensors[name]):
                raise LoadError(
                    f"{first!r} and {name!r} are one tensor in the model that build_model makes, and two with "
                    f"different values in {folder}. Build the model that was saved, with the same weights tied."
                )
            if first == name:
                # A copy where one saved tensor goes to two that are not tied.
                old.data = tensors[name].to(old.device, copy=True)


def _make(model: nn.Module, tensors: dict[str, Tensor]) -> bool:
    """Put tensors with memory in the place of those on the meta device; whether there were any.

    Raises:
        LoadError: one of them is no part of the state, so that its values are not known.
    """
    made: dict[int, Tensor] = {}
    for name, held in held_tensors(model).items():
        old = held.tensor
        if not old.is_meta:
            continue
        if name not in tensors:
            raise LoadError(
                f"build_model leaves {name!r} on the meta device, and it is not saved with the model, since it is no "
                "part of its state. Make it on the device where the model is to run."
            )
        if id(old) not in made:
            new = torch.empty_like(tensors[name])
            made[id(old)] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
            vars(made[id(old)]).update(vars(old))
        held.store[held.key] = made[id(old)]
    return bool(made)


def _fitting(name: str, old: Tensor, new: Tensor, folder: Path) -> None:
    """Refuse a tensor of another shape, or one that is no number of the kind that it should be."""
    if old.shape != new.shape:
        raise LoadError(
            f"{name!r} has the shape {list(new.shape)} in {folder} and {list(old.shape)} in the model that build_model "
            "makes, after pruning it by the plan. Build the model that was pruned."
        )
    # A model may have been saved in another precision than it is built in; counts and masks have none.
    precision = {old.dtype, new.dtype} <= _REAL or {old.dtype, new.dtype} <= _COMPLEX
    if not precision and old.dtype != new.dtype:
        raise LoadError(
            f"{name!r} is of {new.dtype} in {folder} and of {old.dtype} in the model that build_model makes. Build the "
            "model that was saved."
        )


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same bits; unlike `torch.equal`, NaN counts as itself."""
    return one is other or (
        one.dtype == other.dtype
        and torch.equal(one.contiguous().flatten().view(torch.uint8), other.contiguous().flatten().view(torch.uint8))
    )
