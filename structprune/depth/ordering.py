"""In which order branches go: the one that is worth least for what it saves, or consecutive blocks together."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from structprune.coupling.costs import node_macs
from structprune.depth.cut import Cut
from structprune.depth.records import PlacedBranch
from structprune.depth.removal import cut_of
from structprune.depth.scoring import SCORES, Scorer
from structprune.distributed import all_reduced
from structprune.errors import PlanError
from structprune.tracing.state import held_tensors

Chosen = tuple[PlacedBranch, ...]


def candidates_of(branches: Iterable[PlacedBranch], kinds: Collection[str]) -> list[PlacedBranch]:
    """Those of the kinds ``"blocks"`` (nothing is left of their module) and ``"branches"`` (single terms of sums)."""
    return [
        item
        for item in branches
        if ("blocks" in kinds and item.branch.identity) or ("branches" in kinds and item.branch.kind == "branch")
    ]


# What an operation takes of something, or a parameter.
NodeCost = Callable[[fx.Node], float]


def counted(scorer: Scorer, what: str) -> NodeCost:
    """How to count ``"params"`` or ``"macs"``."""
    if what == "macs":
        macs: dict[fx.Node, int] = {}

        def of(node: fx.Node) -> float:
            if node not in macs:
                call = node.op.startswith("call_")
                macs[node] = node_macs(node, scorer.channels, lambda axis: axis.size) if call else 0
            return macs[node]

        return of
    held = {name: one.tensor for name, one in held_tensors(scorer.model).items()}
    numel = {name: tensor.numel() for name, tensor in held.items() if isinstance(tensor, nn.Parameter)}
    return lambda node: numel.get(str(node.target), 0) if node.meta["name"] == "parameter" else 0


class Saved:
    """Counts what goes with branches.

    Args:
        scorer: of the model.
        costs: how each of several amounts is counted, by its name.

    Attributes:
        totals: what there is of each in the whole model.
    """

    def __init__(self, scorer: Scorer, costs: Mapping[str, NodeCost]) -> None:
        self._trace, self._costs = scorer.trace, costs
        self._whole = Cut(scorer.trace)
        self.totals = {name: sum(of(node) for node in scorer.trace.nodes) for name, of in costs.items()}

    def removed_nodes(self, chosen: Sequence[PlacedBranch]) -> set[fx.Node]:
        """What is no longer computed or used.

        Raises:
            PlanError: nothing would be left of an output.
        """
        return self._whole.needed - cut_of(self._trace, chosen).needed

    def amounts(self, chosen: Sequence[PlacedBranch]) -> dict[str, float]:
        """How much of each goes with these branches.

        Raises:
            PlanError: nothing would be left of an output.
        """
        removed = self.removed_nodes(chosen)
        return {name: sum(of(node) for node in removed) for name, of in self._costs.items()}

    def shares(self, chosen: Sequence[PlacedBranch]) -> dict[str, float]:
        """The same as shares of what there is."""
        return {name: amount / (self.totals[name] or 1) for name, amount in self.amounts(chosen).items()}

    def __call__(self, chosen: Sequence[PlacedBranch]) -> float:
        """The shares added up."""
        return sum(self.shares(chosen).values())


def choices(
    scorer: Scorer,
    candidates: Sequence[PlacedBranch],
    score: str,
    greedy: bool,
    price: Saved | None,
    may_go: Callable[[PlacedBranch], bool] = lambda _: True,
) -> Iterator[Chosen]:
    """What goes if one branch goes, if two go, and so on, until no more can go.

    Args:
        scorer: of the model.
        candidates: the branches that may go.
        score: one of `structprune.depth.scoring.SCORES`.
        greedy: whether those that are left are scored anew after each choice.
        price: what is saved; if given, branches go in the order of what is lost over what they save.
        may_go: asked of each that is about to be chosen one by one; what may not go is passed over.
    """
    if score == "angular":
        return _by_runs(scorer, candidates)
    return _one_by_one(scorer, candidates, score, greedy, price, may_go)


def _scores(score: str, scorer: Scorer, left: Sequence[PlacedBranch], chosen: Sequence[PlacedBranch]) -> list[float]:
    """What is lost without each of the branches that are left.

    Raises:
        PlanError: a score is no number.
    """
    scores = SCORES[score](scorer, left, chosen)
    if not all(map(math.isfinite, scores)):
        raise PlanError("A score of a branch is NaN or infinite on the data. Check the data and the weights.")
    return scores


def _one_by_one(
    scorer: Scorer,
    candidates: Sequence[PlacedBranch],
    score: str,
    greedy: bool,
    price: Saved | None,
    may_go: Callable[[PlacedBranch], bool],
) -> Iterator[Chosen]:
    saved = price or Saved(scorer, {})
    lost = dict(zip(map(_name, candidates), _scores(score, scorer, candidates, ()), strict=True))
    fresh = dict.fromkeys(lost, 0)
    chosen: list[PlacedBranch] = []
    left = list(candidates)
    while (best := _next(left, chosen, lost, saved, price is not None)) is not None:
        if greedy and fresh[_name(best)] < len(chosen):
            # What the others cost was counted when more was there: mostly it has only risen, so that they come later.
            (lost[_name(best)],) = _scores(score, scorer, [best], chosen)
            fresh[_name(best)] = len(chosen)
            continue
        if not may_go(best):
            left.remove(best)
            continue
        chosen.append(best)
        yield tuple(chosen)
        # What is inside of it, or around it and nothing else, went with it.
        gone = saved.removed_nodes(chosen)
        left = [item for item in left if not item.own_nodes <= gone]


def _name(item: PlacedBranch) -> str:
    return item.branch.name


def _next(
    left: Sequence[PlacedBranch], chosen: Sequence[PlacedBranch], lost: dict[str, float], saved: Saved, per_cost: bool
) -> PlacedBranch | None:
    """The next to go; those are passed over without which nothing would be left, or which save nothing."""
    before = saved(chosen) if per_cost else 0.0
    worth: list[tuple[float, int]] = []
    for place, item in enumerate(left):
        try:
            more = saved([*chosen, item]) - before
        except PlanError:
            continue
        if not per_cost or more > 0:
            worth.append((lost[_name(item)] / more if per_cost else lost[_name(item)], place))
    return left[min(worth)[1]] if worth else None


# -- consecutive blocks -----------------------------------------------------------------------------------------------


def _by_runs(scorer: Scorer, candidates: Sequence[PlacedBranch]) -> Iterator[Chosen]:
    """For each number of blocks, the runs of consecutive ones of each stack that turn the stream least.

    Of a stack of n blocks, the run of m whose input and output make the smallest angle goes (Gromov et al., 2024,
    equation 8); how many go of each stack is what makes the sum of the angles smallest.
    """
    stacks = _stacks(candidates)
    angles = _angles(scorer, stacks)
    best: list[list[tuple[float, int]]] = []
    for angle in angles:
        n = len(angle)
        runs = [(0.0, 0)]
        runs += [min((float(angle[start, start + m]), start) for start in range(n - m)) for m in range(1, n)]
        best.append(runs)
    for count in range(1, sum(len(stack) for stack in stacks) + 1):
        chosen = [
            item
            for stack, runs, m in zip(stacks, best, _spread(best, count), strict=True)
            for item in stack[runs[m][1] : runs[m][1] + m]
        ]
        try:
            cut_of(scorer.trace, chosen)
        except PlanError:
            return
        yield tuple(chosen)


def _stacks(candidates: Sequence[PlacedBranch]) -> list[list[PlacedBranch]]:
    """Blocks that follow each other in one list with streams of one shape; others stand alone."""
    stacks: dict[tuple[str, ...], list[PlacedBranch]] = {}
    for item in candidates:
        holder = item.branch.module.rpartition(".")[0]
        key = (holder,) if item.branch.identity else (holder, item.branch.name)
        stacks.setdefault(key, []).append(item)
    return list(stacks.values())


def _angles(scorer: Scorer, stacks: Sequence[Sequence[PlacedBranch]]) -> list[NDArray[np.float64]]:
    """For each stack of n blocks the angles over pi between all streams before, between and behind them.

    Shape ``(n + 1, n + 1)``; averaged over positions and batches. Infinite between streams of different shape.
    """
    flat = [item for stack in stacks for item in stack]
    before: dict[int, tuple[fx.Node, Tensor]] = {}
    after: dict[int, tuple[fx.Node, Tensor]] = {}

    def see(which: int, node: fx.Node, given: Tensor, result: Tensor) -> None:
        before[which], after[which] = (node, given.clone()), (node, result.clone())

    sums = [np.zeros((len(stack) + 1, len(stack) + 1)) for stack in stacks]
    count = 0
    for _ in scorer.watched(flat, (), see):
        count += 1
        start = 0
        for stack, total in zip(stacks, sums, strict=True):
            places = range(start, start + len(stack))
            streams = [*(before[place] for place in places), after[start + len(stack) - 1]]
            for i, (_, one) in enumerate(streams):
                for j, (node, other) in enumerate(streams[i + 1 :], i + 1):
                    total[i, j] += _angle(scorer, node, one, other)
            start += len(stack)
    batches = float(all_reduced(torch.tensor(float(max(count, 1)))))
    return [all_reduced(torch.from_numpy(total)).numpy() / batches for total in sums]


def _angle(scorer: Scorer, node: fx.Node, one: Tensor, other: Tensor) -> float:
    if one.shape != other.shape:
        return float("inf")
    with torch.no_grad():
        return float(scorer.cosine(node, one, other).clamp(-1, 1).arccos().mean()) / np.pi


def _spread(best: Sequence[Sequence[tuple[float, int]]], count: int) -> list[int]:
    """How many blocks go of each stack, so that `count` go at the least sum.

    Example:
        >>> _spread([[(0.0, 0), (0.2, 1)], [(0.0, 0), (0.1, 0), (0.5, 0)]], 2)
        [1, 1]
    """
    # By how many go so far: the least sum, and how many of each stack that takes.
    known: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}
    for runs in best:
        new: dict[int, tuple[float, list[int]]] = {}
        for gone, (total, spread) in known.items():
            for m, (angle, _) in enumerate(runs):
                entry = total + angle, [*spread, m]
                if gone + m not in new or entry < new[gone + m]:
                    new[gone + m] = entry
        known = new
    return known[count][1]
