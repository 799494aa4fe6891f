"""`trace`: run a model once and write down every tensor operation, with no arithmetic done where that is possible."""

from __future__ import annotations

import dataclasses
import traceback
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from structprune.errors import PlanError, StructpruneError, TraceError
from structprune.tracing.calls import CallKey, Group, ModuleCall, equal_calls
from structprune.tracing.provenance import Comparison, Escape, plain, tracked_numbers
from structprune.tracing.recorder import Recorder
from structprune.tracing.shadow import shadow_of
from structprune.tracing.state import caches, copy_buffer, dictionaries, eager, held_tensors, meta_like
from structprune.tracing.vocabulary import Lookup, nothing_known

_TORCH, _HERE = str(Path(torch.__file__).parent), str(Path(__file__).parent.parent)
ExampleInputs = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]
OutputName = str | int


@dataclass(frozen=True, kw_only=True)
class Trace:
    """A model as a graph of tensor operations.

    Attributes:
        nodes: the operations in order, as calls of the torch API; parameters, buffers and constants are ``get_attr``
            nodes. `provenance.Dim.node` counts in this tuple.
        calls: the module calls in order; ``node.meta["call"]`` counts in this tuple.
        inputs: the nodes of the example inputs.
        outputs: the nodes of the tensors that the model returns, by name.
        tensors: the names under which the model holds each tensor, by the name of its ``get_attr`` node.
        comparisons: what Python compared on the way.
        escapes: tracked numbers that left for plain Python.
        caches: module and attribute of the dicts in which the forward keeps results.
        real: whether real numbers had to flow, because Python's control flow depends on them.
        all_nodes: `nodes` and, behind them, those of the forward in training mode, where only that one reaches some of
            the parameters (an auxiliary head); ``node.meta["index"]`` counts in this tuple.
        every_call: the module calls of both.
        training_outputs: what the forward in training mode returns, where it was recorded.
        training_error: why it could not be, where it was tried.
        operations: what was known of the operation of a name.
        answers: the values of tensors that Python asked for, in order.
        asked: the tensors whose values they are.
    """

    nodes: tuple[fx.Node, ...]
    calls: tuple[ModuleCall, ...]
    inputs: tuple[fx.Node, ...]
    outputs: dict[str, fx.Node]
    tensors: dict[str, tuple[str, ...]]
    comparisons: tuple[Comparison, ...]
    escapes: tuple[Escape, ...]
    caches: tuple[tuple[str, str], ...]
    real: bool
    all_nodes: tuple[fx.Node, ...]
    every_call: tuple[ModuleCall, ...]
    training_outputs: tuple[fx.Node, ...] = ()
    training_error: str = ""
    operations: Lookup = nothing_known
    answers: tuple[Any, ...] = ()
    asked: tuple[fx.Node, ...] = ()

    @cached_property
    def keys(self) -> dict[int, CallKey]:
        """What each operation of `nodes` is found again by, by its number, in the order in which they run."""
        keyed = ((n, CallKey(*group, i)) for group, numbers in self.equals.items() for i, n in enumerate(numbers))
        return dict(sorted(keyed))

    @cached_property
    def equals(self) -> dict[Group, list[int]]:
        """The numbers of the operations that only their order tells apart, in that order."""
        return equal_calls(self.nodes, self.calls)

    @cached_property
    def counts(self) -> Counter[str]:
        """How often each module is called, by its path."""
        return Counter(call.path for call in self.calls)

    @cached_property
    def own(self) -> dict[str, list[fx.Node]]:
        """The operations that each module runs itself and the parts of their results, by its path, in order."""
        by_path: dict[str, list[fx.Node]] = {}
        for node in self.nodes:
            if node.op.startswith("call_") and node.meta["call"] >= 0:
                by_path.setdefault(self.calls[node.meta["call"]].path, []).append(node)
        return by_path

    @cached_property
    def held(self) -> frozenset[fx.Node]:
        """The model's own tensors, and what is computed from such alone."""
        held: set[fx.Node] = set()
        for node in self.all_nodes:
            sources = node.all_input_nodes
            if node.op == "get_attr" or (sources and all(source in held for source in sources)):
                held.add(node)
        return frozenset(held)

    def unreached(self, model: nn.Module) -> set[str]:
        """Parameters of `model`, by the first of their names, that take no part."""
        reached = {str(node.target) for node in self.all_nodes if node.meta["name"] == "parameter"}
        first = {names[0] for names in self.tensors.values()}
        missing = first - reached
        held = held_tensors(model) if missing else {}
        return {name for name in missing if isinstance(held[name].tensor, nn.Parameter)}


def as_call(example_inputs: ExampleInputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments from a tensor, a tuple (positional) or a dict (keyword)."""
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), {}
    raise PlanError(
        f"example_inputs is a {type(example_inputs).__name__}; give a tensor, a tuple of positional arguments, or a "
        "dict of keyword arguments."
    )


def map_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    """`value` with `function` applied to each tensor in its tuples, lists and dicts.

    A tensor that stands in several places is one tensor still: a forward may ask whether query and key are the same.
    """
    return _mapped(function, value, {})


def _mapped(function: Callable[[Tensor], Any], value: Any, known: dict[int, Any]) -> Any:
    if isinstance(value, Tensor):
        if id(value) not in known:
            known[id(value)] = function(value)
        return known[id(value)]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_mapped(function, item, known) for item in value))
    if isinstance(value, (tuple, list)):
        return type(value)(_mapped(function, item, known) for item in value)
    if isinstance(value, Mapping):
        return {key: _mapped(function, item, known) for key, item in value.items()}
    return value


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in a nested output; objects that are no container (a cache, say) are not outputs."""
    return (tensor for _, tensor in named_tensors(value))


def distinct_tensors(value: Any) -> list[Tensor]:
    """The tensors in nested example inputs, each of them once."""
    return list({id(tensor): tensor for tensor in tensors_in(value)}.values())


def named_tensors(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors in a nested output with their names: keys, attributes and positions, joined by dots."""
    if isinstance(value, Tensor):
        yield name, value
        return
    if isinstance(value, Mapping):
        items: Iterable[tuple[Any, Any]] = value.items()
    elif isinstance(value, (tuple, list)):
        items = zip(getattr(value, "_fields", range(len(value))), value, strict=True)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        items = ((item.name, getattr(value, item.name)) for item in dataclasses.fields(value))
    else:
        return
    for key, item in items:
        yield from named_tensors(item, f"{name}.{key}" if name else str(key))


def chosen_names(names: Iterable[str], wanted: Iterable[OutputName] | None) -> list[str]:
    """Those of the outputs' `names` that `wanted` names, whole or by what contains them; all if it is None.

    Raises:
        PlanError: a name is no output.
    """
    names = list(names)
    if wanted is None:
        return names
    chosen: set[str] = set()
    for name in map(str, [wanted] if isinstance(wanted, (str, int)) else wanted):
        hit = {n for n in names if n == name or n.startswith(f"{name}.")}
        if not hit:
            raise PlanError(f"The model has no output {name!r}. It returns {', '.join(map(repr, names))}.")
        chosen |= hit
    return [name for name in names if name in chosen]


@contextmanager
def preserved_random_state() -> Generator[None]:
    """The random generators of all devices are afterwards as they were."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        yield


def _run(model: nn.Module, inputs: ExampleInputs, operations: Lookup, meta: bool, training: bool = False) -> Trace:
    names = held_tensors(model)
    aliases: dict[int, list[str]] = {}
    for name, held in names.items():
        aliases.setdefault(id(held.tensor), []).append(name)
    tensors = {group[0]: tuple(group) for group in aliases.values()}
    replace: Callable[[Tensor], Tensor] = meta_like if meta else (lambda tensor: tensor.detach().clone())
    stand_in = meta_like if meta else copy_buffer
    shadow = shadow_of(model, lambda _, tensor: stand_in(tensor), held=names)
    args, kwargs = as_call(inputs)
    given = distinct_tensors((args, kwargs))
    args, kwargs = map_tensors(replace, (args, kwargs))
    model = shadow.model
    with preserved_random_state(), torch.no_grad(), eager(), tracked_numbers() as ledger:
        model.eval()
        recorder = Recorder(
            shadow.names, operations, meta, lambda name: buffer_of_indices(names[name].tensor), shadow.stands_for
        )
        placeholders: list[fx.Node] = []
        for tensor, original in zip(distinct_tensors((args, kwargs)), given, strict=True):
            node = recorder.input_node()
            recorder.remember(tensor, node)
            if meta:
                recorder.values.give(node, original)
            placeholders.append(node)
        before = dictionaries(model)
        with recorder.watching(model, shadow.originals), recorder:
            result = model(*args, **kwargs)
        kept = caches(model, before)
        outputs = {name: recorder.node_of(tensor) for name, tensor in named_tensors(result)}
        recording = recorder.recording
        nodes, calls, trained = tuple(recording.nodes), tuple(recording.calls), ()
        if training:
            model.train()
            args, kwargs = map_tensors(two_samples, (args, kwargs))
            for tensor, original in zip(distinct_tensors((args, kwargs)), given, strict=True):
                node = recorder.input_node()
                recorder.remember(tensor, node)
                recorder.values.give(node, two_samples(original))
            with recorder.watching(model, shadow.originals), recorder:
                result = model(*args, **kwargs)
            trained = tuple(recorder.node_of(tensor) for tensor in tensors_in(result))
    fx.Node(recording.graph, "output", "output", "output", (tuple(outputs.values()),), {})  # it is a user of each
    return Trace(
        nodes=nodes,
        calls=calls,
        inputs=tuple(placeholders),
        outputs=outputs,
        tensors=tensors,
        comparisons=tuple(ledger.comparisons.values()),
        escapes=tuple(ledger.escapes.values()),
        caches=kept,
        real=not meta,
        all_nodes=tuple(recording.nodes),
        every_call=tuple(recording.calls),
        training_outputs=trained,
        operations=operations,
        answers=tuple(recording.answers),
        asked=tuple(recording.asked),
    )


def two_samples(tensor: Tensor) -> Tensor:
    """A batch of one as a batch of two: batch norms refuse to train on a single value."""
    return torch.cat([tensor, tensor]) if tensor.shape[:1] == (1,) else tensor.clone()


def buffer_of_indices(tensor: Tensor) -> Tensor | None:
    """A buffer of positions, counts or flags: its values are no weights, and may decide a branch."""
    weight = isinstance(tensor, nn.Parameter) or tensor.is_floating_point() or tensor.is_complex()
    return None if weight or tensor.is_meta else tensor


def run_once(model: nn.Module, example_inputs: ExampleInputs) -> Any:
    """The outputs of `model` in eval mode, without gradients; model, inputs and random state stay as they were."""
    args, kwargs = map_tensors(lambda tensor: tensor.detach().clone(), as_call(example_inputs))
    shadow = shadow_of(model, lambda _, tensor: copy_buffer(tensor), tracked=False)
    with preserved_random_state(), torch.no_grad():
        shadow.model.eval()
        return shadow.model(*args, **kwargs)


def trace(model: nn.Module, example_inputs: ExampleInputs, operations: Lookup = nothing_known) -> Trace:
    """Record the forward of `model` on `example_inputs`, in eval mode, with nothing computed where possible.

    The model runs on stand-ins on the ``meta`` device. Where Python needs a real number (``.item()``, a branch on a
    value) that the example inputs alone decide, it is computed from them. Where weights decide it, the model runs once
    more on its own weights and the given inputs, and `Trace.real` says so. The model, its mode, its buffers and the
    random state are left as they were.

    Args:
        model: any ``nn.Module``.
        example_inputs: a tensor, a tuple of positional arguments, or a dict of keyword arguments.
        operations: what is known of the operation of a name; a Python function that is known is not opened.

    Raises:
        TraceError: the model does not run on these inputs, or runs but cannot be recorded.
    """
    try:
        return _with_training(_run(model, example_inputs, operations, meta=True), model, example_inputs, operations)
    except Exception as error:  # the user's forward may raise anything on stand-ins; real numbers are tried next
        first = error
    if any(held.tensor.is_meta for held in held_tensors(model).values()):
        if isinstance(first, StructpruneError):
            raise first
        raise TraceError(
            f"The forward cannot be traced on the meta device, where this model's weights are ({first}). "
            "Give the model real weights, or take what needs a tensor's value out of its forward."
        ) from first
    try:
        return _run(model, example_inputs, operations, meta=False)
    except Exception as error:  # raised again below, after the user's own error had its chance to show
        second = error
    require_running(model, example_inputs)
    if isinstance(second, StructpruneError):
        raise second
    raise TraceError(
        f"The model runs on the example inputs, but not while it is recorded: {type(second).__name__}: {second}"
    ) from second


def require_running(
    model: nn.Module,
    example_inputs: ExampleInputs,
    error: type[Exception] = TraceError,
    run: Callable[[nn.Module, ExampleInputs], Any] | None = None,
) -> None:
    """Check that the model runs on its inputs.

    Args:
        model: any ``nn.Module``.
        example_inputs: what it runs on.
        error: what is raised if it does not; it says what the model raised, and where.
        run: runs it; `run_once` if not given.
    """
    try:
        (run or run_once)(model, example_inputs)
    except StructpruneError:
        raise
    except Exception as raised:  # the user's forward may raise anything
        shapes = [list(tensor.shape) for tensor in tensors_in(as_call(example_inputs))]
        raise error(
            f"{type(model).__name__} cannot run on the inputs given (example_inputs, or the first batch of data), "
            f"tensors of the shapes {shapes}: {type(raised).__name__}: {raised} {_raised_at(raised)}"
        ) from raised


def _raised_at(error: BaseException) -> str:
    """The last line of the user's own code in a traceback: ``(net.py:12)``."""
    places = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    own = [(name, line) for name, line in places if not name.startswith((_TORCH, _HERE))]
    return f"({own[-1][0]}:{own[-1][1]})" if own else ""


def in_both_modes(model: nn.Module, example_inputs: ExampleInputs, operations: Lookup) -> Trace | None:
    """A trace of the forward in eval mode and, behind it, in training mode; None where it cannot run so."""
    try:
        return _run(model, example_inputs, operations, meta=True, training=True)
    except Exception:  # in training mode the user's forward may ask for more: labels, a larger batch
        return None


def _with_training(recorded: Trace, model: nn.Module, example_inputs: ExampleInputs, operations: Lookup) -> Trace:
    """`recorded`, or a trace of both modes if the forward in training mode reaches parameters that it does not."""
    missing = recorded.unreached(model)
    if not missing:
        return recorded
    try:
        both = _run(model, example_inputs, operations, meta=True, training=True)
    except Exception as error:  # in training mode the user's forward may ask for more: labels, a larger batch
        return dataclasses.replace(recorded, training_error=f"{type(error).__name__}: {error}")
    return both if both.unreached(model) < missing else recorded


def part_of(node: fx.Node) -> tuple[fx.Node, int]:
    """The operation that a ``part`` node takes one of several results of, and which one."""
    parent, position = node.args
    assert isinstance(parent, fx.Node)
    assert isinstance(position, int)
    return parent, position


def describe(node: fx.Node, trace: Trace) -> str:
    """Where `node` stands: its operation, module path and source line."""
    call = node.meta["call"]
    path = trace.every_call[call].path if call >= 0 else ""
    name = node.target if node.op == "get_attr" else node.meta["name"]
    return f"{name} in {path or 'the model'} ({plain(node.meta.get('where', 'input'))})"
