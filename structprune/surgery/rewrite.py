"""Sizes that stand as literals in a forward: the smallest module around them gets a forward with the new number."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import fx, nn

from structprune.errors import StructpruneError, SurgeryError, TraceError
from structprune.ops import op_of
from structprune.surgery.edits import Edits, LiteralEdit
from structprune.tracing.specification import unspecify
from structprune.tracing.subgraph import module_graph, rewritten_class
from structprune.tracing.trace import trace

Pending = dict[tuple[int, tuple[int | str, ...]], LiteralEdit]
# What makes a module's forward another: a subclass of its class, or the graph of a module that is run by one.
Rewritten = type[nn.Module] | fx.Graph


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
    except StructpruneError:
        raise
    except Exception as error:  # a forward may raise anything on inputs that were not made for it
        raise SurgeryError(
            f"The model does not run on inputs like those that the plan was made with: {type(error).__name__}: {error}."
            " Make a new plan for this model."
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
        classes[path] = _rewritten(model.get_submodule(path), path, graph)
    return classes


def _rewritten(module: nn.Module, path: str, graph: fx.Graph) -> Rewritten:
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
