"""`sparsity`: how many entries of each tensor are zero."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from html import escape

from torch import Tensor, nn

from structprune.errors import PlanError
from structprune.masks.torch_masks import masked_tensors
from structprune.wrapping import prunable

NOTE = (
    "Zeros alone make dense hardware no faster: structprune.masks.compact cuts out the channels that they switch off."
)


@dataclass(frozen=True, slots=True)
class TensorSparsity:
    """Zeros of one tensor.

    Attributes:
        tensor: its name, as the layer uses it: ``"conv1.weight"``, also where a mask makes it of ``weight_orig``.
        zeros: entries that are zero.
        entries: all of them.
    """

    tensor: str
    zeros: int
    entries: int


@dataclass(frozen=True, slots=True)
class Sparsity:
    """Zeros of the tensors of a model, and in all.

    Example:
        >>> import torch
        >>> from structprune import masks
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 2, bias=False))
        >>> _ = torch.nn.utils.prune.l1_unstructured(model[0], "weight", amount=2)
        >>> print(masks.sparsity(model))
        Sparsity in 0.weight: 25.00%
        Global sparsity: 25.00%
    """

    tensors: tuple[TensorSparsity, ...]

    @property
    def zeros(self) -> int:
        """Entries that are zero, in all tensors."""
        return sum(tensor.zeros for tensor in self.tensors)

    @property
    def entries(self) -> int:
        """Entries of all tensors."""
        return sum(tensor.entries for tensor in self.tensors)

    def __str__(self) -> str:
        """A line for each tensor, and one for all."""
        lines = [f"Sparsity in {t.tensor}: {_share(t.zeros, t.entries):.2%}" for t in self.tensors]
        return "\n".join([*lines, f"Global sparsity: {_share(self.zeros, self.entries):.2%}"])

    def to_json(self) -> str:
        """The same as JSON text: a list of tensors, the sums, and what zeros are good for."""
        tensors = [{**asdict(t), "sparsity": _share(t.zeros, t.entries)} for t in self.tensors]
        total = {"zeros": self.zeros, "entries": self.entries, "sparsity": _share(self.zeros, self.entries)}
        return json.dumps({"tensors": tensors, "global": total, "note": NOTE}, indent=1)

    def _repr_html_(self) -> str:
        """A table for notebooks."""
        rows = [(t.tensor, t.zeros, t.entries) for t in self.tensors] + [("all", self.zeros, self.entries)]
        cells = [(escape(name), f"{zeros:,}", f"{n:,}", f"{_share(zeros, n):.2%}") for name, zeros, n in rows]
        body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in cells)
        head = "".join(f"<th>{title}</th>" for title in ("tensor", "zeros", "entries", "sparsity"))
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table><p>{NOTE}</p>"


def sparsity(model: nn.Module) -> Sparsity:
    """How many entries of each parameter of a model are zero, masks of ``torch.nn.utils.prune`` included.

    Zeros alone do not make dense hardware faster; `structprune.masks.compact` shows what can be gained.

    Args:
        model: masked or not.

    Raises:
        PlanError: a tensor is on the ``meta`` device.
    """
    found: list[TensorSparsity] = []
    for name, tensor in masked_tensors(prunable(model)).items():
        found.append(TensorSparsity(name, _zeros(name, tensor), tensor.numel()))
    return Sparsity(tuple(found))


def _zeros(name: str, tensor: Tensor) -> int:
    if tensor.is_meta:
        raise PlanError(f"{name!r} is on the meta device: its zeros cannot be seen. Load its weights first.")
    return int((tensor == 0).sum())


def _share(zeros: int, entries: int) -> float:
    return zeros / entries if entries else 0.0
