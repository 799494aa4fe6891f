"""`learn_connections`: prune below thresholds by the sensitivity of each layer, retrain what is kept, repeat."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from structprune.errors import PlanError
from structprune.masks.mask import Mask
from structprune.masks.saliency import Saliency
from structprune.masks.thresholds import standard_deviations
from structprune.masks.torch_masks import chosen_tensors, hooks_of, update
from structprune.wrapping import prunable

DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


@dataclass(frozen=True, slots=True)
class ConnectionRound:
    """A round of pruning and retraining.

    Attributes:
        qualities: by tensor, the threshold in standard deviations of its weights; the smaller, the more sensitive.
        remaining: share of the connections that are left.
        pruned: score before retraining.
        retrained: score after it.
    """

    qualities: dict[str, float]
    remaining: float
    pruned: float
    retrained: float


@dataclass(frozen=True, slots=True, eq=False)
class Connections:
    """What `learn_connections` did.

    Attributes:
        dense: score before the first round.
        rounds: those that were kept.
        mask: the connections that are left.
    """

    dense: float
    rounds: tuple[ConnectionRound, ...]
    mask: Mask

    @property
    def times_fewer(self) -> float:
        """All connections over those that are left."""
        return self.mask.entries / max(1, self.mask.kept)

    def __str__(self) -> str:
        """A line for each round."""
        table = Table("round", "connections left", "pruned", "retrained")
        table.add_row("0", "100.0%", "", f"{self.dense:.4g}")
        for number, each in enumerate(self.rounds, 1):
            table.add_row(str(number), f"{each.remaining:.1%}", f"{each.pruned:.4g}", f"{each.retrained:.4g}")
        text = io.StringIO()
        Console(file=text, width=100).print(table)
        return text.getvalue().rstrip()


def learn_connections(
    model: nn.Module,
    train: Callable[[nn.Module], object],
    evaluate: Callable[[nn.Module], float],
    *,
    rounds: int = 5,
    tolerance: float = 0.01,
    drop: float = 0.0,
    qualities: Sequence[float] = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0),
    names: Iterable[str] | None = None,
) -> Connections:
    """Learn both weights and connections: prune what is below thresholds, retrain what is kept, and again.

    Han et al., Learning both Weights and Connections for Efficient Neural Networks, 2015. In each round the sensitivity
    of each tensor is measured: the largest threshold, in standard deviations of its weights, at which it alone can be
    pruned before the score falls by more than `tolerance`; the most sensitive gets the smallest. Kept weights are
    retrained from the values that they have, with the ratio of each dropout scaled by the square root of the share of
    connections left in the layer behind it (equation 2 of the paper; the layer that is next in the order of
    ``named_modules``). Add `weight_penalty` to the loss for L1 or L2 regularisation.

    A round after which the retrained score is below the dense one by more than `drop` is undone, and ends the loop.

    Args:
        model: trained; it is masked in place (``torch.nn.utils.prune``) and retrained.
        train: retrains the model in place.
        evaluate: gives a score, the higher the better. Give it data that is not the test set.
        rounds: at most so many.
        tolerance: how much the score may fall when one tensor alone is pruned.
        drop: how much the final score may be below the dense one.
        qualities: thresholds that are tried, in increasing order.
        names: of the parameters that are pruned; None for all of two dimensions or more.

    Raises:
        PlanError: an argument is out of range, a name is no parameter, or a tensor is masked already.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 1))
        >>> x = torch.randn(64, 4)
        >>> error = lambda model: (model(x) - x.sum(1, keepdim=True)).square().mean()
        >>> def train(model):
        ...     optimizer = torch.optim.Adam(model.parameters(), 0.01)
        ...     for _ in range(10):
        ...         optimizer.zero_grad()
        ...         (error(model) + weight_penalty(model, l2=1e-4)).backward()
        ...         optimizer.step()
        >>> result = learn_connections(model, train, lambda m: -float(error(m).detach()), rounds=2, drop=10.0)
        >>> len(result.rounds), result.mask.kept < result.mask.entries
        (2, True)
    """
    if rounds < 1 or not tolerance >= 0 or not drop >= 0:
        raise PlanError(f"rounds={rounds}, tolerance={tolerance}, drop={drop}: at least 1, 0 and 0.")
    tried = tuple(qualities)
    if not tried or list(tried) != sorted(set(tried)) or tried[0] < 0:
        raise PlanError(f"qualities is {list(tried)}; give numbers of at least 0 in increasing order.")
    inner = prunable(model, inplace=True)
    mask = Mask({name: tensor == tensor for name, tensor in chosen_tensors(inner, names).items()})
    mask.attach(model)
    dropouts = _dropouts(inner, set(mask))
    dense = float(evaluate(model))
    kept: list[ConnectionRound] = []
    try:
        for _ in range(rounds):
            before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            thresholds = {name: _quality(model, mask, name, evaluate, tried, tolerance) for name in mask}
            smaller = _below(model, thresholds, mask)
            if smaller.kept == mask.kept:
                break
            update(inner, smaller)
            pruned = float(evaluate(model))
            for module, ratio, name in dropouts:
                part = smaller.only([name])
                module.p = ratio * math.sqrt(part.kept / part.entries)
            train(model)
            retrained = float(evaluate(model))
            if retrained < dense - drop:
                model.load_state_dict(before)
                update(inner, mask)
                break
            mask = smaller
            kept.append(ConnectionRound(thresholds, mask.kept / mask.entries, pruned, retrained))
    finally:
        for module, ratio, _ in dropouts:
            module.p = ratio
    return Connections(dense, tuple(kept), mask)


def weight_penalty(model: nn.Module, l1: float = 0.0, l2: float = 0.0, names: Iterable[str] | None = None) -> Tensor:
    """The sum of absolute values times `l1` and of squares times `l2`, over the weights that are left.

    Args:
        model: masked or not.
        l1: factor of the absolute values; L1 before pruning, as the paper found, drives more weights to zero.
        l2: factor of the squares; better when the kept weights are retrained.
        names: of parameters; None for all of two dimensions or more.

    Returns:
        A scalar to add to the loss.

    Raises:
        PlanError: a name is no parameter of the model.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> weight_penalty(layer, l1=0.1).backward()
        >>> layer.weight.grad.abs()
        tensor([[0.1000, 0.1000]])
    """
    inner = prunable(model)
    wanted = chosen_tensors(inner, names)
    total = torch.zeros(())
    for path, module in inner.named_modules():
        hooks = {f"{hook._tensor_name}_orig": hook for hook in hooks_of(module)}
        for key, parameter in module._parameters.items():
            name = f"{path}.{key.removesuffix('_orig') if key in hooks else key}".lstrip(".")
            if parameter is not None and name in wanted:
                weight = hooks[key].apply_mask(module) if key in hooks else parameter
                total = total.to(weight.device) + l1 * weight.abs().sum() + l2 * weight.square().sum()
    return total


def _quality(
    model: nn.Module,
    mask: Mask,
    name: str,
    evaluate: Callable[[nn.Module], float],
    qualities: tuple[float, ...],
    tolerance: float,
) -> float:
    """The largest threshold at which this tensor alone can be pruned; 0 if there is none."""
    inner = prunable(model)
    whole, best = float(evaluate(model)), 0.0
    try:
        for quality in qualities:
            update(inner, _below(model, {name: quality}, mask.only([name])))
            if float(evaluate(model)) < whole - tolerance:
                break
            best = quality
    finally:
        update(inner, mask.only([name]))
    return best


def _below(model: nn.Module, qualities: dict[str, float], mask: Mask) -> Mask:
    """The mask without what is below thresholds of these qualities."""
    scores = Saliency.magnitude(model, list(mask))
    return scores.above(standard_deviations(model, qualities, names=list(mask)), default_mask=mask)


def _dropouts(model: nn.Module, names: set[str]) -> list[tuple[nn.modules.dropout._DropoutNd, float, str]]:
    """Dropouts, their ratios, and the masked weight that comes next."""
    dropouts: list[tuple[nn.modules.dropout._DropoutNd, float, str]] = []
    waiting: list[nn.modules.dropout._DropoutNd] = []
    for path, module in model.named_modules():
        if isinstance(module, DROPOUTS):
            waiting.append(module)
        here = [f"{path}.{hook._tensor_name}".lstrip(".") for hook in hooks_of(module)]
        if masked := [name for name in here if name in names]:
            dropouts += [(dropout, dropout.p, masked[0]) for dropout in waiting]
            waiting = []
    return dropouts
