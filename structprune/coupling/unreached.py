"""What stays whole for what the trace does not show: tensors left alone by the user, caches, modules not chosen.

Where data decide which of several alike modules run (a list of experts, each for the tokens that are routed to it), the
trace shows those that ran. The others will be given the same tensors another time, so what they share with their
siblings must stay as wide as it is; their own inner widths stay whole since nothing of theirs was seen. The same holds
for parameters of a module that data decide whether to use: weights of experts that are stacked in one tensor.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

from torch import fx, nn

from structprune.coupling.propagate import Channels
from structprune.ops.relations import Axis
from structprune.tracing.containers import leaves_of
from structprune.tracing.provenance import Dim, leaves
from structprune.tracing.state import held_tensors, join
from structprune.tracing.trace import Trace, describe, part_of
from structprune.tracing.vocabulary import HANDED_OUT


def pin_ignored(paths: Iterable[str], trace: Trace, channels: Channels) -> None:
    """Pin all tensors of the modules at `paths`, or of these names."""
    for path in paths:
        for node in trace.all_nodes:
            if node.op == "get_attr" and f"{node.target}.".startswith(f"{path}."):
                for axis in channels.axes[node.meta["index"]]:
                    channels.relations.pin(axis, f"{path} is ignored")


def pin_outputs_of(paths: Iterable[str], trace: Trace, channels: Channels) -> None:
    """Pin what the modules at `paths`, and all in them, give; of a tensor of this name, all dimensions."""
    for path in paths:
        given = [
            node for call in trace.every_call if _inside(call.path, path) for node in leaves_of(call.output, fx.Node)
        ]
        given += [node for node in trace.all_nodes if node.op == "get_attr" and node.target == path]
        for node in given:
            for axis in _axes(channels, node):
                channels.relations.pin(axis, f"the outputs of {path} are to stay, by ignore_outputs")


def _inside(path: str, block: str) -> bool:
    return f"{path}.".startswith(f"{block}." if block else "")


def pin_caches(model: nn.Module, trace: Trace, channels: Channels) -> None:
    """A tensor whose size the forward checks is built anew where it does not fit: it must stay as it would be."""
    held = held_tensors(model) if trace.comparisons else {}
    for comparison in trace.comparisons:
        for leaf in (*leaves(comparison.left), *leaves(comparison.right)):
            node = trace.all_nodes[leaf.node] if isinstance(leaf, Dim) else None
            if node is not None and node.meta["name"] == "parameter" and held[str(node.target)].temporary:
                for axis in channels.axes[node.meta["index"]]:
                    reason = f"the forward checks its size at {comparison.where}, and may build it anew"
                    channels.relations.pin(axis, reason)


def pin_unseen(trace: Trace, channels: Channels) -> None:
    """Pin what Python uses as a number, and what may be used where it is not seen (``vmap``, a tensor subclass, C++).

    On real numbers the result of such an operation looks like a constant. On stand-ins it would have been noticed.
    """
    if not trace.real:
        return
    for node in trace.asked:
        _pin_sources(node, f"Python uses the value of {describe(node, trace)}, which is computed from it", channels)
    exits = [n.meta["index"] for n in trace.all_nodes if n.meta["name"] in HANDED_OUT]
    for node in trace.all_nodes:
        if node.meta["name"] == "constant" and node.meta["dtype"].is_floating_point:
            last = node.meta["index"]
            # What NumPy was given is pinned already, and comes back as a constant.
            first = max((number for number in exits if number < last), default=0)
            for before in trace.all_nodes[first:last]:
                if before.op.startswith("call_"):
                    for axis in _axes(channels, before):
                        reason = f"what becomes of it before {node.meta['where']} is not seen"
                        channels.relations.pin(axis, reason)


def _pin_sources(node: fx.Node, reason: str, channels: Channels) -> None:
    """Pin the channels of `node`; where it has none left, those of what it was computed from."""
    pending = [node]
    while pending:
        current = pending.pop()
        free = [axis for axis in _axes(channels, current) if axis.free]
        for axis in free:
            channels.relations.pin(axis, reason)
        if not free:
            pending += _sources(current)


def _sources(node: fx.Node) -> list[fx.Node]:
    """What the values of `node` were computed from; a rule may say that one of several results leaves operands out."""
    if node.meta["name"] == "part":
        parent, position = part_of(node)
        only = parent.meta.get("part_of_operand", {}).get(position)
        return [parent] if only is None else [only]
    return node.all_input_nodes


def pin_unreached(model: nn.Module, trace: Trace, channels: Channels) -> None:
    """Pin what goes into and comes out of modules beside which an alike one was not chosen by the example inputs."""
    if not trace.real:
        return  # no branch depends on weights: what did not run never runs
    reached = {call.path for call in trace.calls}
    for node in trace.all_nodes:
        if node.meta["name"] == "parameter":
            parts = str(node.target).split(".")
            reached.update(".".join(parts[:n]) for n in range(1, len(parts)))
    for missing, siblings in _alternatives(model, reached):
        reason = (
            f"{missing} takes it too when data choose it, which the example inputs did not; give example inputs that "
            "reach it"
        )
        _pin_calls(siblings, reason, trace, channels)
    for path, name in _left_out(model, trace):
        reason = f"{name} is used where data choose it, which the example inputs did not; give some that reach it"
        _pin_calls({path}, reason, trace, channels)


def _pin_calls(paths: Collection[str], reason: str, trace: Trace, channels: Channels) -> None:
    """Pin what the modules at these paths take and give."""
    for call in trace.calls:
        if call.path in paths:
            for axis in _axes(channels, (call.args, call.kwargs, call.output)):
                channels.relations.pin(axis, reason)


def _left_out(model: nn.Module, trace: Trace) -> Iterator[tuple[str, str]]:
    """Modules in whose forward Python asked for values, each with a parameter of its own that no operation reached."""
    asking = {trace.calls[node.meta["call"]].path for node in trace.asked if node.meta["call"] >= 0}
    for name in sorted(trace.unreached(model)):
        path = name.rpartition(".")[0]
        if path in asking:
            yield path, name


_Form = tuple[type[nn.Module], tuple[tuple[str, tuple[int, ...]], ...]]


def _alternatives(model: nn.Module, reached: set[str]) -> Iterator[tuple[str, frozenset[str]]]:
    """Each module of a list that did not run, with those like it that did."""
    for path, module in model.named_modules():
        if not isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            continue
        alike: dict[_Form, list[str]] = {}
        for name, child in module.named_children():
            alike.setdefault(_form(child), []).append(join(path, name))
        for form, members in alike.items():
            ran = frozenset(member for member in members if member in reached)
            missing = [member for member in members if member not in ran]
            if form[1] and ran and missing:
                yield missing[0], ran


def _form(module: nn.Module) -> _Form:
    return type(module), tuple((name, tuple(p.shape)) for name, p in module.named_parameters())


def _axes(channels: Channels, value: object) -> Iterator[Axis]:
    """The axes of all recorded tensors in `value`."""
    for node in leaves_of(value, fx.Node):
        yield from (axis for axis in channels.axes[node.meta["index"]] if isinstance(axis, Axis))
