"""The weights of a whole model put into a pruned one that has none yet, or that is sharded, one tensor at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from structprune.checking import MODEL, PATH, Check, instance, require
from structprune.errors import LoadError
from structprune.folders import Shards
from structprune.ops.gains import Gain
from structprune.planning.plan import Plan
from structprune.surgery.slicing import smaller_tensor
from structprune.training.ranks import inside, part_of, sharded_like


def load_pruned(
    model: nn.Module,
    plan: Plan,
    weights: Mapping[str, Tensor] | str | os.PathLike[str],
    *,
    device: str | torch.device = "cpu",
) -> nn.Module:
    """Give a pruned model the weights of the one that it is pruned from, as if that had been loaded and then pruned.

    So a model that is too large for one process is planned and pruned on the ``meta`` device, sharded by
    ``torch.distributed.fsdp.fully_shard``, and only then gets memory. Each tensor is read, loses what the plan removes,
    and is written; of a sharded one each rank writes its part, so that no more than one tensor is whole at a time.
    Nothing is sent from rank to rank: each reads for itself.

    Args:
        model: what ``plan.apply`` made of the whole model; on the ``meta`` device or not, sharded or not.
        plan: the plan.
        weights: the tensors of the whole model by name; or a folder with ``model.safetensors``, or with an index and
            the files that it names, which are read tensor by tensor.
        device: where tensors on ``meta`` are to be.

    Returns:
        The model itself.

    Raises:
        LoadError: `weights` lacks a tensor of the model, or has one of another shape, or more than the model has; or a
            buffer on ``meta`` is no part of the state, so that its values are not known.

    Example:
        >>> import torch, structprune
        >>> from structprune.training import load_pruned
        >>> def network():
        ...     return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> whole, x = network(), torch.randn(1, 4)
        >>> plan = structprune.plan(whole, x, ratio=0.5, round_to=1)
        >>> with torch.device("meta"):
        ...     model = network()
        >>> slim = load_pruned(plan.apply(model), plan, whole.state_dict())
        >>> torch.equal(slim(x), plan.apply(whole)(x))
        True
    """
    source = Check(lambda value: isinstance(value, Mapping) or PATH.fits(value), "give tensors by name, or a folder")
    require(locals(), model=MODEL, plan=instance(Plan, "give the plan of the model"), weights=source)
    if any(isinstance(rescale, Gain) for rescale in plan.rescales):
        raise LoadError("The model normalises its weights by a hook; load it whole and use structprune.prune.")
    given: Mapping[str, Tensor] = weights if isinstance(weights, Mapping) else _Read(Shards(Path(weights)))
    inner = inside(model)
    stored = _stored(inner, given)
    _make(inner, torch.device(device))
    tied: dict[str, set[str]] = {}
    for name, where in stored.items():
        tied.setdefault(where, set()).add(name)
    held = inner.state_dict(keep_vars=True)
    with torch.no_grad():
        for where, names in tied.items():
            target, whole = held[min(names)], given[where].detach()
            _require_fitting(where, whole, names, plan)
            smaller = smaller_tensor(whole, plan, names)
            if smaller.shape != target.shape:
                raise LoadError(
                    f"{where!r} has the shape {list(smaller.shape)} after pruning and {list(target.shape)} in the "
                    "model. Give the weights of the whole model, and the plan that the model was pruned by."
                )
            part_of(target.detach()).copy_(part_of(sharded_like(smaller, target)))
    return model


def _require_fitting(where: str, whole: Tensor, names: set[str], plan: Plan) -> None:
    """Check that a tensor has the sizes that the plan was made for."""
    for sliced in plan.slices:
        if sliced.tensor in names and (whole.dim() <= sliced.dim or whole.shape[sliced.dim] != sliced.size):
            raise LoadError(
                f"{where!r} has the shape {list(whole.shape)} in weights, and the plan slices its dimension "
                f"{sliced.dim} from {sliced.size} entries. Give the weights of the model that the plan was made of."
            )


class _Read(Mapping[str, Tensor]):
    """The tensors of a folder, each read when it is asked for."""

    def __init__(self, shards: Shards) -> None:
        self._shards = shards

    def __getitem__(self, name: str) -> Tensor:
        return self._shards.read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shards)

    def __len__(self) -> int:
        return len(self._shards)


def _stored(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, str]:
    """For each name of a tensor of the model the name that it has in `weights`; tied ones may be there once.

    Raises:
        LoadError: one is missing, or there are more.
    """
    tied: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        tied.setdefault(id(tensor), []).append(name)
    stored: dict[str, str] = {}
    for names in tied.values():
        where = next((name for name in names if name in weights), None)
        if where is None:
            raise LoadError(f"weights lacks {names[0]!r}, which {type(model).__name__} has. Give all of its tensors.")
        stored.update(dict.fromkeys(names, where))
    if more := weights.keys() - stored.keys():
        raise LoadError(f"weights holds {min(more)!r}, which {type(model).__name__} does not have.")
    return stored


def _make(model: nn.Module, device: torch.device) -> None:
    """Give tensors on the ``meta`` device memory.

    Raises:
        LoadError: a buffer among them is no part of the state.
    """
    state = model.state_dict(keep_vars=True).keys()
    for name, buffer in model.named_buffers():
        if buffer.is_meta and name not in state:
            raise LoadError(
                f"The buffer {name!r} is on the meta device, and is not saved with the model, since it is no part of "
                "its state. Make it where the model is to run."
            )
    model._apply(lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor)
