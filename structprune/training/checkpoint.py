"""The folder from which a killed run of `finetune` goes on: tensors in safetensors, no pickle that could run code.

``progress.json`` names the two files that belong to it, ``weights-N.safetensors`` and ``optimizer-N.pt``. It takes the
place of the old one in one step, after they are whole, so that a kill at any moment leaves one state or the other. A
file that ``progress.json`` may name is never written over: another run in the same folder gives its own another name.
"""

from __future__ import annotations

import json
import pickle
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from structprune.errors import LoadError
from structprune.files import locked, remove_drafts, require_regular, sync_folder, write_text, write_whole

SCHEMA = 1
PROGRESS = "progress.json"
Tensors = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class State:
    """Where a run stands after an epoch.

    Attributes:
        epoch: how many epochs are done.
        tensors: by part (``"model"``, ``"best"``, ``"average"``), then by name.
        optimizer: state dicts of the optimizer and of what else has one.
        record: plain data: history, best score, what the run was asked for.
    """

    epoch: int
    tensors: Mapping[str, Tensors]
    optimizer: Mapping[str, Any]
    record: Mapping[str, Any]


def store(folder: Path, state: State) -> None:
    """Write a state; the one before is removed once this one is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    flat = {
        f"{part}/{name}": value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for part, tensors in state.tensors.items()
        for name, value in tensors.items()
    }
    with locked(folder):
        remove_drafts(folder)
        taken = any(folder.glob(f"*-{state.epoch}.*"))
        name = f"{state.epoch}-{secrets.token_hex(8)}" if taken else f"{state.epoch}"
        weights, optimizer = f"weights-{name}.safetensors", f"optimizer-{name}.pt"
        write_whole(folder / weights, lambda draft: save_file(flat, draft, metadata={"format": "pt"}))
        write_whole(folder / optimizer, lambda draft: torch.save(dict(state.optimizer), draft))
        sync_folder(folder)
        record = {"schema": SCHEMA, "epoch": state.epoch, "weights": weights, "optimizer": optimizer, **state.record}
        write_text(folder / PROGRESS, json.dumps(record, indent=1))
        sync_folder(folder)
        for pattern in ("weights-*.safetensors", "optimizer-*.pt"):
            for old in folder.glob(pattern):
                if old.name not in (weights, optimizer):
                    old.unlink()


def restore(folder: Path) -> State | None:
    """The state in a folder, or None if there is none yet.

    Raises:
        LoadError: it is damaged, or of a later version.
    """
    path = folder / PROGRESS
    if not path.exists():
        return None
    try:
        require_regular(path)
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["schema"] > SCHEMA:
            raise LoadError(f"{path} has schema {record['schema']}; this version reads up to {SCHEMA}. Upgrade.")
        flat = load_file(folder / Path(record["weights"]).name)
        optimizer = torch.load(folder / Path(record["optimizer"]).name, map_location="cpu", weights_only=True)
        epoch = int(record["epoch"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError, pickle.UnpicklingError, RuntimeError) as error:
        raise LoadError(
            f"The checkpoint in {folder} is damaged ({type(error).__name__}: {error}). Restore it, or give an empty "
            "folder to begin anew."
        ) from error
    tensors: dict[str, dict[str, Tensor]] = {}
    for name, value in flat.items():
        part, _, inner = name.partition("/")
        tensors.setdefault(part, {})[inner] = value
    return State(epoch, tensors, optimizer, record)
