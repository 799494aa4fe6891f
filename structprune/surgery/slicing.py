"""The smaller tensors of a plan, for any kind of layer alike."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import astuple

import numpy as np
import torch
from torch import Tensor, nn

from structprune.errors import SurgeryError
from structprune.ops.gains import Gain, divisors
from structprune.surgery.edits import Edits, RemovedSlice, Rescale, SectionedSlice, ShiftedRescale
from structprune.tracing.state import Held


def kept(sliced: RemovedSlice) -> np.ndarray:
    """Original indices that stay, as the smaller tensor has them.

    Example:
        >>> kept(RemovedSlice("w", 0, 5, (1, 3))).tolist(), kept(RemovedSlice("w", 0, 5, (1, 3), (4, 0, 2))).tolist()
        ([0, 2, 4], [4, 0, 2])
    """
    mask = np.ones(sliced.size, dtype=bool)
    mask[np.fromiter(sliced.removed, dtype=np.int64, count=len(sliced.removed))] = False
    stays = np.flatnonzero(mask)
    if sliced.order is None:
        return stays
    order = np.array(sliced.order, dtype=np.int64)
    if not np.array_equal(np.sort(order), stays):
        raise SurgeryError(f"The order of what stays of {sliced.tensor!r} does not fit what goes. Make a new plan.")
    return order


class KeptIndices:
    """`kept` for the slices of one plan, whose coupled tensors share what goes, and so the indices that stay."""

    def __init__(self) -> None:
        self._known: dict[tuple[object, ...], np.ndarray] = {}

    def __call__(self, sliced: RemovedSlice) -> np.ndarray:
        """Original indices that stay; not to be written into."""
        # The very tuples first, since they may be long.
        same = sliced.size, id(sliced.removed), id(sliced.order)
        indices = self._known.get(same)
        if indices is None:
            equal = sliced.size, sliced.removed, sliced.order
            indices = self._known.get(equal)
            if indices is None:
                indices = self._known[equal] = kept(sliced)
            self._known[same] = indices
        return indices


def take(tensor: Tensor, dim: int, index: np.ndarray) -> Tensor:
    """The entries `index` of dimension `dim`; a run such as [2, 3, 4] is cut out without an index, as a view."""
    run = len(index) and index[-1] - index[0] == len(index) - 1
    if run and bool((np.diff(index) == 1).all()):
        return tensor.narrow(dim, int(index[0]), len(index))
    return tensor.index_select(dim, torch.from_numpy(index).to(tensor.device))


def taken(tensor: Tensor, slices: list[RemovedSlice], stays: Callable[[RemovedSlice], np.ndarray] = kept) -> Tensor:
    """What stays of a tensor; a view of it where each dimension keeps a run. `stays` gives the indices that stay.

    A weight (8, 6) that loses 2 of its outputs and 3 of its inputs: first (8, 6) -> (8, 3), then (8, 3) -> (6, 3).
    Of a grouped convolution, a weight (4, 3, 3, 3) with sections ((0, 2), (1, 2)): outputs 0 and 1 keep inputs 0 and 2,
    outputs 2 and 3 keep inputs 1 and 2, which gives (4, 2, 3, 3).
    """
    # Sections are those of the whole dimension 0. Then the dimension that loses the largest share goes first: less is
    # copied twice.
    for sliced in sorted(slices, key=lambda t: (not isinstance(t, SectionedSlice), -len(t.removed) / t.size)):
        if isinstance(sliced, SectionedSlice):
            parts = tensor.chunk(len(sliced.sections))
            kept_in = [np.array(section, dtype=np.int64) for section in sliced.sections]
            tensor = torch.cat([take(part, sliced.dim, stay) for part, stay in zip(parts, kept_in, strict=True)])
        else:
            tensor = take(tensor, sliced.dim, stays(sliced))
    return tensor


def zero(tensor: Tensor, sliced: RemovedSlice, value: float = 0) -> None:
    """Set what goes of a tensor to zero, or to another value, in place."""
    if not isinstance(sliced, SectionedSlice):
        tensor.index_fill_(sliced.dim, torch.tensor(sliced.removed, device=tensor.device), value)
        return
    for part, section in zip(tensor.chunk(len(sliced.sections)), sliced.sections, strict=True):
        gone = np.setdiff1d(np.arange(sliced.size), section)  # of 3 indices with section (0, 2): [1]
        part.index_fill_(sliced.dim, torch.from_numpy(gone).to(tensor.device), value)


def _sliced(tensor: Tensor, slices: list[RemovedSlice], stays: KeptIndices) -> Tensor:
    result = taken(tensor.detach(), slices, stays)
    view = not result.is_meta and result.untyped_storage().nbytes() > result.numel() * result.element_size()
    return result.clone(memory_format=torch.contiguous_format) if view or _shares(result, tensor) else result


def smaller_tensor(tensor: Tensor, plan: Edits, names: Collection[str]) -> Tensor:
    """What a plan makes of one tensor, which the model holds under `names`, in memory of its own."""
    slices = [sliced for sliced in plan.slices if sliced.tensor in names]
    result = _sliced(tensor, slices, KeptIndices())
    for rescale in plan.rescales:
        if isinstance(rescale, Rescale) and rescale.tensor in names:
            result = rescaled(result, rescale, slices)
    return result.contiguous()


def _shares(result: Tensor, tensor: Tensor) -> bool:
    if not result.numel():
        return True
    return not result.is_meta and result.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()


def rescaled(tensor: Tensor, rescale: Rescale, slices: list[RemovedSlice]) -> Tensor:
    """A tensor that has lost `slices`, multiplied, in its own type."""
    if isinstance(rescale, ShiftedRescale):
        wide = tensor if tensor.dtype == torch.float64 else tensor.float()
        moved = rescaled(wide + rescale.offset, Rescale(*astuple(rescale)[:4]), slices)
        return (moved - rescale.offset).to(tensor.dtype)
    if rescale.positions is None:
        return tensor * rescale.factor
    # Positions are original ones: with [0, 2, 4] left, positions (2, 3) and factor 0.5, `factor` is [1, 0.5, 1].
    stays = next((kept(t) for t in slices if t.dim == rescale.dim), np.arange(tensor.shape[rescale.dim]))
    factor = np.where(np.isin(stays, rescale.positions), rescale.factor, 1.0)
    shape = [-1 if dim == rescale.dim else 1 for dim in range(tensor.dim())]
    return tensor * torch.from_numpy(factor).to(tensor.device, tensor.dtype).view(shape)


def _by_tensor(plan: Edits, tensors: dict[str, Held]) -> dict[str, list[RemovedSlice]]:
    """What the plan removes from each tensor, once it is known to fit."""
    by_tensor: dict[str, list[RemovedSlice]] = {}
    limits: dict[int, tuple[int, int]] = {}  # by the ``id`` of what goes
    for sliced in plan.slices:
        held = tensors.get(sliced.tensor)
        if held is None:
            raise SurgeryError(
                f"The plan slices {sliced.tensor!r}, which this model does not have. Apply a plan to the model it was "
                "made for."
            )
        shape = tuple(held.tensor.shape)
        if id(sliced.removed) not in limits:
            limits[id(sliced.removed)] = min(sliced.removed, default=0), max(sliced.removed, default=0)
        first, last = limits[id(sliced.removed)]
        inside = not sliced.removed or (first >= 0 and last < sliced.size)
        if sliced.dim >= len(shape) or shape[sliced.dim] != sliced.size or not inside:
            raise SurgeryError(
                f"The plan slices dimension {sliced.dim} of {sliced.tensor!r} from {sliced.size} entries, but its "
                f"shape is {list(shape)}. Has the model been pruned since the plan was made? Make a new plan."
            )
        if isinstance(sliced, SectionedSlice) and not _fits(sliced, shape):
            raise SurgeryError(
                f"The plan slices dimension {sliced.dim} of {sliced.tensor!r} in sections that a tensor of shape "
                f"{list(shape)} does not have. Make a new plan."
            )
        before = by_tensor.setdefault(sliced.tensor, [])
        before.append(sliced)
        if len(before) > 1 and len({t.dim for t in before}) < len(before):
            raise SurgeryError(f"The plan slices dimension {sliced.dim} of {sliced.tensor!r} twice. Make a new plan.")
    return by_tensor


def _fits(sliced: SectionedSlice, shape: tuple[int, ...]) -> bool:
    """Whether a tensor of this shape has the sections, and each keeps as many of its indices as the slice says."""
    left, count = sliced.size - len(sliced.removed), len(sliced.sections)
    if not left or not count or not sliced.dim or shape[0] % count:
        return False
    return all(
        len(set(section)) == len(section) == left and min(section) >= 0 and max(section) < sliced.size
        for section in sliced.sections
    )


def regained(
    gain: Gain, old: dict[str, Tensor], new: dict[int, Tensor], slices: dict[str, list[RemovedSlice]]
) -> Tensor:
    """The smaller `gain.tensor` that makes up for a smaller norm.

    Args:
        gain: which one.
        old: the tensors of the original by name.
        new: smaller tensors by the ``id`` of the old ones.
        slices: what goes, by tensor.
    """
    smaller = {name: new.get(id(tensor), tensor.detach()) for name, tensor in old.items()}
    before, after = divisors(gain, old), divisors(gain, smaller)
    for sliced in slices.get(gain.weight, ()) if not gain.vectors else ():
        if sliced.dim == gain.dim:
            before = take(before, gain.dim, kept(sliced))
    factor = before / after if gain.vectors else after / before
    value = smaller[gain.tensor]
    return (value * torch.where(factor.isfinite(), factor, 1).reshape(value.shape if factor.dim() else ())).to(
        value.dtype
    )


def smaller_tensors(plan: Edits, tensors: dict[str, Held]) -> dict[int, Tensor]:
    """The new tensor for each tensor that the plan changes, by the ``id`` of the old one.

    Raises:
        SurgeryError: a tensor of the plan is missing or has another size.
    """
    by_tensor = _by_tensor(plan, tensors)
    stays = KeptIndices()
    result: dict[int, Tensor] = {}
    for name, slices in by_tensor.items():
        old = tensors[name].tensor
        result[id(old)] = _sliced(old, slices, stays)
    for rescale in plan.rescales:
        _check_rescale(rescale, tensors)
        old = tensors[rescale.tensor].tensor
        if isinstance(rescale, Gain):
            olds = {name: tensors[name].tensor for name in rescale.names}
            result[id(old)] = regained(rescale, olds, result, by_tensor)
        else:
            smaller = result.get(id(old), old.detach())
            result[id(old)] = rescaled(smaller, rescale, by_tensor.get(rescale.tensor, []))
    for name in by_tensor.keys() | {rescale.tensor for rescale in plan.rescales}:
        old = tensors[name].tensor
        if isinstance(old, nn.Parameter) and old.grad is not None:
            result[id(old.grad)] = _sliced(old.grad, by_tensor.get(name, []), stays)
    return result


def _check_rescale(rescale: Rescale | Gain, tensors: dict[str, Held]) -> None:
    """The tensors of a rescale must be there, and have the entries that it names."""
    for name in rescale.names if isinstance(rescale, Gain) else (rescale.tensor,):
        if name not in tensors:
            raise SurgeryError(f"The plan rescales {name!r}, which this model does not have.")
    if isinstance(rescale, Gain):
        return
    old = tensors[rescale.tensor].tensor
    size = old.shape[rescale.dim] if rescale.dim < old.dim() else 0
    if any(position >= size for position in rescale.positions or ()):
        raise SurgeryError(
            f"The plan rescales dimension {rescale.dim} of {rescale.tensor!r}, whose shape {list(old.shape)} does "
            "not have it. Make a new plan."
        )
