"""`Saliency`: scores for each entry of named tensors, as plain values, and the masks that are made of them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from structprune.coupling.graph import ChannelGraph
from structprune.errors import PlanError
from structprune.importance import Batches, Importance, importance_of
from structprune.importance.base import WeightCriterion
from structprune.importance.data import Forward, Loss
from structprune.masks.choosing import best_of_blocks, grouped, lowest, require_scope
from structprune.masks.compacting import permanent
from structprune.masks.drawing import draw_matrices
from structprune.masks.mask import Mask
from structprune.masks.named import NamedTensors, read, write
from structprune.masks.torch_masks import chosen_tensors, hooks_of
from structprune.tracing.trace import ExampleInputs
from structprune.wrapping import prunable, unwrapped

KIND = "saliency"


class Saliency(NamedTensors):
    """A score for each entry of named tensors; the lower, the sooner it goes.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> mask = Saliency.magnitude(model).mask(0.75)
        >>> mask.kept, mask.entries
        (12, 48)
        >>> undo = mask.apply(model)
        >>> int((model[0].weight == 0).sum() + (model[2].weight == 0).sum())
        36
        >>> undo()

    Args:
        tensors: floating tensors by the names of parameters.

    Raises:
        PlanError: a tensor is not floating, or holds NaN.
    """

    @staticmethod
    def _checked(name: str, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            raise PlanError(f"The saliency of {name!r} is of {tensor.dtype}; give floating numbers.")
        if bool(tensor.isnan().any()):
            raise PlanError(f"The saliency of {name!r} holds NaN, which has no order.")
        return tensor

    @classmethod
    def magnitude(cls, model: nn.Module, names: Iterable[str] | None = None) -> Saliency:
        """Absolute values.

        Args:
            model: of which masked tensors count with their zeros.
            names: of parameters; None for all of two dimensions or more.

        Raises:
            PlanError: a name is no parameter of the model.
        """
        return cls({name: tensor.abs() for name, tensor in chosen_tensors(model, names).items()})

    @classmethod
    def random(cls, model: nn.Module, names: Iterable[str] | None = None, seed: int = 0) -> Saliency:
        """Uniform scores in [0, 1), from a generator of their own: the baseline of all criteria.

        Args:
            model: whose tensors get scores.
            names: of parameters; None for all of two dimensions or more.
            seed: of the generator.

        Raises:
            PlanError: a name is no parameter of the model.
        """
        generator = torch.Generator().manual_seed(seed)
        chosen = chosen_tensors(model, names)
        return cls({name: torch.rand(tensor.shape, generator=generator) for name, tensor in chosen.items()})

    @classmethod
    def of(
        cls,
        model: nn.Module,
        example_inputs: ExampleInputs,
        importance: str | Importance,
        *,
        data: Iterable[Any] | Batches | None = None,
        loss: Loss | None = None,
        forward: Forward | None = None,
        names: Iterable[str] | None = None,
    ) -> Saliency:
        """The scores that a criterion gives to single weights.

        Those that have some: ``"l1"`` and other norms (absolute values), ``"random"``, ``"weight_taylor"`` (gradient
        times weight), ``"snip"``, ``"obd_fisher"`` and ``"obd_hutchinson"`` (Optimal Brain Damage), ``"OBS"`` as
        ``importance=structprune.importance.OBS()`` (Optimal Brain Surgeon on each layer), ``"wanda"``, and your own
        objects with a method ``weight_scores`` (`structprune.importance.base.WeightCriterion`). A masked model is
        scored with its zeros. The model is left as it was.

        Args:
            model: masked or not.
            example_inputs: a tensor, a tuple (positional) or a dict (keyword) that the model accepts.
            importance: a name or a criterion.
            data: an iterable of batches, or `structprune.importance.Batches`, for those that look at data.
            loss: called with the model and a batch; returns a scalar; for those that look at gradients.
            forward: called with the model and a batch; by default the model is called on the batch.
            names: of parameters; None for all of two dimensions or more that the criterion has scores for.

        Raises:
            PlanError: the criterion has no scores for single weights or not for these, a score is NaN, or data or a
                loss is missing or does not fit.

        Example:
            >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
            >>> scores = Saliency.of(model, torch.randn(1, 4), "wanda", data=[torch.randn(16, 4)])
            >>> scores
            Saliency(0.weight: [8, 4], 2.weight: [2, 8])
        """
        criterion = importance_of(importance)
        if not isinstance(criterion, WeightCriterion):
            raise PlanError(f"{type(criterion).__name__} scores channels, and has no scores for single weights.")
        inner = prunable(model)
        if any(hooks_of(module) for module in inner.modules()):
            inner = permanent(unwrapped(model))
        scores = criterion.weight_scores(ChannelGraph(inner, example_inputs), _batches(data, forward, loss))
        if names is None:
            return cls({name: tensor for name, tensor in scores.items() if tensor.dim() > 1})
        wanted = list(names)
        known = dict(inner.named_parameters())
        for name in wanted:
            if name not in known:
                raise PlanError(f"The model has no parameter {name!r}.")
            if name not in scores:
                raise PlanError(f"{type(criterion).__name__} has no scores for {name!r}: it is no weight of a layer.")
        return cls({name: scores[name] for name in wanted})

    @classmethod
    def gradient_times_weight(cls, model: nn.Module, names: Iterable[str] | None = None) -> Saliency:
        """Absolute values of weight times gradient, with the gradients that the parameters hold (LeCun 1990, SNIP).

        Args:
            model: after ``loss.backward()``.
            names: of parameters; None for all of two dimensions or more.

        Raises:
            PlanError: a name is no parameter of the model, or has no gradient.
        """
        parameters = dict(prunable(model).named_parameters())
        scores: dict[str, Tensor] = {}
        for name, tensor in chosen_tensors(model, names).items():
            held = parameters.get(name, parameters.get(f"{name}_orig"))
            if held is None or held.grad is None:
                raise PlanError(f"{name!r} has no gradient: call backward() on a loss first.")
            scores[name] = (tensor * held.grad).abs()
        return cls(scores)

    def __add__(self, other: Saliency) -> Saliency:
        """Sums of the scores."""
        return self._with(other, torch.add)

    def __mul__(self, other: Saliency | float) -> Saliency:
        """Products with other scores, or with a number."""
        if isinstance(other, Saliency):
            return self._with(other, torch.mul)
        return Saliency({name: tensor * other for name, tensor in self._tensors.items()})

    def min(self, other: Saliency) -> Saliency:
        """The smaller of two scores, entry by entry."""
        return self._with(other, torch.minimum)

    def max(self, other: Saliency) -> Saliency:
        """The larger of two scores, entry by entry."""
        return self._with(other, torch.maximum)

    def ranks(self, scope: str = "model") -> Saliency:
        """Ranks in place of scores, from above 0 to 1 for the highest; of equal scores the later are lower.

        Ranks of different criteria can be added, where their scores have different units.

        Args:
            scope: among what is ranked; see `mask`.

        Raises:
            PlanError: there is no such scope.
        """
        ranked: dict[str, Tensor] = {}
        for names in self._groups(scope):
            parts = [self._tensors[name] for name in names]
            scores = torch.cat([part.reshape(-1).cpu() for part in parts])
            order = len(scores) - 1 - scores.flip(0).argsort(stable=True)
            ranks = torch.empty(len(scores), dtype=torch.float64)
            ranks[order] = torch.arange(1, len(scores) + 1, dtype=torch.float64) / max(1, len(scores))
            pieces = ranks.split([part.numel() for part in parts])
            ranked |= {name: piece.view(part.shape) for name, piece, part in zip(names, pieces, parts, strict=True)}
        return Saliency({name: ranked[name] for name in self})

    def correlation(self, other: Saliency) -> dict[str, float]:
        """By tensor, how alike two saliencies rank its entries: Spearman's coefficient, from -1 to 1.

        Raises:
            PlanError: the two have other names or shapes.
        """
        self.require_alike(other)
        mine, theirs = self.ranks("tensor"), other.ranks("tensor")
        pairs = {
            name: torch.stack([mine._tensors[name].reshape(-1), theirs._tensors[name].reshape(-1)]) for name in self
        }
        return {name: float(torch.corrcoef(pair)[0, 1]) if pair.shape[1] > 1 else 1.0 for name, pair in pairs.items()}

    # -- masks ---------------------------------------------------------------------------------------------------

    def mask(
        self,
        amount: float,
        scope: str = "model",
        *,
        dim: int | None = None,
        n: float = 2.0,
        default_mask: Mask | None = None,
        cumulative: bool = False,
    ) -> Mask:
        """The mask without the lowest scores; of equal ones the later go.

        What "10%" means depends on the scope: of the model it takes most from layers of low scores, and may empty one;
        of each tensor it takes the same share everywhere.

        Args:
            amount: how many go: a fraction (a float from 0 to 1) or a count (an int), rounded as torch does.
            scope: whether that is of the whole ``"model"``, of each ``"layer"`` (all tensors of one module), of each
                ``"tensor"`` or of each ``"output"`` (each index of a tensor's first dimension, as Wanda does).
            dim: whole slices along this dimension go, such as 0 for filters, and `amount` is of slices; None for
                single entries.
            n: a slice has the Ln norm of its scores.
            default_mask: of an earlier round: what it lacks stays gone, and `amount` is of what it keeps.
            cumulative: `amount` is of everything, and what `default_mask` lacks counts towards it.

        Raises:
            PlanError: `amount` is out of range, there is no such scope or dimension, or `default_mask` does not fit.

        Example:
            >>> scores = Saliency({"w": torch.tensor([[1.0, 9.0], [2.0, 3.0]])})
            >>> scores.mask(0.5)["w"].tolist(), scores.mask(1, dim=0)["w"].tolist()
            ([[False, True], [False, True]], [[True, True], [False, False]])
        """
        if default_mask is not None:
            self.require_alike(default_mask)
        if not n > 0:
            raise PlanError(f"The order of a norm must be above 0, not {n}.")
        for name, tensor in self._tensors.items():
            if dim is not None and not -tensor.dim() <= dim < tensor.dim():
                raise PlanError(f"{name!r} has no dimension {dim}: its shape is {list(tensor.shape)}.")
        kept = {name: None if default_mask is None else default_mask[name] for name in self}
        masks: dict[str, Tensor] = {}
        for names in self._groups(scope, dim):
            parts = {name: (self._tensors[name], kept[name]) for name in names}
            masks |= lowest(parts, amount, dim, n, by_output=scope == "output", cumulative=cumulative)
        return Mask({name: masks[name] for name in self})

    def above(self, threshold: float | Mapping[str, float], *, default_mask: Mask | None = None) -> Mask:
        """The mask of the scores that are at least a threshold.

        Args:
            threshold: one for the whole model, or one for each tensor by name, such as `standard_deviations` gives.
            default_mask: of an earlier round: what it lacks stays gone.

        Raises:
            PlanError: a threshold is missing or NaN, or `default_mask` does not fit.
        """
        each = threshold if isinstance(threshold, Mapping) else dict.fromkeys(self, threshold)
        for name in self:
            if name not in each:
                raise PlanError(f"There is no threshold for {name!r}.")
            if each[name] != each[name]:
                raise PlanError(f"The threshold of {name!r} is NaN.")
        above = Mask({name: tensor >= each[name] for name, tensor in self._tensors.items()})
        return above if default_mask is None else above & default_mask

    def n_of_m(self, n: int = 2, m: int = 4) -> Mask:
        """The mask that keeps the `n` highest of each `m` entries that follow each other along the inputs.

        Inputs are the second dimension: of a linear layer what 2:4 sparse kernels expect, of a convolution its input
        channels at each place of the kernel. `structprune.masks.semi_structured` converts linear layers on CUDA.

        Args:
            n: how many stay, from 1 to below `m`.
            m: size of a block.

        Raises:
            PlanError: a tensor has fewer than two dimensions or not a multiple of `m` inputs, or `n` is out of range.
        """
        return Mask({name: best_of_blocks(name, tensor, n, m) for name, tensor in self._tensors.items()})

    def _groups(self, scope: str, dim: int | None = None) -> list[list[str]]:
        """Names of tensors that are looked at together."""
        require_scope(scope, dim)
        return grouped(self, scope)

    # -- on disk and drawn ---------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write a safetensors file.

        Args:
            path: of the file.
        """
        write(path, KIND, self._tensors)

    @classmethod
    def load(cls, path: str | Path) -> Saliency:
        """The saliency that `save` wrote.

        Args:
            path: of the file.

        Raises:
            LoadError: it is not such a file.
        """
        return cls(read(path, KIND)[0])

    def draw(self, path: str | os.PathLike[str]) -> Path:
        """Draw each tensor as a matrix of outputs x inputs: the darker, the higher the score.

        Args:
            path: the file to write; its ending says which format (pdf, svg, png).

        Raises:
            MissingExtraError: Matplotlib is not installed.
        """
        return draw_matrices(self._tensors, path)


def _batches(data: Iterable[Any] | Batches | None, forward: Forward | None, loss: Loss | None) -> Batches | None:
    if not isinstance(data, Batches):
        return None if data is None else Batches(data, forward, loss)
    if loss is not None or forward is not None:
        raise PlanError("data is Batches, which hold loss and forward; give them there.")
    return data
