"""The original with some of its branches at zero: what a model without them computes, and by which they are scored."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx, nn

from structprune.depth.cut import Cut
from structprune.depth.records import PlacedBranch
from structprune.depth.sums import stacked
from structprune.ops.arguments import arguments
from structprune.tracing.containers import Path, located
from structprune.tracing.replay import Hook, Replay, ReplayedCall
from structprune.tracing.trace import Trace


@contextmanager
def branches_off(
    model: nn.Module, recorded: Trace, chosen: Iterable[PlacedBranch], hooks: Mapping[int, Hook] = MappingProxyType({})
) -> Generator[None]:
    """While the block runs, these branches of `model` are zero and these blocks give back what they get.

    Everything is computed as before, and thrown away at the sums.

    Args:
        model: the traced model, without wrappers.
        recorded: its trace.
        chosen: what is off.
        hooks: what stands in for operations meanwhile, by number; a sum's is shown the terms that are left. A model can
            be followed by one `Replay` at a time, so that what is to be seen of it is given here.
    """
    chosen = list(chosen)
    positions: dict[int, list[int]] = {}
    for number, position in (edge for item in chosen for edge in item.off):
        positions.setdefault(number, []).append(position)
    everything: dict[int, Hook] = dict(hooks) | {
        number: partial(_zeroed, recorded.nodes[number], places, hooks.get(number, ReplayedCall.__call__))
        for number, places in positions.items()
    }
    with ExitStack() as stack:
        for item in chosen:
            if item.skipped:
                stack.enter_context(passing(model, recorded, item, lambda given, _: given.clone()))
        if everything:
            stack.enter_context(Replay(recorded, everything, required=False).over(model))
        yield


def _zeroed(node: fx.Node, positions: list[int], run: Hook, operation: ReplayedCall) -> Any:
    """Let `run` run a sum with the terms at these positions at zero."""
    args = list(operation.args)
    stack = stacked(node)
    if stack is not None:
        dim = arguments(stack).get("dim") or 0
        args[0] = args[0].index_fill(dim, torch.tensor(positions, device=args[0].device), 0)
        operation.args = tuple(args)
        return run(operation)
    for position in positions:
        if position >= len(args):
            operation.kwargs = operation.kwargs | {"other": torch.zeros_like(operation.kwargs["other"])}
        elif position == 0 and operation.call.inplace:
            args[0].zero_()
        else:
            args[position] = torch.zeros_like(args[position])
    operation.args = tuple(args)
    return run(operation)


@contextmanager
def passing(
    model: nn.Module, recorded: Trace, block: PlacedBranch, combine: Callable[[Tensor, Tensor], Tensor]
) -> Generator[None]:
    """While the block runs, a module gives `combine` of what it got and what it computed, each of them one tensor."""
    calls = [call for call in recorded.calls if call.path == block.branch.module]
    whole = Cut(recorded)
    pairs = {recorded.nodes[y]: recorded.nodes[x] for y, x in block.skipped}
    places: list[tuple[Path, Path] | None] = []
    for call in calls:
        outputs = {whole.value[node]: path for path, node in located(call.output, fx.Node)}
        given = {whole.value[node]: path for path, node in reversed(list(located((call.args, call.kwargs), fx.Node)))}
        pairs_here = [(outputs[y], given[x]) for y, x in pairs.items() if y in outputs and x in given]
        places.append(pairs_here[0] if pairs_here else None)
    count = iter(places)

    def passed(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        place = next(count)
        if place is None:
            return output
        value: Any = (args, kwargs)
        for step in place[1]:
            value = value[step]
        result = output
        for step in place[0]:
            result = result[step]
        assert isinstance(value, Tensor)
        return _replaced(output, place[0], combine(value, result))

    def begin(module: nn.Module, args: Any) -> None:
        nonlocal count
        count = iter(places)

    handles = [
        model.register_forward_pre_hook(begin),
        model.get_submodule(block.branch.module).register_forward_hook(passed, with_kwargs=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _replaced(output: Any, path: Path, value: Tensor) -> Any:
    if not path:
        return value
    inner = _replaced(output[path[0]], path[1:], value)
    if isinstance(output, (tuple, list)):
        items = [inner if i == path[0] else item for i, item in enumerate(output)]
        return type(output)(*items) if hasattr(output, "_fields") else type(output)(items)
    changed = type(output)(output)
    changed[path[0]] = inner
    return changed
