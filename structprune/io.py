"""`save` and `load`: a pruned model as a folder of plain data, with no pickle and no code.

The folder holds ``model.safetensors``, the tensors, and ``plan.json``: what was removed, repaired and rewritten in each
round, and the digest of the tensors' file. Loading builds the original from the user's own factory, replays the plans,
and fills in the tensors.

A save never leaves the folder broken. New tensors are written beside the old ones, to a file named by their digest, so
that it takes the place of no others. The new ``plan.json``, which names that digest, takes the place of the old one in
one step; only then the tensors become ``model.safetensors``. Whatever the moment of a kill, the file that ``plan.json``
names is there under one of the two names, and the next save tidies up. Writers wait for each other. Readers do not
lock: one that was overtaken by a save finds that ``plan.json`` was replaced, and begins anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from structprune.checking import MODEL, PATH, function, require
from structprune.errors import LoadError, PlanError, StructpruneError
from structprune.files import (
    drafts_in,
    locked,
    remove_drafts,
    replace,
    require_regular,
    sync_folder,
    write_text,
    write_whole,
)
from structprune.filling import fill
from structprune.offloading import at_hand
from structprune.planning.plan import Plan, plans_of
from structprune.schema import FormError, Migration, up_to_date
from structprune.surgery.history import kept
from structprune.tracing.containers import unspecify
from structprune.tracing.shadow import shadow_of
from structprune.tracing.trace import as_call, tensors_in

SCHEMA = 1
# For every older schema of the folder, what lifts its record to the next one; plans have a schema of their own.
MIGRATIONS: dict[int, Migration] = {}
PLAN, WEIGHTS = "plan.json", "model.safetensors"
# What older versions called new tensors until they got their name.
INCOMING = "model.incoming.safetensors"
# So many saves may overtake one load before it gives up.
_TRIES = 1000


def save(model: nn.Module, path: str | os.PathLike[str]) -> Path:
    """Write a model, pruned or not, to a folder that `load` reads.

    Saving over an older save is safe: a kill at any moment leaves the old or the new one whole. Processes that save to
    one folder at once wait for each other, and the last one wins.

    Parameters, buffers and what was pruned are saved. Other attributes that were set on a model after it was built
    (``model.note = 8``) are lost: they are those that `build_model` gives it when it is loaded.

    Args:
        model: any module; what was pruned from it is recorded by `Plan.apply`.
        path: the folder; it is made if it does not exist.

    Returns:
        The folder.

    Raises:
        PlanError: `path` is a file; or the state of the model holds something that is no tensor, or a tensor without
            data; or layers of it were pruned in another model, whose plans it does not have.

    Example:
        >>> import tempfile, torch, structprune
        >>> def build():
        ...     return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> slim = structprune.prune(build(), torch.randn(1, 4), ratio=0.5)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     again = structprune.load(build, structprune.save(slim, f"{folder}/slim"))
        >>> torch.equal(again[0].weight, slim[0].weight)
        True
    """
    require(locals(), model=MODEL, path=PATH)
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise PlanError(f"{folder} is a file; give the path of a folder, which may exist or not.")
    folder.mkdir(parents=True, exist_ok=True)
    tensors, aliases = _distinct(at_hand(model))
    plans = plans_of(model)
    if not plans and (pruned := next(iter(kept(model)), None)) is not None:
        raise PlanError(
            f"{pruned!r} was pruned as part of another model, and this one does not know by which plans, so it cannot "
            "be built again. Save the model that was pruned, or prune the whole."
        )
    plans_data = [json.loads(plan.to_json()) for plan in plans]
    with locked(folder):
        _tidy(folder)
        try:
            _store(folder, tensors, aliases, plans_data)
        finally:
            _tidy(folder)
    return folder


def load(build_model: Callable[[], nn.Module], path: str | os.PathLike[str]) -> nn.Module:
    """The model that `save` wrote: built anew, pruned by the saved plans, filled with the saved tensors.

    Nothing in the folder is run; the only code is that of `build_model`. See `structprune.save` for an example.

    Args:
        build_model: makes the original model, with any weights, or on the ``meta`` device; called once.
        path: the folder.

    Returns:
        The model, in the mode in which `build_model` makes it.

    Raises:
        LoadError: the folder is incomplete, damaged, of a later version, or does not fit the model.
    """
    require(locals(), LoadError, build_model=function(), path=PATH)
    folder = Path(path)
    record, weights = _read(folder)
    model = build_model()
    if not isinstance(model, nn.Module):
        raise LoadError(f"build_model returned a {type(model).__name__}; let it return the original model.")
    try:
        plans = [Plan.from_data(data) for data in record["plans"]]
        # A removal of branches, read by the same function, has no numbers of its own.
        numbers = [plan for plan in plans if isinstance(plan, Plan) and (plan.attribute_edits or plan.literal_edits)]
        before = _shapes(model, numbers[0]) if numbers else None
        for plan in plans:
            model = plan.apply(model, inplace=True)
    except StructpruneError as error:
        raise LoadError(
            f"The plan in {folder / PLAN} does not fit the model that build_model makes: {error}"
        ) from error
    if before is not None and _shapes(model, numbers[0]) != before:
        raise LoadError(
            f"The sizes that the plan in {folder / PLAN} sets do not fit each other: the pruned model does not give "
            "outputs like the original's on inputs like those that the plan was made with. Save the model again."
        )
    fill(model, weights, folder)
    return model


def _shapes(model: nn.Module, plan: Plan) -> list[tuple[int, ...] | None] | None:
    """The shapes of the outputs on stand-ins for the plan's inputs; None where the forward needs real ones.

    Those of outputs that the plan may change are left out.
    """
    shadow = shadow_of(model, lambda _, tensor: tensor.detach().to("meta"), tracked=False).model
    try:
        args, kwargs = as_call(unspecify(plan.inputs))
        with torch.no_grad(), torch.device("meta"):
            outputs = shadow.eval()(*args, **kwargs)
    except Exception:  # a forward may raise anything on stand-ins
        return None
    return [tuple(tensor.shape) if plan.outputs is None else None for tensor in tensors_in(outputs)]


# -- writing ----------------------------------------------------------------------------------------------------------


def _distinct(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of the state dict, each once, and for the further names of tied ones the name that holds them."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[int, str] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor) or value.is_meta:
            what = "has no data: it is on the meta device" if isinstance(value, Tensor) else "is no tensor"
            raise PlanError(f"{name!r} in the state of the model {what}, so it cannot be saved.")
        if id(value) in first:
            aliases[name] = first[id(value)]
        else:
            first[id(value)] = name
            # A copy: safetensors refuses tensors that share memory, and views of larger ones.
            tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
    return tensors, aliases


def _store(folder: Path, tensors: dict[str, Tensor], aliases: dict[str, str], plans: list[Any]) -> None:
    """Write both files; the switch from the old save to the new one is that of ``plan.json``."""
    with drafts_in(folder) as drafts:
        write_whole(drafts / WEIGHTS, lambda draft: save_file(tensors, draft, metadata={"format": "pt"}))
        digest = _digest(drafts / WEIGHTS)
        replace(drafts / WEIGHTS, _generation(folder, digest))
    sync_folder(folder)
    record = {"schema": SCHEMA, "weights": {"sha256": digest, "aliases": aliases}, "plans": plans}
    write_text(folder / PLAN, json.dumps(record, indent=1))
    sync_folder(folder)


def _generation(folder: Path, digest: str) -> Path:
    """The file of tensors with this digest until ``plan.json`` names it, and for a moment afterwards."""
    return folder / f"model-{digest[:32]}.safetensors"


def _tidy(folder: Path) -> None:
    """Give the tensors that ``plan.json`` names their own name, and remove what else killed saves have left.

    Safe at any moment at which nobody else writes: a file that ``plan.json`` names is never removed.
    """
    remove_drafts(folder)
    named = None
    if (folder / PLAN).exists():
        try:
            with _opened(folder / PLAN) as file:
                named = _record(file)["weights"]["sha256"]
        except LoadError:  # damaged, or of a later version: which files belong to it is not known
            return
    generation, incoming = None if named is None else _generation(folder, named), folder / INCOMING
    if generation is not None and generation.is_file():
        replace(generation, folder / WEIGHTS)
    elif incoming.is_file() and _digest(incoming) == named:
        replace(incoming, folder / WEIGHTS)
    for path in (*folder.glob(f"model-{'[0-9a-f]' * 32}.safetensors"), incoming):
        path.unlink(missing_ok=True)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# -- reading ----------------------------------------------------------------------------------------------------------


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The record and the tensors of one and the same save, though others may save meanwhile.

    Raises:
        LoadError: the folder is incomplete, damaged, or of a later version.
    """
    for _ in range(_TRIES):
        with _opened(folder / PLAN) as file:
            try:
                record = _record(file)
                return record, _weights(folder, record)
            except LoadError:
                if _is_at(file, folder / PLAN):
                    raise
    raise LoadError(f"{folder} is saved to again and again, faster than it can be read. Load it when that has ended.")


def _opened(path: Path) -> BinaryIO:
    """``plan.json``, opened to be read."""
    try:
        require_regular(path)
        return path.open("rb")
    except FileNotFoundError as error:
        raise LoadError(f"{path} does not exist. Give the folder that structprune.save returned.") from error
    except OSError as error:
        raise LoadError(f"{path} cannot be read: {error}.") from error


def _record(file: BinaryIO) -> dict[str, Any]:
    """The contents of ``plan.json``, after checking their form."""
    path = Path(file.name)
    try:
        data = json.loads(file.read().decode())
    except OSError as error:
        raise LoadError(f"{path} cannot be read: {error}.") from error
    except (ValueError, RecursionError) as error:
        raise LoadError(f"{path} is damaged or is no JSON: {error}. Save the model again.") from error
    try:
        record = up_to_date(data, SCHEMA, MIGRATIONS, str(path))
    except FormError as error:
        raise LoadError(f"{error}. Give a folder that structprune.save wrote.") from error
    weights: Any = record.get("weights")
    weights = weights if isinstance(weights, dict) else {}
    aliases: Any = weights.get("aliases")
    digest: Any = weights.get("sha256")
    whole = isinstance(aliases, dict) and isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest)
    if not whole or not isinstance(record.get("plans"), list):
        raise LoadError(f"{path} is not whole. Save the model again.")
    if not all(isinstance(x, str) for pair in aliases.items() for x in pair):
        raise LoadError(f"{path} names tied tensors by something that is no name. Save the model again.")
    return record


def _weights(folder: Path, record: dict[str, Any]) -> dict[str, Tensor]:
    """All tensors by name, from the file that has the recorded digest."""
    wanted = record["weights"]["sha256"]
    # The first one if a save was cut short, or is about to end; the last one of an older version.
    for path in (_generation(folder, wanted), folder / WEIGHTS, folder / INCOMING):
        tensors = _tensors(path, wanted)
        if tensors is not None:
            break
    else:
        raise LoadError(
            f"No file in {folder} holds the tensors that {PLAN} was written with: {WEIGHTS} is missing, truncated or "
            "was changed since. Save the model again, or restore the file."
        )
    for alias, name in record["weights"]["aliases"].items():
        if name not in tensors:
            raise LoadError(f"{folder / PLAN} ties {alias!r} to {name!r}, which is not among the tensors.")
        tensors[alias] = tensors[name]
    return tensors


def _tensors(path: Path, wanted: str) -> dict[str, Tensor] | None:
    """The tensors in a file, or None if there is no file that has the digest `wanted`."""
    try:
        require_regular(path)
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != wanted:
                return None
            try:
                tensors = load_file(path)
            except (SafetensorError, OSError, KeyError, ValueError, RuntimeError) as error:
                if _is_at(file, path):
                    raise LoadError(f"{path} is no safetensors file that torch can read: {error}") from error
                return None
            # Since the digest was taken, a save may have put another file in its place.
            return tensors if _is_at(file, path) else None
    except OSError:
        return None


def _is_at(file: BinaryIO, path: Path) -> bool:
    """Whether `path` still leads to the file that is open: while it is, no other one gets its number."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
