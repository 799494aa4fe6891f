"""Events and handlers, in the manner of PyTorch-Ignite: what happens, who is told, in which order and how often."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from structprune.errors import PlanError

Handler = Callable[[Any], object]


@dataclass(frozen=True, slots=True)
class _Registered:
    handler: Handler
    priority: int
    every: int
    once: int | None


class Events:
    """Handlers by the names of events.

    Args:
        names: of all events that there are.

    Attributes:
        counts: how often each event has happened.
    """

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names
        self.counts: Counter[str] = Counter()
        self._handlers: dict[str, list[_Registered]] = {name: [] for name in names}

    def on(self, event: str, handler: Handler, priority: int, every: int, once: int | None) -> None:
        """Let `handler` be called when `event` happens.

        Args:
            event: its name.
            handler: called with one argument.
            priority: higher ones are called earlier; equal ones in the order in which they were added.
            every: only at each so-many-th time.
            once: only at this time, counted from 1.

        Raises:
            PlanError: there is no such event, or a filter is below 1 or is given twice.
        """
        if event not in self.names:
            raise PlanError(f"There is no event {event!r}: give one of {', '.join(map(repr, self.names))}.")
        if every < 1 or (once is not None and once < 1):
            raise PlanError(f"every={every}, once={once}: events are counted from 1.")
        if every > 1 and once is not None:
            raise PlanError("Give every= or once=, not both.")
        handlers = self._handlers[event]
        handlers.append(_Registered(handler, priority, every, once))
        handlers.sort(key=lambda registered: -registered.priority)

    def fire(self, event: str, argument: Any) -> None:
        """Let an event happen: call its handlers with `argument`."""
        self.counts[event] += 1
        now = self.counts[event]
        for registered in tuple(self._handlers[event]):
            if now % registered.every == 0 and registered.once in (None, now):
                registered.handler(argument)
