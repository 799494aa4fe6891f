"""Finding the operations of a trace again while a model runs, and doing something there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from structprune.errors import StructpruneError, TraceError
from structprune.tracing.calls import ASKED, MOVES, CallKey, CallMode, Group, Leaf, holds_tensor
from structprune.tracing.containers import leaves_of
from structprune.tracing.opaque import holdings, opaque_call
from structprune.tracing.state import held_tensors
from structprune.tracing.trace import Trace, describe
from structprune.tracing.vocabulary import Call, Kind


@dataclass(slots=True)
class ReplayedCall:
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


Hook = Callable[[ReplayedCall], Any]


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
            less elsewhere, as long as there are as many equals of each operation that was asked for.
        required: whether each forward has to come by all operations that were asked for.
        error: what is raised where the run is not the one that was traced.
        begin: called with the arguments of the model as each forward begins.

    Attributes:
        forwards: how many forwards of the model began.
        asked: whether Python asked for the value of a tensor in the last of them; noted in whole runs.

    Example:
        >>> import torch
        >>> from structprune.tracing.trace import trace
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1))
        >>> recorded = trace(model, torch.randn(1, 2))
        >>> relu = next(number for number, key in recorded.keys.items() if key.name == "relu")
        >>> def none(operation):
        ...     return torch.zeros_like(operation())
        >>> with Replay(recorded, {relu: none}).over(model):
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
        super().__init__(trace.operations)
        self._trace, self._hooks, self._whole, self._required = trace, hooks, whole, required
        self._error, self._begin = error, begin
        self._order = list(trace.keys) if whole else []
        keys = [] if whole else [self._key(number) for number in hooks if isinstance(number, int)]
        self._equals = {key.group: trace.equals[key.group] for key in keys}
        self._names = {key.name for key in keys}
        self._known_calls = {key.module: trace.counts[key.module] for key in keys}
        self._model_names: dict[int, str] = {}
        self.forwards = 0
        self._reset()

    def _key(self, number: int) -> CallKey:
        key = self._trace.keys.get(number)
        if key is None:
            raise self._error(
                f"{describe(self._trace.nodes[number], self._trace)} runs outside of the model's forward, so that it "
                "cannot be found in another run."
            )
        return key

    def _reset(self) -> None:
        """A forward begins: nothing has run."""
        self._stack: list[tuple[str, int]] = []
        self._calls: Counter[str] = Counter()
        self._done: Counter[Group] = Counter()
        self._held, self._referenced = dict(self._model_names), list[Tensor]()
        self._at = 0
        self.asked = False

    @contextmanager
    def over(self, model: nn.Module) -> Generator[Replay]:
        """While the block runs, forwards of `model` are followed; several threads need a shadow of it each.

        Raises:
            StructpruneError: of the class asked for, as soon as a forward is not the one that was traced.
        """
        held = {} if self._whole else held_tensors(model)
        self._model_names = {id(h.tensor): name for name, h in reversed(held.items())}  # the first of several names
        with self.watching(model):
            yield self

    # -- modules -------------------------------------------------------------------------------------------------

    def _called(
        self, path: str, module: nn.Module, original: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if not self._stack:
            return module._call_impl(*args, **kwargs) if path else self._forward(module, args, kwargs)
        number = self._calls[path]
        self._calls[path] += 1
        if number >= self._known_calls.get(path, number + 1):
            raise self._error(self._other_counts(f"calls {path}", number))
        self._stack.append((path, number))
        try:
            return module._call_impl(*args, **kwargs)
        finally:
            self._stack.pop()

    def _forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._reset()
        self.forwards += 1
        if self._begin is not None:
            self._begin(args, kwargs)
        self._calls[""] = 1
        self._stack.append(("", 0))
        try:
            with self:
                output = model._call_impl(*args, **kwargs)
        finally:
            self._stack.clear()
        if self._required:
            self._complete()
        return output

    def _complete(self) -> None:
        """A forward ended: it must have come by all that was asked for, and by all that could be mistaken for it."""
        missing = self._order[self._at :]
        for group, numbers in self._equals.items():
            missing += numbers[self._done[group] :]
        if missing:
            raise self._error(
                f"On the data the forward did not come to {describe(self._trace.nodes[missing[0]], self._trace)}, as "
                "it did on the example inputs. Give example inputs of the same form as the data."
            )
        for path, known in self._known_calls.items():
            if self._calls[path] != known:
                raise self._error(self._other_counts(f"calls {path}", known))

    @staticmethod
    def _other_counts(what: str, known: int) -> str:
        return (
            f"On the data the forward {what} another number of times than the {known} of the example inputs, so that "
            "it cannot be told which of them is which. Give example inputs of the same form as the data."
        )

    # -- operations ----------------------------------------------------------------------------------------------

    def _seen(self, call: Call, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if call.kind is Kind.SIZE or not self._stack:
            return func(*args, **kwargs)
        if call.name in MOVES:
            return self._moved(func(*args, **kwargs), args[0])
        if self._whole:
            return self._next(ReplayedCall(None, call, func, args, kwargs))
        if call.name in self._names or call.name in self._hooks:
            return self._among_equals(ReplayedCall(None, call, func, args, kwargs), [args, kwargs])
        return self._made(func(*args, **kwargs))

    def _leaf(self, leaf: Leaf) -> Any:
        call = Call(leaf.opaque.name, Kind.OPERATION, opaque_call, False)
        operation = ReplayedCall(None, call, leaf.forward, leaf.args, leaf.kwargs)
        if self._whole:
            return self._next(operation)
        return self._among_equals(operation, [*holdings(leaf.module), leaf.args, leaf.kwargs])

    def _among_equals(self, operation: ReplayedCall, taken: list[Any]) -> Any:
        """Run an operation that may be asked for; `taken` is what the trace has as its arguments."""
        held = tuple(self._held[id(t)] for t in leaves_of(taken, Tensor, slices=True) if id(t) in self._held)
        group: Group = (*self._stack[-1], operation.call.name, held)
        numbers, done = self._equals.get(group), self._done[group]
        if numbers is not None and done == len(numbers):
            path = group[0] or "the model"
            raise self._error(self._other_counts(f"runs {operation.call.name} in {path}", done))
        result = self._run(operation, None if numbers is None else numbers[done])
        self._done[group] += 1
        return self._made(result)

    def _next(self, operation: ReplayedCall) -> Any:
        """Run the operation that has to be the next of the trace."""
        number = self._order[self._at] if self._at < len(self._order) else None
        name = operation.call.name
        same = number is not None and self._trace.keys[number][:3] == (*self._stack[-1], name)
        result = self._run(operation, number if same else None)
        if name in ASKED and not holds_tensor(result):
            self.asked = True
            return result
        if not same:
            there = "its end" if number is None else describe(self._trace.nodes[number], self._trace)
            raise self._error(
                f"A batch runs {name} where the trace of the original has {there}. The two models, or the batches, "
                "take different branches of the forward; give batches that all take the same one."
            )
        self._at += 1
        return result

    def _run(self, operation: ReplayedCall, number: int | None) -> Any:
        if number is not None:
            operation.node = self._trace.nodes[number]
        hook = self._hooks.get(number) or self._hooks.get(operation.call.name, ReplayedCall.__call__)
        self._away = True
        try:
            return hook(operation)
        finally:
            self._away = False

    def _moved(self, result: Any, source: Tensor) -> Any:
        """A tensor of the model on another device is still that tensor."""
        if id(source) in self._held and result is not source:
            self._held[id(result)] = self._held[id(source)]
            self._referenced.append(result)
        return result

    def _made(self, result: Any) -> Any:
        """A tensor that an operation returned is that operation's, even if the model holds it."""
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            self._held.pop(id(tensor), None)
        return result
