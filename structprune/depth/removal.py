"""`remove_branches`: a model without some of its branches and blocks, and the record by which it is made again."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from structprune.checking import FLAG, INPUTS, require, shown
from structprune.coupling.costs import Cost, count_cost
from structprune.coupling.propagate import propagate
from structprune.depth.check import Comparison, zeros_of
from structprune.depth.config import repair_config
from structprune.depth.cut import Cut
from structprune.depth.finding import find
from structprune.depth.records import Branch, PlacedBranch
from structprune.depth.reference import branches_off
from structprune.depth.steps import Steps, Undo, carry_out, paths_of
from structprune.depth.surgery import WAYS, Planner
from structprune.errors import PlanError, StructpruneError, SurgeryError
from structprune.offloading import held_in_place, is_placed
from structprune.ops import op_of
from structprune.planning.plan import KINDS, SCHEMA, plans_of, remember_plan
from structprune.schema import FormError, inputs, record, settings, texts
from structprune.surgery.apply import _memo
from structprune.surgery.edits import RemovedSlice, Rescale
from structprune.surgery.verify import Report, verify_runs
from structprune.tracing.containers import specify, unspecify
from structprune.tracing.state import collection_paused, held_tensors
from structprune.tracing.trace import ExampleInputs, Trace, trace
from structprune.wrapping import prunable, rewrapped, unwrapped

KIND = "branches"
Done = tuple[dict[str, str], Trace, dict[str, str | None]]


@dataclass(frozen=True)
class Removal:
    """What `structprune.save` keeps of branches that were removed. See `structprune.remove_branches` for an example.

    Attributes:
        branches: their names, in the model before.
        inputs: shapes and types of the example inputs.
        before: cost of the model before.
        after: cost of the model after.
        names: for each tensor of the model before that has another name now, that name; None if it went.
        settings: ``"config"``: why a configuration could not say what the model is, if it could not.
    """

    branches: tuple[str, ...]
    inputs: Any
    before: Cost
    after: Cost
    names: Mapping[str, str | None] = field(repr=False)
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """SHA-256 of what is removed, in hexadecimal: equal for removals that make the same model."""
        return hashlib.sha256(json.dumps([KIND, self.branches, self.inputs], sort_keys=True).encode()).hexdigest()

    @property
    def slices(self) -> tuple[RemovedSlice, ...]:
        """No tensor is sliced."""
        return ()

    @property
    def rescales(self) -> tuple[Rescale, ...]:
        """No tensor is scaled."""
        return ()

    @staticmethod
    def of(model: nn.Module) -> Removal:
        """The last removal of branches that a model went through, for `structprune.remap_optimizer`.

        Raises:
            PlanError: there was none.
        """
        removals = [plan for plan in plans_of(model) if isinstance(plan, Removal)]
        if not removals:
            raise PlanError("No branch was removed from this model. Give what structprune.remove_branches returned.")
        return removals[-1]

    def apply(self, model: nn.Module, inplace: bool = False) -> nn.Module:
        """The model without the branches.

        Args:
            model: a model like the one that they were removed from, before.
            inplace: change `model` itself and return it.

        Raises:
            PlanError: the model has no such branches, or is another; it is as it was.
        """
        return _removed(model, unspecify(self.inputs, ones=True), self.branches, inplace)

    def verified(self, original: nn.Module, slim: nn.Module, example_inputs: ExampleInputs) -> Report:
        """What `structprune.verify` finds: `slim` against the original that takes the branches as zero."""

        def without(model: nn.Module, inputs: ExampleInputs) -> AbstractContextManager[None]:
            recorded = trace(model, inputs, operations=op_of)
            return branches_off(model, recorded, chosen_of(find(model, recorded), self.branches))

        return verify_runs(prunable(original), prunable(slim), example_inputs, without)

    def carry_out(self, model: nn.Module, undo: Undo) -> None:
        """`apply` in place; how to take it back is added to `undo`."""
        with collection_paused():
            _removed(model, unspecify(self.inputs, ones=True), self.branches, True, undo)

    def to_json(self) -> str:
        """The removal as JSON text."""
        return json.dumps({"schema": SCHEMA, "kind": KIND, **asdict(self)}, indent=1)

    @classmethod
    def from_data(cls, data: Any) -> Removal:
        """The same from what the JSON text says.

        Raises:
            PlanError: it is no removal.
        """
        try:
            return cls(
                texts(data["branches"]), inputs(data["inputs"]), record(Cost, data["before"]),
                record(Cost, data["after"]), _names(data["names"]), settings(data["settings"]),
            )  # fmt: skip
        except (FormError, KeyError, TypeError) as error:
            raise PlanError(f"This removal of branches cannot be used: {error}. Pass what to_json returned.") from error


def _names(data: Any) -> dict[str, str | None]:
    if not isinstance(data, dict) or not all(x is None or isinstance(x, str) for x in (*data, *data.values())):
        raise FormError(f"names of tensors are {data!r:.60}")
    return data


KINDS[KIND] = Removal.from_data


def remove_branches(
    model: nn.Module, example_inputs: ExampleInputs, branches: Iterable[str | Branch], *, inplace: bool = False
) -> nn.Module:
    """`model` without some of its branches and blocks: a smaller model that computes exactly what is left.

    A removed branch counts as zero in its sum, a removed block gives back what it got (see `structprune.branches`).
    What only they compute and use is gone: parameters, buffers and operations. A block of an ``nn.Sequential`` or of
    an ``nn.ModuleList`` that is looped over is taken out of the list, and those behind it are numbered anew, with the
    ints by which they know their number (`layer_idx`). Elsewhere it becomes a module that gives back what it gets, in
    the same form. A branch inside a forward is taken out by rewriting the forward; where that depends on its arguments
    or on the mode, it stays as written, and the last module of the branch gives zeros. A configuration that the class
    is built from says the new number of layers, so that ``save_pretrained`` and ``from_pretrained`` work.

    The result is traced and compared with what was meant, operation by operation, so a removal either succeeds whole or
    raises. `structprune.save` and `structprune.load` know of it.

    Args:
        model: any ``nn.Module`` whose forward can be traced.
        example_inputs: a tensor, a tuple (positional) or a dict (keyword) that the model accepts.
        branches: names of branches or blocks, or what `structprune.branches` lists.
        inplace: change `model` itself and return it; otherwise it stays untouched.

    Raises:
        PlanError: there is no branch of this name, or it cannot be removed: nothing would be left of an output, a
            module that is called several times would lose it in some calls only, or its forward cannot be changed. The
            model is as it was.
        TraceError: the forward cannot be recorded.

    Example:
        >>> import torch, structprune
        >>> layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> model = torch.nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        >>> shallow = structprune.remove_branches(model, torch.randn(1, 4, 8), ["layers.1"])
        >>> len(shallow.layers), shallow.layers[1].linear1.weight.equal(model.layers[2].linear1.weight)
        (2, True)
    """
    require(locals(), example_inputs=INPUTS, inplace=FLAG)
    names = tuple(dict.fromkeys(b.name if isinstance(b, Branch) else b for b in _listed(branches)))
    with collection_paused():
        return _removed(model, example_inputs, names, inplace)


def _listed(branches: Iterable[str | Branch]) -> Iterable[str | Branch]:
    listed = [branches] if isinstance(branches, (str, Branch)) else branches
    if not isinstance(listed, (tuple, list, set)) or not listed:
        raise PlanError(f"branches is {shown(branches)}; give the names of the branches to remove, at least one.")
    if wrong := [item for item in listed if not isinstance(item, (str, Branch))]:
        raise PlanError(f"branches holds {shown(wrong[0])}; give names, or what structprune.branches lists.")
    return listed


def chosen_of(candidates: tuple[PlacedBranch, ...], names: Iterable[str]) -> list[PlacedBranch]:
    """Those of these names.

    Raises:
        PlanError: there is none of one of the names.
    """
    by_name = {item.branch.name: item for item in candidates}
    missing = [name for name in names if name not in by_name]
    if missing:
        known = ", ".join(map(repr, list(by_name)[:8])) + (", ..." if len(by_name) > 8 else "")
        raise PlanError(
            f"The model has no branch {missing[0]!r} that may be removed. "
            + (f"It has {known}." if by_name else "It has none: no sum of it has a term with layers of its own.")
        )
    return [by_name[name] for name in names]


def cut_of(recorded: Trace, chosen: Iterable[PlacedBranch]) -> Cut:
    """What is left of a trace without these.

    Raises:
        PlanError: it could not be computed.
    """
    chosen = list(chosen)
    off = [edge for item in chosen for edge in item.off]
    return Cut(recorded, off, {y: x for item in chosen for y, x in item.skipped})


def _removed(
    model: nn.Module, example_inputs: ExampleInputs, names: tuple[str, ...], inplace: bool, undo: Undo | None = None
) -> nn.Module:
    """`remove_branches`; in place, how to take it back is added to `undo`."""
    if inplace and is_placed(unwrapped(model)):
        with held_in_place(unwrapped(model)):
            return _removed(model, example_inputs, names, inplace, undo)
    inner = prunable(model, inplace=inplace)
    recorded = trace(inner, example_inputs, operations=op_of)
    chosen = chosen_of(find(inner, recorded), names)
    if not chosen:
        return model if inplace else rewrapped(model, copy.deepcopy(inner, _memo(held_tensors(inner), {})))
    whole, cut = Cut(recorded), cut_of(recorded, chosen)
    planner = Planner(inner, example_inputs, whole, cut)
    slim = inner if inplace else _copied(inner, whole, cut)
    before = _cost(inner, recorded)
    held = list(held_tensors(inner))
    undo = [] if undo is None else undo
    notes, made, paths = _carried_out(slim, example_inputs, planner, cut, undo)
    left = held_tensors(slim)
    now = {name: paths[name] if paths.get(name) in left else None for name in held}
    renamed = {name: new for name, new in now.items() if new != name}
    removal = Removal(names, specify(example_inputs), before, _cost(slim, made), renamed, notes)
    remember_plan(slim, (*plans_of(inner), removal), undo)
    return model if inplace else rewrapped(model, slim)


def shell_of(model: nn.Module) -> nn.Module:
    """A model of the same structure that holds the same tensors: what is done to its structure leaves `model` alone."""
    memo: dict[int, Any] = {id(held.tensor): held.tensor for held in held_tensors(model).values()}
    return copy.deepcopy(model, memo)


def cut_model(model: nn.Module, example_inputs: ExampleInputs, names: Iterable[str]) -> nn.Module:
    """`model` without some of its branches, on the same tensors: not to be trained or returned to a user.

    Raises:
        PlanError: they cannot be removed.
    """
    with collection_paused():
        return _removed(shell_of(model), example_inputs, tuple(names), True)


def _cost(model: nn.Module, recorded: Trace) -> Cost:
    return count_cost(model, recorded, propagate(recorded), lambda axis: axis.size)


def _copied(model: nn.Module, whole: Cut, cut: Cut) -> nn.Module:
    """A copy, in which tensors that are about to go are those of the model."""
    held = held_tensors(model)
    memo = _memo(held, {})
    gone = [str(n.target) for n in whole.needed - cut.needed if n.meta["name"] == "parameter"]
    memo |= {id(held[name].tensor): held[name].tensor for name in gone}
    return copy.deepcopy(model, memo)


def _carried_out(slim: nn.Module, example_inputs: ExampleInputs, planner: Planner, cut: Cut, taken: Undo) -> Done:
    """Change `slim` in the first way that gives what was meant; what is to be noted of it, and its trace."""
    reasons: list[str] = []
    tried: list[Any] = []
    for way in WAYS:
        undo: Undo = []
        try:
            steps = planner.steps(way)
            done = (sorted(steps.forwards), steps.emptied, steps.dropped, steps.shortened)
            if done in tried:
                continue
            tried.append(done)
            done_so = _tried(slim, example_inputs, steps, cut, undo)
            taken += undo
            return done_so
        except StructpruneError as error:
            take_back(undo)
            reasons.append(str(error).removeprefix("This cannot be removed: ").rstrip("."))
        except BaseException:  # an interrupt too must leave the model as it was; raised again
            take_back(undo)
            raise
    raise PlanError("This cannot be removed: " + "; or ".join(dict.fromkeys(reasons)) + ".")


def take_back(undo: Undo) -> None:
    """Make a model what it was, by what was noted while it was changed."""
    for step in reversed(undo):
        step()


def _tried(slim: nn.Module, example_inputs: ExampleInputs, steps: Steps, cut: Cut, undo: Undo) -> Done:
    names = list(held_tensors(slim))
    lengths = {path: list(slim.get_submodule(path)._modules) for path in steps.shortened}
    moved = carry_out(slim, steps, undo)
    new_paths: dict[str, str | None] = {}
    new_paths |= paths_of(moved, [*names, *steps.emptied, *steps.dropped])
    taken = [f"{path}.{key}." if path else f"{key}." for path, keys in steps.shortened.items() for key in keys]
    new_paths |= dict.fromkeys(name for name in names if name.startswith(tuple(taken)))
    left = {
        path: [i for i, key in enumerate(lengths[path]) if key not in gone] for path, gone in steps.shortened.items()
    }
    shortened = {path: (len(lengths[path]), places) for path, places in left.items()}
    config = repair_config(slim, shortened, _thinner(steps, new_paths), undo)
    made = _traced(slim, example_inputs)
    zero = zeros_of(made, frozenset(now for path in steps.emptied if (now := new_paths[path]) is not None))
    Comparison(cut, Cut(made, zero=zero), new_paths).run()
    _check_training(cut, made, slim, new_paths)
    return ({"config": f"unchanged: {config}"} if config else {}), made, new_paths


def _traced(slim: nn.Module, example_inputs: ExampleInputs) -> Trace:
    """The trace of the smaller model.

    Raises:
        SurgeryError: it does not run.
    """
    try:
        return trace(slim, example_inputs, operations=op_of)
    except StructpruneError:
        raise
    except Exception as error:  # a forward may raise anything once a module is gone
        raise SurgeryError(f"without it the forward raises {type(error).__name__}: {error}") from error


def _thinner(steps: Steps, new_paths: Mapping[str, str | None]) -> list[str]:
    """Modules, and names of tensors, that are gone without being items of a list."""
    return [now for path in (*steps.emptied, *steps.dropped) if (now := new_paths.get(path, path)) is not None]


def _check_training(cut: Cut, made: Trace, slim: nn.Module, new_paths: Mapping[str, str | None]) -> None:
    """Parameters that only the forward in training mode uses must still be used there."""
    end = len(cut.trace.nodes)
    trained = {str(n.target) for n in cut.trace.all_nodes[end:] if n.meta["name"] == "parameter"}
    lost = {name for new in trained if (name := new_paths[new]) is not None} & made.unreached(slim)
    if lost or (trained and not made.training_outputs):
        raise SurgeryError(f"in training mode {', '.join(sorted(lost)[:3]) or 'the rest'} would no longer be used")
