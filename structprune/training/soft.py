"""`SoftPruner`: channels switched off after each epoch that may come back in the next, until the last ones are cut."""

from __future__ import annotations

from typing import Any, Unpack

import numpy as np
import torch
from torch import nn

from structprune.api import coupled_channels, decide
from structprune.checking import INPUTS, MODEL, one_of, require
from structprune.coupling.graph import ChannelGraph
from structprune.errors import PlanError
from structprune.importance.sites import summed_dims
from structprune.ops.relations import Ids
from structprune.planning.build import plan_removal
from structprune.planning.options import PlanKeywords, PlanOptions, takes_options
from structprune.planning.plan import Plan
from structprune.surgery.edits import RemovedSlice
from structprune.surgery.slicing import zero
from structprune.tracing.state import held_tensors
from structprune.tracing.trace import ExampleInputs
from structprune.wrapping import unwrapped

PLACES = ("filters", "consumers")


@takes_options
class SoftPruner:
    """Sets the lowest-ranked channels to zero at the end of each epoch, lets them recover, and cuts them out at last.

    He et al., Soft Filter Pruning for Accelerating Deep Convolutional Neural Networks, 2018 (algorithm 1); with
    ``importance=FPGM()``: He et al., Filter Pruning via Geometric Median, 2019 (algorithm 1). Which channels go is
    decided anew each time, so a wrong choice can be undone, and the network trains with its full width.

    Only a part of what a plan removes is set to zero, since a channel of which everything is zero has no gradient left
    to come back by.

    Args:
        model: any ``nn.Module`` whose forward can be traced; `step` writes to its weights.
        example_inputs: a tensor, a tuple (positional) or a dict (keyword) that the model accepts.
        places: ``"filters"``: the weights that make the channels, as in the papers. Biases and norms stay, so that a
            channel still gives a constant, which is lost when it is cut; where that is below zero and a ReLU follows,
            it does not come back. ``"consumers"``: the weights that sum the channels up. Then the network already
            computes what the cut one does (unless a norm runs over the channels), and every channel can come back.
        options: those of `structprune.plan` (`structprune.planning.options.PlanOptions`).

    Attributes:
        plan: what the last `step` switched off; None before the first.

    Raises:
        PlanError: there is no such place.

    Example:
        >>> import torch, structprune
        >>> from structprune.training import SoftPruner
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
        >>> pruner = SoftPruner(model, torch.randn(1, 4), ratio=0.5, importance="fpgm")
        >>> for epoch in range(3):  # train for an epoch, then
        ...     plan = pruner.step()
        >>> int((model[0].weight == 0).all(1).sum())
        8
        >>> pruner.cut()[0].out_features
        8
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: ExampleInputs,
        *,
        places: str = "filters",
        **options: Unpack[PlanKeywords],
    ) -> None:
        require(locals(), model=MODEL, example_inputs=INPUTS, places=one_of(PLACES))
        self.model = model
        self.places = places
        self.plan: Plan | None = None
        self._inputs = example_inputs
        self._options = PlanOptions(**options)

    def step(self, *_: Any) -> Plan:
        """Rank the channels as they are now, and set the lowest ones to zero.

        Arguments, such as the number of an epoch, are ignored: it may be the ``on_epoch`` of `finetune`.

        Returns:
            The plan that would remove them.

        Raises:
            PlanError: what is asked for cannot be planned, or a channel has no weight of this kind to set to zero.
        """
        graph = coupled_channels(self.model, self._inputs, self._options)
        decision = decide(graph, self._options)
        with torch.no_grad():
            plan = plan_removal(graph, decision.chosen, decision.settings, described=decision.described)
            zeroed = self._zeroed(graph, plan, decision.chosen)
            tensors = held_tensors(unwrapped(self.model))
            for sliced in zeroed:
                tensor = tensors[sliced.tensor].tensor
                zero(tensor, sliced)
        self.plan = plan
        return plan

    def cut(self, inplace: bool = False) -> nn.Module:
        """The compact model: without the channels that the last `step` switched off.

        Call it right after `step`: what channels learn after it is lost with them.

        Args:
            inplace: change the model itself and return it; otherwise it stays untouched.

        Raises:
            PlanError: no step was made yet.
        """
        if self.plan is None:
            raise PlanError("Nothing is switched off yet. Call step() first.")
        return self.plan.apply(self.model, inplace=inplace)

    def _zeroed(self, graph: ChannelGraph, plan: Plan, chosen: Ids) -> list[RemovedSlice]:
        """The slices to set to zero, after checking that every group that loses channels has some."""
        summed, computed = summed_dims(graph)
        tensors = held_tensors(graph.model)
        slices: list[RemovedSlice] = []
        for sliced in plan.slices:
            tensor = tensors[sliced.tensor].tensor
            if not isinstance(tensor, nn.Parameter) or tensor.dim() < 2:
                continue
            if sliced.tensor in computed:
                raise PlanError(
                    f"A weight is computed from {sliced.tensor!r}, and what zeros in it do to that weight is not "
                    "known. Remove the parametrization or the mask while you train with SoftPruner."
                )
            if ((sliced.tensor, sliced.dim) in summed) == (self.places == "consumers"):
                slices.append(sliced)
        self._require_all(graph, chosen, {(sliced.tensor, sliced.dim) for sliced in slices})
        return slices

    def _require_all(self, graph: ChannelGraph, chosen: Ids, zeroed: set[tuple[str, int]]) -> None:
        for group in graph.groups():
            members = {(member.tensor, member.dim) for member in group.members}
            if np.isin(group.components, chosen).any() and not members & zeroed:
                raise PlanError(
                    f"No weight among the {self.places} of {group.name!r} can be set to zero. Name the layer in "
                    f"ignore=, or give places={PLACES[1 - PLACES.index(self.places)]!r}."
                )
