"""Which branches and blocks of a model may be removed, read off its trace: sums, not classes, are looked at."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Any

from torch import fx, nn

from structprune.coupling.costs import node_macs
from structprune.coupling.propagate import propagate
from structprune.depth.cut import Cut
from structprune.depth.records import Branch, Edge, PlacedBranch, name_of, named_apart, nodes_in
from structprune.depth.sums import is_float, repeats, stacked, stands_alone, terms_of
from structprune.ops import op_of
from structprune.tracing.calls import ModuleCall
from structprune.tracing.state import collection_paused, held_tensors
from structprune.tracing.trace import ExampleInputs, Trace, trace
from structprune.wrapping import prunable

_STACKS = (nn.Sequential, nn.ModuleList)


class Finder:
    """Finds the branches and blocks of a traced model.

    Args:
        model: the model.
        recorded: its trace.
    """

    def __init__(self, model: nn.Module, recorded: Trace) -> None:
        self._model, self._trace = model, recorded
        self._whole = Cut(recorded)
        self._outputs = {value for node in recorded.outputs.values() if (value := self._of(node)) is not None}
        self._held = held_tensors(model)
        self._users: dict[fx.Node, list[fx.Node]] = {node: [] for node in recorded.nodes}
        for node in recorded.nodes:
            if node in self._whole.needed:
                for operand in self._takes(node):
                    # One that only writes into a tensor does not read it.
                    if node.users or self._of(node.meta.get("writes")) is not operand:
                        self._users[operand].append(node)

    def _of(self, node: fx.Node | None) -> fx.Node | None:
        """A tensor without changes to the type that it has already."""
        return None if node is None else self._whole.value[node]

    def _takes(self, node: fx.Node) -> list[fx.Node]:
        return self._whole.operands(node) if node.op.startswith("call_") else []

    def _terms(self, node: fx.Node) -> list[fx.Node]:
        return [value for term in terms_of(node) if (value := self._of(term)) is not None]

    def _nodes_in(self, value: Any) -> list[fx.Node]:
        return [part for node in nodes_in(value) if (part := self._of(node)) is not None]

    @cached_property
    def _channels(self) -> Any:
        return propagate(self._trace)

    def all(self) -> tuple[PlacedBranch, ...]:
        """All of them, in the order of the forward, each under a name of its own."""
        branches = list(self._branches())
        blocks = list(self._blocks(branches))
        everything = sorted([*branches, *blocks], key=self._place)
        return tuple(named_apart(everything))

    def _place(self, item: PlacedBranch) -> tuple[int, int]:
        sums = [number for number, _ in (*item.off, *item.skipped)]
        return min(sums), item.branch.kind != "block"

    # -- branches ------------------------------------------------------------------------------------------------

    def _branches(self) -> Iterator[PlacedBranch]:
        groups: dict[Any, list[int]] = {}
        seen: set[tuple[str, tuple[str, ...]]] = set()
        for number, key in self._trace.keys.items():
            node = self._trace.nodes[number]
            if node in self._whole.needed and len(self._terms(node)) > 1:
                # The calls of a module that is called several times have their branches in common.
                groups.setdefault((key.module, key.name, key.held, key.occurrence), []).append(number)
        for numbers in groups.values():
            for position in range(len(self._terms(self._trace.nodes[numbers[0]]))):
                branch = self._branch([(number, position) for number in numbers])
                if branch is not None and (branch.branch.module, branch.branch.tensors) not in seen:
                    # A sum of the branch and the stream beside it is no other branch.
                    seen.add((branch.branch.module, branch.branch.tensors))
                    yield branch

    def _branch(self, edges: list[Edge]) -> PlacedBranch | None:
        """The branch that ends in these terms, if they are one."""
        for number, position in edges:
            node = self._trace.nodes[number]
            if position >= len(self._terms(node)) or not self._rest_is_whole(node, position):
                return None
        own = self._own_nodes([(self._terms(self._trace.nodes[n])[p], n) for n, p in edges])
        if not self._is_layer(own) or not all(self._comes_from_rest(edge, own) for edge in edges):
            return None
        call = self._call_of(self._trace.nodes[edges[0][0]])
        identity = call.path != "" and all(self._is_identity(edge) for edge in edges)
        return PlacedBranch(self._described(call.path, "branch", own, identity), tuple(edges), (), frozenset(own))

    def _call_of(self, node: fx.Node) -> ModuleCall:
        return self._trace.calls[node.meta["call"]]

    def _rest_is_whole(self, node: fx.Node, position: int) -> bool:
        """Whether a sum without one of its terms has the shape and type that it has with it."""
        terms = self._terms(node)
        rest = [term for i, term in enumerate(terms) if i != position]
        if stacked(node) is not None:
            return bool(rest)
        (other,) = rest
        same = (other.meta["shape"], other.meta["dtype"]) == (node.meta["shape"], node.meta["dtype"])
        return same and terms[position] is not other and stands_alone(node, 1 - position)

    def _own_nodes(self, ends: Iterable[tuple[fx.Node, int]], keep: Iterable[fx.Node] = ()) -> set[fx.Node]:
        """What no operation reads once each of these tensors is no longer read by the operation of this number."""
        cut = {(tensor, self._trace.nodes[reader]) for tensor, reader in ends}
        stack = {tensor: stacked(reader) for tensor, reader in cut}
        own: set[fx.Node] = set()
        pending, keep = [tensor for tensor, _ in cut], {*keep, *self._outputs}
        while pending:
            node = pending.pop()
            if node in own or node in keep:
                continue
            if all(u in own or (node, u) in cut or u is stack.get(node) for u in self._users[node]):
                own.add(node)
                pending += self._takes(node)
        return {node for node in own if node.meta["name"] != "input"}

    def _is_layer(self, own: set[fx.Node]) -> bool:
        """Whether weights are used for more than scaling and shifting each entry."""
        for node in own:
            known = op_of(node.meta["name"])
            plain = known is not None and (known.elementwise or known.views or known.moves)
            weights = any(n in own and n.meta["name"] == "parameter" for n in self._takes(node))
            if weights and not plain:
                return True
        return False

    def _comes_from_rest(self, edge: Edge, own: set[fx.Node]) -> bool:
        """Whether the branch and another term are computed from the same floating tensor."""
        node = self._trace.nodes[edge[0]]
        rest = [term for i, term in enumerate(self._terms(node)) if i != edge[1]]
        term = self._terms(node)[edge[1]]
        sources = {n for d in own for n in self._takes(d)} - own or {term}
        shared = [n for n in sources if is_float(n) and n.meta["name"] not in ("parameter", "constant")]
        shared.sort(key=lambda n: -n.meta["index"])
        if any(self._reaches(source, rest) for source in shared):
            return True
        return not self._origins(shared).isdisjoint(self._origins(rest))

    def _origins(self, nodes: Iterable[fx.Node]) -> set[fx.Node]:
        """The floating tensors that these are computed from, and themselves."""
        pending, seen = list(nodes), set[fx.Node]()
        while pending:
            node = pending.pop()
            if node not in seen:
                seen.add(node)
                pending += self._takes(node)
        return {node for node in seen if is_float(node) and node.meta["name"] not in ("parameter", "constant")}

    def _reaches(self, source: fx.Node, targets: list[fx.Node]) -> bool:
        first = source.meta["index"]
        pending, seen = list(targets), set[fx.Node]()
        while pending:
            node = pending.pop()
            if node is source:
                return True
            if node not in seen and node.meta["index"] > first:
                seen.add(node)
                pending += self._takes(node)
        return False

    def _is_identity(self, edge: Edge) -> bool:
        """Whether the module that adds the branch gives back one of its arguments without it."""
        node = self._trace.nodes[edge[0]]
        terms = self._terms(node)
        if len(terms) != 2 or stacked(node) is not None:
            return False
        rest, call = terms[1 - edge[1]], self._call_of(node)
        outputs = [n for n in self._nodes_in(call.output) if self._users[n] or n in self._outputs]
        if rest not in set(self._nodes_in((call.args, call.kwargs))) or len(outputs) != 1:
            return False
        (output,) = outputs
        return output is node or (self._takes(output) == [node] and repeats(output, rest))

    # -- blocks --------------------------------------------------------------------------------------------------

    def _blocks(self, branches: list[PlacedBranch]) -> Iterator[PlacedBranch]:
        alone = {(f.branch.module, f.branch.tensors) for f in branches}
        streams = {n for f in branches for number, p in f.off for n in self._others(number, p)}
        for path, mine in self._calls_in_stacks().items():
            pairs = [pair for call in mine if (pair := self._through(call, streams)) is not None]
            if len(pairs) < len(mine):
                continue
            block = self._block(path, mine, [(y, x) for y, x in pairs if y is not x], branches)
            if block is not None and (path, block.branch.tensors) not in alone:
                yield block

    def _calls_in_stacks(self) -> dict[str, list[ModuleCall]]:
        """The calls of each module that is an item of a list, by its path."""
        calls: dict[str, list[ModuleCall]] = {}
        for call in self._trace.calls:
            if call.path and isinstance(self._model.get_submodule(call.path.rpartition(".")[0]), _STACKS):
                calls.setdefault(call.path, []).append(call)
        return calls

    def _block(
        self, path: str, calls: list[ModuleCall], pairs: list[tuple[fx.Node, fx.Node]], branches: list[PlacedBranch]
    ) -> PlacedBranch | None:
        """The block that gives back each second tensor for the first one; None if it has no layers of its own."""
        off = self._terms_of_block(pairs, branches)
        ends = [(self._terms(self._trace.nodes[n])[p], n) for n, p in off]
        if not off:
            ends = [(y, user.meta["index"]) for y, _ in pairs for user in self._users[y]]
        own = self._own_nodes(ends, [x for _, x in pairs])
        if not self._is_layer(own):
            return None
        adding = {self._trace.nodes[n] for n, _ in off}
        whole = {n for call in calls for n in self._ops(call)} <= own | adding
        if not off and not whole:
            return None  # it computes something else besides, so it is more than a step from one tensor to the next
        skipped = () if off else tuple((y.meta["index"], x.meta["index"]) for y, x in pairs)
        return PlacedBranch(self._described(path, "block", own, whole), off, skipped, frozenset(own))

    def _terms_of_block(self, pairs: list[tuple[fx.Node, fx.Node]], branches: list[PlacedBranch]) -> tuple[Edge, ...]:
        """The terms that a block adds to what it gets, where that is all that it does; else none."""
        chains = [self._chain(y, x, branches) for y, x in pairs]
        return tuple(edge for chain in chains for edge in chain or ()) if all(chains) else ()

    def _chain(self, result: fx.Node, given: fx.Node, branches: list[PlacedBranch]) -> list[Edge] | None:
        """The terms that make `result` out of `given`, if nothing but sums stands between them."""
        edges = {number: position for branch in branches for number, position in branch.off}
        chain: list[Edge] = []
        while result is not given:
            number = result.meta["index"]
            terms = self._terms(result)
            if len(terms) != 2 or number not in edges or stacked(result) is not None:
                return None
            chain.append((number, edges[number]))
            result = terms[1 - edges[number]]
        return chain

    def _ops(self, call: ModuleCall) -> list[fx.Node]:
        """What a call of a module computes, with the modules in it."""
        inside = self._trace.nodes[call.first : call.last]
        return [n for n in inside if n.op.startswith("call_") and n in self._whole.needed]

    def _others(self, number: int, position: int) -> list[fx.Node]:
        return [term for i, term in enumerate(self._terms(self._trace.nodes[number])) if i != position]

    def _through(self, call: ModuleCall, streams: set[fx.Node]) -> tuple[fx.Node, fx.Node] | None:
        """The result of a block and what it got in the same shape, which its first residual sum carries on."""
        results = [n for n in self._nodes_in(call.output) if is_float(n) and call.first <= n.meta["index"] < call.last]
        for given in self._nodes_in((call.args, call.kwargs)):
            if is_float(given) and given in streams and self._sums_inside(call, given):
                like = (given.meta["shape"], given.meta["dtype"])
                made = next((n for n in results if (n.meta["shape"], n.meta["dtype"]) == like), None)
                if made is not None and made not in self._outputs:
                    return made, given
        return None

    def _sums_inside(self, call: ModuleCall, given: fx.Node) -> bool:
        return any(call.first <= u.meta["index"] < call.last and len(self._terms(u)) > 1 for u in self._users[given])

    # -- description ---------------------------------------------------------------------------------------------

    def _described(self, module: str, kind: str, own: set[fx.Node], identity: bool) -> Branch:
        held = sorted((n for n in own if n.meta["name"] == "parameter"), key=lambda n: n.meta["index"])
        names = tuple(str(n.target) for n in held)
        layers = tuple(dict.fromkeys(name.rpartition(".")[0] for name in names))
        params = sum(
            self._held[name].tensor.numel() for name in names if isinstance(self._held[name].tensor, nn.Parameter)
        )
        macs = sum(node_macs(n, self._channels, lambda axis: axis.size) for n in own if n.op.startswith("call_"))
        name = module if kind == "block" or identity else name_of(module, layers)
        return Branch(name, kind, module, layers, names, params, macs, identity)


def find(model: nn.Module, recorded: Trace) -> tuple[PlacedBranch, ...]:
    """The branches and blocks of a traced model, with where they stand in the trace."""
    return Finder(model, recorded).all()


def branches(model: nn.Module, example_inputs: ExampleInputs) -> tuple[Branch, ...]:
    """The branches and blocks of `model` that `structprune.remove_branches` may take out, in the order of the forward.

    A branch is a term of a sum, with layers of its own, beside another term that is computed from the same tensor: `f`
    in ``x + f(x)``. Removed, it counts as zero. A block is a module of an ``nn.Sequential`` or ``nn.ModuleList`` with
    such a sum in it that gives a tensor of the shape that it got; removed, it gives back what it got. Where both are
    the same, it is listed once. Branches nest: a transformer's layer is a block with two or more branches in it.

    Args:
        model: any ``nn.Module`` whose forward can be traced.
        example_inputs: a tensor, a tuple (positional) or a dict (keyword) that the model accepts.

    Raises:
        TraceError: the forward cannot be recorded.

    Example:
        >>> import torch, structprune
        >>> class Residual(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layer = torch.nn.Linear(4, 4)
        ...     def forward(self, x):
        ...         return x + self.layer(x).relu()
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), Residual(), Residual())
        >>> for branch in structprune.branches(model, torch.randn(1, 4)):
        ...     print(branch)
        1: branch, 20 parameters, 16 MACs
        2: branch, 20 parameters, 16 MACs
    """
    model = prunable(model)
    with collection_paused():
        return tuple(item.branch for item in find(model, trace(model, example_inputs, operations=op_of)))
