"""Taking out of a model what a `Cut` of its trace no longer computes."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn

from structprune.depth.cut import Cut
from structprune.depth.records import nodes_in
from structprune.depth.steps import LISTS, Steps
from structprune.depth.sums import is_float, is_itself
from structprune.errors import PlanError
from structprune.ops import op_of
from structprune.surgery.edits import Rewritten, rewritten_forward
from structprune.tracing.calls import ModuleCall
from structprune.tracing.state import collection_paused
from structprune.tracing.subgraph import Change, changed_graph
from structprune.tracing.trace import ExampleInputs, in_both_modes


@dataclass(frozen=True, slots=True)
class Way:
    """One way to do it where there are several: the first that gives the right network is taken.

    Attributes:
        rewrite: forwards that lose a part are rewritten, where they are not, the modules of that part give zeros.
        shorten: modules are taken out of lists, where they are not, they give back what they get.
        guard: forwards that may depend on flags are rewritten too, and then refuse other flags.
    """

    rewrite: bool
    shorten: bool
    guard: bool = False


WAYS = (
    Way(True, True), Way(False, True), Way(True, False), Way(False, False),
    Way(True, True, guard=True), Way(True, False, guard=True),
)  # fmt: skip


class _Left(Change):
    """The change of a forward to what a cut leaves of it."""

    def __init__(self, planner: Planner, zeros: bool, guarded: bool) -> None:
        self._planner, self.zeros, self.guarded = planner, zeros, guarded

    def value(self, node: fx.Node) -> fx.Node | None:
        value = self._planner.cut.value[node]
        return value if value in self._planner.cut.needed else None

    def runs(self, node: fx.Node) -> bool:
        if node.meta["name"] == "part":
            return self.value(node) is node
        if is_itself(node):
            return not self.zeros and self.value(node) is not None
        return self._planner.still_run(node)

    def calls(self, child: ModuleCall) -> bool:
        if self.zeros or self._planner.did(child)[0]:
            return not self.zeros and not self._planner.gone(child)
        # One that does nothing in eval mode goes with the branch that it is in.
        return all(self.value(node) is not None for node in nodes_in((child.args, child.kwargs)))

    def reads(self, node: fx.Node) -> bool:
        return node in self._planner.read


class Planner:
    """Decides which modules go, which give back what they get, and which get another forward.

    Args:
        model: the model.
        example_inputs: what it was traced on.
        whole: its trace, uncut.
        cut: what is to be left of it.
    """

    def __init__(self, model: nn.Module, example_inputs: ExampleInputs, whole: Cut, cut: Cut) -> None:
        self._model, self._inputs = model, example_inputs
        self.whole, self.cut, self._trace = whole, cut, cut.trace
        self.read = {n for node in whole.needed for n in whole.operands(node) if node.op.startswith("call_")}
        self._children: dict[int, list[ModuleCall]] = {}
        self._by_path: dict[str, list[ModuleCall]] = {}
        for call in self._trace.calls:
            self._by_path.setdefault(call.path, []).append(call)
            self._children.setdefault(call.parent, []).append(call)
        self._numbers = {id(call): number for number, call in enumerate(self._trace.calls)}
        self._own: dict[int, list[fx.Node]] = {}
        for node in self._trace.nodes:
            if node.op.startswith("call_") and node.meta["name"] != "part":
                self._own.setdefault(node.meta["call"], []).append(node)
        self._kind: dict[int, tuple[bool, bool]] = {}

    def still_run(self, node: fx.Node) -> bool:
        """Whether an operation is still run."""
        return node in self.cut.needed

    def _has(self, node: fx.Node) -> bool:
        value = self.cut.value[node]
        return value is not None and (value in self.cut.needed or node not in self.whole.needed)

    def did(self, call: ModuleCall) -> tuple[bool, bool]:
        """Whether a call, with those in it, computed something that mattered, and whether some of that is left."""
        number = self._numbers[id(call)]
        if number not in self._kind:
            own = [node for node in self._own.get(number, ()) if node in self.whole.needed]
            inner = [self.did(child) for child in self._children.get(number, ())]
            did = bool(own) or any(a for a, _ in inner)
            left = any(self.still_run(node) for node in own) or any(b for _, b in inner)
            self._kind[number] = did, left
        return self._kind[number]

    def gone(self, call: ModuleCall) -> bool:
        """Whether nothing is left of a call of a module."""
        did, left = self.did(call)
        return did and not left

    def _passes(self, call: ModuleCall) -> bool:
        """Whether a call of which nothing is left gives on what it got."""
        values = [self.cut.value[node] for node in nodes_in(call.output) if node in self.read or self._is_output(node)]
        return any(value is not None and value in self.cut.needed for value in values)

    def _is_output(self, node: fx.Node) -> bool:
        return node in self._trace.outputs.values()

    # -- decisions -----------------------------------------------------------------------------------------------

    def steps(self, way: Way) -> Steps:
        """What to do.

        Raises:
            PlanError: a module that is called several times would have to differ between its calls.
            TraceError: a forward that would have to be rewritten uses something that a graph cannot hold.
        """
        steps = Steps({}, [], [], {})
        (root,) = self._children[-1]
        done: set[str] = set()
        self._visit(root, way, steps, done)
        steps.kept = self._still_used(steps)
        return steps

    def _still_used(self, steps: Steps) -> frozenset[str]:
        """Names of tensors in modules that go which something else uses, and which no other module holds."""
        inside = tuple(f"{path}." for path in (*steps.emptied, *steps.dropped))
        used = [str(n.target) for n in self.cut.needed if n.meta["name"] == "parameter"]
        names_used: set[str] = set()
        for name in used:
            names = self._trace.tensors[name]
            if all(f"{one}.".startswith(inside) for one in names):
                names_used.update(names)
        return frozenset(names_used)

    def _check_alike(self, path: str) -> None:
        """A module that is called several times has one forward."""
        calls = [call for call in self._by_path[path] if self.did(call)[0]]
        kinds = {(self.gone(call), self._changes(call), len(self._kept_own(call))) for call in calls}
        if len(kinds) > 1:
            raise PlanError(
                f"This cannot be removed: {path or 'the model'} is called {len(calls)} times, and only some of the "
                "calls would go without it. Modules that are shared lose a branch in all calls or in none."
            )

    def _goes(self, child: ModuleCall) -> bool:
        """Whether nothing is left of any call of a module."""
        return all(self.gone(call) for call in self._by_path[child.path] if self.did(call)[0])

    def _kept_own(self, call: ModuleCall) -> list[fx.Node]:
        return [node for node in self._own.get(self._numbers[id(call)], ()) if self.still_run(node)]

    def _changes(self, call: ModuleCall) -> bool:
        """Whether the forward of a module itself loses something."""
        number = self._numbers[id(call)]
        for node in self._own.get(number, ()):
            if node in self.whole.needed and not self.still_run(node):
                return True
        for child in self._children.get(number, ()):
            if self.gone(child):
                if not self._passes(child):
                    return True
            elif self.did(child)[0] and any(not self._has(n) for n in nodes_in((child.args, child.kwargs))):
                return True
        return False

    def _visit(self, call: ModuleCall, way: Way, steps: Steps, done: set[str]) -> None:
        """Decide about a call of which something is left, and those in it."""
        if call.path in done:
            return
        done.add(call.path)
        children = self._children.get(self._numbers[id(call)], [])
        changes = self._changes(call)
        rewrite = changes and way.rewrite and self._may_be_rewritten(call, way.guard)
        if rewrite:
            self._check_alike(call.path)
            steps.forwards[call.path] = self._forward(call, zeros=False, guarded=way.guard)
            steps.dropped += [child.path for child in children if self._goes(child)]
            steps.dropped += self._own_tensors(call)
        for child in children:
            if self.gone(child):
                if not rewrite:
                    self._leave(child, way, steps, done)
            elif self.did(child)[0]:
                self._visit(child, way, steps, done)

    def _leave(self, call: ModuleCall, way: Way, steps: Steps, done: set[str]) -> None:
        """Decide about a call of which nothing is left, in a forward that stays as it is."""
        if call.path in done:
            return
        done.add(call.path)
        if not self._goes(call):
            return  # it is shared with what stays, and stays as it is
        parent, _, key = call.path.rpartition(".")
        holder = self._model.get_submodule(parent)
        listed = isinstance(holder, LISTS) and type(holder).forward in (nn.Sequential.forward, nn.Module.forward)
        if listed and self._passes(call) and (way.shorten or isinstance(holder, nn.Sequential)):
            steps.shortened.setdefault(parent, []).append(key)
            return
        if self._passes(call) and not self._changes(call):
            done.remove(call.path)
            self._visit(call, way, steps, done)
            return
        steps.forwards[call.path] = self._forward(call, zeros=True, guarded=False)
        steps.emptied.append(call.path)

    def _forward(self, call: ModuleCall, zeros: bool, guarded: bool) -> Rewritten:
        graph = changed_graph(self._trace, call, _Left(self, zeros, guarded))
        return rewritten_forward(self._model.get_submodule(call.path), call.path, graph)

    def _own_tensors(self, call: ModuleCall) -> list[str]:
        """Names of the tensors that a module itself holds and nothing uses any more."""
        held = [n for n in self.whole.needed if n.meta["name"] == "parameter" and n not in self.cut.needed]
        return [str(n.target) for n in held if str(n.target).rpartition(".")[0] == call.path]

    # -- what may be rewritten -----------------------------------------------------------------------------------

    def _may_be_rewritten(self, call: ModuleCall, guard: bool) -> bool:
        """Whether a forward does the same whatever its arguments and in both modes, as far as the trace can tell.

        A forward that was given a flag, a cache or no mask may do something else with another one: it stays as written,
        unless it is guarded.
        """
        parameters = inspect.signature(type(call.module).forward).parameters.values()
        named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        given = (*call.args, *call.kwargs.values())
        if guard:
            given = tuple(item for item in given if not (item is None or isinstance(item, (bool, int, float, str))))
        elif len(named) - 1 > len(given):
            return False  # one has its default
        return all(isinstance(item, (fx.Node, Tensor)) for item in _leaves(given)) and self._same_in_training(call)

    @cached_property
    def _training(self) -> dict[str, list[list[str]]] | None:
        """What each module runs itself in training mode, call by call; None where that could not be recorded."""
        with collection_paused():
            both = in_both_modes(self._model, self._inputs, op_of)
        if both is None:
            return None
        own: dict[int, list[str]] = {}
        for node in both.all_nodes[len(both.nodes) :]:
            if node.op.startswith("call_"):
                own.setdefault(node.meta["call"], []).append(node.meta["name"])
        by_path: dict[str, list[list[str]]] = {}
        for number in range(len(both.calls), len(both.every_call)):
            by_path.setdefault(both.every_call[number].path, []).append(own.get(number, []))
        return by_path

    def _same_in_training(self, call: ModuleCall) -> bool:
        number = self._numbers[id(call)]
        here = [n.meta["name"] for n in self._trace.own.get(call.path, ()) if n.meta["call"] == number]
        if self._training is None:  # in training mode the model as a whole asks for more: labels, say
            return here == _alone_in_training(self._model.get_submodule(call.path), call)
        return here in self._training.get(call.path, ())


def _alone_in_training(module: nn.Module, call: ModuleCall) -> list[str] | None:
    """What a module runs itself in training mode on tensors like those of a call; None where that is not known."""
    if call.kwargs or not all(isinstance(item, fx.Node) and is_float(item) for item in call.args):
        return None
    given = tuple(torch.empty(n.meta["shape"], dtype=n.meta["dtype"], device="meta") for n in call.args)
    with collection_paused():
        both = in_both_modes(module, given, op_of)
    if both is None:
        return None
    behind = both.all_nodes[len(both.nodes) :]
    own = [n for n in behind if n.op.startswith("call_") and n.meta["call"] >= 0]
    return [n.meta["name"] for n in own if not both.every_call[n.meta["call"]].path]


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        for item in value.values():
            yield from _leaves(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _leaves(item)
    else:
        yield value
