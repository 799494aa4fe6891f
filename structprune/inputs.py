"""Example inputs: their batch and how it is resized, and models held still while they run on them."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from structprune.tracing.trace import ExampleInputs, as_call


def batch_size(example_inputs: ExampleInputs) -> int:
    """Size of the batch: dimension 0 of the first tensor that has dimensions.

    Raises:
        ValueError: No tensor of the inputs has dimensions, or the first that has holds no sample.

    Example:
        >>> batch_size((torch.zeros(8, 3), torch.zeros(8)))
        8
    """
    for leaf in pytree.tree_leaves(as_call(example_inputs)):
        if isinstance(leaf, Tensor) and leaf.ndim > 0:
            if not leaf.shape[0]:
                raise ValueError(f"the example inputs hold no sample: a tensor has the shape {list(leaf.shape)}")
            return leaf.shape[0]
    raise ValueError(
        "the example inputs hold no tensor with a batch dimension; pass a tensor, a tuple of positional arguments "
        "or a dict of keyword arguments"
    )


def is_batched(tensor: Tensor, size: int) -> bool:
    """Whether a tensor has the batch in dimension 0, judged by its size."""
    return tensor.ndim > 0 and tensor.shape[0] == size


def resize_batch(example_inputs: ExampleInputs, size: int) -> Any:
    """Repeat or cut the samples until there are ``size`` of them.

    Args:
        example_inputs: As for ``as_call``. Every tensor whose dimension 0 is as long as the batch is resized.
        size: Number of samples wanted.

    Raises:
        ValueError: ``size`` is below one, or the inputs have no batch dimension or no sample.

    Example:
        >>> resize_batch(torch.tensor([[1.0], [2.0]]), 5).flatten().tolist()
        [1.0, 2.0, 1.0, 2.0, 1.0]
    """
    current = batch_size(example_inputs)
    if size < 1 or current < 1:
        raise ValueError(f"cannot make a batch of {size} out of {current} samples; both must be at least 1")
    if size == current:
        return example_inputs

    def resize(tensor: Tensor) -> Tensor:
        if not is_batched(tensor, current):
            return tensor
        return tensor[torch.arange(size, device=tensor.device) % current]

    return pytree.tree_map_only(Tensor, resize, example_inputs)


def resize_dims(example_inputs: ExampleInputs, sizes: Sequence[Mapping[int, int]]) -> Any:
    """Repeat or cut tensors along any of their dimensions.

    Args:
        example_inputs: As for ``as_call``.
        sizes: For each tensor, in flat order, the new size of the dimensions that get one.

    Example:
        >>> resize_dims(torch.tensor([[1.0, 2.0]]), [{1: 3}]).tolist()
        [[1.0, 2.0, 1.0]]
    """
    pending = iter(sizes)

    def resize(tensor: Tensor) -> Tensor:
        for dim, size in next(pending).items():
            tensor = tensor.index_select(dim, torch.arange(size, device=tensor.device) % tensor.shape[dim])
        return tensor

    return pytree.tree_map_only(Tensor, resize, example_inputs)


def device_of(model: nn.Module) -> torch.device:
    """Where the model is: the device of its first parameter, or the CPU if it has none.

    Example:
        >>> device_of(nn.Linear(2, 2))
        device(type='cpu')
    """
    return next((p.device for p in model.parameters()), torch.device("cpu"))


@contextmanager
def modes_kept(*models: nn.Module) -> Generator[None]:
    """Each module is afterwards in training or eval mode as it was."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        yield
    finally:
        # Set flag by flag: `train()` may be overridden, and some parts may have been in eval mode all along.
        for module, mode in modes:
            module.training = mode


@contextmanager
def evaluating(*models: nn.Module) -> Generator[None]:
    """Hold models in eval mode without gradients; afterwards their modes and the random state are as they were.

    Random numbers drawn inside do not advance the caller's generators.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
        >>> with evaluating(model):
        ...     model.training
        False
        >>> model.training
        True
    """
    tensors = (tensor for model in models for tensor in chain(model.parameters(), model.buffers()))
    devices = {tensor.device.index for tensor in tensors if tensor.device.type == "cuda"}
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=sorted(devices)))
        stack.enter_context(torch.no_grad())
        stack.enter_context(modes_kept(*models))
        for model in models:
            model.eval()
        yield
