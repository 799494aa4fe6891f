"""The single changes that surgery makes, as plain data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import fx, nn

from structprune.errors import PlanError, SurgeryError, TraceError
from structprune.ops import op_of
from structprune.ops.gains import Gain
from structprune.tracing.containers import unspecify
from structprune.tracing.subgraph import module_graph, rewritten_class
from structprune.tracing.trace import trace


@dataclass(frozen=True, slots=True)
class RemovedSlice:
    """Indices `removed` of dimension `dim`, of `size` entries, of the tensor named `tensor` go.

    `order` holds the indices that stay as the smaller tensor has them; None where they keep their order.
    """

    tensor: str
    dim: int
    size: int
    removed: tuple[int, ...]
    order: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class SectionedSlice(RemovedSlice):
    """Equal sections of dimension 0 lose equally many, but other indices of dimension `dim`.

    `sections` are the indices that stay in each of them. `removed` are the last indices, as many as each section loses,
    so that ``size - len(removed)`` stay here too. The weight ``(out, in / groups, ...)`` of a grouped convolution is
    such a tensor: of 2 groups of 3 channels, ``sections=((0, 2), (1, 2))`` and ``removed=(2,)`` keep channels 0, 2, 4
    and 5.
    """

    sections: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class AttributeEdit:
    """The attribute at `chain` of the module `module` becomes `new`; it was None where another number gave the size.

    A number that is no size, such as a scale computed from one, is a float before and after.
    """

    module: str
    chain: tuple[str | int, ...]
    old: int | float | None
    new: int | float


@dataclass(frozen=True, slots=True)
class Rescale:
    """Entries at the original `positions` (all, if None) of dimension `dim` of `tensor` are multiplied by `factor`."""

    tensor: str
    dim: int
    positions: tuple[int, ...] | None
    factor: float


@dataclass(frozen=True, slots=True)
class ShiftedRescale(Rescale):
    """The same for what the forward uses as ``offset + tensor``: that sum is multiplied."""

    offset: float = 0.0


@dataclass(frozen=True, slots=True)
class LiteralEdit:
    """Literal `old`, at `place` in the arguments of operation number `operation` run directly by `module`, is `new`."""

    module: str
    operation: int
    place: tuple[int | str, ...]
    old: int
    new: int


@dataclass(frozen=True)
class Edits:
    """All that is to change, and what the example inputs looked like (see `structprune.tracing.containers`).

    `caches` names the dicts (module, attribute) in which the forward keeps results of the old shape: they are emptied.
    `outputs` names the outputs that keep their shape; None if all do.
    """

    slices: tuple[RemovedSlice, ...]
    attribute_edits: tuple[AttributeEdit, ...]
    rescales: tuple[Rescale | Gain, ...]
    literal_edits: tuple[LiteralEdit, ...]
    caches: tuple[tuple[str, str], ...]
    inputs: Any
    outputs: tuple[str, ...] | None

    @property
    def thinnings(self) -> tuple[RemovedSlice, ...]:
        """The former name of `slices`."""
        return self.slices

    @property
    def repairs(self) -> tuple[AttributeEdit, ...]:
        """The former name of `attribute_edits`."""
        return self.attribute_edits

    @property
    def rewrites(self) -> tuple[LiteralEdit, ...]:
        """The former name of `literal_edits`."""
        return self.literal_edits


# -- sizes that stand as literals in a forward: the smallest module around them gets a forward with the new number ---

Pending = dict[tuple[int, tuple[int | str, ...]], LiteralEdit]
# What makes a module's forward another: a subclass of its class, or the graph of a module that is run by one.
Rewritten = type[nn.Module] | fx.Graph


def _literal(path: str, pending: Pending, number: int, place: tuple[int | str, ...], old: int) -> int:
    """The new value of a literal, if the plan has one; an edit that is used is taken out of `pending`."""
    edit = pending.pop((number, place), None)
    if edit is None:
        return old
    if edit.old != old:
        raise SurgeryError(
            f"The forward of {path or 'the model'} has the literal {old} where the plan expects {edit.old}. "
            "Make a new plan for this model."
        )
    return edit.new


def rewritten_classes(model: nn.Module, edits: Edits) -> dict[str, Rewritten]:
    """The new class or graph of every module whose forward holds a literal that changes; `model` is not touched.

    Raises:
        SurgeryError: the forward of this model is not the one that the plan was made for.
    """
    by_module: dict[str, list[LiteralEdit]] = {}
    for edit in edits.literal_edits:
        by_module.setdefault(edit.module, []).append(edit)
    if not by_module:
        return {}
    try:
        recorded = trace(model, unspecify(edits.inputs), operations=op_of)
    except (TraceError, PlanError) as error:
        raise SurgeryError(
            f"The model does not run on inputs like those that the plan was made with: {error} Make a new plan "
            "for this model."
        ) from error
    classes: dict[str, Rewritten] = {}
    for path, literals in by_module.items():
        pending = {(r.operation, r.place): r for r in literals}

        try:
            graph = module_graph(recorded, path, partial(_literal, path, pending))
        except TraceError as error:
            raise SurgeryError(f"A size in {path or 'the model'} cannot be rewritten: {error}.") from error
        if pending:
            raise SurgeryError(
                f"The forward of {path or 'the model'} no longer holds the literals {[r.old for r in literals]} that "
                "the plan rewrites. Make a new plan for this model."
            )
        classes[path] = rewritten_forward(model.get_submodule(path), path, graph)
    return classes


def rewritten_forward(module: nn.Module, path: str, graph: fx.Graph) -> Rewritten:
    """What `install` takes to make `graph` the forward of `module`, which is at `path`.

    Raises:
        SurgeryError: the module keeps further graphs, which would still be what they are.
    """
    if not isinstance(module, fx.GraphModule):
        return rewritten_class(type(module), graph)
    # Its copies are built from its graph: a class with another forward would be forgotten by them.
    others = [name for name, held in vars(module).items() if isinstance(held, fx.Graph) and held is not module.graph]
    if others:
        raise SurgeryError(
            f"A size in {path or 'the model'} cannot be rewritten: the module keeps further graphs in "
            f"{', '.join(others)} (one for each mode, as a feature extractor does), which hold the size too. Write the "
            "size with x.shape or -1, or prune before the feature extractor is made."
        )
    return graph


def install(module: nn.Module, rewritten: Rewritten, undo: list[Callable[[], None]]) -> None:
    """Give a module its new forward; how to take it back is added to `undo`."""
    if isinstance(rewritten, fx.Graph):
        assert isinstance(module, fx.GraphModule)
        undo.append(partial(setattr, module, "graph", module.graph))
        module.graph = rewritten
    else:
        undo.append(partial(setattr, module, "__class__", type(module)))
        module.__class__ = rewritten
