"""`sparsity`: how many entries of each tensor are zero."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path

from torch import Tensor, nn

from structprune.coupling.costs import Cost, cost
from structprune.errors import PlanError
from structprune.masks.compacting import compact, permanent
from structprune.masks.drawing import draw_shares
from structprune.masks.torch_masks import masked_tensors
from structprune.tracing.trace import ExampleInputs
from structprune.wrapping import prunable, unwrapped

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
class Gain:
    """What `structprune.masks.compact` would gain: the cost of the network as it is, and of the smaller one."""

    before: Cost
    after: Cost

    def __str__(self) -> str:
        """In one line."""
        pairs = {"parameters": (self.before.params, self.after.params), "MACs": (self.before.macs, self.after.macs)}
        parts = (f"{name} {b:,} -> {a:,} ({_share(a, b):.1%})" for name, (b, a) in pairs.items())
        return f"Zeros alone make nothing faster; compact: {', '.join(parts)}"


@dataclass(frozen=True, slots=True)
class Sparsity:
    """Zeros of the tensors of a model, and in all.

    Attributes:
        tensors: one entry for each parameter.
        gain: what `structprune.masks.compact` would gain, if it was asked for.

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
    gain: Gain | None = None

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
        lines.append(f"Global sparsity: {_share(self.zeros, self.entries):.2%}")
        return "\n".join(lines if self.gain is None else [*lines, str(self.gain)])

    def to_json(self) -> str:
        """The same as JSON text: a list of tensors, the sums, and what zeros are good for."""
        tensors = [{**asdict(t), "sparsity": _share(t.zeros, t.entries)} for t in self.tensors]
        total = {"zeros": self.zeros, "entries": self.entries, "sparsity": _share(self.zeros, self.entries)}
        gain = {} if self.gain is None else {"compact": asdict(self.gain)}
        return json.dumps({"tensors": tensors, "global": total, "note": NOTE, **gain}, indent=1)

    def _repr_html_(self) -> str:
        """A table for notebooks."""
        rows = [(t.tensor, t.zeros, t.entries) for t in self.tensors] + [("all", self.zeros, self.entries)]
        cells = [(escape(name), f"{zeros:,}", f"{n:,}", f"{_share(zeros, n):.2%}") for name, zeros, n in rows]
        body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in cells)
        head = "".join(f"<th>{title}</th>" for title in ("tensor", "zeros", "entries", "sparsity"))
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table><p>{NOTE}</p>" + (
            "" if self.gain is None else f"<p>{escape(str(self.gain))}</p>"
        )

    def draw(self, path: str | os.PathLike[str]) -> Path:
        """Draw the share of zeros of each tensor, and in all.

        Args:
            path: the file to write; its ending says which format (pdf, svg, png).

        Raises:
            MissingExtraError: Matplotlib is not installed.
        """
        shares = [(t.tensor, _share(t.zeros, t.entries)) for t in self.tensors]
        return draw_shares([*shares, ("all", _share(self.zeros, self.entries))], "zeros, %", path)


def sparsity(model: nn.Module, example_inputs: ExampleInputs | None = None) -> Sparsity:
    """How many entries of each parameter of a model are zero, masks of ``torch.nn.utils.prune`` included.

    Zeros alone do not make dense hardware faster; `structprune.masks.compact` shows what can be gained.

    Args:
        model: masked or not.
        example_inputs: what the model accepts; given, the report says what `structprune.masks.compact` would gain.

    Raises:
        PlanError: a tensor is on the ``meta`` device.
        TraceError: the forward cannot be recorded.
    """
    counts: list[TensorSparsity] = []
    for name, tensor in masked_tensors(prunable(model)).items():
        counts.append(TensorSparsity(name, _zeros(name, tensor), tensor.numel()))
    return Sparsity(tuple(counts), None if example_inputs is None else _gain(model, example_inputs))


def _gain(model: nn.Module, example_inputs: ExampleInputs) -> Gain:
    dense = permanent(unwrapped(model))
    return Gain(cost(dense, example_inputs), cost(compact(dense, example_inputs), example_inputs))


def _zeros(name: str, tensor: Tensor) -> int:
    if tensor.is_meta:
        raise PlanError(f"{name!r} is on the meta device: its zeros cannot be seen. Load its weights first.")
    return int((tensor == 0).sum())


def _share(zeros: int, entries: int) -> float:
    return zeros / entries if entries else 0.0
