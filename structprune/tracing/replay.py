"""Finding the operations of a trace again while a model runs, and doing something there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from structprune.errors import StructpruneError, TraceError
from structprune.tracing.calls import ASKED, MOVES, CallMode, call_module, holds_tensor, tensors_taken
from structprune.tracing.opaque import Opaque, holdings, opaque_call
from structprune.tracing.state import held_tensors
from structprune.tracing.trace import Trace, describe
from structprune.tracing.vocabulary import Call, Kind


@dataclass(slots=True)
class Operation:
    """An operation that is about to run. Calling it runs it on `args` and `kwargs`, which a hook may exchange first.

    Attributes:
        node: the operation in the trace; None where a hook was asked for by name and the trace has no such one.
        call: its canonical name, and whether it writes into its first argument.
        func: what runs it.
        args: its positional arguments; for an opaque module, those of its forward.
        kwargs: its keyword arguments.
    """

    node: fx.Node | None
    call: Call
    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self) -> Any:
        """Run it."""
        return self.func(*self.args, **self.kwargs)


Hook = Callable[[Operation], Any]
Group = tuple[str, int, str, tuple[str, ...]]  # operations that only their order tells apart


class Replay(CallMode):
    """Finds the operations of a trace again while a model runs, and lets hooks stand in for them.

    The model may be the traced one, a copy or a pruned copy of it, and run on other inputs or inside a loss: operations
    are found by `CallKey`. A hook is called in place of the operation, and what it returns is the result. So it can
    look at the arguments and the result, exchange either, leave the work out, or wait there for another thread.

    Args:
        trace: of the model.
        hooks: by the number of an operation in the trace; or by a canonical name, for all other operations of that name
            in the model.
        whole: whether the run has to do just what the trace did, operation for operation. Else it may do more, and do
            less elsewhere, as long as each operation that was asked for can be told from its equals.
        required: whether each forward has to come by all operations that were asked for.
        error: what is raised where the run is not the one that was traced.
        begin: called with the arguments of the model as each forward begins.

    Attributes:
        forwards: how many forwards of the model began.
        asked: whether Python asked for the value of a tensor in the last of them.

    Example:
        >>> import torch
        >>> from structprune.tracing.trace import trace
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1))
        >>> found = trace(model, torch.randn(1, 2))
        >>> relu = next(number for number, key in found.keys.items() if key.name == "relu")
        >>> def none(operation):
        ...     return torch.zeros_like(operation())
        >>> with Replay(found, {relu: none}).over(model):
        ...     output = model(torch.randn(5, 2))
        >>> torch.equal(output, model[2].bias.expand(5, 1))
        True
    """

    def __init__(
        self,
        trace: Trace,
        hooks: Mapping[Any, Hook],
        *,
        whole: bool = False,
        required: bool = True,
        error: type[StructpruneError] = TraceError,
        begin: Callable[[tuple[Any, ...], dict[str, Any]], None] | None = None,
    ) -> None:
        super().__init__(trace.leaves)
        self._trace, self._hooks, self._whole, self._required = trace, hooks, whole, required
        self._error, self._begin = error, begin
        keys = trace.keys
        for number in hooks:
            if isinstance(number, int) and number not in keys:
                where = describe(trace.nodes[number], trace)
                raise error(f"{where} runs outside of the model's forward, so that it cannot be found in another run.")
        self._wanted = list(keys) if whole else [number for number in keys if number in hooks]
        asked = () if whole else self._wanted
        self._numbers: dict[tuple[Any, ...], int] = {keys[number]: number for number in asked}
        self._names = {keys[number].name for number in asked}
        equals = Counter(key[:-1] for key in keys.values() if key.name in self._names)
        self._expected: dict[Group, int] = {group: equals[group] for group in {keys[n][:-1] for n in asked}}
        calls = Counter(call.path for call in trace.calls)
        self._known_calls = {path: calls[path] for path in {keys[number].module for number in asked}}
        self._model_names: dict[int, str] = {}
        self._alive: list[Tensor] = []
        self.forwards = 0
        self._reset()

    def _reset(self) -> None:
        """A forward begins: nothing has run."""
        self._stack: list[tuple[str, int]] = []
        self._calls: dict[str, int] = {}
        self._counts: dict[Group, int] = {}
        self._held = dict(self._model_names)
        self._renamed: list[Tensor] = []
        self._at = 0
        self.asked = False

    @contextmanager
    def over(self, model: nn.Module) -> Generator[Replay]:
        """While the block runs, forwards of `model` in this thread are followed.

        Raises:
            StructpruneError: of the class asked for, as soon as a forward is not the one that was traced.
        """
        self._model_names = {}
        for name, held in held_tensors(model).items():
            self._model_names.setdefault(id(held.tensor), name)
            self._alive.append(held.tensor)
        try:
            with self.watching(model):
                yield self
        finally:
            self._alive.clear()

    # -- modules -------------------------------------------------------------------------------------------------

    def _called(self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self._stack:
            return call_module(module, *args, **kwargs) if path else self._forward(module, args, kwargs)
        number = self._calls[path] = self._calls.get(path, -1) + 1
        if number >= self._known_calls.get(path, number + 1):
            raise self._error(self._other_counts(f"calls {path}", number + 1, number))
        self._stack.append((path, number))
        try:
            return call_module(module, *args, **kwargs)
        finally:
            self._stack.pop()

    def _forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._reset()
        self.forwards += 1
        if self._begin is not None:
            self._begin(args, kwargs)
        self._calls[""] = 0
        self._stack.append(("", 0))
        try:
            with self:
                output = call_module(model, *args, **kwargs)
        finally:
            self._stack.clear()
        if self._required:
            self._complete()
        return output

    def _complete(self) -> None:
        """A forward ended: it must have come by all that was asked for."""
        for place, number in enumerate(self._wanted):
            key = self._trace.keys[number]
            done = self._at > place if self._whole else self._counts.get(key[:-1], 0) > key.occurrence
            if not done:
                where = describe(self._trace.nodes[number], self._trace)
                raise self._error(
                    f"On the data the forward did not come to {where}, as it did on the example inputs. Give example "
                    "inputs of the same form as the data."
                )
        for path, known in self._known_calls.items():
            if self._calls[path] + 1 != known:
                raise self._error(self._other_counts(f"calls {path}", self._calls[path] + 1, known))
        for group, expected in self._expected.items():
            if self._counts[group] != expected:
                raise self._error(self._other_counts(_runs(group), self._counts[group], expected))

    @staticmethod
    def _other_counts(what: str, here: int, there: int) -> str:
        return (
            f"On the data the forward {what} {here} times{' or more' if here > there else ''}, where it did so {there} "
            "times on the example inputs: which of them is which cannot be told. Give example inputs of the same form "
            "as the data."
        )

    # -- operations ----------------------------------------------------------------------------------------------

    def _seen(self, call: Call, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if call.kind is Kind.SIZE or not self._stack:
            return func(*args, **kwargs)
        if call.name in MOVES:
            return self._moved(func, args, kwargs)
        if call.name in self._names or call.name in self._hooks or self._whole:
            return self._operation(Operation(None, call, func, args, kwargs), (args, kwargs))
        return self._made(func(*args, **kwargs))

    def _leaf(
        self, opaque: Opaque, module: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Any
    ) -> Any:
        call = Call(opaque.name, Kind.OPERATION, opaque_call, False)
        return self._operation(Operation(None, call, forward, args, kwargs), ((*holdings(module), *args), kwargs))

    def _operation(self, operation: Operation, taken: Any) -> Any:
        """Run an operation, or its hook; `taken` is what the trace has as its arguments."""
        group = (*self._stack[-1], operation.call.name, self._held_among(taken))
        occurrence = self._counts.get(group, 0)
        number = self._next(group) if self._whole else self._numbers.get((*group, occurrence), -1)
        if number >= 0:
            operation.node = self._trace.nodes[number]
        hook = self._hooks.get(number) or self._hooks.get(operation.call.name, Operation.__call__)
        self._away = True
        try:
            result = hook(operation)
        finally:
            self._away = False
        if operation.call.name in ASKED and not holds_tensor(result):
            self.asked = True
            return result
        if self._whole and number < 0:
            raise self._error(self._other_branch(operation.call.name))
        self._at += 1
        self._counts[group] = occurrence + 1
        if occurrence >= self._expected.get(group, occurrence + 1):
            raise self._error(self._other_counts(_runs(group), occurrence + 1, occurrence))
        return self._made(result)

    def _held_among(self, taken: Any) -> tuple[str, ...]:
        return tuple(self._held[id(t)] for t in tensors_taken(list(taken)) if id(t) in self._held)

    def _next(self, group: Group) -> int:
        """The number of the next operation of the trace, if that is of this kind; else -1."""
        number = self._wanted[self._at] if self._at < len(self._wanted) else -1
        return number if number >= 0 and self._trace.keys[number][:3] == group[:3] else -1

    def _other_branch(self, name: str) -> str:
        node = self._trace.nodes[self._wanted[self._at]] if self._at < len(self._wanted) else None
        return (
            f"A batch runs {name} where the trace of the original has "
            f"{'its end' if node is None else describe(node, self._trace)}. The two models, or the batches, take "
            "different branches of the forward; give batches that all take the same one."
        )

    def _moved(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A tensor of the model on another device is still that tensor."""
        result = func(*args, **kwargs)
        name = self._held.get(id(args[0]))
        if name is not None and result is not args[0]:
            self._held[id(result)] = name
            self._renamed.append(result)
        return result

    def _made(self, result: Any) -> Any:
        """A tensor that an operation returned is that operation's, even if the model holds it."""
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            self._held.pop(id(tensor), None)
        return result


def _runs(group: Group) -> str:
    path, call, name, _ = group
    return f"runs {name} in {path or 'the model'}{f' (call {call + 1})' if call else ''}"
