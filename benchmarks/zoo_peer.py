"""What torch-pruning makes of a model of the zoo, judged as ours is."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import torch
from harness import peer
from harness.children import OverTime, Report, at_most, one_line
from support import oracle
from torch import nn
from zoo_check import LARGEST_IN_DOUBLE, TOLERANCE, built, jittered, parameters, shapes
from zoo_models.entry import Entry


def _judged(original: nn.Module, pruned: nn.Module, inputs: Any, before: Any) -> dict[str, Any]:
    """Whether what it left computes what the original computes with the channels off that are gone."""
    output = oracle.call(pruned, inputs)
    if shapes(output) != before:
        return {"outcome": "wrong", "error": f"output shapes {shapes(output)[:3]} instead of {before[:3]}"}
    removed = peer.removed_from(oracle.floating_tensors(original), oracle.floating_tensors(pruned))
    if not removed:
        return {"outcome": "removes nothing"}
    judge = oracle.Oracle(original, inputs)
    expected = judge.expect(removed, norms=None)  # its means may run over what it left
    with peer.SameScale() as noted:
        oracle.call(original, inputs)
    # A softmax that is scaled by the root of its new, smaller heads is let pass.
    with peer.SameScale(noted.seen):
        error = oracle.relative_error(judge.output(pruned, expected.widened), expected.output)
    right = error <= TOLERANCE[judge.dtype]
    return {"outcome": "right" if right else "wrong", "error": f"relative error {error:.1e}"}


def peer_outcome(entry: Entry, limit: float) -> Callable[[Report], None]:
    """Work for a process of its own: ``right``, ``wrong``, ``crashes``, ``hangs`` or ``removes nothing``.

    The peer may take `limit` seconds of the processor; what its model computes is compared with the oracle, which takes
    the removed channels from the tensors that are left.
    """

    def work(report: Report) -> None:
        with torch.no_grad():
            model, inputs = built(entry)
        dtype = torch.float32 if parameters(model) > LARGEST_IN_DOUBLE else torch.float64
        model, inputs = jittered(model, dtype), oracle.double(inputs, dtype)
        original, before, size = copy.deepcopy(model), shapes(oracle.call(model, inputs)), parameters(model)
        start = time.process_time()
        report({"outcome": "hangs"})
        try:
            with at_most(limit):
                peer.prune(model, inputs, 0.5, peer.last_layers(model, inputs), peer.heads_of(model))
            report({"kept": parameters(model) / size, "seconds": time.process_time() - start})
            report(_judged(original, model, inputs, before))
        except OverTime:
            return
        except Exception as error:  # the peer may raise anything; that is its outcome
            report({"outcome": "crashes", "error": one_line(error)})

    return work
