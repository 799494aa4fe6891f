"""The plain calls: `plan` and `prune`."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import nn

from structprune.allocation import check_ratio, local_shares, lowest
from structprune.dependency_graph import DependencyGraph
from structprune.graph import Layer
from structprune.importance.base import Importance, check_scores, importance_of
from structprune.plan import Plan
from structprune.planning import plan_removal, tensors_of
from structprune.surgery.verify import verify as verify_pruned
from structprune.tracing.state import collection_paused
from structprune.tracing.trace import ExampleInputs


def plan(
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    ratio: float = 0.5,
    importance: str | Importance = "l2",
    ignore: Iterable[Layer] = (),
) -> Plan:
    """Decide which channels of `model` go; nothing is changed.

    Args:
        model: any ``nn.Module`` whose forward can be traced.
        example_inputs: a tensor, a tuple (positional) or a dict (keyword) that the model accepts.
        ratio: share of the channels of every coupled group to remove, from 0 to below 1.
        importance: what a channel is worth: ``"l1"``, ``"l2"``, ``"linf"``, ``"random"``, or a callable that gives
            scores (see `structprune.importance.base.Importance`).
        ignore: layers (modules or dotted names) to leave whole.

    Raises:
        PlanError: what is asked for cannot be planned.
        TraceError: the forward cannot be recorded.

    Example:
        >>> import torch, structprune
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> structprune.plan(model, torch.randn(1, 4), ratio=0.25).layers
        (LayerWidth(layer='0', before=8, after=6),)
    """
    check_ratio(ratio)
    with collection_paused():
        return _plan(model, example_inputs, ratio, importance, ignore)


def _plan(
    model: nn.Module, example_inputs: ExampleInputs, ratio: float, importance: str | Importance, ignore: Iterable[Layer]
) -> Plan:
    score = importance_of(importance)
    graph = DependencyGraph(model, example_inputs, ignore=ignore)
    tensors = tensors_of(graph)
    chosen = [np.zeros(0, dtype=np.int64)]
    with torch.no_grad():
        for share in local_shares(graph, ratio):
            group = share.group
            count = group.channels - share.keep
            if count:
                scores = check_scores(score(group, tensors), group)
                chosen.append(group.components[lowest(scores.double().cpu().numpy(), count)])
    settings = {"ratio": ratio, "importance": importance if isinstance(importance, str) else repr(importance)}
    return plan_removal(graph, np.concatenate(chosen), settings)


def prune(
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    ratio: float = 0.5,
    importance: str | Importance = "l2",
    ignore: Iterable[Layer] = (),
    inplace: bool = False,
    verify: bool = True,
) -> nn.Module:
    """A smaller model of the same class: plan, apply, verify.

    The outputs keep their shape. The original is untouched unless `inplace`.

    Args:
        model: any ``nn.Module`` whose forward can be traced.
        example_inputs: a tensor, a tuple (positional) or a dict (keyword) that the model accepts.
        ratio: share of the channels of every coupled group to remove, from 0 to below 1.
        importance: what a channel is worth; see `plan`.
        ignore: layers (modules or dotted names) to leave whole.
        inplace: change `model` itself and return it.
        verify: compare the result with the original whose removed channels are switched off; costs two forwards.

    Raises:
        PlanError: what is asked for cannot be planned.
        TraceError: the forward cannot be recorded.
        VerificationError: the result is not exact; with `inplace`, the model is left as it was.

    Example:
        >>> import torch, structprune
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> structprune.prune(model, torch.randn(1, 4), ratio=0.5)[0]
        Linear(in_features=4, out_features=4, bias=True)
    """
    decided = plan(model, example_inputs, ratio=ratio, importance=importance, ignore=ignore)
    if verify:
        slim = decided.apply(model)
        verify_pruned(model, slim, decided, example_inputs).raise_for_error()
        if not inplace:
            return slim
    return decided.apply(model, inplace=inplace)
