"""Layers that have code of their own to make them smaller: what it changes beside a plan."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from structprune.errors import PlanError
from structprune.surgery.apply import apply
from structprune.surgery.edits import AttributeEdit, Edits

Slim = Callable[[nn.Module, list[int]], Any]
Beyond = list[tuple[tuple[str, int], tuple[int, ...]]]


def own_changes(model: nn.Module, plan: Edits, own: Mapping[type, Slim]) -> tuple[Beyond, list[AttributeEdit]]:
    """What the code of layers removes beside a plan, and the ints that it sets beside those that the plan sets.

    Each is asked to make a copy of its layer smaller, where all that the plan removes from it has the same indices.

    Args:
        model: the model of the plan; it stays as it is.
        plan: what is to go.
        own: for a class of modules, what removes channels, given by their indices, from such a module in place.

    Returns:
        Pairs of a dimension of a tensor and indices that go too, and edits to be made with those of the plan.

    Raises:
        PlanError: such code makes other tensors than the plan does.
    """
    beyond: Beyond = []
    edits: list[AttributeEdit] = []
    for path, module in model.named_modules() if own else ():
        slim = next((each for kind, each in own.items() if isinstance(module, kind)), None)
        gone = {part.removed for part in plan.slices if part.tensor.startswith(f"{path}.")}
        if slim is None or len(gone) != 1:
            continue
        theirs, ours = copy.deepcopy(module), apply(model, plan, inplace=False).get_submodule(path)
        slim(theirs, list(*gone))
        made, wanted = theirs.state_dict(), ours.state_dict()
        smaller = [(name, dim) for name in wanted for dim in _smaller(made[name], wanted[name])]
        if not smaller and not all(_same(made[name], wanted[name]) for name in wanted):
            raise PlanError(f"Its own code makes other tensors of {path!r} than the forward asks for.")
        beyond += [((f"{path}.{name}", dim), next(iter(gone))) for name, dim in smaller]
        edits += _edits(path, module, theirs, ours)
    return beyond, edits


def _smaller(made: Tensor, wanted: Tensor) -> list[int]:
    return [dim for dim, size in enumerate(wanted.shape) if made.shape[dim] < size]


def _same(made: Tensor, wanted: Tensor) -> bool:
    return torch.equal(made.nan_to_num(), wanted.nan_to_num())


def _edits(path: str, module: nn.Module, theirs: nn.Module, ours: nn.Module) -> list[AttributeEdit]:
    """The ints of a layer that its own code sets and the plan does not."""
    ints = [(name, old, vars(theirs)[name]) for name, old in vars(module).items() if type(old) is int]
    return [AttributeEdit(path, (name,), old, new) for name, old, new in ints if old != new != vars(ours)[name]]
