"""`NamedTensors`: frozen mappings from names of parameters to tensors, what `Saliency` and `Mask` have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from structprune.errors import LoadError, PlanError
from structprune.files import write_whole
from structprune.planning.plan import Plan


class NamedTensors(Mapping[str, Tensor]):
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

    def only(self, names: Iterable[str]) -> Self:
        """The tensors of these names.

        Raises:
            PlanError: a name is not among them.
        """
        wanted = list(names)
        for name in wanted:
            if name not in self._tensors:
                raise PlanError(f"There is no tensor {name!r} in this {type(self).__name__}.")
        return type(self)({name: self._tensors[name] for name in wanted})

    def slice(self, plan: Plan) -> Self:
        """The same for the smaller network that `plan` makes: without what it removes.

        Raises:
            PlanError: a tensor has another shape than the plan was made for.
        """
        tensors = dict(self._tensors)
        for sliced in plan.slices:
            name = sliced.tensor.removesuffix("_orig")
            if name not in tensors:
                continue
            tensor = tensors[name]
            if sliced.dim >= tensor.dim() or tensor.shape[sliced.dim] != sliced.size:
                raise PlanError(
                    f"The plan removes entries of dimension {sliced.dim} of {name!r} from {sliced.size}, but its shape "
                    f"is {list(self._tensors[name].shape)} here."
                )
            gone = frozenset(sliced.removed)
            stays = sliced.order or [index for index in range(sliced.size) if index not in gone]
            tensors[name] = tensor.index_select(
                sliced.dim, torch.tensor(stays, dtype=torch.int64, device=tensor.device)
            )
        return type(self)(tensors)

    def _with(self, other: NamedTensors, join: Callable[[Tensor, Tensor], Tensor]) -> Self:
        """Entry by entry.

        Raises:
            PlanError: the two have other names or shapes.
        """
        self.require_alike(other)
        return type(self)({name: join(tensor, other._tensors[name]) for name, tensor in self._tensors.items()})

    def require_alike(self, other: NamedTensors) -> None:
        """Check that two have the same names and shapes.

        Raises:
            PlanError: they have not; the message names the first tensor that differs.
        """
        for name in [*self, *other]:
            if name not in self._tensors or name not in other._tensors:
                kinds = " and ".join(sorted({type(self).__name__, type(other).__name__}))
                raise PlanError(f"{name!r} is in one of the two {kinds} values only.")
            if self._tensors[name].shape != other._tensors[name].shape:
                shapes = list(self._tensors[name].shape), list(other._tensors[name].shape)
                raise PlanError(f"{name!r} has the shapes {shapes[0]} and {shapes[1]} in the two values.")


def write(path: str | Path, kind: str, tensors: Mapping[str, Tensor], notes: Mapping[str, str] | None = None) -> None:
    """Write tensors to a safetensors file, whole or not at all.

    Args:
        path: of the file.
        kind: what it holds, such as ``"mask"``; `read` asks for the same.
        tensors: by name.
        notes: a text for each name.
    """
    plain = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    write_whole(Path(path), lambda draft: save_file(plain, draft, {**(notes or {}), "": f"structprune {kind}"}))


def read(path: str | Path, kind: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and notes that `write` wrote.

    Raises:
        LoadError: it is no such file.
    """
    try:
        with safe_open(path, "pt") as file:
            notes = dict(file.metadata() or {})
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise LoadError(f"{path} is no safetensors file: {error}") from error
    if notes.pop("", None) != f"structprune {kind}":
        raise LoadError(f"{path} holds no {kind} that structprune saved.")
    return tensors, notes
