"""`PruningEngine`: masks that grow step by step beside a training loop, with events for handlers of yours."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, overload

from torch import nn

from structprune.errors import PlanError
from structprune.extras import require
from structprune.masks.choosing import require_scope
from structprune.masks.compacting import Compaction, compaction, permanent
from structprune.masks.events import Events, Handler
from structprune.masks.mask import Mask
from structprune.masks.saliency import Saliency
from structprune.masks.torch_masks import chosen_tensors, update
from structprune.masks.unit_graph import Unit, unit_graph
from structprune.pruner import SCHEDULES, Schedule
from structprune.tracing.trace import ExampleInputs
from structprune.wrapping import prunable, unwrapped

if TYPE_CHECKING:
    import networkx as nx

EVENTS = ("started", "step_started", "saliency_computed", "mask_updated", "step_completed", "compacted")


def gradual(amount: float, steps: int, schedule: Schedule = "cubic") -> list[float]:
    """Shares that are gone after each of some steps, for `PruningEngine`.

    Args:
        amount: the last of them, from 0 to 1.
        steps: how many, from 1.
        schedule: ``"cubic"`` (most goes early; Zhu & Gupta, 2017), ``"linear"``, ``"one-shot"``, or a function from the
            share of the steps done to the share of `amount` gone.

    Raises:
        PlanError: there is no such schedule, or `steps` is below 1.

    Example:
        >>> gradual(0.8, 4, "linear")
        [0.2, 0.4, 0.6, 0.8]
    """
    if isinstance(schedule, str) and schedule not in SCHEDULES:
        raise PlanError(f"There is no schedule {schedule!r}: give one of {', '.join(map(repr, SCHEDULES))}.")
    if steps < 1:
        raise PlanError(f"steps is {steps}; it takes at least 1.")
    curve = SCHEDULES[schedule] if isinstance(schedule, str) else schedule
    return [round(amount * curve(step / steps), 12) for step in range(1, steps + 1)]


class PruningEngine:
    """Masks a model step by step while it is trained: score, mask more, tell the handlers.

    It runs beside any training loop: call `step` when it is time, or let an engine of Ignite (`attach`), Lightning or
    transformers (`structprune.integrations`) call it. Masks are those of ``torch.nn.utils.prune``; the optimizer goes
    on with the same parameters.

    Events, in the order in which they happen: ``"started"`` once, then in each step ``"step_started"``,
    ``"saliency_computed"``, ``"mask_updated"``, ``"step_completed"``; ``"compacted"`` after `compact`. Handlers are
    called with the engine.

    Args:
        model: it is masked in place.
        saliency: gives the scores of the model as it is now, such as `Saliency.magnitude`, or
            ``lambda model: Saliency.of(model, x, "wanda", data=data)``.
        schedule: the share that is gone after each step, such as ``[0.3, 0.5, 0.6]``, or what `gradual` gives.
        scope: whether that is of the ``"model"``, of each ``"layer"``, ``"tensor"`` or ``"output"``. "10%" of the model
            takes most where scores are low and may empty a layer; of each tensor it is the same share everywhere.
        dim: whole slices along this dimension go, such as 0 for filters; None for single entries.
        n: a slice has the Ln norm of its scores.
        names: of the parameters that are masked; None for all of two dimensions or more.
        example_inputs: what the model accepts, for `compact` and `graph`.
        keep_masks: whether the masks of all steps are kept, at one bit an entry, or the last one alone.

    Attributes:
        taken: how many steps are done.
        mask: what stays now.
        saliency: the scores of the last step; None before the first.
        compaction: what `compact` made last, with its report; None before.

    Raises:
        PlanError: the schedule does not grow from 0 to 1, a name is no parameter of the model, or there is no such
            scope.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> engine = PruningEngine(model, Saliency.magnitude, gradual(0.75, 3), example_inputs=torch.randn(1, 4))
        >>> @engine.on("step_completed", every=3)
        ... def report(engine):
        ...     print(engine.taken, engine.mask.kept, "of", engine.mask.entries)
        >>> while not engine.done:  # train for an epoch, then
        ...     mask = engine.step()
        3 12 of 48
        >>> engine.compact()(torch.randn(1, 4)).shape
        torch.Size([1, 2])
    """

    def __init__(
        self,
        model: nn.Module,
        saliency: Callable[[nn.Module], Saliency],
        schedule: Sequence[float],
        *,
        scope: str = "model",
        dim: int | None = None,
        n: float = 2.0,
        names: Iterable[str] | None = None,
        example_inputs: ExampleInputs | None = None,
        keep_masks: bool = True,
    ) -> None:
        require_scope(scope, dim)
        self.schedule = tuple(float(share) for share in schedule)
        steps = pairwise((0.0, *self.schedule))
        if not self.schedule or any(not 0 <= before <= share <= 1 for before, share in steps):
            raise PlanError(f"schedule is {list(schedule)}; give shares from 0 to 1 that never shrink.")
        self.model = model
        self.taken = 0
        self.saliency: Saliency | None = None
        self.compaction: Compaction | None = None
        inner = prunable(model, inplace=True)
        self.mask = Mask({name: tensor == tensor for name, tensor in chosen_tensors(inner, names).items()})
        self._score = saliency
        self._choice: dict[str, Any] = {"scope": scope, "dim": dim, "n": n}
        self._inputs = example_inputs
        self._keep = keep_masks
        self._events = Events(EVENTS)
        self._undo: Callable[[], None] | None = None
        self._masks = {0: self.mask.packed()}

    @property
    def done(self) -> bool:
        """Whether all steps are taken."""
        return self.taken == len(self.schedule)

    # -- events --------------------------------------------------------------------------------------------------

    @overload
    def on(
        self, event: str, handler: None = None, *, priority: int = 0, every: int = 1, once: int | None = None
    ) -> Callable[[Handler], Handler]: ...
    @overload
    def on(
        self, event: str, handler: Handler, *, priority: int = 0, every: int = 1, once: int | None = None
    ) -> Handler: ...
    def on(
        self, event: str, handler: Handler | None = None, *, priority: int = 0, every: int = 1, once: int | None = None
    ) -> Handler | Callable[[Handler], Handler]:
        """Let a handler be called with the engine when an event happens; also as a decorator.

        Args:
            event: its name.
            handler: what is called; None to decorate a function.
            priority: higher ones are called earlier; equal ones in the order in which they were added.
            every: only at each so-many-th time.
            once: only at this time, counted from 1.

        Raises:
            PlanError: there is no such event, or a filter is below 1 or is given twice.
        """

        def register(handler: Handler) -> Handler:
            self._events.on(event, handler, priority, every, once)
            return handler

        return register if handler is None else register(handler)

    def attach(self, trainer: Any, event: Any = None) -> PruningEngine:
        """Take a step at each of an Ignite engine's events, as long as there are steps.

        Args:
            trainer: an ``ignite.engine.Engine``.
            event: such as ``Events.EPOCH_COMPLETED(every=2)``; None for the end of each epoch.

        Returns:
            The engine itself.

        Raises:
            MissingExtraError: no event is given, and Ignite is not installed.
        """
        if event is None:
            event = require("ignite.engine", "Attaching to a trainer", "ignite").Events.EPOCH_COMPLETED
        trainer.add_event_handler(event, lambda _: None if self.done else self.step())
        return self

    # -- steps ---------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Put masks on that keep everything; `step` does it where it was not done.

        From now on the model's state dict has ``weight_orig`` and ``weight_mask``, so that checkpoints of a masked
        model fit.

        Raises:
            PlanError: a tensor is masked already; the model is as it was.
        """
        if self._undo is None:
            self._undo = self.mask.attach(self.model)
            self._events.fire("started", self)

    def step(self) -> Mask:
        """Score the weights and mask more of them.

        Returns:
            What stays.

        Raises:
            PlanError: all steps are taken, or the scores are NaN or not of the masked tensors; masks are as they were.
        """
        if self.done:
            raise PlanError(f"All {len(self.schedule)} steps are taken.")
        self.start()
        self._events.fire("step_started", self)
        scores = self._score(self.model)
        self.saliency = scores.only(self.mask)
        self._events.fire("saliency_computed", self)
        share = self.schedule[self.taken]
        self._set(self.taken + 1, self.saliency.mask(share, default_mask=self.mask, cumulative=True, **self._choice))
        self._events.fire("mask_updated", self)
        self._events.fire("step_completed", self)
        return self.mask

    def _set(self, taken: int, mask: Mask) -> None:
        update(unwrapped(self.model), mask)
        self.taken, self.mask = taken, mask
        self._masks = {**(self._masks if self._keep else {}), taken: mask.packed()}

    def undo(self) -> None:
        """Take the masks off: the model has its parameters back, with the values that they have by now."""
        if self._undo is not None:
            self._undo()
            self._undo = None

    # -- what came of it -----------------------------------------------------------------------------------------

    def mask_of(self, step: int | None = None) -> Mask:
        """What stayed after a step.

        Args:
            step: how many steps were taken then; None for now.

        Raises:
            PlanError: that step was not taken, or its mask was not kept.
        """
        number = self.taken if step is None else step
        if number not in self._masks:
            raise PlanError(f"There is no mask of step {number}: known are those of {sorted(self._masks)}.")
        return Mask.unpacked(self._masks[number], {name: list(self.mask[name].shape) for name in self.mask})

    def graph(self, step: int | None = None) -> nx.DiGraph[Unit]:
        """The channels and neurons that a path of kept weights led through after a step, as a networkx graph.

        Args:
            step: how many steps were taken then; None for now.

        Returns:
            Nodes ``(layer, index)``, edges with the number of weights left as ``weights``; see
            `structprune.masks.unit_graph.unit_graph`.

        Raises:
            PlanError: that step was not taken, its mask was not kept, or the engine has no example inputs.
        """
        return unit_graph(permanent(unwrapped(self.model)), self._given(), self.mask_of(step))

    def compact(self, step: int | None = None) -> nn.Module:
        """The smaller network that computes what the model computes with the masks of a step.

        The values are those of now: weights that were masked later count with what they held when they were.

        Args:
            step: how many steps were taken then; None for now.

        Raises:
            PlanError: that step was not taken, its mask was not kept, or the engine has no example inputs.
            TraceError: the forward cannot be recorded.
        """
        mask, inputs = self.mask_of(step), self._given()
        self.start()
        try:
            update(unwrapped(self.model), mask)
            self.compaction = compaction(self.model, inputs)
        finally:
            update(unwrapped(self.model), self.mask)
        self._events.fire("compacted", self)
        return self.compaction.model

    def _given(self) -> ExampleInputs:
        if self._inputs is None:
            raise PlanError("The engine has no example inputs. Give example_inputs= when you make it.")
        return self._inputs

    # -- going on after a kill -----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs, in plain numbers and tensors: steps, events and masks (one bit an entry)."""
        return {
            "schedule": list(self.schedule),
            "taken": self.taken,
            "events": dict(self._events.counts),
            "masks": {step: dict(packed) for step, packed in self._masks.items()},
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave. Call it before the model's state is loaded: it puts the masks on.

        Raises:
            PlanError: the state belongs to another schedule, or to other tensors; the model is as it was.
        """
        if list(state_dict["schedule"]) != list(self.schedule):
            raise PlanError(f"The state belongs to the schedule {state_dict['schedule']}, not {list(self.schedule)}.")
        shapes = {name: list(self.mask[name].shape) for name in self.mask}
        masks: dict[int, dict[str, Any]] = {int(step): dict(packed) for step, packed in state_dict["masks"].items()}
        for packed in masks.values():
            if packed.keys() != shapes.keys():
                name = sorted(packed.keys() ^ shapes.keys())[0]
                raise PlanError(f"{name!r} is masked in the state or in this engine alone.")
        mask = Mask.unpacked(masks[state_dict["taken"]], shapes)
        self.start()
        update(unwrapped(self.model), mask)
        self.taken, self.mask, self._masks = int(state_dict["taken"]), mask, masks
        self._events.counts.clear()
        self._events.counts.update(state_dict["events"])
