"""Which branches go: what a network loses without each of them, and a choice that meets a target."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from structprune.checking import FLAG, INPUTS, ON_BATCH, one_of, real, require, shown, whole
from structprune.coupling.costs import node_macs
from structprune.coupling.propagate import Channels, propagate
from structprune.depth.cut import Cut
from structprune.depth.finding import find
from structprune.depth.records import Found
from structprune.depth.reference import branches_off
from structprune.depth.removal import cut_of
from structprune.depth.sums import stacked
from structprune.errors import PlanError
from structprune.importance.data import Batches, Forward, Loss, size_of
from structprune.ops import op_of
from structprune.tracing.replay import FoundCall, Hook, Replay
from structprune.tracing.state import collection_paused, copy_buffer, held_tensors, swapped_tensors
from structprune.tracing.trace import ExampleInputs, Trace, preserved_random_state, tensors_in, trace
from structprune.wrapping import prunable

SCORES = ("influence", "kl", "loss")
KINDS = ("blocks", "branches")


class _Scorer:
    """Scores branches of one model on data.

    Args:
        model: the model, without wrappers.
        recorded: its trace.
        batches: the data.
    """

    def __init__(self, model: nn.Module, recorded: Trace, batches: Batches) -> None:
        self.model, self.trace, self._batches = model, recorded, batches
        self._channels: Channels = propagate(recorded)
        self._data: list[Any] | None = None

    def data(self) -> list[Any]:
        """The batches, kept: each branch is looked at on all of them."""
        if self._data is None:
            self._data = list(self._batches.once("branches"))
        return self._data

    @contextmanager
    def _running(self) -> Generator[None]:
        with preserved_random_state(), torch.no_grad(), swapped_tensors(self.model, copy_buffer, track=False):
            self.model.eval()
            yield

    # -- one minus the cosine ------------------------------------------------------------------------------------

    def influence(self, found: Sequence[Found], off: Sequence[Found]) -> list[float]:
        """One minus the cosine between what stands before each branch and behind it, averaged over positions."""
        sums: dict[int, list[tuple[int, int, bool]]] = {}
        totals, counts = [0.0] * len(found), [0] * len(found)
        held: dict[tuple[int, int], Tensor] = {}

        def note(node: fx.Node, operation: FoundCall) -> Any:
            number = node.meta["index"]
            before = {p: operation.args[p] for p in range(len(operation.args)) if isinstance(operation.args[p], Tensor)}
            before |= {1: operation.kwargs["other"]} if "other" in operation.kwargs else {}
            before = {p: tensor.clone() for p, tensor in before.items()}
            result = operation()
            for which, position, last in sums[number]:
                rest = before.get(1 - position)
                if rest is None or stacked(node) is not None:
                    rest = result - before[position] if position in before else result
                # A block goes from what its first sum gets to what its last sum gives.
                held.setdefault((which, 0), rest)
                if last:
                    cosine = self._cosine(node, held.pop((which, 0)), result)
                    totals[which] += float(cosine.sum())
                    counts[which] += cosine.numel()
            return result

        for which, item in enumerate(found):
            edges = sorted(item.off)
            for number, position in edges:
                last = item.branch.kind == "branch" or number == edges[-1][0]
                sums.setdefault(number, []).append((which, position, last))
        hooks: dict[int, Hook] = {number: partial(note, self.trace.nodes[number]) for number in sums}
        passing = [which for which, item in enumerate(found) if item.skipped]
        with self._running(), branches_off(self.model, self.trace, off):
            for batch in self.data():
                held.clear()
                with (
                    Replay(self.trace, hooks, required=False).over(self.model),
                    self._looking(found, passing, totals, counts),
                ):
                    self._batches.forward(self.model, batch)
        return [1 - total / max(count, 1) for total, count in zip(totals, counts, strict=True)]

    @contextmanager
    def _looking(
        self, found: Sequence[Found], passing: Sequence[int], totals: list[float], counts: list[int]
    ) -> Generator[None]:
        """Look at what goes into blocks that are no sum, and comes out of them."""

        def look(which: int, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            y, x = (self.trace.nodes[number] for number in found[which].skipped[0])
            given = next(
                t for t in tensors_in((args, kwargs)) if t.is_floating_point() and t.dim() == len(x.meta["shape"])
            )
            result = next(t for t in tensors_in(output) if t.shape == given.shape)
            cosine = self._cosine(y, given, result)
            totals[which] += float(cosine.sum())
            counts[which] += cosine.numel()

        handles = [
            self.model.get_submodule(found[which].branch.module).register_forward_hook(
                partial(look, which), with_kwargs=True
            )
            for which in passing
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _cosine(self, node: fx.Node, before: Tensor, after: Tensor) -> Tensor:
        """The cosine over the channels of two tensors, one for each position."""
        rows = self._channels.axes[node.meta["index"]]
        dims = [dim for dim, row in enumerate(rows) if row.free] if isinstance(rows, tuple) else []
        dims = dims or list(range(1, before.dim()))
        before, after = before.double(), after.double()
        norms = before.pow(2).sum(dims).sqrt() * after.pow(2).sum(dims).sqrt()
        return (before * after).sum(dims) / norms.clamp_min(1e-30)

    # -- with the branch off -------------------------------------------------------------------------------------

    def kl(self, found: Sequence[Found], off: Sequence[Found]) -> list[float]:
        """Divergence of the output without each branch from that of the whole model, in nats for each position."""
        whole = [self._logits(batch) for batch in self._outputs(())]
        return [self._divergence(whole, [*off, item]) for item in found]

    def _outputs(self, off: Sequence[Found]) -> Iterator[Any]:
        with self._running(), branches_off(self.model, self.trace, off):
            for batch in self.data():
                yield self._batches.forward(self.model, batch)

    @staticmethod
    def _logits(output: Any) -> Tensor:
        first = next((t for t in tensors_in(output) if t.is_floating_point()), None)
        if first is None or not first.dim():
            raise PlanError("The model's output holds no scores to compare; choose with score='influence'.")
        return first.double().log_softmax(-1).flatten(0, -2)

    def _divergence(self, whole: list[Tensor], off: Sequence[Found]) -> float:
        total, count = 0.0, 0
        for dense, output in zip(whole, self._outputs(off), strict=True):
            total += float((dense.exp() * (dense - self._logits(output))).sum())
            count += len(dense)
        return total / count

    def loss(self, found: Sequence[Found], off: Sequence[Found]) -> list[float]:
        """How much the loss rises without each branch."""
        before = self._loss(off)
        return [self._loss([*off, item]) - before for item in found]

    def _loss(self, off: Sequence[Found]) -> float:
        with self._running(), branches_off(self.model, self.trace, off):
            losses = [(float(self._batches.value(self.model, batch)), size_of(batch)) for batch in self.data()]
        return sum(loss * size for loss, size in losses) / sum(size for _, size in losses)

    # -- what is saved -------------------------------------------------------------------------------------------

    def saved(self, cut: Cut, whole: Cut, what: str) -> int:
        """How many parameters or multiply-accumulates go with what a cut leaves out."""
        dead = whole.live - cut.live
        if what == "macs":
            return sum(node_macs(n, self._channels, lambda axis: axis.size) for n in dead if n.op.startswith("call_"))
        held = held_tensors(self.model)
        names = [str(n.target) for n in dead if n.meta["name"] == "parameter"]
        return sum(held[name].tensor.numel() for name in names if isinstance(held[name].tensor, nn.Parameter))

    def total(self, what: str) -> int:
        """All of them."""
        if what == "macs":
            return sum(node_macs(n, self._channels, lambda axis: axis.size) for n in self.trace.nodes)
        return sum(p.numel() for p in self.model.parameters())


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

    Args:
        model: any ``nn.Module`` whose forward can be traced.
        example_inputs: a tensor, a tuple (positional) or a dict (keyword) that the model accepts.
        data: an iterable of batches; they are held at once.
        count: how many go.
        target: instead, what is to remain of ``"params"`` or ``"macs"``: a fraction, or an amount above 1. Then they go
            in the order of what is lost over what is saved.
        score: what is lost: ``"influence"``, one minus the cosine of what goes in and comes out (Men et al., ShortGPT,
            2024, equation 1), by one forward for all; ``"kl"``, the divergence of the output without it; ``"loss"``,
            the rise of the loss. These take a forward of all data for each branch.
        kind: ``"blocks"``: those whose module is nothing without them (layers of a stack, residual blocks);
            ``"branches"``: single terms of sums, attention apart from MLP.
        greedy: score those that are left anew after each choice.
        loss: called with the model and a batch, returns a scalar; for ``"loss"``.
        forward: called with the model and a batch; by default the model is called on a tensor, the first of a pair, or
            a dict of keyword arguments.

    Returns:
        Names, in the order in which they were chosen.

    Raises:
        PlanError: what is asked for is unknown, or cannot be met.

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
    scores = {"score": one_of(SCORES), "kind": one_of(KINDS), "greedy": FLAG}
    functions = {"loss": ON_BATCH.or_none, "forward": ON_BATCH.or_none}
    require(locals(), example_inputs=INPUTS, count=whole(1).or_none, **scores, **functions)
    _check(count, target)
    inner = prunable(model)
    with collection_paused():
        recorded = trace(inner, example_inputs, operations=op_of)
        everything = find(inner, recorded)
    candidates = [f for f in everything if (f.branch.identity if kind == "blocks" else f.branch.kind == "branch")]
    batches = data if isinstance(data, Batches) else Batches(data, forward, loss)
    scorer = _Scorer(inner, recorded, batches)
    return _Choice(scorer, candidates, getattr(scorer, score), greedy).run(count, target)


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


class _Choice:
    """One choice: the branch that is worth least goes, and so on."""

    def __init__(
        self,
        scorer: _Scorer,
        candidates: list[Found],
        score: Callable[[Sequence[Found], Sequence[Found]], list[float]],
        greedy: bool,
    ) -> None:
        self._scorer, self._left, self._score, self._greedy = scorer, candidates, score, greedy
        self._whole = Cut(scorer.trace)
        self._chosen: list[Found] = []

    def run(self, count: int | None, target: Mapping[str, float] | None) -> tuple[str, ...]:
        what, share = next(iter(target.items())) if target is not None else ("params", 0.0)
        total = self._scorer.total(what)
        goal = total - (share * total if share <= 1 else share)
        scores: dict[str, float] = {}
        saved = 0
        while len(self._chosen) < count if count is not None else saved < goal:
            if self._greedy or not scores:
                found = self._score(self._left, self._chosen if self._greedy else ())
                if not np.isfinite(found).all():
                    raise PlanError("A score of a branch is NaN or infinite on data. Check the data and the weights.")
                scores = {f.branch.name: value for f, value in zip(self._left, found, strict=True)}
            best = self._best(scores, what, saved, per_cost=target is not None)
            if best is None:
                raise PlanError(
                    (f"count is {count}, but no" if count is not None else f"target is {shown(target)}, but no")
                    + f" more than {len(self._chosen)} can be removed"
                    + (f", which leaves {total - saved:,} of {total:,} {what}" if target is not None else "")
                    + ". Ask for less, or let branches go too: kind='branches'."
                )
            item, saved = best
            self._chosen.append(item)
            # What is inside of it, or around it and nothing else, went with it.
            self._left = [f for f in self._left if not f.dead <= self._dead()]
        return tuple(item.branch.name for item in self._chosen)

    def _dead(self) -> set[fx.Node]:
        return self._whole.live - cut_of(self._scorer.trace, self._chosen).live

    def _best(self, scores: Mapping[str, float], what: str, saved: int, per_cost: bool) -> tuple[Found, int] | None:
        """The next to go, and what is saved with it; those are passed over without which nothing would be left."""
        worth: list[tuple[float, int, Found, int]] = []
        for place, item in enumerate(self._left):
            try:
                now = self._scorer.saved(cut_of(self._scorer.trace, [*self._chosen, item]), self._whole, what)
            except PlanError:
                continue
            if not per_cost or now > saved:
                lost = scores[item.branch.name]
                worth.append((lost / (now - saved) if per_cost else lost, place, item, now))
        if not worth:
            return None
        _, _, item, now = min(worth, key=lambda entry: entry[:2])
        return item, now
