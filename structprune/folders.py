"""A folder of sharded weights made into another, with one tensor after the other in memory.

The model is built from the folder's configuration on the ``meta`` device, so that tracing and planning hold no
weights; a criterion that looks at weights alone gets them from the files as it asks for them. Then each shard is read,
sliced and written by itself.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Unpack

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from structprune.api import coupled_channels, decide
from structprune.checking import INPUTS, PATH, require
from structprune.errors import LoadError, PlanError, TraceError
from structprune.extras import require as extra
from structprune.files import drafts_in
from structprune.importance.base import Fittable, importance_of
from structprune.ops.gains import Gain
from structprune.planning.build import plan_removal
from structprune.planning.options import PlanKeywords, PlanOptions, takes_options
from structprune.planning.plan import Plan
from structprune.surgery.slicing import smaller_tensor
from structprune.tracing.state import collection_paused
from structprune.tracing.trace import ExampleInputs

INDEX, WHOLE = "model.safetensors.index.json", "model.safetensors"
# So many tokens go in, where no example inputs are given.
TOKENS = 16


class Shards(Mapping[str, Tensor]):
    """The tensors of a folder by name, each read when it is asked for, and not kept.

    Args:
        folder: holds ``model.safetensors``, or an index and the shards that it names.

    Attributes:
        files: the file of each tensor.

    Raises:
        LoadError: there are no such files, or a shard is missing or cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        try:
            if (folder / INDEX).is_file():
                names = set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
            else:
                names = {WHOLE}
            self.files: dict[str, str] = {}
            for name in sorted(names):
                if Path(name).name != name:
                    raise LoadError(f"{folder / INDEX} names {name!r}, which is no file in its own folder.")
                with safe_open(folder / name, framework="pt") as shard:
                    self.files.update(dict.fromkeys(shard.keys(), name))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            raise LoadError(f"The weights in {folder} cannot be read ({type(error).__name__}: {error}).") from error
        self.aliases: dict[str, str] = {}
        self._buffers: dict[str, Tensor] = {}

    def read(self, name: str) -> Tensor:
        """A tensor by the name that it has in the files."""
        with safe_open(self._folder / self.files[name], framework="pt") as shard:
            return shard.get_tensor(name)

    def __getitem__(self, name: str) -> Tensor:
        """A parameter as a criterion sees it; a buffer, which none looks into, without values."""
        if name in self._buffers:
            return self._buffers[name]
        return nn.Parameter(self.read(self.aliases[name]), requires_grad=False)

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)

    def fit(self, model: nn.Module) -> None:
        """Check that the tensors are those of a model, and find those that it has under other names too.

        Raises:
            LoadError: they are others.
        """
        self._buffers = dict(model.named_buffers())
        tied: dict[int, list[str]] = {}
        for name, tensor in model.state_dict(keep_vars=True).items():
            tied.setdefault(id(tensor), []).append(name)
        for names in tied.values():
            held = next((name for name in names if name in self.files), None)
            if held is None:
                raise LoadError(
                    f"{self._folder} lacks {names[0]!r}, which {type(model).__name__} has. If the class renames "
                    "tensors as it loads them, as some with experts do, load the model and use structprune.prune."
                )
            self.aliases.update(dict.fromkeys(names, held))
        if more := self.files.keys() - self.aliases.keys():
            raise LoadError(f"{self._folder} holds {min(more)!r}, which {type(model).__name__} does not have.")


def _model_in(folder: Path) -> Any:
    """The model that a folder's configuration names, on the ``meta`` device."""
    transformers = extra("transformers", "prune_folder", "models")
    config = transformers.AutoConfig.from_pretrained(folder)
    named = config.architectures or []
    kind = getattr(transformers, named[0], None) if named else None
    if kind is None:
        raise PlanError(f"The configuration in {folder} names the classes {named}, of which transformers has none.")
    with torch.device("meta"):
        model = kind(config).eval()
    return model if config.dtype is None else model.to(config.dtype)


@takes_options
def prune_folder(
    folder: str | os.PathLike[str],
    into: str | os.PathLike[str],
    example_inputs: ExampleInputs | None = None,
    **options: Unpack[PlanKeywords],
) -> Plan:
    """Prune a model of transformers from a folder to another, never holding more than one shard of it.

    The new folder has the same files with smaller tensors, and a configuration that says so: `from_pretrained` loads
    it. Whatever else is in the folder (a tokenizer, say) is copied.

    Args:
        folder: what `save_pretrained` wrote.
        into: a folder that does not exist yet; it appears once it is whole.
        example_inputs: a tensor, a tuple (positional) or a dict (keyword) that the model accepts; some tokens by
            default.
        options: those of `structprune.planning.options.PlanOptions`; the criterion looks at weights alone.

    Example::

        structprune.prune_folder("llama", "llama-small", target={"params": 0.7}, tensor_parallel=4)

    Raises:
        PlanError: what is asked for cannot be planned, or no configuration can describe what comes of it.
        LoadError: the folder lacks a shard or a tensor, or `into` exists.
    """
    asked = PlanOptions(**options)
    require(locals(), LoadError, folder=PATH, into=PATH)
    require(locals(), example_inputs=INPUTS.or_none)
    source, goal = Path(folder), Path(into)
    if goal.exists():
        raise LoadError(f"{goal} exists already. Name a folder that does not.")
    if asked.data is not None or asked.times or isinstance(importance_of(asked.importance), Fittable):
        raise PlanError(
            "prune_folder has no weights to run: importance must look at weights alone, and data and a target of "
            "latency have no place here."
        )
    shards = Shards(source)
    model = _model_in(source)
    shards.fit(model)
    if example_inputs is None:
        example_inputs = {"input_ids": torch.ones(1, TOKENS, dtype=torch.long)}
    with torch.no_grad():
        try:
            graph = coupled_channels(model, example_inputs, asked)
        except TraceError as error:
            raise TraceError(f"The model in {source} does not run on the example_inputs: {error}") from error
        decision = decide(graph, asked, tensors=shards)
        with collection_paused():
            plan = plan_removal(graph, decision.chosen, decision.settings, described=decision.described)
    if reason := plan.settings.left.get("config"):
        raise PlanError(f"No configuration says what comes of it ({reason}), so that no class could load the folder.")
    if any(isinstance(rescale, Gain) for rescale in plan.rescales):
        raise PlanError("The model normalises its weights by a hook; load it and use structprune.prune.")
    with drafts_in(goal.absolute().parent) as drafts:
        written = drafts / goal.name
        written.mkdir()
        _write(shards, source, written, plan, plan.apply(model))
        os.replace(written, goal)
    return plan


def _write(shards: Shards, folder: Path, written: Path, plan: Plan, slim: Any) -> None:
    """Write every shard anew, and all that belongs to it."""
    for path in folder.iterdir():
        if path.is_file() and path.suffix != ".safetensors" and path.name not in (INDEX, "config.json"):
            shutil.copy2(path, written / path.name)
    slim.config.save_pretrained(written)
    shapes = {shards.aliases[name]: tuple(t.shape) for name, t in slim.state_dict(keep_vars=True).items()}
    total = 0
    for file in sorted(set(shards.files.values())):
        held: dict[str, Tensor] = {}
        for name in (name for name, where in shards.files.items() if where == file):
            names = {alias for alias, stored in shards.aliases.items() if stored == name}
            held[name] = smaller_tensor(shards.read(name), plan, names)
            if tuple(held[name].shape) != shapes[name]:
                raise LoadError(f"{name!r} came out as {list(held[name].shape)}, not as {list(shapes[name])}.")
        total += sum(tensor.numel() * tensor.element_size() for tensor in held.values())
        save_file(held, written / file, metadata={"format": "pt"})
    if (folder / INDEX).is_file():
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(shards.files.items()))}
        (written / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
