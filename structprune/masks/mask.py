"""`Mask`: which entries of named tensors stay, as a plain value."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Column, Table
from torch import Tensor, nn

from structprune.errors import LoadError, PlanError
from structprune.masks.drawing import draw_matrices
from structprune.masks.named import NamedTensors, read, write
from structprune.masks.torch_masks import attach, require_fitting
from structprune.wrapping import prunable

KIND = "mask"


@dataclass(frozen=True, slots=True)
class TensorComparison:
    """Two masks of one tensor.

    Attributes:
        tensor: its name.
        entries: of the tensor.
        kept: how many each of the two keeps.
        overlap: entries that both keep over those that one of them keeps (Jaccard); 1 where neither keeps any.
        hamming: entries that the two choose differently.
    """

    tensor: str
    entries: int
    kept: tuple[int, int]
    overlap: float
    hamming: int


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two masks, tensor by tensor; printed as a table."""

    tensors: tuple[TensorComparison, ...]

    def __str__(self) -> str:
        """A line for each tensor."""
        table = Table(Column("tensor", overflow="fold"), "entries", "kept", "kept by the other", "overlap", "Hamming")
        for row in self.tensors:
            numbers = (f"{row.entries:,}", f"{row.kept[0]:,}", f"{row.kept[1]:,}", f"{row.overlap:.3f}")
            table.add_row(row.tensor, *numbers, f"{row.hamming:,}")
        text = io.StringIO()
        Console(file=text, width=100).print(table)
        return text.getvalue().rstrip()


class Mask(NamedTensors):
    """Which entries of named tensors stay: True where one does. One byte an entry in memory, one bit on disk.

    Example:
        >>> first = Mask({"w": torch.tensor([True, True, False])})
        >>> second = Mask({"w": torch.tensor([True, False, False])})
        >>> first.overlap(second), first.hamming(second), (first & ~second)["w"].tolist()
        (0.5, 1, [False, True, False])

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

    # -- combined and compared -----------------------------------------------------------------------------------

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

    def compared(self, other: Mask) -> Comparison:
        """The same tensor by tensor.

        Raises:
            PlanError: the two have other names or shapes.
        """
        self.require_alike(other)
        rows: list[TensorComparison] = []
        for name, mine in self._tensors.items():
            theirs = other._tensors[name]
            either, both = int((mine | theirs).sum()), int((mine & theirs).sum())
            kept = int(mine.sum()), int(theirs.sum())
            rows.append(TensorComparison(name, mine.numel(), kept, both / either if either else 1.0, either - both))
        return Comparison(tuple(rows))

    # -- on disk and drawn ---------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, eight entries a byte.

        Args:
            path: of the file.
        """
        write(path, KIND, self.packed(), {name: _shape(tensor) for name, tensor in self._tensors.items()})

    @classmethod
    def load(cls, path: str | Path) -> Mask:
        """The mask that `save` wrote.

        Args:
            path: of the file.

        Raises:
            LoadError: it is not such a file.
        """
        packed, shapes = read(path, KIND)
        if shapes.keys() != packed.keys():
            raise LoadError(f"{path} does not say the shapes of its tensors.")
        sizes_of: dict[str, list[int]] = {}
        for name, text in shapes.items():
            sizes = text.split(",") if text else []
            if not all(size.isdecimal() for size in sizes):
                raise LoadError(f"{path}: {name!r} is no packed mask.")
            sizes_of[name] = [int(size) for size in sizes]
        try:
            return cls.unpacked(packed, sizes_of)
        except PlanError as error:
            raise LoadError(f"{path}: {error}") from error

    def packed(self) -> dict[str, Tensor]:
        """Each tensor as bytes, eight entries a byte, the last byte filled up with zeros."""
        return {name: torch.from_numpy(np.packbits(t.cpu().numpy().reshape(-1))) for name, t in self._tensors.items()}

    @classmethod
    def unpacked(cls, packed: Mapping[str, Tensor], shapes: Mapping[str, list[int]]) -> Mask:
        """The mask of which `packed` gave these bytes.

        Raises:
            PlanError: a tensor has not the bytes that its shape needs.
        """
        tensors: dict[str, Tensor] = {}
        for name, shape in shapes.items():
            bits, count = packed[name], int(np.prod(shape, dtype=np.int64))
            if bits.dtype != torch.uint8 or bits.dim() != 1 or len(bits) != -(-count // 8):
                raise PlanError(f"{name!r} has {bits.numel()} bytes, where its shape {shape} needs {-(-count // 8)}.")
            tensors[name] = torch.from_numpy(np.unpackbits(bits.numpy(), count=count)).bool().view(shape)
        return cls(tensors)

    def draw(self, path: str | os.PathLike[str]) -> Path:
        """Draw each tensor as a matrix of outputs x inputs: dark where an entry stays.

        Args:
            path: the file to write; its ending says which format (pdf, svg, png).

        Raises:
            MissingExtraError: Matplotlib is not installed.
        """
        return draw_matrices({name: tensor.float() for name, tensor in self._tensors.items()}, path)

    # -- on a model ----------------------------------------------------------------------------------------------

    def apply(self, model: nn.Module) -> Callable[[], None]:
        """Set the entries that go to zero, in place.

        Args:
            model: has a parameter of each of the names.

        Returns:
            A function that gives the model its values back, bit for bit.

        Raises:
            PlanError: a name is no parameter of the model, is masked already, or has another shape there; the model is
                as it was.
        """
        parameters = require_fitting(prunable(model), self._tensors)
        lost = {name: parameters[name].detach()[self._off(parameters[name], name)] for name in self}
        with torch.no_grad():
            for name in self:
                parameters[name][self._off(parameters[name], name)] = 0

        def undo() -> None:
            with torch.no_grad():
                for name, values in lost.items():
                    parameters[name][self._off(parameters[name], name)] = values

        return undo

    def attach(self, model: nn.Module) -> Callable[[], None]:
        """Mask the tensors by ``torch.nn.utils.prune``, in place, so that they stay masked while they are trained.

        The masks are held as bool, one byte an entry. `structprune.masks.remove` makes them permanent.

        Args:
            model: has a parameter of each of the names.

        Returns:
            A function that takes the masks off: the parameters are again the same objects in the same order, with the
            values that they have by then; those that were masked have kept theirs bit for bit.

        Raises:
            PlanError: a name is no parameter of the model, is masked already, or has another shape there; the model is
                as it was.
        """
        return attach(prunable(model, inplace=True), self._tensors)

    def _off(self, parameter: Tensor, name: str) -> Tensor:
        """Where entries of a parameter go."""
        return ~self._tensors[name].to(parameter.device)


def _shape(tensor: Tensor) -> str:
    return ",".join(map(str, tensor.shape))
