"""`Batches`: the data that a criterion looks at, and how the model runs on a batch of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from structprune.checking import DATA, FLAG, ON_BATCH, one_of, require
from structprune.errors import PlanError, StructpruneError
from structprune.padding import unpadded
from structprune.progress import shown
from structprune.tracing.trace import map_tensors, tensors_in

Forward = Callable[[nn.Module, Any], Any]
Loss = Callable[[nn.Module, Any], Tensor]


def call_on_batch(model: nn.Module, batch: Any) -> Any:
    """Call `model` on a tensor, on the first of a pair, or on a dict as keyword arguments.

    Tensors go to the device of the model's first parameter.

    Raises:
        PlanError: the batch is none of these.
    """
    if isinstance(batch, (tuple, list)) and batch:
        batch = batch[0]
    first = next(model.parameters(), None)
    if first is not None:
        batch = map_tensors(lambda tensor: tensor.to(first.device), batch)
    if isinstance(batch, (Mapping, Tensor)):
        try:
            return model(**batch) if isinstance(batch, Mapping) else model(batch)
        except StructpruneError:
            raise
        except Exception as error:  # the user's forward may raise anything
            raise PlanError(
                f"{type(model).__name__} cannot run on a batch of the data, with tensors of the shapes "
                f"{[list(tensor.shape) for tensor in tensors_in(batch)]}: {type(error).__name__}: {error}"
            ) from error
    raise PlanError(
        f"A batch of data is a {type(batch).__name__}, and structprune cannot tell how to call the model on it. Let "
        "data give tensors, pairs whose first is a tensor or a dict, or dicts; or pass forward=, a function of model "
        "and batch."
    )


class Batches:
    """Data, with the way to run a model on a batch of it.

    Args:
        data: any iterable of batches: a ``DataLoader``, a list, a generator. One that can be run through only once (a
            generator) serves a single criterion that passes over the data once. Of dicts with an ``attention_mask``,
            sequences are looked at without what it leaves out at their ends, those of one length together.
        forward: called with the model and a batch; default `call_on_batch`.
        loss: called with the model and a batch; returns a scalar. Only criteria that need gradients ask for it.
        reduction: whether `loss` is the ``"mean"`` or the ``"sum"`` over the samples of a batch. Batches of unlike size
            are weighted accordingly, so that how the data is cut into batches does not matter.
        progress: whether to draw a progress bar; by default only if standard error is a terminal.

    Example:
        >>> import torch
        >>> batches = Batches([torch.zeros(2, 3), torch.ones(1, 3)], progress=False)
        >>> [tuple(batches.forward(torch.nn.Identity(), batch).shape) for batch in batches.once("looking")]
        [(2, 3), (1, 3)]
    """

    def __init__(
        self,
        data: Iterable[Any],
        forward: Forward | None = None,
        loss: Loss | None = None,
        *,
        reduction: str = "mean",
        progress: bool | None = None,
    ) -> None:
        kinds = {"data": DATA, "reduction": one_of(("mean", "sum")), "progress": FLAG.or_none}
        require(locals(), forward=ON_BATCH.or_none, loss=ON_BATCH.or_none, **kinds)
        self.data = data
        self.forward: Forward = call_on_batch if forward is None else forward
        self._loss = loss
        self.reduction = reduction
        self.progress = progress
        self._spent = False

    @property
    def has_loss(self) -> bool:
        """Whether a loss was given."""
        return self._loss is not None

    def held(self) -> Batches:
        """The same with all batches in a list, so that they can be run through any number of times."""
        data = list(self.once("holding"))
        return Batches(data, self.forward, self._loss, reduction=self.reduction, progress=self.progress)

    def once(self, what: str, model: nn.Module | None = None) -> Iterator[Any]:
        """One pass over the data, without what attention masks leave out (`structprune.padding`).

        Args:
            what: stands before the progress bar.
            model: that runs on it.

        Raises:
            PlanError: there is no batch, or one without samples, or the data could be run through only once and was.
        """
        iterator = iter(self.data)
        single = iterator is self.data
        if single and self._spent:
            raise PlanError(
                f"data is a {type(self.data).__name__}, which can be run through only once, and it was. Give something "
                "that can be started again: a DataLoader, or a list of batches."
            )
        self._spent = single
        count = 0
        length = getattr(self.data, "__len__", None)
        total = None if length is None else int(length())
        for batch in shown(iterator, what, total, progress=self.progress):
            count += 1
            if any(not len(tensor) for tensor in islice((t for t in tensors_in(batch) if t.dim()), 1)):
                raise PlanError(f"Batch {count} of data holds no sample. Leave such batches out.")
            yield from unpadded(batch, model)
        if not count:
            raise PlanError("data holds no batch, so there is nothing to measure a channel by.")

    def require_loss(self, criterion: object) -> None:
        """Check that there is a loss.

        Raises:
            PlanError: there is none.
        """
        if self._loss is None:
            raise PlanError(
                f"{type(criterion).__name__} needs gradients: pass loss=, a function of model and batch that returns a "
                "scalar, such as lambda model, batch: cross_entropy(model(batch[0]), batch[1])."
            )

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The loss of a batch, after checking that it is a finite scalar with a gradient.

        Raises:
            PlanError: it is not.
        """
        value = self.value(model, batch)
        if not value.requires_grad:
            raise PlanError(
                "The loss does not depend on the model through differentiable operations. Does loss= call the model "
                "under torch.no_grad(), or detach its output?"
            )
        return value

    def value(self, model: nn.Module, batch: Any) -> Tensor:
        """The loss of a batch, after checking that it is a finite scalar.

        Raises:
            PlanError: it is not, or no loss was given.
        """
        if self._loss is None:
            raise PlanError("The loss is asked for: pass loss=, a function of model and batch that returns a scalar.")
        try:
            value = self._loss(model, batch)
        except StructpruneError:
            raise
        except Exception as error:  # the user's function may raise anything
            raise PlanError(f"loss raised {type(error).__name__} on a batch of data: {error}") from error
        if not isinstance(value, Tensor) or value.numel() != 1:
            shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise PlanError(f"loss must return a scalar tensor, but it returned {shape}. Take its mean over the batch.")
        if not bool(torch.isfinite(value).all()):
            raise PlanError(f"The loss of a batch is {value.item()}. Check the data and the model's weights.")
        return value.reshape(())


def size_of(batch: Any, of: str = "data") -> int:
    """Number of samples: dimension 0 of the first tensor that has dimensions.

    Raises:
        PlanError: no tensor of the batch has dimensions.
    """
    for tensor in tensors_in(batch):
        if tensor.dim():
            return tensor.shape[0]
    raise PlanError(f"A batch of {of}, a {type(batch).__name__}, holds no tensor whose dimension 0 counts samples.")


def samples_of(batch: Any) -> Iterator[Any]:
    """The samples of a batch, each as a batch of one: every tensor cut along dimension 0.

    Raises:
        PlanError: the tensors of the batch differ in dimension 0.
    """
    size = size_of(batch)
    if any(not tensor.dim() or tensor.shape[0] != size for tensor in tensors_in(batch)):
        raise PlanError(
            "The gradients of single samples are needed, but the tensors of a batch differ in dimension 0: "
            f"{[list(tensor.shape) for tensor in tensors_in(batch)]}. Give batches of one sample each."
        )
    for i in range(size):
        yield map_tensors(lambda tensor, at=i: tensor[at : at + 1], batch)


def require_data(batches: Batches | None, criterion: object) -> Batches:
    """`batches`, after checking that there are any.

    Raises:
        PlanError: there are none.
    """
    if batches is None:
        raise PlanError(f"{type(criterion).__name__} looks at data: pass data=, an iterable of batches.")
    return batches
