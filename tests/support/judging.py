"""What one plain call makes of a small network: the classes in which single operations are counted."""

from __future__ import annotations

import copy
import math
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import structprune
from structprune.errors import StructpruneError
from support.operations import Case, Reader
from support.oracle import Oracle, Removed, leaves, switch_off
from support.runs import call

RIGHT, SURVIVORS, WHOLE = "right", "right over the survivors of a norm", "kept whole"
WRONG, BROKEN, RAW, REFUSED, HANG = "wrong numbers", "broken forward", "raw exception", "refused", "hang"
RANDOM, NO_VALUE, NO_CALL = "random", "no value", "the operation raises"
GOOD = (RIGHT, SURVIVORS, WHOLE)
FAULTS = (WRONG, BROKEN, RAW, REFUSED, HANG)
NOT_COMPARABLE = (RANDOM, NO_VALUE, NO_CALL)
TOLERANCE = {torch.float64: 1e-9, torch.complex128: 1e-9, torch.float32: 1e-4, torch.complex64: 1e-4}


class Verdict(NamedTuple):
    """What came of a case.

    Attributes:
        kind: one of the classes above.
        note: the reason, or the error.
        went: how many channels of the first layer went.
    """

    kind: str
    note: str = ""
    went: int = 0


class Late(BaseException):
    """Time is up; no handler of errors may take it for one."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise `Late` after so many seconds; in the main thread only."""

    def late(signum: int, frame: FrameType | None) -> None:
        raise Late

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def judge(model: nn.Module, inputs: Any, limit: float = 20.0, *, reasons: bool = True) -> Verdict:
    """Remove half of the channels of `model` with one plain call, and compare with plain zeroing.

    Args:
        model: a linear layer called ``before``, the operation, and readers.
        inputs: of the model.
        limit: seconds after which it hangs.
        reasons: say why channels were kept, which costs another trace.
    """
    try:
        with time_limit(limit), warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            return _judge(model, inputs, why_whole if reasons else _no_reason)
    except Late:
        return Verdict(HANG, f"more than {limit:g} s")


def judge_case(case: Case, limit: float = 20.0, *, reasons: bool = True) -> Verdict:
    """What comes of one case of torch's test databases; see `judge`."""
    try:
        model, inputs = case.network()
    except (RuntimeError, AssertionError) as error:  # a sample that this build of torch does not take
        return Verdict(NO_CALL, _said(error))
    return judge(model, inputs, limit, reasons=reasons)


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def run(model: nn.Module, inputs: Any, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return call(model, inputs)


def run_filled(model: nn.Module, inputs: Any) -> Any:
    """A run with another seed, in which memory that nothing was written to is not a number."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        return run(model, inputs, seed=1)
    finally:
        torch.use_deterministic_algorithms(before)


def _judge(model: nn.Module, inputs: Any, why: Callable[[nn.Module, Any], str]) -> Verdict:
    try:
        whole = run(copy.deepcopy(model), inputs)
        again = run_filled(copy.deepcopy(model), inputs)
    except Exception as error:  # any error of the operation itself
        return Verdict(NO_CALL, _said(error))
    try:
        plan = structprune.plan(model, inputs)
        slim = plan.apply(model)
    except StructpruneError as error:
        return Verdict(REFUSED, _said(error))
    except Exception as error:  # what must never reach a user
        return Verdict(RAW, _said(error))
    removed = plan.removed
    went = len(removed.get("before.weight", {}).get(0, ()))
    if not removed:
        return Verdict(WHOLE, why(model, inputs))
    try:
        ours = run(slim, inputs)
    except Exception as error:  # of the pruned network: the fault that is looked for
        return Verdict(BROKEN, _said(error), went)
    if not _equal(whole, again):
        return Verdict(RANDOM, "", went)
    verdict = _compared(model, inputs, removed, whole, ours)
    if verdict.kind in (RIGHT, SURVIVORS) and not went:  # channels of other tensors went
        return Verdict(WHOLE, why(model, inputs))
    return verdict._replace(went=went)


def _no_reason(model: nn.Module, inputs: Any) -> str:
    del model, inputs
    return ""


def why_whole(model: nn.Module, inputs: Any) -> str:
    """The reason for which no channel of the first layer may go, as the graph gives it."""
    pinned = structprune.DependencyGraph(copy.deepcopy(model), inputs).pinned()
    return pinned.get("before.weight, dim 0", "not pinned: rounding or balance leaves no feasible number")


def _compared(model: nn.Module, inputs: Any, removed: Removed, whole: Any, ours: Any) -> Verdict:
    watched = _blind(copy.deepcopy(model), removed)
    try:
        plain = run(switch_off(watched, removed), inputs)
    except Exception as error:  # an operation that has no result with a channel at zero
        return Verdict(NO_VALUE, _said(error))
    error = largest_error(ours, plain)
    if error <= 1:
        return Verdict(RIGHT)
    try:
        oracle = Oracle(watched, inputs)
        expected = oracle.expect(removed).output
        over = largest_error(ours, expected)
    except (AssertionError, RuntimeError) as problem:  # the forward of other numbers goes another way, or nowhere
        over, expected = math.inf, plain
        problem_note = f" ({_said(problem)})"
    else:
        problem_note = ""
    if over <= 1:
        return Verdict(SURVIVORS)
    if not finite(plain) and finite(whole):
        return Verdict(NO_VALUE, "not finite")
    return Verdict(WRONG, f"error {_shown(ours, plain)}{problem_note}")


def _blind(model: nn.Module, removed: Removed) -> nn.Module:
    """A copy whose readers do not look at what stands in a removed channel where it is no number.

    The reader's weight is zero there, but zero times infinity is not.
    """
    for name, module in model.named_modules():
        gone = removed.get(f"{name}.weight", {}).get(1)
        if gone and isinstance(module, nn.Linear) and isinstance(model.get_submodule(name.rpartition(".")[0]), Reader):

            def mask(_: nn.Module, args: Any, gone: Any = tuple(gone)) -> Any:
                x = args[0].clone()
                part = x[..., gone]
                x[..., gone] = torch.where(part.isfinite(), part, 0)
                return (x,)

            module.register_forward_pre_hook(mask)
    return model


def finite(tree: Any) -> bool:
    return all(bool(t.isfinite().all()) for _, t in leaves(tree))


def _equal(a: Any, b: Any) -> bool:
    return largest_error(a, b) <= 1


def largest_error(ours: Any, expected: Any) -> float:
    """The largest error over its tolerance; what is not finite must stand at the same places, with the same values."""
    got, want = list(leaves(ours)), list(leaves(expected))
    if [(t.shape, t.dtype) for _, t in got] != [(t.shape, t.dtype) for _, t in want]:
        return math.inf
    return max((_error(a, b) for (_, a), (_, b) in zip(got, want, strict=True)), default=0.0)


def _error(a: Tensor, b: Tensor) -> float:
    if not (a.is_floating_point() or a.is_complex()):
        return 0.0 if torch.equal(a, b) else math.inf
    finite = b.isfinite()
    if not torch.equal(finite, a.isfinite()) or not torch.equal(a[~finite].isnan(), b[~finite].isnan()):
        return math.inf
    gap = float((a - b)[finite].abs().max()) if finite.any() else 0.0
    scale = float(b[finite].abs().max()) if finite.any() else 0.0
    return gap / (max(scale, 1e-3) * TOLERANCE.get(a.dtype, 1e-3))


def _shown(ours: Any, expected: Any) -> str:
    for (_, a), (_, b) in zip(leaves(ours), leaves(expected), strict=False):
        if a.shape != b.shape:
            return f"of shapes: {list(a.shape)}, expected {list(b.shape)}"
        if _error(a, b) > 1:
            where = ~torch.isclose(a, b, rtol=1e-6, atol=1e-9, equal_nan=True)
            return f"got {a[where].flatten()[:3].tolist()}, expected {b[where].flatten()[:3].tolist()}"
    return "of form"
