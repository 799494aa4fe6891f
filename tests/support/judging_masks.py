"""Whether `masks.compact` takes no more out of a small network than its zeros allow, whatever operation it holds."""

from __future__ import annotations

import copy
import warnings

import torch
from torch import Tensor

from structprune import masks
from structprune.errors import StructpruneError, VerificationError
from support.judging import (
    BROKEN,
    HANG,
    NO_CALL,
    NO_VALUE,
    RANDOM,
    RAW,
    REFUSED,
    RIGHT,
    WHOLE,
    WRONG,
    Late,
    Verdict,
    finite,
    largest_error,
    run,
    run_filled,
    time_limit,
)
from support.operations import Case, OperationNetwork, Reader


def judge_compaction(case: Case, limit: float = 60.0) -> Verdict:
    """What `masks.compact` makes of a case of torch's test databases, half of whose channels are constants.

    It is compared with the masked network on the sample, and on two others that lie close by, which the operation takes
    as well.
    """
    try:
        with time_limit(limit), warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            return _judge(case)
    except Late:
        return Verdict(HANG, f"more than {limit:g} s")


def _judge(case: Case) -> Verdict:
    try:
        model, inputs = case.network()
        _mask(model.eval())
        given = [inputs, *(_near(inputs, seed) for seed in (1, 2))]
        masked = [run(copy.deepcopy(model), each) for each in given]
    except Exception as error:  # a sample that this build of torch does not take, or an operation that raises near it
        return Verdict(NO_CALL, str(error))
    if not all(finite(output) for output in masked):
        return Verdict(NO_VALUE)
    if largest_error(run_filled(copy.deepcopy(model), inputs), masked[0]) > 1:
        return Verdict(RANDOM)
    try:
        found = masks.compaction(model, inputs)
    except VerificationError as error:
        return Verdict(WRONG, str(error))
    except StructpruneError as error:
        return Verdict(REFUSED, f"{type(error).__name__}: {error}")
    except Exception as error:  # what must never reach a user
        return Verdict(RAW, f"{type(error).__name__}: {error}")
    went = sum(len(layer.removed) for layer in found.layers)
    try:
        outputs = [run(copy.deepcopy(found.model), x) for x in given]
    except Exception as raised:  # the smaller network does not run
        return Verdict(BROKEN, f"{type(raised).__name__}: {raised}", went)
    error = max(map(largest_error, outputs, masked))
    if error > 1:
        return Verdict(WRONG, f"{error:.1e} times the tolerance", went)
    return Verdict(RIGHT if went else WHOLE, "", went)


def _mask(model: OperationNetwork) -> None:
    """Zeros in the first half of the channels that the operation is given, and in some of what reads its results."""
    weight = model.before.weight
    weight[: max(1, len(weight) // 2)] = 0
    generator = torch.Generator().manual_seed(1)
    for reader in model.readers:
        if isinstance(reader, Reader):
            reader.linear.weight[:, torch.rand(reader.linear.in_features, generator=generator) < 0.4] = 0


def _near(inputs: tuple[Tensor, ...], seed: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)

    def moved(x: Tensor) -> Tensor:
        if not (x.is_floating_point() or x.is_complex()):
            return x
        return (x * (1 + 1e-3 * torch.rand(x.shape, generator=generator))).to(x.dtype)

    return tuple(map(moved, inputs))
