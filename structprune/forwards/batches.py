"""The data of recovery: what the model takes of each batch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from structprune.checking import DATA, require
from structprune.errors import RecoveryError
from structprune.inputs import device_of
from structprune.padding import unpadded
from structprune.tracing.shadow import shadow_of
from structprune.tracing.state import copy_buffer
from structprune.tracing.trace import as_call, map_tensors, preserved_random_state, tensors_in

Forward = Callable[[nn.Module, Any], Any]


def batches_of(
    model: nn.Module, data: Iterable[Any], forward: Forward | None, what: str, *, padding: bool = True
) -> list[Any]:
    """The inputs of the model for each batch of data, on its device: a tensor, a tuple of arguments, or keywords.

    Args:
        model: the model that is to run on them.
        data: any iterable of batches.
        forward: how the model is called on a batch; if not given, by what `inputs_of` finds in it.
        what: what there would be nothing to do without a batch, for the message.
        padding: whether positions that an attention mask leaves out are kept (`structprune.padding`).

    Raises:
        RecoveryError: there is no batch, or one has no sample, or the model cannot be called on it.
    """
    require(locals(), RecoveryError, data=DATA)
    batches: list[Any] = []
    for batch in data:
        new = [inputs_of(batch, device_of(model))] if forward is None else calls_of(model, batch, forward)
        if not padding:
            new = [part for inputs in new for part in unpadded(inputs, model, RecoveryError)]
        for inputs in new:
            _require_samples(inputs)
            _require_fitting(model, inputs, forward is None)
        batches += new
    if not batches:
        raise RecoveryError(f"data holds no batch, so there {what}.")
    return batches


def samples_in(batch: Any) -> int:
    """Samples of what the model takes: the first dimension of its first tensor that has one; one where none has."""
    return next((tensor.shape[0] for tensor in tensors_in(batch) if tensor.dim()), 1)


def compared(result: Any) -> Tensor | None:
    """What of a model's result is compared: the first tensor, but no single number before others.

    Models that are given labels return a loss first.
    """
    tensors = list(tensors_in(result))
    return next((tensor for tensor in tensors if tensor.dim()), tensors[0] if tensors else None)


def inputs_of(batch: Any, device: torch.device) -> Any:
    """The part of a batch that the model takes: all of a tensor or a dict of keyword arguments, the first of a pair.

    Args:
        batch: a tensor, a dict, or a tuple or list that begins with one of them.
        device: where the tensors are to be.

    Raises:
        RecoveryError: the batch is none of these.
    """
    if isinstance(batch, (tuple, list)) and batch:
        batch = batch[0]
    if not isinstance(batch, (Tensor, Mapping)):
        raise RecoveryError(
            f"A batch of data is a {type(batch).__name__}, and it is not clear how the model takes it. Let data give "
            "tensors, dicts of keyword arguments, or pairs whose first is one of them; or pass forward=, a function of "
            "model and batch."
        )
    return map_tensors(lambda tensor: tensor.to(device), batch)


def calls_of(model: nn.Module, batch: Any, forward: Forward) -> list[Any]:
    """What `forward` calls the model with on a batch: the arguments of each call."""
    calls: list[Any] = []

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # Copies, since a forward may write over what it is given.
        args, kwargs = map_tensors(lambda tensor: tensor.detach().clone(), (args, kwargs))
        calls.append(_one_form(model, args, kwargs))

    shadow = shadow_of(model, lambda _, tensor: copy_buffer(tensor), tracked=False).model
    shadow.register_forward_pre_hook(note, with_kwargs=True)
    with preserved_random_state(), torch.no_grad():
        forward(shadow.eval(), batch)
    if not calls:
        raise RecoveryError(
            "forward= does not call the model that it is given, so there is nothing to solve its layers on. Let it "
            "call its first argument: forward=lambda model, batch: model(*batch)."
        )
    return calls


def _one_form(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A call as a tuple of positional arguments, or as a dict of keyword arguments."""
    if not kwargs:
        return args
    if not args:
        return kwargs
    bound = inspect.signature(model.forward).bind(*args, **kwargs)
    if bound.args and any(p.kind is p.VAR_POSITIONAL for p in bound.signature.parameters.values()):
        raise RecoveryError(
            f"forward= calls {type(model).__name__} with positional and keyword arguments, some of which have no name. "
            "Let it give all of them by name, or all by position."
        )
    named: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        named.update(value if bound.signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD else {name: value})
    return named


def _require_samples(inputs: Any) -> None:
    shapes = [list(tensor.shape) for tensor in tensors_in(inputs)]
    # Others may be empty on purpose: a cache without entries.
    if not shapes or 0 in shapes[0]:
        raise RecoveryError(
            f"A batch of data holds no sample: its tensors have the shapes {shapes}. Leave such batches out."
        )


def _require_fitting(model: nn.Module, inputs: Any, by_default: bool) -> None:
    """Check that the forward takes these arguments; it may still find their shapes wrong."""
    args, kwargs = as_call(inputs)
    try:
        inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError as error:
        why = "Of a tuple or a list the first alone is taken, since the others may be labels. " if by_default else ""
        raise RecoveryError(
            f"{type(model).__name__} cannot be called on a batch of data: {error}. {why}Let data give dicts of keyword "
            "arguments, or pass forward=, such as forward=lambda model, batch: model(*batch)."
        ) from error
