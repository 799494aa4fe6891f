"""Which entries have the lowest scores: by amount, in slices or alone, and in blocks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from structprune.errors import PlanError

SCOPES = ("model", "layer", "tensor", "output")


def require_scope(scope: str, dim: int | None, among: tuple[str, ...] = SCOPES) -> None:
    """Check the name of a scope.

    Raises:
        PlanError: there is no such scope, or it does not go with slices.
    """
    if scope not in among:
        raise PlanError(f"There is no scope {scope!r}: give one of {', '.join(map(repr, among))}.")
    if scope == "output" and dim is not None:
        raise PlanError("scope='output' is for single entries; slices are chosen of a tensor, a layer or the model.")


def grouped(names: Iterable[str], scope: str) -> list[list[str]]:
    """The names of tensors that are looked at together."""
    groups: dict[str, list[str]] = {}
    for name in names:
        key = {"model": "", "layer": name.rpartition(".")[0]}.get(scope, name)
        groups.setdefault(key, []).append(name)
    return list(groups.values())


def lowest(
    parts: Mapping[str, tuple[Tensor, Tensor | None]],
    amount: float,
    dim: int | None,
    n: float,
    *,
    by_output: bool,
    cumulative: bool,
) -> dict[str, Tensor]:
    """Masks of some tensors without their lowest scores; of equal ones the later go.

    Args:
        parts: by name, scores and which of them are still kept (None: all are).
        amount: a fraction or a count of what is kept, over all the tensors together.
        dim: slices along this dimension go as a whole; None for single entries.
        n: order of the norm of a slice.
        by_output: the amount is of each index of the first dimension instead.
        cumulative: the amount is of everything, and what is gone already counts towards it.

    Raises:
        PlanError: `amount` is out of range.
    """
    if by_output:
        return {name: _lowest_of_rows(name, scores, kept, amount, cumulative) for name, (scores, kept) in parts.items()}
    flat = [_units(scores, kept, dim, n) for scores, kept in parts.values()]
    scores, kept = torch.cat([unit[0] for unit in flat]), torch.cat([unit[1] for unit in flat])
    count = _count(amount, int(kept.sum()), len(kept) if cumulative else None, list(parts))
    keep = _without_lowest(scores[None], kept[None], count)[0]
    pieces = keep.split([len(unit[0]) for unit in flat])
    masks: dict[str, Tensor] = {}
    for (name, (tensor, kept_before)), piece in zip(parts.items(), pieces, strict=True):
        shape = tensor.shape if dim is None else [-1 if d == dim % tensor.dim() else 1 for d in range(tensor.dim())]
        mask = piece.view(shape).expand(tensor.shape).to(tensor.device)
        masks[name] = mask if kept_before is None else mask & kept_before.to(tensor.device)
    return masks


def _units(scores: Tensor, given: Tensor | None, dim: int | None, n: float) -> tuple[Tensor, Tensor]:
    """Scores of entries or slices in a row, and which of them are kept."""
    kept = torch.ones_like(scores, dtype=torch.bool) if given is None else given.to(scores.device)
    if dim is None:
        return scores.reshape(-1).cpu(), kept.reshape(-1).cpu()
    rows = (scores * kept).movedim(dim, 0).reshape(scores.shape[dim], -1)
    return torch.linalg.vector_norm(rows, n, dim=1).cpu(), kept.movedim(dim, 0).flatten(1).any(1).cpu()


def _lowest_of_rows(name: str, scores: Tensor, given: Tensor | None, amount: float, cumulative: bool) -> Tensor:
    rows = scores.reshape(len(scores), -1) if scores.dim() else scores.reshape(1, 1)
    kept = torch.ones_like(rows, dtype=torch.bool) if given is None else given.reshape(rows.shape).to(rows.device)
    each = kept.sum(1)
    stay = torch.empty_like(kept)
    for entries in each.unique().tolist():
        count = _count(amount, entries, rows.shape[1] if cumulative else None, [name])
        these = each == entries
        stay[these] = _without_lowest(rows[these], kept[these], count)
    return stay.view(scores.shape)


def _without_lowest(scores: Tensor, kept: Tensor, count: int) -> Tensor:
    """In each row, which of the kept entries stay when the `count` lowest go."""
    # What is gone comes last in the order; sorted from behind, so that of equal scores the later go.
    order = scores.masked_fill(~kept, math.inf).flip(1).argsort(dim=1, stable=True)
    # An infinite score of what is kept would tie with what is gone.
    order = order.gather(1, (~kept.flip(1)).gather(1, order).to(torch.uint8).argsort(dim=1, stable=True))
    keep = kept.clone()
    return keep.scatter_(1, scores.shape[1] - 1 - order[:, :count], False)


def best_of_blocks(name: str, scores: Tensor, n: int, m: int) -> Tensor:
    """The mask that keeps the `n` highest of each `m` entries along the second dimension.

    Raises:
        PlanError: the tensor cannot be cut into such blocks, or `n` is out of range.
    """
    if not 1 <= n < m:
        raise PlanError(f"{n}:{m} is no pattern for {name!r}: keep at least 1 and fewer than all of a block.")
    if scores.dim() < 2 or scores.shape[1] % m:
        raise PlanError(
            f"{name!r} of shape {list(scores.shape)} has no blocks of {m} inputs. Choose other tensors by only(names)."
        )
    blocks = scores.movedim(1, -1).unflatten(-1, (-1, m))
    # Sorted downwards and stably, so that of equal scores the later go.
    best = blocks.argsort(dim=-1, descending=True, stable=True)[..., :n]
    mask = torch.zeros_like(blocks, dtype=torch.bool).scatter_(-1, best, True)
    return mask.flatten(-2).movedim(-1, 1).contiguous()


def _count(amount: float, kept: int, total: int | None, names: list[str]) -> int:
    """How many of the `kept` entries go; of a total, those that are gone already are taken off."""
    where = ", ".join(map(repr, names[:3])) + (" and others" if len(names) > 3 else "")
    entries = kept if total is None else total
    whole = isinstance(amount, int) and not isinstance(amount, bool)
    if not 0 <= amount <= (entries if whole else 1):  # NaN is in no range
        raise PlanError(
            f"amount={amount} is out of range for {where}: give a fraction from 0.0 to 1.0, or a count from 0 to "
            f"{entries}."
        )
    return max(0, (int(amount) if whole else round(amount * entries)) - (entries - kept))
