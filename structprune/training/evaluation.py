"""What `finetune` does with a batch: outputs, labels, the default loss, and the score on validation data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from structprune.checking import SEED, real, require, shown, whole
from structprune.distributed import all_reduced, rank_and_count
from structprune.errors import PlanError
from structprune.importance.data import call_on_batch, size_of


def logits_of(output: Any) -> Tensor:
    """The logits among a model's outputs: the tensor itself, what is named ``logits``, or the first of a tuple.

    Raises:
        PlanError: there is nothing of the kind.
    """
    if isinstance(output, Tensor):
        return output
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if logits is None and isinstance(output, (tuple, list)) and output:
        logits = output[0]
    if not isinstance(logits, Tensor):
        raise PlanError(
            f"The model returns a {type(output).__name__}, that holds no logits: give a tensor, something named "
            "'logits', or the first of a tuple. Write the training step yourself, with structprune.training's losses."
        )
    return logits


def labels_of(batch: Any) -> Tensor | None:
    """The labels of a pair, or None if the batch is none."""
    pair = isinstance(batch, (tuple, list)) and len(batch) == 2 and isinstance(batch[1], Tensor)
    return batch[1] if pair else None


def default_loss(model: nn.Module, batch: Any) -> Tensor:
    """Cross entropy of a pair of inputs and labels; of a dict, the loss that the model itself returns.

    Raises:
        PlanError: it is neither.
    """
    output = call_on_batch(model, batch)
    labels = labels_of(batch)
    if labels is not None:
        return F.cross_entropy(logits_of(output), labels)
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if not isinstance(loss, Tensor):
        raise PlanError(
            "There is no loss to train on: the batch is no pair of inputs and labels, and the model returns none "
            "(transformers' models do when 'labels' is among the inputs). Pass loss=, a function of model and batch."
        )
    return loss


@torch.no_grad()
def score_of(
    model: nn.Module,
    validate: Iterable[Any] | Callable[[nn.Module], float],
    loss: Callable[[nn.Module, Any], Tensor],
    moved: Callable[[Any], Any],
    autocast: Callable[[], AbstractContextManager[Any]],
) -> float:
    """The validation score, the higher the better: what `validate` returns; on batches, accuracy or minus the loss.

    It is the mean over the samples of all ranks that work together, or over what `validate` returns on each.

    Args:
        model: in eval mode.
        validate: a function of the model, or batches.
        loss: of model and batch; its mean counts if the batches are no pairs with class numbers.
        moved: puts a batch on the model's device.
        autocast: the precision to compute in.

    Raises:
        PlanError: there are no batches.
    """
    if not isinstance(validate, Iterable):
        score = validate(model)
        try:
            mean = all_reduced(torch.tensor(float(score), dtype=torch.float64)) / rank_and_count()[1]
            return float(mean)
        except (TypeError, ValueError) as error:
            raise PlanError(f"validate returned {shown(score)}; it returns a number, the higher the better.") from error
    total, count = 0.0, 0
    for batch in map(moved, validate):
        labels = labels_of(batch)
        with autocast():
            if labels is not None and labels.dim() == 1 and not labels.is_floating_point():
                good = (logits_of(call_on_batch(model, batch)).argmax(-1) == labels).float().mean() * 100
            else:
                good = -loss(model, batch)
        total, count = total + float(good) * size_of(batch), count + size_of(batch)
    total, count = all_reduced(torch.tensor([total, count], dtype=torch.float64)).tolist()
    if not count:
        raise PlanError("validate holds no batch. If it is a generator, give something that can be started again.")
    return total / count


def split(count: int, share: float = 0.1, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Draw a part of the training data for validation.

    Args:
        count: number of samples.
        share: of them for validation, above 0 and below 1; at least one sample goes to either side.
        seed: of the draw; the global random state is not touched.

    Returns:
        The indices to train on and those to validate on, each in ascending order; for `torch.utils.data.Subset`, or to
        index tensors with.

    Raises:
        PlanError: a side would be empty.

    Example:
        >>> train, validate = split(50_000, 0.1)
        >>> len(train), len(validate)
        (45000, 5000)
    """
    require(locals(), count=whole(2), share=real(above=0, below=1), seed=SEED)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    held = min(count - 1, max(1, round(count * share)))
    return order[held:].sort().values, order[:held].sort().values
