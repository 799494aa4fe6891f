"""Many batches through a model side by side, all held at the same operation.

Layers that are solved one after the other need the statistics of a layer on the network as solved so far. Running the
data once more for every layer would cost the square of the depth. Here each batch has a thread of its own, which stops
at the operations asked for; once all stand there, the layer is solved, and all go on with the new weights. One pass
over the data is enough, and no knowledge of the model's blocks is needed. Only one thread runs at a time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor, fx, nn

from structprune.errors import RecoveryError
from structprune.ops import op_of
from structprune.tracing.recorder import Recorder
from structprune.tracing.trace import Trace, as_call, describe
from structprune.tracing.vocabulary import HANDED_OUT, VALUES, Call


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


def operations(trace: Trace) -> list[fx.Node]:
    """The nodes of a trace that are operations, in the order in which they run."""
    return [node for node in trace.nodes if node.meta["name"] not in ("input", "parameter", "constant", "part")]


class Walker(Recorder):
    """Counts operations as the tracer does, and hands over to its lane where it has to stop; nothing is recorded."""

    def __init__(self, trace: Trace, nodes: Sequence[fx.Node], lane: Lane) -> None:
        super().__init__({}, op_of, meta=False)
        self._trace = trace
        self._nodes = nodes
        self._at = 0
        self._lane = lane

    def _argument(self, value: Any) -> Any:
        return value

    def _size(self, call: Call, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return func(*args, **kwargs)

    def _moved(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return func(*args, **kwargs)

    def _execute(self, call: Call, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._at >= len(self._nodes):
            return func(*args, **kwargs)
        number = self._nodes[self._at].meta["index"]
        self._lane.visit(Stop((number, Side.BEFORE), args, kwargs))
        result = func(*args, **kwargs)
        self._lane.visit(Stop((number, Side.AFTER), args, kwargs, result))
        return result

    def _record(self, call: Call, args: list[Any], kwargs: dict[str, Any], result: Any) -> None:
        tensors = isinstance(result, Tensor) or (
            isinstance(result, (tuple, list)) and any(isinstance(item, Tensor) for item in result)
        )
        if not tensors and call.name in VALUES - HANDED_OUT:
            return
        if self._at >= len(self._nodes) or self._nodes[self._at].meta["name"] != call.name:
            there = describe(self._nodes[self._at], self._trace) if self._at < len(self._nodes) else "its end"
            raise RecoveryError(
                f"A batch runs {call.name} where the trace of the original has {there}. The two models, or the "
                "batches, take different branches of the forward; give batches that all take the same one."
            )
        self._at += 1


class Lane:
    """One batch on its way through a model, in a thread of its own."""

    def __init__(
        self,
        model: nn.Module,
        inputs: Any,
        trace: Trace,
        nodes: Sequence[fx.Node],
        stops: set[Event],
        walker: Callable[[Trace, Sequence[fx.Node], Lane], Walker] = Walker,
    ) -> None:
        self.walker = walker(trace, nodes, self)
        self._go, self._there = threading.Semaphore(0), threading.Semaphore(0)
        self._stops = stops
        self._stop: Stop | None = None
        self._cancelled = False
        self._error: BaseException | None = None
        self._output: Any = None
        self._thread = threading.Thread(target=self._run, args=(model, inputs), daemon=True)
        self._thread.start()

    def _run(self, model: nn.Module, inputs: Any) -> None:
        self._go.acquire()
        try:
            if not self._cancelled:
                args, kwargs = as_call(inputs)
                with torch.no_grad(), self.walker:
                    self._output = model(*args, **kwargs)
        except _Cancelled:
            pass
        except BaseException as error:  # raised again by the thread that waits for this one
            self._error = error
        finally:
            self._stop = None
            self._there.release()

    def visit(self, stop: Stop) -> None:
        """Wait here if somebody is to look."""
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
        while True:
            self._go.release()
            self._there.acquire()
            if self._error is not None:
                raise self._error
            if self._stop is None:
                raise RecoveryError(f"A batch ended before operation {event[0]}. Do all batches run the same forward?")
            if self._stop.event == event:
                return self._stop

    def finish(self) -> Any:
        """Let the batch run to the end; what the model returned."""
        while self._stop is not None or self._thread.is_alive():
            self._go.release()
            self._there.acquire()
            if self._error is not None:
                raise self._error
            if self._stop is None:
                break
        return self._output

    def cancel(self) -> None:
        """End the thread."""
        self._cancelled = True
        if self._thread.is_alive():
            self._go.release()
        self._thread.join()


@contextmanager
def lanes(
    model: nn.Module,
    batches: Sequence[Any],
    trace: Trace,
    stops: set[Event],
    walker: Callable[[Trace, Sequence[fx.Node], Lane], Walker] = Walker,
) -> Generator[list[Lane]]:
    """One lane for each batch; all are ended when the block is left.

    Args:
        model: in eval mode, and of the same forward as the traced one.
        batches: example inputs each.
        trace: of the original.
        stops: where the lanes can be asked to stop.
        walker: what watches each forward.
    """
    nodes = operations(trace)
    started: list[Lane] = []
    try:
        for inputs in batches:
            started.append(Lane(model, inputs, trace, nodes, stops, walker))
        yield started
    finally:
        for lane in started:
            lane.cancel()
