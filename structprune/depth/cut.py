"""A trace with terms of sums left out: what each tensor is then, and what is still computed.

y = relu(bn(conv(x)) + x), where x is a ReLU's result. With the first term of the sum left out, the sum is x, and so
is its ReLU. What led to the term is no longer computed, unless something else reads it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType

from torch import fx

from structprune.coupling.costs import is_view
from structprune.depth.sums import is_itself, passes_zero, repeats, stacked, stands_alone, terms_of
from structprune.errors import PlanError
from structprune.ops.arguments import tensors
from structprune.tracing.trace import Trace, describe


class Cut:
    """What is left of a trace.

    Args:
        trace: of the model.
        off: terms that are zero, as (number of the sum, position among its terms).
        skipped: tensors that are replaced by others: number of the one -> number of the other, which comes before it.
        zero: numbers of operations whose results are zero.

    Attributes:
        value: what each node is: itself, another node that it equals, or None for zero.
        needed: the nodes that the outputs are computed from.

    Raises:
        PlanError: the rest cannot be computed: nothing is left of a sum that is used otherwise, or memory that is
            written to would be shared.
    """

    def __init__(
        self,
        trace: Trace,
        off: Iterable[tuple[int, int]] = (),
        skipped: Mapping[int, int] = MappingProxyType({}),
        zero: Iterable[int] = (),
    ) -> None:
        self.trace = trace
        self._off, self._skipped, self._zero = frozenset(off), skipped, frozenset(zero)
        self.value: dict[fx.Node, fx.Node | None] = {}
        self._faults: dict[fx.Node, str] = {}
        self._roots: dict[fx.Node, fx.Node] = {}
        for node in trace.nodes:
            self.value[node] = self._valued(node)
        self.needed = self._needed()
        self._check()

    def terms(self, node: fx.Node) -> list[fx.Node]:
        """The terms of a sum that are left."""
        number = node.meta["index"]
        values = [self.value[term] for i, term in enumerate(terms_of(node)) if (number, i) not in self._off]
        return [term for term in values if term is not None]

    def operands(self, node: fx.Node) -> list[fx.Node]:
        """The tensors that an operation takes now, after what they are replaced by."""
        values = [self.value[n] for n in tensors(node)]
        if node.meta["name"] == "stack" and len(node.users) == 1 and stacked(user := next(iter(node.users))) is node:
            return self.terms(user)
        return [value for value in values if value is not None]

    # -- values --------------------------------------------------------------------------------------------------

    def _valued(self, node: fx.Node) -> fx.Node | None:
        number = node.meta["index"]
        if number in self._zero:
            return None
        if number in self._skipped:
            return self.value[self.trace.nodes[self._skipped[number]]]
        inputs = tensors(node) if node.op.startswith("call_") else []
        if not inputs:
            return node
        if is_itself(node):
            return self.value[inputs[0]]
        terms = terms_of(node)
        if terms:
            return self._sum(node, terms)
        if any(self.value[n] is None for n in inputs):
            return self._on_zero(node)
        if len(inputs) == 1 and self.value[inputs[0]] is not inputs[0]:
            value = self.value[inputs[0]]
            if value is not None and repeats(node, value):
                return value
        return node

    def _sum(self, node: fx.Node, terms: tuple[fx.Node, ...]) -> fx.Node | None:
        number = node.meta["index"]
        left = [i for i, term in enumerate(terms) if (number, i) not in self._off and self.value[term] is not None]
        if len(left) == len(terms) or (left and stacked(node) is not None):
            return node
        if not left:
            return None
        rest = self.value[terms[left[0]]]
        assert rest is not None
        if not stands_alone(node, left[0]):
            self._faults[node] = f"what is left of {describe(node, self.trace)} would have to be scaled"
        elif (rest.meta["shape"], rest.meta["dtype"]) != (node.meta["shape"], node.meta["dtype"]):
            self._faults[node] = f"what is left of {describe(node, self.trace)} has another shape or type than the sum"
        else:
            return rest
        return node

    def _on_zero(self, node: fx.Node) -> fx.Node | None:
        stack = node.meta["name"] == "stack" and len(node.users) == 1
        if stack and stacked(next(iter(node.users))) is node:
            return node
        if passes_zero(node, lambda n: self.value[n] is None):
            return None
        self._faults[node] = f"nothing is left of what {describe(node, self.trace)} takes, so something has to stay"
        return node

    # -- what is still needed ------------------------------------------------------------------------------------

    def _needed(self) -> set[fx.Node]:
        needed: set[fx.Node] = set()
        pending: list[fx.Node] = []
        for name, node in self.trace.outputs.items():
            value = self.value[node]
            if value is None:
                raise PlanError(f"Nothing would be left of the output {name!r}: this is the only path to it.")
            pending.append(value)
        writers = [node for node in self.trace.nodes if "writes" in node.meta and self.value[node] is node]
        while pending:
            self._reach(pending, needed)
            roots = {self.root(node) for node in needed}
            # A write into the memory of a needed tensor is needed too, although no operation takes its result.
            pending = [w for w in writers if w not in needed and self._target(w) in roots]
        return needed

    def _target(self, writer: fx.Node) -> fx.Node | None:
        value = self.value[writer.meta["writes"]]
        return None if value is None else self.root(value)

    def _reach(self, pending: list[fx.Node], needed: set[fx.Node]) -> None:
        while pending:
            node = pending.pop()
            if node not in needed:
                needed.add(node)
                pending += self.operands(node)

    def root(self, node: fx.Node) -> fx.Node:
        """The tensor in whose memory a tensor lies."""
        steps: list[fx.Node] = []
        while node not in self._roots:
            value = self.value[node]
            behind = _lies_in(node) if value is node else value
            if behind is None:
                self._roots[node] = node
                break
            steps.append(node)
            node = behind
        for step in steps:
            self._roots[step] = self._roots[node]
        return self._roots[node]

    def _check(self) -> None:
        for node, reason in self._faults.items():
            if node in self.needed:
                raise PlanError(f"This cannot be removed: {reason}.")
        merged = {node for node in self.trace.nodes if (v := self.value[node]) is not None and v is not node}
        if merged:
            self._check_writes()

    def _check_writes(self) -> None:
        """Of two tensors that have become one, neither may be written to while the other is still read."""
        writers: dict[fx.Node, list[fx.Node]] = {}
        for node in self.needed:
            if "writes" in node.meta and self.value[node] is node and (root := self._target(node)) is not None:
                writers.setdefault(root, []).append(node)
        if not writers:
            return
        own = _Memory()
        readers = [(n, n.meta["index"], tensors(n)) for n in self.needed if n.op.startswith("call_")]
        readers += [(n, len(self.trace.nodes), [n]) for n in self.trace.outputs.values()]
        for reader, at, taken in readers:
            for node in taken:
                value = self.value[node]
                made = own.of(node)
                for writer in writers.get(self.root(value), ()) if value is not None else ():
                    between = made.meta["index"] < writer.meta["index"] < at
                    if between and made is not own.of(writer.meta["writes"]):
                        raise PlanError(
                            f"This cannot be removed: {describe(writer, self.trace)} would then write into a tensor "
                            f"that {describe(reader, self.trace)} still reads. Write it without inplace=True."
                        )


def _lies_in(node: fx.Node) -> fx.Node | None:
    """The tensor in whose memory the result of an operation lies, if it has none of its own."""
    inputs = tensors(node) if node.op.startswith("call_") else []
    return inputs[0] if inputs and (is_view(node) or "writes" in node.meta) else None


class _Memory:
    """In whose memory tensors lie as the trace has them."""

    def __init__(self) -> None:
        self._known: dict[fx.Node, fx.Node] = {}

    def of(self, node: fx.Node) -> fx.Node:
        """The tensor in whose memory `node` lies."""
        steps: list[fx.Node] = []
        while node not in self._known and (source := _lies_in(node)) is not None:
            steps.append(node)
            node = source
        root = self._known.get(node, node)
        for step in (*steps, node):
            self._known[step] = root
        return root
