"""What a library holds: an entry for each group, in memory or in a folder, one file a group."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from structprune.coupling.groups import Group
from structprune.errors import LoadError, PlanError
from structprune.files import locked, remove_drafts, write_text, write_whole
from structprune.schema import json_of, up_to_date

INDEX = "library.json"
SCHEMA = 1
_CHANGE = "change"


def key_of(group: Group) -> str:
    """What is equal for the same group in another graph of the same model: 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for member in group.members:
        digest.update(f"{member.tensor} {member.dim} ".encode())
        digest.update(member.positions.astype("<i8").tobytes() + member.channels.astype("<i8").tobytes())
    return digest.hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Entry:
    """One group of channels at several widths.

    Attributes:
        group: its name.
        axis: what its channels are (see `structprune.coupling.roles.AXES`).
        order: its channels in the order in which they go, shape ``(channels,)``.
        error: of the layers that consume it once each is gone, shape ``(channels - 1,)``.
        kept: how many channels are kept at each level, descending, shape ``(levels,)``.
        loss: how far the output of the network then is from the whole one's, for a sample; shape ``(levels,)``.
        saved: multiply-accumulates, or parameters, that one channel saves.
    """

    group: str
    axis: str
    order: NDArray[np.int64]
    error: NDArray[np.float64]
    kept: NDArray[np.int64]
    loss: NDArray[np.float64]
    saved: float

    @property
    def channels(self) -> int:
        """How many there are."""
        return len(self.order)

    def __repr__(self) -> str:
        """Name, size and levels; the losses are in ``entry.loss``."""
        return f"Entry({self.group!r}, {self.axis}, {self.channels} channels at {self.kept.tolist()})"


class Shelf(Mapping[str, Entry]):
    """The entries by `key_of`, and what each adds to which tensors.

    Args:
        folder: where they are kept; None for memory. Each entry is there whole or not at all.
        settings: what the entries depend on, as plain data: the weights, the data, the levels.

    Raises:
        PlanError: the folder holds entries of other settings.
        LoadError: the folder holds something else.
    """

    def __init__(self, folder: Path | None, settings: Mapping[str, Any]) -> None:
        self._folder = folder
        self._entries: dict[str, Entry] = {}
        self._changes: dict[str, dict[int, dict[str, Tensor]]] = {}
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder):
            remove_drafts(folder)
            self._open(folder / INDEX, json.loads(json.dumps(settings)))
        for file in sorted(folder.glob("*.safetensors")):
            self._entries[file.stem] = _read(file)

    def _open(self, index: Path, settings: dict[str, Any]) -> None:
        """Check that the folder is of these settings, or write them down."""
        if not index.exists():
            write_text(index, json.dumps({"schema": SCHEMA, "settings": settings}, indent=1))
            return
        with json_of("a library", LoadError):
            known = up_to_date(json.loads(index.read_text(encoding="utf-8")), SCHEMA, {}, "it")["settings"]
        # Without data nothing is said of it, and what is there is taken.
        differing = sorted(name for name, value in settings.items() if value is not None and known.get(name) != value)
        if differing:
            raise PlanError(
                f"{index.parent} holds a library of other {', '.join(differing)}. Name another folder, or delete it."
            )

    def __getitem__(self, key: str) -> Entry:
        return self._entries[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, key: str, entry: Entry, changes: Mapping[int, Mapping[str, Tensor]]) -> None:
        """Keep an entry, and for each number of kept channels what is added to which tensors."""
        if self._folder is None:
            self._changes[key] = {count: dict(held) for count, held in changes.items()}
        else:
            tensors = {
                "order": torch.from_numpy(entry.order),
                "error": torch.from_numpy(entry.error),
                "kept": torch.from_numpy(entry.kept),
                "loss": torch.from_numpy(entry.loss),
            }
            for count, held in changes.items():
                tensors |= {f"{_CHANGE}/{count}/{name}": tensor.contiguous().cpu() for name, tensor in held.items()}
            about = {"group": entry.group, "axis": entry.axis, "saved": repr(entry.saved)}
            write_whole(self._folder / f"{key}.safetensors", lambda draft: save_file(tensors, draft, metadata=about))
        self._entries[key] = entry

    def changes(self, key: str, kept: int) -> dict[str, Tensor]:
        """What is added to which tensors when the group keeps so many channels."""
        if self._folder is None:
            return self._changes[key][kept]
        start = f"{_CHANGE}/{kept}/"
        with _reading(self._folder / f"{key}.safetensors") as file:
            names: list[str] = [name for name in list(file.keys()) if name.startswith(start)]
            return {name.removeprefix(start): file.get_tensor(name) for name in names}


def _reading(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise LoadError(
            f"{path} cannot be read ({type(error).__name__}: {error}). Delete it: it is made anew."
        ) from error


def _read(path: Path) -> Entry:
    try:
        with _reading(path) as file:
            about = file.metadata() or {}
            order, error, kept, loss = (file.get_tensor(name).numpy() for name in ("order", "error", "kept", "loss"))
            return Entry(about["group"], about["axis"], order, error, kept, loss, float(about["saved"]))
    except (KeyError, ValueError, SafetensorError) as error:
        raise LoadError(f"{path} is no entry of a library ({type(error).__name__}: {error}). Delete it.") from error
