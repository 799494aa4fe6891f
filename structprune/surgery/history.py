"""Which channels of the first model are left: a record that travels with each layer through any number of rounds.

The record of a tensor is a plain attribute of the module that holds it, and not of the model as a whole. So it follows
the layer wherever it goes: into a copy, a pickle, a wrapper, another model, or under another name. A layer that is
replaced by a new one begins anew. It is no parameter and no buffer, and the state dict does not know it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from structprune.checking import MODEL, require
from structprune.errors import SurgeryError
from structprune.surgery.edits import Edits, RemovedSlice, SectionedSlice
from structprune.surgery.slicing import KeptIndices
from structprune.tracing.state import Held, held_tensors, join, modules_of
from structprune.wrapping import unwrapped

# Of a module: the name of a tensor that it holds -> dimension -> (size in the first model, indices kept). The indices
# are None once something else has resized a pruned tensor, since then it is unknown which channels they are; their
# shape is (0, number kept) where each group of a grouped convolution keeps others.
RECORD = "_structprune_kept"
# A copy of a GraphModule is built from its graph anew, and takes along only the attributes that its meta names here.
_PRESERVED = "_user_preserved_attributes"
Indices = NDArray[np.int64]
Record = dict[str, dict[int, tuple[int, Indices | None]]]


def _shape(module: nn.Module, key: str) -> tuple[int, ...] | None:
    """The shape of a tensor that a module holds, if it still does."""
    state = module.__dict__
    for store in (state["_parameters"], state["_buffers"], state):
        if isinstance(store.get(key), Tensor):
            return tuple(store[key].shape)
    return None


def _composed(
    record: tuple[int, Indices | None] | None, sliced: RemovedSlice, left: Indices, now: int
) -> tuple[int, Indices | None]:
    """What is left of the first model's indices, when the dimension came out of the slicing with `now` entries."""
    if record is None:
        return sliced.size, left if left.shape[-1] == now else None
    first, before = record
    fits = before is not None and before.shape[-1] == sliced.size and left.shape[-1] == now
    return first, None if before is None or not fits else before[..., left] if left.ndim == 1 else left


def record_kept(model: nn.Module, tensors: Mapping[str, Held], edits: Edits, undo: list[Callable[[], None]]) -> None:
    """Note, at the modules that hold them, what is left of the tensors that `edits` sliced.

    Args:
        model: the pruned model.
        tensors: the tensors before they were sliced, by name; a tied one is noted under each of its names.
        edits: what was removed.
        undo: how to take the notes back is added here.
    """
    names: dict[int, list[str]] = {}
    for name, held in tensors.items():
        names.setdefault(id(held.tensor), []).append(name)
    modules = dict(modules_of(model))
    new: dict[int, tuple[nn.Module, Record]] = {}
    stays = KeptIndices()
    for sliced in edits.slices:
        apart = isinstance(sliced, SectionedSlice)
        indices = np.empty((0, sliced.size - len(sliced.removed)), np.int64) if apart else stays(sliced)
        for name in names[id(tensors[sliced.tensor].tensor)]:
            path, _, key = name.rpartition(".")
            module = modules[path]
            if id(module) not in new:
                old: Record = recalled(module, RECORD, {})
                new[id(module)] = module, {tensor: dict(dims) for tensor, dims in old.items()}
            dims = new[id(module)][1].setdefault(key, {})
            shape = _shape(module, key)
            if shape is not None:
                dims[sliced.dim] = _composed(dims.get(sliced.dim), sliced, indices, shape[sliced.dim])
    for module, record in new.values():
        remember(module, RECORD, record, undo)


def remember(module: nn.Module, key: str, value: Any, undo: list[Callable[[], None]]) -> None:
    """Give a module a plain attribute that its copies take along; how to take it back is added to `undo`."""
    _assign(module.__dict__, key, value, undo)
    if isinstance(module, fx.GraphModule):
        kept_in_copies: dict[str, Any] = module.meta.get(_PRESERVED, {})
        _assign(module.meta, _PRESERVED, {**kept_in_copies, key: value}, undo)


def recalled(module: nn.Module, key: str, default: Any) -> Any:
    """What `remember` gave to a module or to what it is a copy of."""
    if key in module.__dict__:
        return module.__dict__[key]
    # A shallow copy of a GraphModule shares its meta, and has no attributes of the original.
    return module.meta.get(_PRESERVED, {}).get(key, default) if isinstance(module, fx.GraphModule) else default


def _assign(target: dict[str, Any], key: str, value: Any, undo: list[Callable[[], None]]) -> None:
    before = dict(target)

    def restore() -> None:
        if key in before:
            target[key] = before[key]
        else:
            target.pop(key, None)

    undo.append(restore)
    target[key] = value


def _records(model: nn.Module) -> Iterator[tuple[str, dict[int, tuple[int, Indices | None]], tuple[int, ...]]]:
    """Name, record and shape of every sliced tensor that is still there."""
    for path, module in unwrapped(model).named_modules():
        record: Record = recalled(module, RECORD, {})
        for key, dims in record.items():
            shape = _shape(module, key)
            if shape is not None:
                yield join(path, key), dims, shape


def kept(model: nn.Module) -> dict[str, dict[int, tuple[int, ...]]]:
    """The channels of the first model that are left in this one, after any number of rounds of pruning.

    `Plan.apply`, `prune` and `DependencyGraph.prune_group` write this down, in place and on copies alike. The record is
    kept by each layer: it goes along in ``copy.deepcopy``, in ``torch.save`` of a whole module, when a layer is
    renamed, moved into another model or wrapped (``torch.compile``, DataParallel, an average of weights; names are
    those of the model inside). A layer that is replaced by a new one is a whole one. A state dict does not hold the
    record: after ``load_state_dict`` it says what was done to the model that was loaded into.

    Args:
        model: a model that was pruned, or not.

    Returns:
        For each tensor that lost channels, by name: dimension -> for each index that is left, in order, its index in
        the tensor of the first model. Dimensions that are whole are left out, as are those of which each group of a
        grouped convolution keeps other indices; a model never pruned gives ``{}``. A tied tensor appears under each of
        its names.

    Raises:
        SurgeryError: something else has resized a tensor since it was pruned, so that this is no longer known.

    Example:
        >>> import torch, structprune
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> graph = structprune.DependencyGraph(model, torch.randn(1, 4))
        >>> for _ in range(2):  # train in between
        ...     _ = graph.prune_group("0", [0, 3])
        >>> structprune.kept(model)["2.weight"]
        {1: (2, 4, 6, 7)}
    """
    require(locals(), SurgeryError, model=MODEL)
    indices_left: dict[str, dict[int, tuple[int, ...]]] = {}
    for name, dims, shape in _records(model):
        indices_left[name] = {}
        for dim, (first, indices) in sorted(dims.items()):
            if indices is None or dim >= len(shape) or indices.shape[-1] != shape[dim]:
                raise SurgeryError(
                    f"Dimension {dim} of {name!r} had {first} channels in the first model and was pruned; since then "
                    f"something else gave it the shape {list(shape)}, so which channels are left is not known. Put a "
                    "new layer in its place instead, or resize before the first pruning."
                )
            if indices.ndim == 1:
                indices_left[name][dim] = tuple(indices.tolist())
    return indices_left


def first_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shapes that the tensors of `model` had before it was first pruned, by name.

    Args:
        model: a model that was pruned, or not.

    Example:
        >>> import torch, structprune
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> slim = structprune.prune(model, torch.randn(1, 4), ratio=0.5)
        >>> first_shapes(slim)["2.weight"], tuple(slim[2].weight.shape)
        ((2, 8), (2, 4))
    """
    shapes = {name: tuple(held.tensor.shape) for name, held in held_tensors(unwrapped(model)).items()}
    for name, dims, shape in _records(model):
        shapes[name] = tuple(dims[dim][0] if dim in dims else size for dim, size in enumerate(shape))
    return shapes
