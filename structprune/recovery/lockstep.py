"""Many batches through a model side by side, all held at the same operation.

Layers that are solved one after the other need the statistics of a layer on the network as solved so far. Running the
data once more for every layer would cost the square of the depth. Here each batch has a thread of its own, which stops
at the operations asked for; once all stand there, the layer is solved, and all go on with the new weights. One pass
over the data is enough, and no knowledge of the model's blocks is needed. Only one thread runs at a time.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, TypeVar

import torch
from torch import nn

from structprune.errors import RecoveryError
from structprune.tracing.replay import FoundCall, Hook, Replay
from structprune.tracing.shadow import shadow_of
from structprune.tracing.trace import Trace, as_call


class Side(IntEnum):
    """Before an operation runs, or after it."""

    BEFORE = 0
    AFTER = 1


Event = tuple[int, Side]


@dataclass(slots=True)
class Stop:
    """Where a batch stands: an operation, and what goes into it or, afterwards, what came out."""

    event: Event
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any = None


class _Cancelled(BaseException):
    """Unwinds the forward of a batch that is not needed any more."""


class Lane:
    """One batch on its way through a model, in a thread of its own.

    Args:
        model: in eval mode, and of the same forward as the traced one.
        inputs: what goes in.
        trace: of the original.
        stops: where the lane can be asked to stop.
    """

    def __init__(self, model: nn.Module, inputs: Any, trace: Trace, stops: set[Event]) -> None:
        self.replay = Replay(trace, self._hooks(trace, {n for n, _ in stops}), whole=True, error=RecoveryError)
        self._go, self._there = threading.Semaphore(0), threading.Semaphore(0)
        self._stops = stops
        self._stop: Stop | None = None
        self._cancelled = self._ended = False
        self._error: BaseException | None = None
        self._output: Any = None
        own = shadow_of(model, lambda _, tensor: tensor, tracked=False).model  # of the same tensors
        self._thread = threading.Thread(target=self._run, args=(own, inputs), daemon=True)
        self._thread.start()

    def _run(self, model: nn.Module, inputs: Any) -> None:
        self._go.acquire()
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
            self._stop, self._ended = None, True
            self._there.release()

    def _hooks(self, trace: Trace, stops: set[int]) -> dict[int, Hook]:
        """What stands in for operations."""
        return dict.fromkeys(stops, self._stopping)

    def _stopping(self, operation: FoundCall) -> Any:
        """Run an operation, and wait before it and behind it if somebody is to look."""
        assert operation.node is not None
        number = operation.node.meta["index"]
        self._visit(Stop((number, Side.BEFORE), operation.args, operation.kwargs))
        result = self._result(operation)
        self._visit(Stop((number, Side.AFTER), operation.args, operation.kwargs, result))
        return result

    def _result(self, operation: FoundCall) -> Any:
        return operation()

    def _visit(self, stop: Stop) -> None:
        if stop.event not in self._stops:
            return
        self._stop = stop
        self._there.release()
        self._go.acquire()
        if self._cancelled:
            raise _Cancelled

    def until(self, event: Event) -> Stop:
        """Let the batch run to this event.

        Raises:
            RecoveryError: it never gets there.
        """
        while self._go_on():
            if self._stop is not None and self._stop.event == event:
                return self._stop
        raise RecoveryError(f"A batch ended before operation {event[0]}. Do all batches run the same forward?")

    def _go_on(self) -> bool:
        """Let the batch run to the next stop; whether there is one."""
        if self._ended:
            return False
        self._go.release()
        self._there.acquire()
        if self._error is not None:
            raise self._error
        return not self._ended

    def finish(self) -> Any:
        """Let the batch run to the end; what the model returned."""
        while self._go_on():
            pass
        return self._output

    def cancel(self) -> None:
        """End the thread."""
        self._cancelled = True
        if self._thread.is_alive():
            self._go.release()
        self._thread.join()


L = TypeVar("L", bound=Lane)


@contextmanager
def lanes(
    kind: type[L], model: nn.Module, batches: Sequence[Any], trace: Trace, stops: set[Event]
) -> Generator[list[L]]:
    """One lane for each batch; all are ended when the block is left.

    Args:
        kind: the class of the lanes.
        model: in eval mode, and of the same forward as the traced one.
        batches: example inputs each.
        trace: of the original.
        stops: where the lanes can be asked to stop.
    """
    started: list[L] = []
    try:
        for inputs in batches:
            started.append(kind(model, inputs, trace, stops))
        yield started
    finally:
        for lane in started:
            lane.cancel()
