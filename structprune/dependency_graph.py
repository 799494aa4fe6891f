"""`DependencyGraph`: the coupled channels of a model, and their removal in place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import fx, nn

from structprune.checking import INDICES, LAYER_OR_DIMENSION, require
from structprune.coupling.graph import ChannelGraph
from structprune.coupling.grouped_choices import GroupedChoice, grouped_choice
from structprune.coupling.groups import Group
from structprune.coupling.naming import Dimension, Layer
from structprune.depth.finding import find
from structprune.depth.records import Branch
from structprune.html import html_table
from structprune.ops.relations import Ids
from structprune.planning.build import plan_removal
from structprune.planning.checks import check_ignore, check_outputs
from structprune.planning.plan import Plan, Settings
from structprune.tracing.state import collection_paused
from structprune.tracing.trace import ExampleInputs, OutputName, Trace
from structprune.wrapping import prunable

if TYPE_CHECKING:
    import networkx as nx


class DependencyGraph(ChannelGraph):
    """The coupled channels of a model.

    Building it runs the model once on stand-ins without data; the model is left as it was.

    Args:
        model: any ``nn.Module`` whose forward can be traced.
        example_inputs: a tensor, a tuple (positional) or a dict (keyword) that the model accepts.
        ignore: layers (modules or dotted names) to leave whole.
        ignore_outputs: layers whose outputs stay whole; their inputs may lose channels.
        outputs: names of the outputs that keep their shape (see `structprune.plan`); None for all, ``()`` for none.

    Raises:
        TraceError: the forward cannot be recorded.
        UnknownLayerError: a name in `ignore` is not in the model.

    Example:
        >>> import torch, structprune
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 3))
        >>> graph = structprune.DependencyGraph(model, torch.randn(1, 3, 8, 8))
        >>> print(graph.group("0"))
        0: 8 channels
          0.weight, dim 0: 1 a channel
          0.bias, dim 0: 1 a channel
          2.weight, dim 1: 1 a channel
        >>> plan = graph.prune_group("0", [1, 5])
        >>> model[2].weight.shape
        torch.Size([4, 6, 3, 3])
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: ExampleInputs,
        *,
        ignore: Iterable[Layer] | Layer = (),
        ignore_outputs: Iterable[Layer] | Layer = (),
        outputs: Iterable[OutputName] | OutputName | None = None,
    ) -> None:
        super().__init__(
            model,
            example_inputs,
            ignore=check_ignore("ignore", ignore),
            ignore_outputs=check_ignore("ignore_outputs", ignore_outputs),
            outputs=() if outputs == () else check_outputs("outputs", outputs),
        )
        self._given = model

    _branches: tuple[Trace, tuple[Branch, ...]] | None = None  # those of a trace, once they were asked for

    def __repr__(self) -> str:
        """How much is coupled and pinned; `groups`, `pinned` and `explain` tell more."""
        name, pinned = type(self.model).__name__, len(self.pinned())
        return f"DependencyGraph({name}: {len(self.groups())} groups, {pinned} pinned axes)"

    def _repr_html_(self) -> str:
        """The groups as a table for notebooks."""
        lines = [[g.name, g.axis, str(g.channels), str(len(g.members))] for g in self.groups()]
        return html_table(["group", "axis", "channels", "slices"], lines, repr(self))

    def branches(self) -> tuple[Branch, ...]:
        """The branches and blocks that may be removed as a whole: see `structprune.branches`."""
        if self._branches is None or self._branches[0] is not self.trace:
            with collection_paused():
                self._branches = self.trace, tuple(item.branch for item in find(self.model, self.trace))
        return self._branches[1]

    def explain(self, layer: Layer) -> str:
        """Why a layer's channels are pinned, or what goes with them; and the branches and blocks that it is part of.

        Example:
            >>> import torch, structprune
            >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
            >>> print(structprune.DependencyGraph(model, torch.randn(1, 4)).explain("0"))
            0: 8 channels
              0.weight, dim 0: 1 a channel
              0.bias, dim 0: 1 a channel
              2.weight, dim 1: 1 a channel
        """
        path = self.path_of(layer)
        lines = [super().explain(layer)]
        for branch in self.branches():
            if any(name == path or name.startswith(f"{path}.") for name in branch.layers):
                said = f"{branch.params:,} parameters, {branch.macs:,} MACs"
                lines.append(f"  goes as a whole with {branch.kind} {branch.name!r}: {said}")
        return "\n".join(lines)

    def to_networkx(self) -> nx.DiGraph[str]:
        """The layers that hold tensors, with an edge where one's output reaches the next.

        Node attributes: ``groups``, the numbers (in `groups`) of the groups that slice the layer.
        """
        import networkx as nx  # it takes longer than most graphs

        result: nx.DiGraph[str] = nx.DiGraph()
        numbers: dict[str, set[int]] = {}
        for number, group in enumerate(self.groups()):
            for member in group.members:
                numbers.setdefault(member.tensor.rpartition(".")[0], set()).add(number)
        for path, before in _layer_flow(self.trace):
            result.add_node(path, groups=sorted(numbers.get(path, ())))
            result.add_edges_from((other, path) for other in before if other != path)
        return result

    def prune_group(self, target: Group | Layer | Dimension, indices: Sequence[int]) -> Plan:
        """Remove channels, with all that is coupled to them, from the model in place.

        The graph then describes the smaller model; groups taken from it before are stale.

        Args:
            target: a group of this graph; a layer (module or dotted name), whose output channels are meant; or a
                dimension of a tensor, such as ``("fc.weight", 1)`` for the inputs of a linear layer.
            indices: channels of the group, the layer or the dimension, counted from 0. In front of a grouped
                convolution, and of the convolution itself, other channels of each group may go, equally many of each.

        Returns:
            The plan that was carried out.

        Raises:
            PlanError: indices out of range or repeated, or nothing would be left.
            PinnedError: a channel may not be removed; the message says why.
            SurgeryError: the removal failed; the model is as it was.
            UnsupportedModelError: a model of this kind cannot be changed in place.
        """
        require(locals(), indices=INDICES)
        prunable(self._given, inplace=True)
        if not isinstance(target, Group):
            require(locals(), target=LAYER_OR_DIMENSION)
        decided = plan_removal(
            self, self._settled(target, indices), Settings(asked={"indices": [int(i) for i in indices]})
        )
        self.carry_out(decided)
        return decided

    def carry_out(self, plan: Plan) -> None:
        """Apply a plan to the model in place; the graph then describes the smaller model.

        Raises:
            SurgeryError: the plan does not fit the model, which is then as it was.
        """
        plan.apply(self.model, inplace=True)
        self._analyse()

    def _settled(self, target: Group | Layer | Dimension, indices: Sequence[int]) -> Ids | GroupedChoice:
        """What `prune_group` removes, once every number in the forward that follows it is known to."""
        while True:
            grouped = grouped_choice(self, target, indices)
            chosen = self.chosen(target, indices) if grouped is None else grouped
            removed = self.components.removed(chosen) if isinstance(chosen, np.ndarray) else chosen.removed
            emptied = any(removed[self.components.of(slot.axis)].all() for slot in self.slots)
            if emptied or self.settle(removed, pin=False):
                return chosen
            if isinstance(target, Group):  # components are numbered anew
                same = [group for group in self.groups() if str(group) == str(target)]
                target = same[0] if len(same) == 1 else target.name


def _layer_flow(trace: Trace) -> Iterator[tuple[str, frozenset[str]]]:
    """Paths of the modules whose tensors operations take, in order, and those whose output reaches the operation."""
    reach: dict[fx.Node, frozenset[str]] = {}
    for node in trace.nodes:
        sources = [n for n in node.all_input_nodes if n.meta["name"] != "parameter"]
        held = {str(n.target).rpartition(".")[0] for n in node.all_input_nodes if n.meta["name"] == "parameter"}
        before = frozenset().union(*(reach.get(n, frozenset()) for n in sources)) if sources else frozenset()
        for path in held:
            yield path, before
        reach[node] = frozenset(held) or before
