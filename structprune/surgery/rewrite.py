"""Sizes that stand as literals in a forward: the smallest module around them gets a forward with the new number."""

from __future__ import annotations

from functools import partial

from torch import nn

from structprune.channels.propagate import has_rule
from structprune.errors import SurgeryError, TraceError
from structprune.surgery.edits import Edits, Rewrite
from structprune.tracing.specification import unspecify
from structprune.tracing.subgraph import module_graph, rewritten_class
from structprune.tracing.trace import trace

Pending = dict[tuple[int, tuple[int | str, ...]], Rewrite]


def _literal(path: str, pending: Pending, number: int, place: tuple[int | str, ...], old: int) -> int:
    """The new value of a literal, if the plan has one; what is found is taken out of `pending`."""
    found = pending.pop((number, place), None)
    if found is None:
        return old
    if found.old != old:
        raise SurgeryError(
            f"The forward of {path or 'the model'} has the literal {old} where the plan expects {found.old}. "
            "Make a new plan for this model."
        )
    return found.new


def rewritten_classes(model: nn.Module, edits: Edits) -> dict[str, type[nn.Module]]:
    """The new class of every module whose forward holds a literal that changes; `model` is not touched.

    Raises:
        SurgeryError: the forward of this model is not the one that the plan was made for.
    """
    by_module: dict[str, list[Rewrite]] = {}
    for rewrite in edits.rewrites:
        by_module.setdefault(rewrite.module, []).append(rewrite)
    if not by_module:
        return {}
    recorded = trace(model, unspecify(edits.inputs), leaves=has_rule)
    classes: dict[str, type[nn.Module]] = {}
    for path, rewrites in by_module.items():
        pending = {(r.operation, r.place): r for r in rewrites}

        try:
            graph = module_graph(recorded, path, partial(_literal, path, pending))
        except TraceError as error:
            raise SurgeryError(f"A size in {path or 'the model'} cannot be rewritten: {error}.") from error
        if pending:
            raise SurgeryError(
                f"The forward of {path or 'the model'} no longer holds the literals {[r.old for r in rewrites]} that "
                "the plan rewrites. Make a new plan for this model."
            )
        classes[path] = rewritten_class(model.get_submodule(path), graph)
    return classes
