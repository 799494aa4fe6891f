"""Training by several ranks of ``torch.distributed``: a model that is wrapped in DistributedDataParallel or sharded.

Whatever is done to single entries of weights (the best ones kept, a moving average) is done to the part that a rank
holds. Only a checkpoint holds whole tensors, so that any number of ranks goes on from it.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from structprune.distributed import all_reduced, apart, failing_together, gathered, rank_and_count, several
from structprune.errors import PlanError
from structprune.wrapping import class_names

_WRAPPED = "torch.nn.parallel.distributed.DistributedDataParallel"
_SHARDED = "torch.distributed.fsdp.FSDPModule"


def inside(model: nn.Module) -> nn.Module:
    """The model in a DistributedDataParallel; any other as it is."""
    return model.get_submodule("module") if _WRAPPED in class_names(model) else model


def is_sharded(model: nn.Module) -> bool:
    """Whether ``torch.distributed.fsdp.fully_shard`` was called on the model."""
    return _SHARDED in class_names(model)


@contextmanager
def training_together(model: nn.Module) -> Generator[None]:
    """All ranks train one model if it is wrapped or sharded; else each trains its own, as in a single process."""
    if several() and (is_sharded(model) or _WRAPPED in class_names(model)):
        with failing_together(PlanError, "finetune"):
            yield
    else:
        with apart():
            yield


def require_equal_lengths(**loaders: Any) -> None:
    """Check that all ranks have as many batches, as far as that is known.

    Raises:
        PlanError: they have not; those with more would wait for the others.
    """
    for name, loader in loaders.items():
        lengths = gathered(len(loader) if hasattr(loader, "__len__") else None)
        if len(set(lengths)) > 1:
            raise PlanError(
                f"The ranks have {lengths} batches in {name}. Each step is taken by all of them: give them equally "
                "many, as torch.utils.data.DistributedSampler does."
            )


def mean_over_ranks(values: Iterable[Tensor]) -> None:
    """Put the mean over all ranks in the place of tensors that each rank has for itself, such as norms' statistics."""
    own = [value for value in values if value.is_floating_point()]
    count = rank_and_count()[1]
    if count > 1 and own:
        device = own[0].device
        flat = all_reduced(torch.cat([value.detach().double().flatten().to(device) for value in own])) / count
        for value, mean in zip(own, flat.split([value.numel() for value in own]), strict=True):
            value.copy_(mean.view(value.shape))


# -- the parts of sharded tensors ------------------------------------------------------------------------------------


def part_of(tensor: Tensor) -> Tensor:
    """The part of a tensor that this rank holds, which shares its memory; all of one that is not sharded."""
    local = getattr(tensor, "to_local", None)
    return tensor if local is None else local()


def whole_of(tensor: Tensor, like: Tensor | None = None) -> Tensor:
    """All of a tensor that is sharded, of which this is a part, in the memory of the CPU; all ranks call it together.

    Args:
        tensor: a sharded one; or the part of one that this rank holds.
        like: for a part, a sharded tensor of which it could be one.
    """
    from torch.distributed.tensor import DTensor  # takes half a second, and only sharded models need it

    if like is not None and isinstance(like, DTensor) and not isinstance(tensor, DTensor):
        shape, stride = like.shape, like.stride()
        tensor = DTensor.from_local(tensor, like.device_mesh, like.placements, shape=shape, stride=stride)
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach().cpu()


def sharded_like(whole: Tensor, like: Tensor) -> Tensor:
    """A tensor that every rank has as a whole, sharded as another is, if that is sharded; nothing is sent."""
    from torch.distributed.tensor import DTensor, distribute_tensor  # see `whole_of`

    if not isinstance(like, DTensor):
        return whole
    moved = whole.to(like.device)
    return distribute_tensor(moved, like.device_mesh, like.placements, src_data_rank=None)


def whole_optimizer_state(optimizer: Optimizer) -> dict[str, Any]:
    """The state dict of an optimizer, with sharded tensors as a whole; all ranks call it together."""
    state = optimizer.state_dict()
    return {**state, "state": {number: _each(held, whole_of) for number, held in state["state"].items()}}


def load_whole_optimizer_state(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Give an optimizer the state that `whole_optimizer_state` gave, each rank its part."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def parts(number: int, held: Mapping[str, Any]) -> dict[str, Any]:
        like = parameters[number]
        return _each(held, lambda tensor: sharded_like(tensor, like) if tensor.shape == like.shape else tensor)

    numbered = {int(number): parts(int(number), held) for number, held in state["state"].items()}
    optimizer.load_state_dict({**state, "state": numbered})


def _each(held: Mapping[str, Any], function: Any) -> dict[str, Any]:
    return {name: function(value) if isinstance(value, Tensor) else value for name, value in held.items()}
