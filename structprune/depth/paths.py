"""Where the modules of a model are once branches are gone, and what a plan removes by the names of before."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from structprune.depth.plan import DepthPlan
from structprune.planning.plan import Plan
from structprune.tracing.state import held_tensors


def by_names_before(plan: Plan) -> Plan:
    """A plan of the channels alone, whose slices name tensors as the model has them that still has its branches."""
    if not isinstance(plan, DepthPlan):
        return plan
    before = {now: name for name, now in plan.names.items() if now is not None}
    slices = tuple(replace(each, tensor=before.get(each.tensor, each.tensor)) for each in plan.slices)
    return replace(plan.widths, slices=slices)


class PathsAfter:
    """The path of each module in the model that a plan makes.

    Args:
        model: the model that the plan was made for.
        plan: the plan; without one, and for one of channels alone, all stay where they are.
    """

    def __init__(self, model: nn.Module, plan: Plan | None) -> None:
        self._names: Mapping[str, str | None] = plan.names if isinstance(plan, DepthPlan) else {}
        self._held = list(held_tensors(model)) if self._names else []

    def of(self, path: str) -> str | None:
        """The path of a module; None if it went. A module that holds nothing goes with the one around it."""
        if not self._names or not path:
            return path
        inside = [name for name in self._held if name.startswith(f"{path}.")]
        if not inside:
            around, _, name = path.rpartition(".")
            parent = self.of(around)
            return None if parent is None else f"{parent}.{name}" if parent else name
        for name in inside:
            now = self._names.get(name, name)
            if now is not None:
                return now.removesuffix(name.removeprefix(path))
        return None
