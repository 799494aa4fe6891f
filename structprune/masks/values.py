"""`Saliency` and `Mask`: scores and choices for each entry of named tensors, as plain values."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Self

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from structprune.errors import LoadError, PlanError
from structprune.masks.torch_masks import masked_tensors
from structprune.wrapping import prunable

SCOPES = ("model", "layer", "tensor")


class _Named(Mapping[str, Tensor]):
    """Tensors by name; neither the names nor the tensors change: they are copied in, and copied out."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = {name: self._checked(name, tensor).detach().clone() for name, tensor in tensors.items()}

    @staticmethod
    def _checked(name: str, tensor: Tensor) -> Tensor:
        return tensor

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._tensors:
            known = ", ".join(map(repr, self._tensors)) or "none"
            raise KeyError(f"There is no tensor {name!r}; known are {known}.")
        return self._tensors[name].clone()

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name}: {list(tensor.shape)}" for name, tensor in self._tensors.items())
        return f"{type(self).__name__}({shapes})"

    def _with(self, other: _Named, join: Callable[[Tensor, Tensor], Tensor]) -> Self:
        """Entry by entry.

        Raises:
            PlanError: the two have other names or shapes.
        """
        if mismatch := self._mismatch(other):
            raise PlanError(mismatch)
        return type(self)({name: join(tensor, other._tensors[name]) for name, tensor in self._tensors.items()})

    def _mismatch(self, other: _Named) -> str:
        """What does not fit; empty if all does."""
        for name in [*self, *other]:
            if name not in self or name not in other:
                return f"{name!r} is in one of the two {type(self).__name__} values only."
            if self._tensors[name].shape != other._tensors[name].shape:
                shapes = list(self._tensors[name].shape), list(other._tensors[name].shape)
                return f"{name!r} has the shapes {shapes[0]} and {shapes[1]} in the two values."
        return ""


class Mask(_Named):
    """Which entries of named tensors stay: True where one does. One byte an entry in memory.

    Args:
        tensors: bool tensors by the names of parameters.

    Raises:
        PlanError: a tensor is not of bool.
    """

    @staticmethod
    def _checked(name: str, tensor: Tensor) -> Tensor:
        if tensor.dtype != torch.bool:
            raise PlanError(f"The mask of {name!r} is of {tensor.dtype}; give bool, True where an entry stays.")
        return tensor

    def __and__(self, other: Mask) -> Mask:
        """What stays in both."""
        return self._with(other, torch.logical_and)

    def __or__(self, other: Mask) -> Mask:
        """What stays in one of them."""
        return self._with(other, torch.logical_or)

    def __invert__(self) -> Mask:
        """What goes, in place of what stays."""
        return Mask({name: ~tensor for name, tensor in self._tensors.items()})

    @property
    def kept(self) -> int:
        """Entries that stay."""
        return sum(int(tensor.sum()) for tensor in self._tensors.values())

    @property
    def entries(self) -> int:
        """All entries."""
        return sum(tensor.numel() for tensor in self._tensors.values())

    def overlap(self, other: Mask) -> float:
        """Entries that stay in both over those that stay in one of them (Jaccard); 1 where nothing stays in either."""
        either = (self | other).kept
        return (self & other).kept / either if either else 1.0

    def hamming(self, other: Mask) -> int:
        """How many entries the two choose differently."""
        return self._with(other, torch.logical_xor).kept

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, eight entries a byte.

        Args:
            path: of the file.
        """
        packed = {name: torch.from_numpy(np.packbits(t.cpu().numpy().reshape(-1))) for name, t in self._tensors.items()}
        shapes = {name: ",".join(map(str, tensor.shape)) for name, tensor in self._tensors.items()}
        save_file(packed, path, {**shapes, "": "structprune mask"})

    @classmethod
    def load(cls, path: str | Path) -> Mask:
        """The mask that `save` wrote.

        Args:
            path: of the file.

        Raises:
            LoadError: it is not such a file.
        """
        try:
            with safe_open(path, "pt") as file:
                shapes = dict(file.metadata() or {})
            packed = load_file(path)
        except (SafetensorError, OSError) as error:
            raise LoadError(f"{path} is no safetensors file: {error}") from error
        if shapes.pop("", None) != "structprune mask" or shapes.keys() != packed.keys():
            raise LoadError(f"{path} holds no mask that Mask.save wrote.")
        found: dict[str, Tensor] = {}
        for name, bits in packed.items():
            text = shapes[name].split(",") if shapes[name] else []
            if not all(size.isdecimal() for size in text) or bits.dtype != torch.uint8:
                raise LoadError(f"{path}: {name!r} is no packed mask.")
            shape = [int(size) for size in text]
            count = int(np.prod(shape, dtype=np.int64))
            if bits.dim() != 1 or len(bits) != -(-count // 8):
                raise LoadError(
                    f"{path}: {name!r} has {bits.numel()} bytes, where its shape {shape} needs another number."
                )
            found[name] = torch.from_numpy(np.unpackbits(bits.numpy(), count=count)).bool().view(shape)
        return cls(found)

    def apply(self, model: nn.Module) -> Callable[[], None]:
        """Set the entries that go to zero, in place.

        Args:
            model: has a parameter of each of the names.

        Returns:
            A function that gives the model its values back, bit for bit.

        Raises:
            PlanError: a name is no parameter of the model, or has another shape there; the model is as it was.
        """
        parameters = dict(prunable(model).named_parameters())
        for name, mask in self._tensors.items():
            if name not in parameters:
                raise PlanError(f"The model has no parameter {name!r} that could be masked.")
            if parameters[name].shape != mask.shape:
                shapes = list(mask.shape), list(parameters[name].shape)
                raise PlanError(f"The mask of {name!r} has the shape {shapes[0]}, the parameter {shapes[1]}.")
        lost = {name: parameters[name].detach()[self._on(parameters[name], name)] for name in self}
        with torch.no_grad():
            for name in self:
                parameters[name][self._on(parameters[name], name)] = 0

        def undo() -> None:
            with torch.no_grad():
                for name, values in lost.items():
                    parameters[name][self._on(parameters[name], name)] = values

        return undo

    def _on(self, parameter: Tensor, name: str) -> Tensor:
        """Where entries of a parameter go."""
        return ~self._tensors[name].to(parameter.device)


class Saliency(_Named):
    """A score for each entry of named tensors; the lower, the sooner it goes.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> mask = Saliency.magnitude(model).mask(0.75)
        >>> mask.kept, mask.entries
        (12, 48)
        >>> undo = mask.apply(model)
        >>> int((model[0].weight == 0).sum() + (model[2].weight == 0).sum())
        36
        >>> undo()

    Args:
        tensors: floating tensors by the names of parameters.

    Raises:
        PlanError: a tensor is not floating, or holds NaN.
    """

    @staticmethod
    def _checked(name: str, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            raise PlanError(f"The saliency of {name!r} is of {tensor.dtype}; give floating numbers.")
        if bool(tensor.isnan().any()):
            raise PlanError(f"The saliency of {name!r} holds NaN, which has no order.")
        return tensor

    @classmethod
    def magnitude(cls, model: nn.Module, names: Iterable[str] | None = None) -> Saliency:
        """Absolute values.

        Args:
            model: of which masked tensors count with their zeros.
            names: of parameters; None for all of two dimensions or more.

        Raises:
            PlanError: a name is no parameter of the model.
        """
        return cls({name: tensor.abs() for name, tensor in _chosen(model, names).items()})

    @classmethod
    def gradient_times_weight(cls, model: nn.Module, names: Iterable[str] | None = None) -> Saliency:
        """Absolute values of weight times gradient, with the gradients that the parameters hold (LeCun 1990, SNIP).

        Args:
            model: after ``loss.backward()``.
            names: of parameters; None for all of two dimensions or more.

        Raises:
            PlanError: a name is no parameter of the model, or has no gradient.
        """
        parameters = dict(prunable(model).named_parameters())
        scores: dict[str, Tensor] = {}
        for name, tensor in _chosen(model, names).items():
            held = parameters.get(name, parameters.get(f"{name}_orig"))
            if held is None or held.grad is None:
                raise PlanError(f"{name!r} has no gradient: call backward() on a loss first.")
            scores[name] = (tensor * held.grad).abs()
        return cls(scores)

    def __add__(self, other: Saliency) -> Saliency:
        """Sums of the scores."""
        return self._with(other, torch.add)

    def __mul__(self, other: Saliency | float) -> Saliency:
        """Products with other scores, or with a number."""
        if isinstance(other, Saliency):
            return self._with(other, torch.mul)
        return Saliency({name: tensor * other for name, tensor in self._tensors.items()})

    def min(self, other: Saliency) -> Saliency:
        """The smaller of two scores, entry by entry."""
        return self._with(other, torch.minimum)

    def max(self, other: Saliency) -> Saliency:
        """The larger of two scores, entry by entry."""
        return self._with(other, torch.maximum)

    def mask(self, amount: float, scope: str = "model") -> Mask:
        """The mask without the lowest scores; of equal ones the later go.

        Args:
            amount: how many go: a fraction (a float from 0 to 1) or a count (an int), rounded as torch does.
            scope: whether that is of the whole ``"model"``, of each ``"layer"`` (all tensors of one module) or of each
                ``"tensor"``.

        Raises:
            PlanError: `amount` is out of range, or there is no such scope.
        """
        if scope not in SCOPES:
            raise PlanError(f"There is no scope {scope!r}: give one of {', '.join(map(repr, SCOPES))}.")
        groups: dict[str, list[str]] = {}
        for name in self:
            key = "" if scope == "model" else name.rpartition(".")[0] if scope == "layer" else name
            groups.setdefault(key, []).append(name)
        found: dict[str, Tensor] = {}
        for names in groups.values():
            found |= self._lowest(names, amount)
        return Mask({name: found[name] for name in self})

    def _lowest(self, names: list[str], amount: float) -> dict[str, Tensor]:
        parts = [self._tensors[name] for name in names]
        scores = torch.cat([part.reshape(-1).double().cpu() for part in parts])
        count = _count(amount, len(scores), names)
        keep = torch.ones(len(scores), dtype=torch.bool)
        # Sorted from behind, so that of equal scores the later go.
        keep[len(scores) - 1 - scores.flip(0).argsort(stable=True)[:count]] = False
        pieces = keep.split([part.numel() for part in parts])
        return {
            name: piece.view(part.shape).to(part.device) for name, piece, part in zip(names, pieces, parts, strict=True)
        }


def _count(amount: float, entries: int, names: list[str]) -> int:
    where = ", ".join(map(repr, names[:3])) + (" and others" if len(names) > 3 else "")
    whole = isinstance(amount, int) and not isinstance(amount, bool)
    if not 0 <= amount <= (entries if whole else 1):  # NaN is in no range
        raise PlanError(
            f"amount={amount} is out of range for {where}: give a fraction from 0.0 to 1.0, or a count from 0 to "
            f"{entries}."
        )
    return int(amount) if whole else round(amount * entries)


def _chosen(model: nn.Module, names: Iterable[str] | None) -> dict[str, Tensor]:
    tensors = masked_tensors(prunable(model))
    if names is None:
        return {name: tensor for name, tensor in tensors.items() if tensor.dim() > 1}
    wanted = list(names)
    for name in wanted:
        if name not in tensors:
            raise PlanError(f"The model has no parameter {name!r}.")
    return {name: tensors[name] for name in wanted}
