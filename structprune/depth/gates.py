"""Gates on branches: a one that each branch is multiplied with, whose gradient tells what the branch is worth."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, fx, nn

from structprune.depth.records import PlacedBranch
from structprune.depth.reference import branches_off, passing
from structprune.depth.sums import stacked
from structprune.ops.arguments import arguments
from structprune.tracing.replay import Hook, ReplayedCall
from structprune.tracing.trace import Trace

# Given the number of a branch and the sum that it goes into, its gate: ones that broadcast with that sum.
MakeGate = Callable[[int, Tensor], Tensor]


@contextmanager
def gated(
    model: nn.Module,
    recorded: Trace,
    branches: Sequence[PlacedBranch],
    make: MakeGate,
    off: Sequence[PlacedBranch] = (),
) -> Generator[None]:
    """While the block runs, what each branch adds is multiplied with a gate, which is one: nothing changes.

    The gradient with respect to the gate is the inner product of the sum's gradient with what the branch adds.

    Args:
        model: the traced model, without wrappers.
        recorded: its trace.
        branches: the branches and blocks.
        make: makes the gates; called anew for each sum of a branch and each forward.
        off: branches that are zero meanwhile.
    """
    terms: dict[int, list[tuple[int, int]]] = {}
    for which, item in enumerate(branches):
        for number, position in item.off:
            terms.setdefault(number, []).append((which, position))
    hooks: dict[int, Hook] = {
        number: partial(_opened, recorded.nodes[number], here, make) for number, here in terms.items()
    }

    def through(which: int, given: Tensor, result: Tensor) -> Tensor:
        return result + (make(which, result) - 1) * (result - given).detach()

    with branches_off(model, recorded, off, hooks), ExitStack() as stack:
        for which, item in enumerate(branches):
            if item.skipped:
                stack.enter_context(passing(model, recorded, item, partial(through, which)))
        yield


def _opened(node: fx.Node, terms: list[tuple[int, int]], make: MakeGate, operation: ReplayedCall) -> Any:
    """Run a sum, with gates on some of its terms, given as (number of the branch, position)."""
    stack = stacked(node)
    before = operands(operation)
    result = operation()
    for which, position in terms:
        if stack is not None:
            added = operation.args[0].detach().select(arguments(stack).get("dim") or 0, position)
        else:
            # What a subtracted or scaled branch adds is what the sum has beyond the other term.
            added = result.detach() - before[1 - position]
        step = (make(which, result) - 1) * added
        result = result.add_(step) if operation.call.inplace else result + step
    return result


def operands(operation: ReplayedCall) -> dict[int, Tensor]:
    """Copies of the tensors that a sum is about to take, by their position: it may write into one of them."""
    taken = dict(enumerate(operation.args)) | ({1: operation.kwargs["other"]} if "other" in operation.kwargs else {})
    return {place: tensor.detach().clone() for place, tensor in taken.items() if isinstance(tensor, Tensor)}
