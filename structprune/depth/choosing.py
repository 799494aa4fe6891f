"""Which branches go: an order by what a network loses without each of them, and a choice that meets a target."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from structprune.checking import FLAG, INPUTS, ON_BATCH, one_of, real, require, shown, whole
from structprune.depth.finding import find
from structprune.depth.ordering import Chosen, Saved, candidates_of, choices, counted
from structprune.depth.scoring import SCORES, Scorer
from structprune.distributed import failing_together
from structprune.errors import PlanError
from structprune.importance.data import Batches, Forward, Loss
from structprune.ops import op_of
from structprune.planning.checks import DEPTH
from structprune.tracing.state import collection_paused
from structprune.tracing.trace import ExampleInputs, trace
from structprune.wrapping import prunable


def choose(
    model: nn.Module,
    example_inputs: ExampleInputs,
    data: Iterable[Any] | Batches,
    *,
    count: int | None = None,
    target: Mapping[str, float] | None = None,
    score: str = "influence",
    kind: str = "blocks",
    greedy: bool = False,
    loss: Loss | None = None,
    forward: Forward | None = None,
) -> tuple[str, ...]:
    """The branches or blocks of `model` that matter least, to be given to `structprune.remove_branches`.

    Where ``torch.distributed`` is in use, every rank gives its share of the data, and all choose alike.

    Args:
        model: any ``nn.Module`` whose forward can be traced.
        example_inputs: a tensor, a tuple (positional) or a dict (keyword) that the model accepts.
        data: an iterable of batches; they are held at once.
        count: how many go.
        target: instead, what is to remain of ``"params"`` or ``"macs"``: a fraction, or an amount above 1. Then they go
            in the order of what is lost over what is saved.
        score: what is lost. By one forward for all: ``"influence"``, one minus the cosine of what goes in and comes out
            (Men et al., ShortGPT, 2024, equation 1); ``"angular"``, the angle between them, by which consecutive blocks
            of a stack are chosen together (Gromov et al., The Unreasonable Ineffectiveness of the Deeper Layers, 2024);
            ``"taylor"`` and ``"fisher"``, the mean gradient of the loss by a gate on the branch, and half its mean
            square over the samples. By a forward of all data for each branch: ``"kl"``, the rise of the divergence of
            the output's classes or tokens; ``"error"``, of the squared error of the outputs; ``"loss"``, of the loss.
        kind: ``"blocks"``: those whose module is nothing without them (layers of a stack, residual blocks);
            ``"branches"``: single terms of sums, attention apart from MLP.
        greedy: score those that are left anew after each choice; only those that come near to being the next one.
        loss: called with the model and a batch, returns a scalar; for ``"loss"``, ``"taylor"`` and ``"fisher"``.
        forward: called with the model and a batch; by default the model is called on a tensor, the first of a pair, or
            a dict of keyword arguments.

    Returns:
        Names, in the order in which they were chosen.

    Raises:
        PlanError: what is asked for is unknown, or cannot be met; or another rank has failed.

    Example:
        >>> import torch, structprune
        >>> class Residual(torch.nn.Module):
        ...     def __init__(self, gain):
        ...         super().__init__()
        ...         self.layer, self.gain = torch.nn.Linear(4, 4), gain
        ...     def forward(self, x):
        ...         return x + self.gain * self.layer(x)
        >>> model = torch.nn.Sequential(Residual(1.0), Residual(0.01), Residual(1.0))
        >>> x = torch.randn(8, 4)
        >>> structprune.choose_branches(model, x, [x], count=1)
        ('1',)
    """
    scores = {"score": one_of(SCORES), "kind": one_of(DEPTH), "greedy": FLAG}
    functions = {"loss": ON_BATCH.or_none, "forward": ON_BATCH.or_none}
    require(locals(), example_inputs=INPUTS, count=whole(1).or_none, **scores, **functions)
    _check(count, target)
    batches = data if isinstance(data, Batches) else Batches(data, forward, loss)
    with failing_together(PlanError, "choose_branches"):
        return _chosen(prunable(model), example_inputs, batches, (count, target), (score, kind, greedy))


def _chosen(
    inner: nn.Module,
    example_inputs: ExampleInputs,
    batches: Batches,
    amount: tuple[int | None, Mapping[str, float] | None],
    how: tuple[str, str, bool],
) -> tuple[str, ...]:
    """Names of the branches that go: so many, or as many as a target asks for, by score, kind and greediness."""
    (count, target), (score, kind, greedy) = amount, how
    with collection_paused():
        recorded = trace(inner, example_inputs, operations=op_of)
        everything = find(inner, recorded)
    scorer = Scorer(inner, recorded, batches)
    what, share = next(iter(target.items())) if target is not None else ("params", 0.0)
    saved = Saved(scorer, {what: counted(scorer, what)})
    total = saved.totals[what]
    goal = 0.0 if target is None else total - (share * total if share <= 1 else share)
    price = saved if target is not None else None
    chosen: Chosen = ()
    for chosen in choices(scorer, candidates_of(everything, (kind,)), score, greedy, price):
        if len(chosen) >= count if count is not None else saved.amounts(chosen)[what] >= goal:
            return tuple(item.branch.name for item in chosen)
    gone = saved.amounts(chosen)[what]
    asked = f"count is {count}" if count is not None else f"target is {shown(target)}"
    left = f", which leaves {total - gone:,.0f} of {total:,.0f} {what}" if target is not None else ""
    raise PlanError(
        f"{asked}, but no more than {len(chosen)} can be removed{left}. Ask for less, or let branches go too: "
        "kind='branches'."
    )


def _check(count: int | None, target: Mapping[str, float] | None) -> None:
    if (count is None) == (target is None):
        raise PlanError("Give count, how many branches go, or target, what is to remain: one of them.")
    if target is None:
        return
    given: object = target
    if not isinstance(given, Mapping) or len(target) != 1 or next(iter(target)) not in ("params", "macs"):
        raise PlanError(f"target is {shown(target)}; give {{'params': ...}} or {{'macs': ...}}.")
    if not real(above=0).fits(next(iter(target.values()))):
        raise PlanError(f"target is {shown(target)}; give a fraction of what there is, or an amount.")
