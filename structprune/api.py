"""The plain calls: `plan` and `prune`."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Unpack

import torch
from torch import Tensor, nn

from structprune.checking import FLAG, require
from structprune.coupling.solve import Mask
from structprune.dependency_graph import DependencyGraph
from structprune.errors import PlanError
from structprune.importance.base import fitted
from structprune.joint.layers import search_layers
from structprune.joint.search import DecideForLatency, search
from structprune.planning.build import plan_removal
from structprune.planning.decide import Decision, Ranking, decide_channels
from structprune.planning.dimensions import chains_of, shorter_stacks
from structprune.planning.latency_target import decide_for_latency
from structprune.planning.options import PlanKeywords, PlanOptions, takes_options
from structprune.planning.plan import Plan
from structprune.surgery.verify import verify as check
from structprune.surgery.verify import verify_removal
from structprune.tracing.state import collection_paused
from structprune.tracing.trace import ExampleInputs
from structprune.wrapping import prunable


@takes_options
def plan(model: nn.Module, example_inputs: ExampleInputs, **options: Unpack[PlanKeywords]) -> Plan:
    """Decide which channels of `model` go; nothing is changed.

    Args:
        model: any ``nn.Module`` whose forward can be traced.
        example_inputs: a tensor, a tuple (positional) or a dict (keyword) that the model accepts.
        options: those of `structprune.planning.options.PlanOptions`.

    Raises:
        PlanError: what is asked for cannot be planned.
        PinnedError: `ratio` names a layer whose channels may not be removed.
        UnknownLayerError: a name matches no layer.
        TraceError: the forward cannot be recorded.

    Example:
        >>> import torch, structprune
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> structprune.plan(model, torch.randn(1, 4), ratio=0.25).layers
        (LayerWidth(layer='0', before=8, after=6),)
    """
    return _plan(model, example_inputs, PlanOptions(**options))


def _plan(model: nn.Module, example_inputs: ExampleInputs, options: PlanOptions) -> Plan:
    """The plan of channels; that of branches and channels where the options name them."""
    if options.depth:
        return search(model, example_inputs, options, lambda *asked: _planned(*asked)[-1])
    if stacks := _shorter(model, options):
        return search_layers(model, example_inputs, options, stacks, lambda *asked: _planned(*asked)[-1])
    return _planned(model, example_inputs, options)[-1]


def _shorter(model: nn.Module, options: PlanOptions) -> dict[str, int]:
    """How many layers of each stack go by the sizes that the target asks for."""
    if not options.dimensions:
        return {}
    inner = prunable(model)
    return shorter_stacks(inner, chains_of(inner, options.dimensions))


def _planned(
    model: nn.Module,
    example_inputs: ExampleInputs,
    options: PlanOptions,
    for_latency: DecideForLatency = decide_for_latency,
) -> tuple[DependencyGraph, Mask, Plan]:
    """The coupled channels of `model`, those that go, and the plan that `plan` makes of them."""
    # Each pause ends in a search for garbage. Without data there is one pause for all; forwards on data make garbage.
    with collection_paused() if options.data is None else nullcontext():
        graph = coupled_channels(model, example_inputs, options)
        decision = decide(graph, options, for_latency)
        with collection_paused(), torch.no_grad():
            decided = plan_removal(graph, decision.chosen, decision.settings, described=decision.described)
            return graph, graph.components.removed(decision.chosen), decided


def coupled_channels(model: nn.Module, example_inputs: ExampleInputs, options: PlanOptions) -> DependencyGraph:
    """The coupled channels of `model`, without those that the options leave whole.

    Raises:
        PlanError: the options name blocks or branches, which no graph of channels knows.
    """
    if options.depth:
        named = " and ".join(sorted(options.depth))
        raise PlanError(
            f"axes names {named}, which go in one step: use structprune.plan or prune for them, and prune the channels "
            "of what is left step by step."
        )
    with collection_paused():
        kept = {"ignore": options.ignore, "ignore_outputs": options.ignore_outputs}
        return DependencyGraph(model, example_inputs, **kept, outputs=options.outputs)


def decide(
    graph: DependencyGraph,
    options: PlanOptions,
    for_latency: DecideForLatency = decide_for_latency,
    tensors: Mapping[str, Tensor] | None = None,
) -> Decision:
    """Which of the coupled channels go by the options of `plan`; `tensors` are those to score, if not the model's."""
    while True:
        score = fitted(options.importance, graph, options.data, options.loss, options.forward)
        with collection_paused(), torch.no_grad():
            ranking = Ranking(graph, score, tensors)
            decision = (for_latency if options.times else decide_channels)(graph, options, ranking)
        # What the forward computes from its sizes may show more that has to stay.
        if graph.settle(graph.components.removed(decision.chosen)):
            return decision


@takes_options
def prune(
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    inplace: bool = False,
    verify: bool = True,
    **options: Unpack[PlanKeywords],
) -> nn.Module:
    """A smaller model of the same class: plan, apply, verify.

    The outputs keep their shape. The original is untouched unless `inplace`.

    Args:
        model: any ``nn.Module`` whose forward can be traced.
        example_inputs: a tensor, a tuple (positional) or a dict (keyword) that the model accepts.
        inplace: change `model` itself and return it.
        verify: compare the result with the original whose removed channels are switched off. It costs a forward of
            each, on the example inputs, and beside the two models the memory of their activations and of one large
            weight at a time. In half precision the forwards run in float32, and the model is traced once more.
        options: those of `structprune.planning.options.PlanOptions`.

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
    require(locals(), inplace=FLAG, verify=FLAG)
    asked = PlanOptions(**options)
    if asked.depth or _shorter(model, asked):
        decided = _plan(model, example_inputs, asked)
        if verify:
            slim = decided.apply(model)
            check(model, slim, decided, example_inputs).raise_for_error()
            if not inplace:
                return slim
            del slim
        return decided.apply(model, inplace=inplace)
    graph, removed, decided = _planned(model, example_inputs, asked)
    if verify:
        slim = decided.apply(model)
        verify_removal(graph, slim, decided, removed).raise_for_error()
        if not inplace:
            return slim
        del slim  # before the model itself is changed, so that there is never a third set of weights
    return decided.apply(model, inplace=inplace)
