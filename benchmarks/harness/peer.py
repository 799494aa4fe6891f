"""torch-pruning, called as its own examples call it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

# Names that the projections of an attention block go by, with the attributes that tell how many heads they have.
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "query", "key", "value", "q", "k", "v", "q_lin", "k_lin", "v_lin")
_JOINT = ("qkv", "query_key_value", "Wqkv", "c_attn", "in_proj")
_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head")
_KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads")


def _number(module: nn.Module, names: tuple[str, ...]) -> int | None:
    for owner in (module, getattr(module, "config", None)):
        for name in names:
            value = getattr(owner, name, None)
            if isinstance(value, int):
                return value
    return None


def heads_of(model: nn.Module) -> dict[nn.Module, int]:
    """The ``num_heads`` that torch-pruning must be given for this model."""
    found: dict[nn.Module, int] = {}
    for module in model.modules():
        heads = _number(module, _HEADS)
        if heads is None:
            continue
        if isinstance(module, nn.MultiheadAttention):
            found[module] = heads
            continue
        few = _number(module, _KEY_VALUE_HEADS) or heads
        children = dict(module.named_children())
        for name in (*_PROJECTIONS, *_JOINT):
            if isinstance(children.get(name), nn.Linear):
                found[children[name]] = few if name[0] in "kv" and name not in _JOINT else heads
    return found


# What its examples set by hand after pruning: the size of one head, and of all of them.
_HEAD_SIZES = ("head_dim", "attention_head_size", "head_size")
_ALL_SIZES = ("all_head_size", "all_head_dim", "attn_dim")


def repair_heads(model: nn.Module, heads: dict[nn.Module, int]) -> None:
    """Set the sizes of heads that attention blocks keep as attributes, as torch-pruning's examples do."""
    for module in model.modules():
        for name, child in module.named_children():
            if child not in heads or not isinstance(child, nn.Linear) or name[0] in "kv":
                continue
            width = child.out_features // (3 if name in _JOINT else 1)
            sizes = dict.fromkeys(_HEAD_SIZES, width // heads[child]) | dict.fromkeys(_ALL_SIZES, width)
            for attribute, value in sizes.items():
                if isinstance(getattr(module, attribute, None), int):
                    setattr(module, attribute, value)


class SameScale(TorchFunctionMode):
    """Scaled dot products that find their scale by the size of a head: noted, or scaled as noted before."""

    def __init__(self, sizes: list[int] | None = None) -> None:
        super().__init__()
        self.seen: list[int] = []
        self._sizes = iter(sizes or ())

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Give the scale that the unpruned network had."""
        kwargs = dict(kwargs or {})
        if func is F.scaled_dot_product_attention:
            q = args[0] if args else kwargs["query"]
            self.seen.append(q.shape[-1])
            size = next(self._sizes, None)
            if size and kwargs.get("scale") is None:
                kwargs["scale"] = size**-0.5
        return func(*args, **kwargs)


def last_layers(model: nn.Module, inputs: Any) -> list[nn.Module]:
    """The layers that make the outputs, which torch-pruning must be told to leave alone."""
    made: list[tuple[nn.Module, Tensor]] = []
    hooks = [
        module.register_forward_hook(lambda m, _a, out: made.append((m, out)))
        for module in model.modules()
        if isinstance(module, nn.Linear | nn.modules.conv._ConvNd)
    ]
    try:
        with torch.no_grad():
            outputs = call(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    storages = {t.untyped_storage().data_ptr() for t in _tensors(outputs)}
    last = [module for module, out in made if out.untyped_storage().data_ptr() in storages]
    return last or [module for module, _ in made[-1:]]


def _tensors(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, dict):
        tree = list(tree.values())
    return [t for item in tree for t in _tensors(item)] if isinstance(tree, list | tuple) else []


def call(model: nn.Module, inputs: Any) -> Any:
    """Run a model on a tensor, a tuple of positional arguments or a dict of keyword arguments."""
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def removed_slices(before: Tensor, after: Tensor) -> dict[int, tuple[int, ...]]:
    """Which indices of each dimension are gone, found by the values alone; all entries of `before` must differ.

    Raises:
        ValueError: `after` is no slice of `before`.
    """
    if before.ndim != after.ndim or not after.numel():
        raise ValueError(f"{list(after.shape)} is no slice of {list(before.shape)}")
    # In float32 a large tensor may hold a number twice.
    for corner in (before == after[(0,) * after.ndim]).nonzero()[:16]:
        kept = _kept(before, after, corner.tolist())
        part = before
        for dim, index in enumerate(kept):
            part = part.index_select(dim, index)
        if torch.equal(part, after):
            gone = [sorted(set(range(n)) - set(index.tolist())) for n, index in zip(before.shape, kept, strict=True)]
            return {dim: tuple(indices) for dim, indices in enumerate(gone) if indices}
    raise ValueError("its values are not those of the original")


def _kept(before: Tensor, after: Tensor, corner: list[int]) -> list[Tensor]:
    """For each dimension the indices whose values stand on the lines through the first entry of `after`."""
    kept = []
    for dim in range(before.ndim):
        line = before[tuple(slice(None) if d == dim else c for d, c in enumerate(corner))]
        found = after[tuple(slice(None) if d == dim else 0 for d in range(after.ndim))]
        matches = (line[:, None] == found[None]).nonzero()
        kept.append(matches[matches[:, 1].argsort()][:, 0])
    return kept


def removed_from(before: dict[str, Tensor], after: dict[str, Tensor]) -> dict[str, dict[int, tuple[int, ...]]]:
    """The same for every tensor of a model, by name."""
    found = {name: removed_slices(t, after[name]) for name, t in before.items() if name in after and t.numel() > 1}
    return {name: slices for name, slices in found.items() if slices}


def prune(model: nn.Module, inputs: Any, ratio: float, ignored: list[nn.Module], heads: dict[nn.Module, int]) -> None:
    """Build the dependency graph, rank by the L2 norm of whole groups, remove `ratio`, repair heads; in place."""
    import torch_pruning as tp

    pruner = tp.pruner.MagnitudePruner(
        model,
        inputs,
        importance=tp.importance.MagnitudeImportance(p=2),
        pruning_ratio=ratio,
        ignored_layers=ignored,
        num_heads=dict(heads),
        # Its default arguments are dicts that it writes to: a second model would see the first one's.
        in_channel_groups={},
        out_channel_groups={},
        channel_groups={},
    )
    pruner.step()
    repair_heads(model, heads)
