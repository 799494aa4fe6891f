"""The widths that a library gives to choose from, within a target: as states of groups, as networks, as plans."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from structprune.coupling.graph import ChannelGraph
from structprune.planning.build import plan_removal
from structprune.planning.decide import Deciding, Ranking
from structprune.planning.options import PlanOptions
from structprune.planning.plan import Plan
from structprune.search.evolution import States

if TYPE_CHECKING:
    from structprune.search.library import Library


class Widths:
    """The widths of all groups to choose from, as states: 0 is the narrowest of a group, the last one is the whole.

    Args:
        library: what it is chosen by.
        graph: the coupled channels.
        options: as for `Library.plan`; there is a target.

    Attributes:
        problem: the groups, their widths, what they lose, and the limits.
    """

    def __init__(self, library: Library, graph: ChannelGraph, options: Mapping[str, Any]) -> None:
        self._library, self._graph = library, graph
        with torch.no_grad():
            self._ranking = Ranking(graph, library)
            self._deciding = Deciding(graph, PlanOptions(**library.options(options)), self._ranking, None)
            self.problem = self._deciding.problem()

    @property
    def start(self) -> States:
        """Those that lose least in sum."""
        with torch.no_grad():
            return self.problem.states(self._deciding.decision(None).kept)

    @property
    def levels(self) -> dict[str, int]:
        """The greatest state of each group, or of groups that go together, by the name of the first."""
        names = [coupled.groups[0].name for coupled in self.problem.all_coupled]
        axes = [coupled.groups[0].axis for coupled in self.problem.all_coupled]
        labels = [
            name if names.count(name) == 1 else f"{name} ({axis})" for name, axis in zip(names, axes, strict=True)
        ]
        counts = [len(coupled.counts) - 1 for coupled in self.problem.all_coupled]
        return dict(zip(labels, counts, strict=True))

    def network(self, states: States) -> nn.Module:
        """The network in these states, with the layers that were solved for them."""
        kept = self.problem.kept(states)
        return self._library.assembled(plan_removal(self._graph, self._ranking.removed(kept), config=False), kept)

    def plan(self, states: States) -> Plan | None:
        """The plan; None if the forward does not allow these widths, of which it then knows."""
        decision = self._deciding.decided(self.problem.kept(states), None)
        if not self._graph.settle(self._graph.components.removed(decision.chosen)):
            return None
        with torch.no_grad():
            return plan_removal(self._graph, decision.chosen, decision.settings)
