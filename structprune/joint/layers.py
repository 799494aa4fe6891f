"""Whole layers that go by number, as a target of exact sizes asks: ``{"num_hidden_layers": 28}``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice

from torch import nn

from structprune.depth.records import PlacedBranch
from structprune.errors import PlanError
from structprune.joint.search import PlanWidths, Search, joined
from structprune.planning.checks import WIDTHS
from structprune.planning.configured_part import not_rebuilt
from structprune.planning.options import PlanOptions
from structprune.planning.plan import Plan
from structprune.tracing.trace import ExampleInputs


class _LayerSearch(Search):
    """The search for the layers that are worth least."""

    def plan(self, stacks: Mapping[str, int], rest: Mapping[str, float]) -> Plan:
        """The plan that removes so many layers of each stack, and channels of what is left by another target.

        Raises:
            PlanError: so many cannot go.
        """
        chosen: list[PlacedBranch] = []
        for stack, count in stacks.items():
            layer = re.compile(rf"{re.escape(stack)}\.\d+")
            units = [item for item in self._units if layer.fullmatch(item.branch.module)]
            picked = self._picked(stack, units, count)
            if not_rebuilt(self._cut(picked)) is not None:
                # Some layers hold what others use (a table of positions, say), and no configuration leaves them out.
                alone = [item for item in units if not_rebuilt(self._cut((item,))) is None]
                picked = self._picked(stack, alone, count)
            chosen += picked
        cut = self._cut(tuple(chosen))
        widths = self._planned(cut, self._of_widths(target=rest) if rest else None)
        return self._finished(joined(cut, widths, len(chosen)), {}, {}, {})

    def _picked(self, stack: str, units: Sequence[PlacedBranch], count: int) -> tuple[PlacedBranch, ...]:
        sets = list(islice(self._order(units, None), count))
        if len(sets) < count:
            why = f" Refused: {next(iter(self._refused.items()))}." if self._refused else ""
            raise PlanError(
                f"target asks for {count} layers less in {stack!r}, of which {len(sets)} can go so that the "
                f"configuration describes it.{why}"
            )
        return sets[-1]


def search_layers(
    model: nn.Module, example_inputs: ExampleInputs, options: PlanOptions, stacks: Mapping[str, int], plan: PlanWidths
) -> Plan:
    """A plan of whole layers and channels for a target of exact sizes.

    Args:
        model: the model, wrapped or not.
        example_inputs: what it runs on.
        options: what is asked for.
        stacks: how many layers go of each stack, by its path.
        plan: plans the channels of a model.

    Raises:
        PlanError: the model cannot have these sizes.
    """
    of_layers = replace(options, target=None, axes=("blocks", WIDTHS))
    return _LayerSearch(model, example_inputs, of_layers, plan, options).plan(stacks, options.target or {})
