"""Batches whose attention mask leaves positions out, as batches without these positions.

What a model computes at padding says nothing of it, so criteria and recovery must not look there. Sequences of one
length become one batch, and each is as long as it would be without padding. Of a batch of three sequences that are
padded on the right::

    input_ids       5 8 2 0      5 8 2      4 7 9 1
                    4 7 9 1      6 3 3
                    6 3 3 0
    attention_mask  1 1 1 0      1 1 1      1 1 1 1
                    1 1 1 1      1 1 1
                    1 1 1 0

Masks are known by the names that the models of transformers give them.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from structprune.errors import PlanError

MASK, DECODER = "attention_mask", "decoder_"
IGNORED = -100  # the label that losses of torch leave out
Span = tuple[int, int]


def unpadded(batch: Any, model: nn.Module | None = None, error: type[Exception] = PlanError) -> list[Any]:
    """The same samples without what ``attention_mask`` leaves out at the beginning and at the end of each.

    A batch without a mask of two dimensions, or whose mask leaves nothing out, is given back as it is. Tensors that
    begin with the two dimensions of the mask are cut like it, others by samples. What goes into a decoder is cut by
    ``decoder_attention_mask``, or at the end as labels of -100 say. Zeros between ones stay.

    Args:
        batch: a dict of keyword arguments, or a tuple that begins with one.
        model: tells whether labels are those of a decoder.
        error: what is raised.

    Raises:
        error: some tensor has another number of samples, so that the batch cannot be divided.

    Example:
        >>> import torch
        >>> batch = {"input_ids": torch.tensor([[0, 5], [6, 7]]), "attention_mask": torch.tensor([[0, 1], [1, 1]])}
        >>> [part["input_ids"].tolist() for part in unpadded(batch)]
        [[[5]], [[6, 7]]]
    """
    named: Any = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    mask = _mask_of(named)
    if mask is None:
        return [batch]
    decoded = _decoded(named, mask, model)
    spans, inner = _spans(mask != 0), _spans(mask != 0 if decoded is None else decoded)
    groups: dict[tuple[Span, Span], list[int]] = {}
    for sample, (span, of_decoder) in enumerate(zip(spans, inner, strict=True)):
        if span[0] < span[1]:
            groups.setdefault((span, of_decoder), []).append(sample)
    cuts = [_Cut(mask, decoded, span, of_decoder, samples, error) for (span, of_decoder), samples in groups.items()]
    if named is batch:
        return [_mapped(batch, cut) for cut in cuts]
    return [type(batch)([_mapped(value, cut) for value in batch]) for cut in cuts]


def _mask_of(named: Any) -> Tensor | None:
    """The mask of what goes in, shape (samples, length), if it leaves something out."""
    mask = named.get(MASK) if isinstance(named, Mapping) else None
    if not isinstance(mask, Tensor) or mask.dim() != 2 or bool((mask != 0).all()):
        return None
    others = (value for name, value in named.items() if name not in (MASK, "labels") and isinstance(value, Tensor))
    return mask if any(value.shape[:2] == mask.shape for value in others) else None


def _decoded(named: Mapping[str, Any], mask: Tensor, model: nn.Module | None) -> Tensor | None:
    """Which positions of a decoder's inputs count, shape (samples, length); None without a decoder."""
    given, labels = named.get(f"{DECODER}{MASK}"), named.get("labels")
    if isinstance(given, Tensor) and given.dim() == 2:
        return given != 0
    takes = model is not None and f"{DECODER}input_ids" in inspect.signature(model.forward).parameters
    has = takes or any(name.startswith(DECODER) for name in named)
    if has and isinstance(labels, Tensor) and labels.dim() == 2 and len(labels) == len(mask):
        return labels != IGNORED
    return None


def _spans(real: Tensor) -> list[Span]:
    """From the first to behind the last position that counts, of each sample; (0, 0) where none does."""
    found: list[Span] = []
    for row in real.cpu():
        places = torch.nonzero(row).flatten().tolist()
        found.append((places[0], places[-1] + 1) if places else (0, 0))
    return found


@dataclass(frozen=True, slots=True)
class _Cut:
    """Cuts the tensors of a batch for some samples.

    Attributes:
        mask: of what goes in, shape (samples, length).
        decoded: which positions of a decoder's inputs count, shape (samples, its length); None without a decoder.
        span: from the first to behind the last position that counts.
        of_decoder: the same for its inputs.
        samples: which ones.
        error: what is raised.
    """

    mask: Tensor
    decoded: Tensor | None
    span: Span
    of_decoder: Span
    samples: list[int]
    error: type[Exception]

    def __call__(self, name: str, tensor: Tensor) -> Tensor:
        """What is left of one tensor, by its name in the batch."""
        count, length = self.mask.shape
        if not tensor.dim():
            return tensor
        if tensor.shape[0] == 1 and tensor.shape[1:2] == (length,) and count > 1:
            return _columns(tensor, self.span)  # the same for all samples
        if tensor.shape[0] != count:
            raise self.error(
                f"attention_mask leaves positions out, and {name or 'a tensor'!r} in the batch has the shape "
                f"{list(tensor.shape)}, which does not begin with the {count} samples of the mask, so that it is not "
                "clear what belongs to which sample. Give batches of one sample each, or without padding."
            )
        chosen = tensor[torch.tensor(self.samples, device=tensor.device)]
        if self.decoded is not None and (name.startswith(DECODER) or name == "labels"):
            return _columns(chosen, self.of_decoder) if tensor.shape[:2] == self.decoded.shape else chosen
        return _columns(chosen, self.span) if tensor.shape[:2] == self.mask.shape else chosen


def _columns(tensor: Tensor, span: Span) -> Tensor:
    return tensor[:, slice(*span)].contiguous()


def _mapped(value: Any, cut: Callable[[str, Tensor], Tensor], name: str = "") -> Any:
    if isinstance(value, Tensor):
        return cut(name, value)
    if isinstance(value, Mapping):
        items = {key: _mapped(item, cut, str(key)) for key, item in value.items()}
        if type(value) is dict or not isinstance(value, MutableMapping):
            return items
        like = copy.copy(value)  # a tokenizer's, which functions of users may ask by attribute
        like.update(items)
        return like
    if type(value) in (tuple, list):
        return type(value)(_mapped(item, cut, name) for item in value)
    return value
