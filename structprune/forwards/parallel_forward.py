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
"""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, TypeVar

import torch
from torch import nn

from structprune.errors import RecoveryError
from structprune.tracing.replay import Hook, Replay, ReplayedCall
from structprune.tracing.shadow import shadow_of
from structprune.tracing.trace import Trace, as_call


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
        self._model, self._inputs, self._trace, self._events = model, inputs, trace, events
        self._start(self._hooks({number for number, _ in events}))

    def _start(self, hooks: Mapping[int, Hook]) -> None:
        """Start the thread, which waits until it may run."""
        self.replay = Replay(self._trace, hooks, whole=True, error=RecoveryError)
        self._may_run, self._has_paused = threading.Semaphore(0), threading.Semaphore(0)
        self._pause: Pause | None = None
        self._cancelled = self._ended = False
        self._error: BaseException | None = None
        self._output: Any = None
        # A shadow shares the model's tensors; several threads cannot follow one and the same module.
        shadow = shadow_of(self._model, lambda _, tensor: tensor, tracked=False).model
        self._thread = threading.Thread(target=self._run, args=(shadow, self._inputs), daemon=True)
        self._thread.start()

    def _run(self, model: nn.Module, inputs: Any) -> None:
        """The body of the thread."""
        self._may_run.acquire()
        try:
            if not self._cancelled:
                args, kwargs = as_call(inputs)
                with torch.no_grad(), self.replay.over(model):
                    self._output = model(*args, **kwargs)
        except _Cancelled as cancelled:
            # Context managers that it went through make a cycle of it, which would keep the tensors of all frames.
            traceback.clear_frames(cancelled.__traceback__)
        except BaseException as error:  # raised again by the thread that waits for this one
            self._error = error
        finally:
            self._pause, self._ended = None, True
            self._has_paused.release()

    def _hooks(self, numbers: set[int]) -> dict[int, Hook]:
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
        self._pause = None  # what it holds may not be needed any more
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
    kind: Callable[..., Run], model: nn.Module, batches: Sequence[Any], trace: Trace, events: set[Event]
) -> Generator[list[Run]]:
    """One run for each batch; all threads have ended when the block is left.

    Args:
        kind: `BatchRun`, one that does more, or what makes one of the same arguments.
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
