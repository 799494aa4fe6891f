"""`WeightAverage`: the moving average of a model's weights that `finetune` keeps."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from structprune.checking import MODEL, real, require
from structprune.training.ranks import inside, part_of


def held_by(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of the state dict by name, each tied one once; a DistributedDataParallel is seen through.

    The tensors themselves, sharded ones as such.
    """
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, value in inside(model).state_dict(keep_vars=True).items():
        if isinstance(value, Tensor) and id(value) not in seen:
            seen.add(id(value))
            tensors[name] = value.detach()
    return tensors


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """The same; of sharded ones the part that this rank holds, which shares its memory."""
    return {name: part_of(value) for name, value in held_by(model).items()}


@torch.no_grad()
def fill(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Write values into a model's tensors, in place."""
    for name, tensor in tensors_of(model).items():
        tensor.copy_(values[name])


class WeightAverage:
    """The exponential moving average of the parameters and buffers of a model.

    After update t, counted from 0, the average is ``d * average + (1 - d) * weights`` with ``d = min(decay, (1 + t) /
    (10 + t))``, so that it does not hold on to where training began. Integer buffers are copied.

    Args:
        model: the model; averages start at its weights.
        decay: from 0 to below 1.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(1, 1)
        >>> average = WeightAverage(model, 0.999)
        >>> with average.lent(model):  # compute with the average
        ...     y = model(torch.ones(1))
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        require(locals(), model=MODEL, decay=real(least=0, below=1))
        self.decay = decay
        self.updates = 0
        self.values = {name: tensor.clone() for name, tensor in tensors_of(model).items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the weights as they are now."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        now = tensors_of(model)
        # One call for all tensors of a kind: a loop costs more than the arithmetic on small models.
        moving = [name for name, value in self.values.items() if value.is_floating_point() or value.is_complex()]
        if moving:
            towards = get_ema_multi_avg_fn(decay)
            towards([self.values[name] for name in moving], [now[name] for name in moving], None)
        for name in self.values.keys() - set(moving):
            self.values[name].copy_(now[name])

    @contextmanager
    def lent(self, model: nn.Module) -> Generator[None]:
        """Inside the block the model has the average's weights."""
        own = {name: tensor.clone() for name, tensor in tensors_of(model).items()}
        fill(model, self.values)
        try:
            yield
        finally:
            fill(model, own)
