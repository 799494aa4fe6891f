"""Losses by which a pruned model learns from the one that it was cut out of."""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from structprune.checking import MODEL, Check, instance, is_whole, real, require
from structprune.errors import PlanError
from structprune.surgery.history import kept
from structprune.wrapping import unwrapped


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 4.0,
    dim: int = -1,
    mask: Tensor | None = None,
) -> Tensor:
    """How far the student's class probabilities are from the teacher's, both softened by a temperature.

    ``temperature ** 2`` times the Kullback-Leibler divergence from teacher to student, in nats, averaged over all
    positions. Hinton et al., Distilling the Knowledge in a Neural Network, 2015 (section 2): the factor keeps the
    gradient's size independent of the temperature. Computed in float32 where the logits are narrower.

    Args:
        student_logits: of any shape, classes along `dim`.
        teacher_logits: of the same shape; no gradient goes there.
        temperature: above 0; the higher, the more the small probabilities count.
        dim: the dimension of the classes: the last one; 1 for maps of shape ``(batch, classes, height, width)``.
        mask: whether each position counts (padding does not), in the logits' shape without `dim`.

    Returns:
        A scalar, at least 0; 0 if no position counts.

    Raises:
        PlanError: the shapes differ, or the temperature is not above 0.

    Example:
        >>> import torch
        >>> teacher = torch.tensor([[2.0, 0.0]])
        >>> distillation_loss(teacher, teacher)
        tensor(0.)
        >>> distillation_loss(torch.tensor([[0.0, 0.0]]), teacher, temperature=1.0)
        tensor(0.3278)
    """
    logits = instance(Tensor, "give a tensor of logits")
    require(locals(), student_logits=logits, teacher_logits=logits, mask=instance(Tensor, "give a tensor").or_none)
    require(locals(), temperature=real(above=0), dim=Check(is_whole, "give the number of a dimension"))
    if not -student_logits.dim() <= dim < student_logits.dim():
        raise PlanError(f"dim is {dim}; student_logits have {student_logits.dim()} dimensions.")
    if student_logits.shape != teacher_logits.shape:
        raise PlanError(
            f"The student's logits (student_logits) have the shape {list(student_logits.shape)} and the teacher's "
            f"(teacher_logits) {list(teacher_logits.shape)}. Give the logits of both models on the same batch."
        )
    # Softmax loses most of its digits in half precision.
    student, teacher = (
        logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
        for logits in (student_logits, teacher_logits.detach())
    )
    divergence = F.kl_div(
        F.log_softmax(student / temperature, dim),
        F.log_softmax(teacher / temperature, dim),
        reduction="none",
        log_target=True,
    ).sum(dim)
    if mask is None:
        return divergence.mean() * temperature**2
    if mask.shape != divergence.shape:
        raise PlanError(f"mask has the shape {list(mask.shape)}; there are {list(divergence.shape)} positions.")
    # Where, not a product: what does not count may not be finite.
    counted = torch.where(mask.bool(), divergence, 0)
    return counted.sum() / mask.sum().clamp(min=1) * temperature**2


class FeatureDistillation:
    """How far the outputs of chosen layers are from the teacher's, on the channels that the student still has.

    The squared distance between the outputs of a layer in both models, divided by the mean square of the teacher's,
    averaged over the layers. `structprune.kept` says which of the teacher's channels the student's are, so that no
    extra projection has to be learned, as Romero et al., FitNets, 2015 (equation 3) need it.

    It looks at the layers by hooks, from ``with`` on to its end; run both models on the same batch there, then call
    `loss`.

    Args:
        student: the pruned model.
        teacher: the model before its first pruning; other weights of the same shapes will do.
        layers: dotted names of layers that hold a weight: convolutions, linears, norms, embeddings.

    Raises:
        PlanError: there is no such layer, or its output channels are not known.

    Example:
        >>> import torch, structprune
        >>> dense = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> slim, x = structprune.prune(dense, torch.randn(1, 4), ratio=0.5), torch.randn(16, 4)
        >>> with FeatureDistillation(slim, dense, ["0"]) as features:
        ...     with torch.no_grad():
        ...         _ = dense(x)
        ...     _ = slim(x)
        ...     loss = features.loss()
        >>> float(loss.detach()) < 1e-12  # nothing was pruned in front of this layer
        True
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, layers: Iterable[str]) -> None:
        several = Check(
            lambda value: isinstance(value, Iterable) and not isinstance(value, str), "give names of layers"
        )
        require(locals(), student=MODEL, teacher=MODEL, layers=several)
        records = kept(student)
        self._layers = {name: _Layer(student, teacher, name, records) for name in layers}
        if not self._layers:
            raise PlanError("layers is empty; name at least one layer of both models.")
        self._outputs: dict[tuple[str, str], Tensor] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> Self:
        """Look at the layers from now on."""
        for name, layer in self._layers.items():
            for who, module in (("student", layer.student), ("teacher", layer.teacher)):
                self._handles.append(module.register_forward_hook(self._keeper(who, name)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        """Take the hooks away and forget the outputs."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._outputs.clear()

    def _keeper(self, who: str, name: str) -> Any:
        def keep(_module: nn.Module, _args: Any, output: Any) -> None:
            if not isinstance(output, Tensor):
                raise PlanError(f"{name!r} returns a {type(output).__name__}; name a layer that returns a tensor.")
            self._outputs[who, name] = output

        return keep

    def loss(self) -> Tensor:
        """The loss of the last forward of both models, a scalar.

        Raises:
            PlanError: a layer has not run in both models since the block began, or its outputs do not fit.
        """
        parts: list[Tensor] = []
        for name, layer in self._layers.items():
            outputs = [self._outputs.get((who, name)) for who in ("student", "teacher")]
            if outputs[0] is None or outputs[1] is None:
                who = "student" if outputs[0] is None else "teacher"
                raise PlanError(f"{name!r} has not run in the {who}. Run both models inside the with block.")
            parts.append(layer.distance(outputs[0], outputs[1].detach()))
        return torch.stack(parts).mean()


class _Layer:
    """A layer in both models, and the teacher's channels that the student's are."""

    def __init__(
        self, student: nn.Module, teacher: nn.Module, name: str, records: dict[str, dict[int, tuple[int, ...]]]
    ) -> None:
        self.name = name
        self.student, self.teacher = _submodule(student, name), _submodule(teacher, name)
        tensor, dim = _output_channels(self.student, name)
        self._channels = torch.tensor(records.get(f"{name}.{tensor}", {}).get(dim, ()), dtype=torch.int64)
        self._thinned = dim in records.get(f"{name}.{tensor}", {})
        # Channels come second in maps, and last elsewhere.
        self._at = 1 if isinstance(self.student, (_ConvNd, _NormBase, nn.GroupNorm)) else -1

    def distance(self, mine: Tensor, theirs: Tensor) -> Tensor:
        if self._thinned:
            self._channels = self._channels.to(theirs.device)
            if theirs.shape[self._at] <= int(self._channels.max()):
                raise PlanError(
                    f"{self.name!r} has {theirs.shape[self._at]} output channels in the teacher, but the student keeps "
                    f"its channel {int(self._channels.max())}. Give the model as it was before the first pruning."
                )
            theirs = theirs.index_select(self._at, self._channels)
        if mine.shape != theirs.shape:
            raise PlanError(
                f"The outputs of {self.name!r} have the shapes {list(mine.shape)} and, of the channels that are left, "
                f"{list(theirs.shape)}. Give the model before the first pruning, and the same batch to both."
            )
        mine, theirs = mine.float(), theirs.float()
        return (mine - theirs).square().mean() / theirs.square().mean().clamp(min=torch.finfo(theirs.dtype).tiny)


def _submodule(model: nn.Module, name: str) -> nn.Module:
    module = dict(unwrapped(model).named_modules()).get(name)
    if module is None:
        raise PlanError(f"{type(model).__name__} has no layer {name!r}. Name layers that both models have.")
    return module


def _output_channels(module: nn.Module, name: str) -> tuple[str, int]:
    """The tensor of a layer, and its dimension, that stand for the output channels."""
    if isinstance(getattr(module, "bias", None), Tensor):
        return "bias", 0
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.Embedding):
        return "weight", 1
    ungrouped = not isinstance(module, _ConvTransposeNd) or module.groups == 1
    if isinstance(weight, Tensor) and ungrouped:
        return "weight", int(isinstance(module, _ConvTransposeNd))
    raise PlanError(
        f"{name!r} is a {type(module).__name__}, of whose tensors none is known to be its output channels. Name a "
        "convolution, a linear layer, a norm or an embedding."
    )
