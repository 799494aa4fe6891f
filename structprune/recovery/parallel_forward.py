"""Many batches pass through a model side by side, and all pause at the same operation.

Layers that are solved one after the other need the statistics of each layer on the network as solved so far. A new run
of the data for every layer would cost the square of the depth. Here each batch has a thread of its own, which pauses at
the operations asked for. Once all batches have paused there, the layer is solved, and all go on with the new weights.
One pass over the data is enough, and nothing has to be known of the model's blocks. Only one thread runs at a time.

Three layers, two batches, with a pause before the second layer::

    with parallel_runs(BatchRun, model, [a, b], trace, {(1, Side.BEFORE)}) as runs:
        pauses = [run.run_to((1, Side.BEFORE)) for run in runs]  # pauses[0].args: what layer 1 gets from batch a
        ...                                                      # change the weight of layer 1
        outputs = [run.finish() for run in runs]                 # layers 1 and 2, with the new weight

A `PrefixCache` is such a run that also keeps its results, so that another forward of the same batch can start in the
middle. To measure what a change of one layer does to the output takes a forward for each change; all of them agree up
to that layer, and only what follows is computed again.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn

from structprune.errors import RecoveryError
from structprune.recovery.batches import compared
from structprune.tracing.replay import Hook, Replay, ReplayedCall
from structprune.tracing.shadow import shadow_of
from structprune.tracing.trace import Trace, as_call, map_tensors


class Side(IntEnum):
    """Before an operation runs, or after it."""

    BEFORE = 0
    AFTER = 1


# The number of an operation in the trace, and the side. Sorted, events are in the order of the forward.
Event = tuple[int, Side]


@dataclass(slots=True)
class Pause:
    """Where a batch waits: an operation with its arguments, and afterwards its result.

    Attributes:
        event: the operation, and whether it has run.
        args: its positional arguments.
        kwargs: its keyword arguments.
        result: what it returned; None before it has run.
    """

    event: Event
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any = None


class _Cancelled(BaseException):
    """Unwinds the forward of a batch that is no longer needed."""


class BatchRun:
    """The forward of one batch, in a thread of its own.

    Args:
        model: in eval mode, with the same forward as the traced one.
        inputs: the batch.
        trace: of the original.
        events: where the run can be asked to pause.

    Attributes:
        replay: finds the operations of the trace in the run.
    """

    def __init__(self, model: nn.Module, inputs: Any, trace: Trace, events: set[Event]) -> None:
        self.replay = Replay(trace, self._hooks(trace, {n for n, _ in events}), whole=True, error=RecoveryError)
        self._may_run, self._has_paused = threading.Semaphore(0), threading.Semaphore(0)
        self._events = events
        self._pause: Pause | None = None
        self._cancelled = self._ended = False
        self._error: BaseException | None = None
        self._output: Any = None
        # A shadow shares the model's tensors; several threads cannot follow one and the same module.
        shadow = shadow_of(model, lambda _, tensor: tensor, tracked=False).model
        self._thread = threading.Thread(target=self._run, args=(shadow, inputs), daemon=True)
        self._thread.start()

    def _run(self, model: nn.Module, inputs: Any) -> None:
        """The body of the thread."""
        self._may_run.acquire()
        try:
            if not self._cancelled:
                args, kwargs = as_call(inputs)
                with torch.no_grad(), self.replay.over(model):
                    self._output = model(*args, **kwargs)
        except _Cancelled:
            pass
        except BaseException as error:  # raised again by the thread that waits for this one
            self._error = error
        finally:
            self._pause, self._ended = None, True
            self._has_paused.release()

    def _hooks(self, trace: Trace, numbers: set[int]) -> dict[int, Hook]:
        """The hooks of the run, given the numbers of the operations where it can pause."""
        return dict.fromkeys(numbers, self._with_pauses)

    def _with_pauses(self, operation: ReplayedCall) -> Any:
        """Run an operation, and pause before it and after it where that was asked for."""
        assert operation.node is not None
        number = operation.node.meta["index"]
        self._wait_at(Pause((number, Side.BEFORE), operation.args, operation.kwargs))
        result = self._result(operation)
        self._wait_at(Pause((number, Side.AFTER), operation.args, operation.kwargs, result))
        return result

    def _result(self, operation: ReplayedCall) -> Any:
        return operation()

    def _wait_at(self, pause: Pause) -> None:
        if pause.event not in self._events:
            return
        self._pause = pause
        self._has_paused.release()
        self._may_run.acquire()
        if self._cancelled:
            raise _Cancelled

    def run_to(self, event: Event) -> Pause:
        """Let the batch run to this event.

        Raises:
            RecoveryError: the forward ends without it.
        """
        while self._run_to_next_pause():
            if self._pause is not None and self._pause.event == event:
                return self._pause
        raise RecoveryError(f"A batch ended before operation {event[0]}. Do all batches run the same forward?")

    def _run_to_next_pause(self) -> bool:
        """Let the batch run on; whether it has paused again. False at the end of the forward."""
        if self._ended:
            return False
        self._may_run.release()
        self._has_paused.acquire()
        if self._error is not None:
            raise self._error
        return not self._ended

    def finish(self) -> Any:
        """Let the batch run to the end; what the model returned, which is not kept."""
        while self._run_to_next_pause():
            pass
        output, self._output = self._output, None
        return output

    def cancel(self) -> None:
        """End the thread."""
        self._cancelled = True
        if self._thread.is_alive():
            self._may_run.release()
        self._thread.join()


Run = TypeVar("Run", bound=BatchRun)


@contextmanager
def parallel_runs(
    kind: type[Run], model: nn.Module, batches: Sequence[Any], trace: Trace, events: set[Event]
) -> Generator[list[Run]]:
    """One run for each batch; all threads have ended when the block is left.

    Args:
        kind: `BatchRun` or `PrefixCache`.
        model: in eval mode, with the same forward as the traced one.
        batches: what goes into the model.
        trace: of the original.
        events: where the runs can be asked to pause.
    """
    started: list[Run] = []
    try:
        for inputs in batches:
            started.append(kind(model, inputs, trace, events))
        yield started
    finally:
        for run in started:
            run.cancel()


# -- forwards that start in the middle -------------------------------------------------------------------------------

# Operations that give what the model was given or holds; nothing of it may be written over.
_GIVEN = ("input", "parameter", "constant")


class PrefixCache(BatchRun):
    """A run that keeps the results that later operations need.

    Attributes:
        results: what each operation so far returned, by its number. Where no later operation needs it, there is a
            tensor of the same shape without memory.
    """

    def __init__(self, model: nn.Module, inputs: Any, trace: Trace, events: set[Event]) -> None:
        self.results: dict[int, Any] = {}
        self._last_uses = _last_uses([trace.nodes[number] for number in trace.keys])
        super().__init__(model, inputs, trace, events)

    def _hooks(self, trace: Trace, numbers: set[int]) -> dict[int, Hook]:
        return dict.fromkeys(trace.keys, self._with_pauses)

    def _result(self, operation: ReplayedCall) -> Any:
        assert operation.node is not None
        number = operation.node.meta["index"]
        result = self.results[number] = operation()
        for past in self._last_uses.get(number, ()):
            if past in self.results:  # a parameter or an input is no result of the run
                self.results[past] = map_tensors(_without_memory, self.results[past])
        return result

    def output_from(self, start: int, model: nn.Module, inputs: Any, hooks: Mapping[int, Hook], trace: Trace) -> Tensor:
        """What is compared of the model's output with `hooks`, none of which comes before operation `start`.

        What comes before is taken from this run, which has paused before `start`; where that is not safe, because the
        model writes over what it was given or asks for the value of a tensor, the whole forward runs.
        """
        if not self.replay.asked and can_restart(trace):
            hooks = {**hooks, **prefix_hooks(trace, start, separate_results(trace, start, self.results))}
        return output_of(model, inputs, hooks, trace)


def output_of(model: nn.Module, inputs: Any, hooks: Mapping[int, Hook], trace: Trace) -> Tensor:
    """What is compared of the model's output (`compared`), with hooks at some operations of the trace."""
    args, kwargs = as_call(inputs)
    with Replay(trace, hooks, whole=True, error=RecoveryError).over(model):
        result = compared(model(*args, **kwargs))
    assert result is not None
    return result


def prefix_hooks(trace: Trace, start: int, results: Mapping[int, Any]) -> dict[int, Hook]:
    """Hooks for a forward that computes from operation `start` on: earlier ones return what is in `results`."""

    def cached(operation: ReplayedCall) -> Any:
        assert operation.node is not None
        result = results[operation.node.meta["index"]]
        # An operation in place returns its argument, which the cache holds as it was after the last write before start.
        return operation.args[0] if "writes" in operation.node.meta and isinstance(result, Tensor) else result

    return dict.fromkeys((number for number in trace.keys if number < start), cached)


def can_restart(trace: Trace) -> bool:
    """Whether the forward writes over nothing that the model was given or holds; a prefix left out would not do so."""
    return all(_creator(node).meta["name"] not in _GIVEN for node in trace.nodes if "writes" in node.meta)


def separate_results(trace: Trace, start: int, results: Mapping[int, Any]) -> dict[int, Any]:
    """The results of a cache, safe to be written over from operation `start` on.

    They are copied only if an operation from `start` on writes in place. Views of one storage stay views of one copy:
    with ``x`` and ``x[:, :2]`` cached, writing into the copy of the first still changes the copy of the second.
    """
    if not any("writes" in node.meta and node.meta["index"] >= start for node in trace.nodes):
        return dict(results)
    copies: dict[int, torch.UntypedStorage] = {}

    def copied(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        copy = copies.setdefault(storage.data_ptr(), storage.clone()) if storage.nbytes() else storage
        return tensor.new_empty(0).set_(copy, tensor.storage_offset(), tensor.size(), tensor.stride())

    return {number: map_tensors(copied, result) for number, result in results.items()}


def _creator(node: fx.Node) -> fx.Node:
    """The operation that created the tensor that `node` returns: one in place returns a tensor that was there before.

    For ``y = relu(x); y.mul_(2)`` both nodes lead to ``relu``.
    """
    while "writes" in node.meta or node.meta["name"] == "part":
        source: Any = node.meta["writes"] if "writes" in node.meta else node.args[0]
        node = source
    return node


def _last_uses(nodes: Sequence[fx.Node]) -> dict[int, list[int]]:
    """For the number of an operation, the operations whose results nothing needs once it has run.

    For ``1: a = relu(x); 2: b = a * 2; 3: c = a + b`` it is ``{3: [1, 2]}``; ``c`` is the output and is kept to the
    end.
    """
    last: dict[int, float] = {}
    for node in nodes:
        creator = _creator(node).meta["index"]
        uses = [float("inf") if user.op == "output" else user.meta["index"] for user in _users(node)]
        last[creator] = max(last.get(creator, 0), node.meta["index"], *uses)
    ended: dict[int, list[int]] = {}
    for number, end in last.items():
        if end != float("inf"):
            ended.setdefault(int(end), []).append(number)
    return ended


def _users(node: fx.Node) -> list[fx.Node]:
    """The operations that use a result, or a part of it."""
    users: list[fx.Node] = []
    for user in node.users:
        users += user.users if user.meta.get("name") == "part" else [user]
    return users


def _without_memory(tensor: Tensor) -> Tensor:
    """A tensor of the same shape, all of whose entries are one number in memory."""
    if not tensor.numel():
        return tensor
    return tensor.new_empty(1).as_strided(tensor.shape, (0,) * tensor.dim())
