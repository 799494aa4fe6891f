"""The widths of a library refined by evolution: whole networks are compared, not sums of losses.

A parent has a width for each group. Offspring exchange widths: some groups keep more channels, others fewer, so that
the limits still hold. All offspring are looked at on a few samples, the best of them on more, and the best of those
takes the parent's place if it loses less on all samples::

    parent      conv1 12, conv2 8, conv3 24      lost 0.31
    offspring   conv1 10, conv2 10, conv3 24     lost 0.40 on 1 batch
                conv1 14, conv2 8, conv3 20      lost 0.22 on 1 batch, 0.27 on 2 and on all: the new parent

Sieberling et al., EvoPress, 2024 (section 3, algorithm 1), there for the sparsity of layers or for layers dropped; here
for widths, whose cost is a product of two of them, so that limits are counted for each offspring.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from structprune.checking import require, whole
from structprune.html import html_table
from structprune.planning.allocation import Problem
from structprune.planning.plan import Plan
from structprune.search.outputs import Outputs

States = tuple[int, ...]
# So often an offspring is drawn anew that is known already or cannot be brought within the limits.
DRAWS = 8


@dataclass(frozen=True, kw_only=True)
class Evolution:
    """How widths evolve; see `Library.evolve`.

    Attributes:
        generations: how often a parent has offspring.
        offspring: how many each time.
        switches: how many groups an offspring widens at most.
        survivors: how many offspring are looked at on more samples, at each stage; the samples grow to all of them.
        seed: of the draws.
    """

    generations: int = 30
    offspring: int = 16
    switches: int = 3
    survivors: tuple[int, ...] = (4, 2)
    seed: int = 0

    def __post_init__(self) -> None:
        """Check what was given."""
        require(vars(self), generations=whole(0), offspring=whole(1), switches=whole(1), seed=whole(0))


@dataclass(frozen=True, slots=True)
class Evolved:
    """What evolution came to.

    Attributes:
        plan: the best plan.
        start: what the output of the plan by added losses loses for a sample, on all samples.
        loss: what that of the best plan loses.
        history: the loss of the parent after each generation.
        evaluations: how many networks were looked at.
    """

    plan: Plan
    start: float
    loss: float
    history: tuple[float, ...]
    evaluations: int

    def __repr__(self) -> str:
        """How far the loss fell; the plan is in `plan`."""
        return f"Evolved({self.start:.4g} -> {self.loss:.4g} in {len(self.history)} generations)"

    def _repr_html_(self) -> str:
        """The loss generation by generation, and the plan."""
        lines = [[str(number + 1), f"{loss:.5g}"] for number, loss in enumerate(self.history)]
        return html_table(["generation", "lost"], lines, repr(self)) + self.plan._repr_html_()


class Search:
    """One search for the widths that lose least.

    Args:
        problem: the groups, their widths and the limits.
        outputs: what networks are compared by.
        build: the network whose groups are in these states.
        how: how they evolve.
    """

    def __init__(
        self, problem: Problem, outputs: Outputs, build: Callable[[States], nn.Module], how: Evolution
    ) -> None:
        self._problem, self._outputs, self._build, self._how = problem, outputs, build, how
        self._random = np.random.default_rng(how.seed)
        self._lost: dict[tuple[States, int], float] = {}
        self._within: dict[States, bool] = {}
        self.evaluations = 0

    def go(self, parent: States) -> tuple[States, list[float]]:
        """The best states that were found from `parent` on, and what the parent loses after each generation."""
        every = len(self._outputs)
        history: list[float] = []
        for _ in range(self._how.generations):
            best = self._best(self._offspring(parent))
            if best is not None and self.lost(best, every) < self.lost(parent, every):
                parent = best
            history.append(self.lost(parent, every))
        return parent, history

    def lost(self, states: States, batches: int) -> float:
        """What the network in these states loses on the first batches."""
        if (states, batches) not in self._lost:
            self.evaluations += 1
            with torch.no_grad():
                self._lost[states, batches] = self._outputs.lost(self._build(states), batches)
        return self._lost[states, batches]

    def _best(self, offspring: list[States]) -> States | None:
        """The best of the offspring, looked at on ever more samples."""
        every = len(self._outputs)
        stages = [*self._how.survivors, 1]
        for number, survivors in enumerate(stages):
            batches = max(1, every * (number + 1) // len(stages))
            offspring = sorted(offspring, key=lambda states, seen=batches: self.lost(states, seen))[:survivors]
        return offspring[0] if offspring else None

    def _offspring(self, parent: States) -> list[States]:
        """Offspring that are not yet known, within the limits."""
        offspring: list[States] = []
        for _ in range(self._how.offspring):
            for _ in range(DRAWS):
                states = self._mutated(parent)
                if states is not None and states not in offspring and (states, len(self._outputs)) not in self._lost:
                    offspring.append(states)
                    break
        return offspring

    def _mutated(self, parent: States) -> States | None:
        """Some groups wider, others narrower until the limits hold, and then as many wider as still fit."""
        states = list(parent)
        last = [len(coupled.counts) - 1 for coupled in self._problem.all_coupled]
        wider = [unit for unit in self._shuffled() if states[unit] < last[unit]]
        wider = wider[: int(self._random.integers(1, self._how.switches + 1))]
        for unit in wider:
            states[unit] += 1
        while not self._holds(states):
            can = [unit for unit in range(len(states)) if states[unit] > 0 and unit not in wider]
            if not can:
                return None
            states[int(self._random.choice(can))] -= 1
        for unit in self._shuffled():
            if states[unit] < min(last[unit], parent[unit]):  # as far as it was before
                states[unit] += 1
                if not self._holds(states):
                    states[unit] -= 1
        return tuple(states)

    def _shuffled(self) -> list[int]:
        return self._random.permutation(len(self._problem.all_coupled)).tolist()

    def _holds(self, states: Sequence[int]) -> bool:
        """Whether all limits hold in these states."""
        key = tuple(states)
        if key not in self._within:
            self._within[key] = self._problem.target.misses(self._problem.measure(self._problem.kept(key))) <= 0
        return self._within[key]
