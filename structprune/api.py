"""The plain calls: `plan` and `prune`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypedDict, Unpack

import torch
from torch import nn

from structprune.channels.solver import Mask
from structprune.dependency_graph import DependencyGraph
from structprune.errors import PlanError
from structprune.graph import Layer
from structprune.importance.base import Importance, fitted, importance_of
from structprune.importance.data import Batches, Forward, Loss
from structprune.latency.measure import Latency
from structprune.planning.build import plan_removal
from structprune.planning.decide import Decision, Request
from structprune.planning.latency_target import TimedDecision
from structprune.planning.plan import Plan
from structprune.planning.ratios import Ratio
from structprune.planning.rounding import Rounding, RoundTo
from structprune.planning.scopes import Scope
from structprune.surgery.verify import verify_removal
from structprune.tracing.state import collection_paused
from structprune.tracing.trace import ExampleInputs, OutputName
from structprune.wrapping import prunable


class Options(TypedDict, total=False):
    """What `plan` may be asked for, and `prune` with it; see `plan`."""

    ratio: Ratio | None
    target: Mapping[str, float] | None
    importance: str | Importance
    data: Iterable[Any] | Batches | None
    loss: Loss | None
    forward: Forward | None
    ignore: Iterable[Layer]
    scope: Scope | None
    axes: Iterable[str] | None
    round_to: RoundTo
    min_channels: int
    max_ratio: float
    outputs: Iterable[OutputName] | None
    latency: Latency | None


def plan(
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    ratio: Ratio | None = None,
    target: Mapping[str, float] | None = None,
    importance: str | Importance = "l2",
    data: Iterable[Any] | Batches | None = None,
    loss: Loss | None = None,
    forward: Forward | None = None,
    ignore: Iterable[Layer] = (),
    scope: Scope | None = None,
    axes: Iterable[str] | None = None,
    round_to: RoundTo = "auto",
    min_channels: int = 1,
    max_ratio: float = 1.0,
    outputs: Iterable[OutputName] | None = None,
    latency: Latency | None = None,
) -> Plan:
    """Decide which channels of `model` go; nothing is changed.

    Args:
        model: any ``nn.Module`` whose forward can be traced.
        example_inputs: a tensor, a tuple (positional) or a dict (keyword) that the model accepts.
        ratio: share of the channels to remove, from 0 to below 1; or a mapping from layers or blocks (modules, dotted
            names, patterns like ``"layer3.*"``) to such shares, where what no key matches stays whole. Without a target
            it is 0.5. A function from a `Group` to a share is a ratio too.
        target: instead of a ratio, what is to remain of ``"params"``, ``"macs"``, ``"memory"`` (bytes of weights and of
            activations at their peak), ``"channels"`` or ``"latency"``: a fraction, or an amount above 1; several at
            once if wanted. Latency is measured: a fraction of the time that the model takes on the example inputs, or
            milliseconds; see `latency`.
        importance: what a channel is worth: a name (``"l2"``, ``"taylor"``, any of `structprune.importance.CRITERIA`),
            an object of `structprune.importance`, or a callable that gives scores (see
            `structprune.importance.base.Importance`).
        data: an iterable of batches, for criteria that look at data.
        loss: called with the model and a batch, returns a scalar, the mean over the batch; for criteria that need
            gradients.
        forward: called with the model and a batch; by default the model is called on a tensor, the first of a pair, or
            a dict of keyword arguments.
        ignore: layers (modules or dotted names) to leave whole.
        scope: ``"local"``: each group loses the ratio; ``"global"``: all compete; ``"isomorphic"``: groups of the same
            structure compete; ``"per_cost"`` (with a target): all compete by their scores as they are, over what a
            channel saves of the target; or sets of layer names or patterns: the layers of a set compete; or a
            `structprune.Sensitivity`. By default ``"local"``, with a target of latency ``"global"``: there, and with a
            sensitivity, what is lost is weighed against the time that is saved.
        axes: which kinds of channels may go: any of ``"hidden"`` (the width of a residual stream), ``"mlp"``,
            ``"channels"`` (of convolutions inside a block), ``"heads"``, ``"head_size"``, ``"experts"``. By default
            all, but of heads and head size only the one that comes nearer to the ratio.
        round_to: widths that change become multiples of this; ``"auto"`` takes what the model's device and type run
            fast, and less for narrow layers; 1 does not round. Where no multiple is left, a group stays whole.
        min_channels: no group keeps fewer channels.
        max_ratio: no group loses a greater share of its channels.
        outputs: names (keys, attributes or positions, dotted if nested) of the outputs that must keep their shape; the
            others may lose channels. By default all keep it.
        latency: where and how the time is measured for a target of latency: `structprune.Latency`; by default in eager
            mode where the example inputs are. Widths are then rounded to the steps in which the operations' time
            falls. ``plan.settings["latency"]`` tells what was predicted and measured, and whether the target is met.

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
    options = Options(
        ratio=ratio, target=target, importance=importance, data=data, loss=loss, forward=forward, ignore=ignore,
        scope=scope, axes=axes, round_to=round_to, min_channels=min_channels, max_ratio=max_ratio, outputs=outputs,
        latency=latency,
    )  # fmt: skip
    return _planned(model, example_inputs, options)[-1]


def _planned(model: nn.Module, example_inputs: ExampleInputs, options: Options) -> tuple[DependencyGraph, Mask, Plan]:
    """The coupled channels of `model`, those that go, and the plan that `plan` makes of them."""
    graph, decision = decide(model, example_inputs, options)
    importance = options.get("importance", "l2")
    with collection_paused(), torch.no_grad():
        named = {"importance": importance if isinstance(importance, str) else repr(importance)}
        found = plan_removal(graph, decision.chosen, decision.settings | named)
        return graph, graph.components.dead(decision.chosen), found


def decide(
    model: nn.Module,
    example_inputs: ExampleInputs,
    options: Options,
    change: Callable[[DependencyGraph, Request], Request] = lambda _, request: request,
) -> tuple[DependencyGraph, Decision | TimedDecision]:
    """The coupled channels of `model`, and which of them go by the options of `plan`.

    Args:
        model: any ``nn.Module`` whose forward can be traced.
        example_inputs: a tensor, a tuple (positional) or a dict (keyword) that the model accepts.
        options: those of `plan`.
        change: gives what is asked for in place of what the options ask for.
    """
    criterion = importance_of(options.get("importance", "l2"))
    request = _request(model, options)
    with collection_paused():
        graph = DependencyGraph(model, example_inputs, ignore=options.get("ignore", ()), outputs=options.get("outputs"))
    request = change(graph, request)
    score = fitted(criterion, graph, options.get("data"), options.get("loss"), options.get("forward"))
    with collection_paused(), torch.no_grad():
        if request.target is not None and "latency" in request.target:
            return graph, TimedDecision(graph, score, request, options.get("latency") or Latency())
        return graph, Decision(graph, score, request)


def _request(model: nn.Module, options: Options) -> Request:
    """How much of `model` is to go."""
    rounding = Rounding(
        options.get("round_to", "auto"), *_kind(prunable(model)), options.get("min_channels", 1),
        options.get("max_ratio", 1.0),
    )  # fmt: skip
    target = options.get("target")
    timed = target is not None and "latency" in target
    if options.get("latency") is not None and not timed:
        raise PlanError("latency says how time is measured, but no target asks for it: target={'latency': 0.5}, say.")
    scope = options.get("scope") or ("global" if timed else "local")
    return Request(options.get("ratio"), target, scope, options.get("axes"), rounding)


def _kind(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where the model's weights are, and their type."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            return parameter.device, parameter.dtype
    return torch.device("cpu"), torch.float32


def prune(
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    inplace: bool = False,
    verify: bool = True,
    **options: Unpack[Options],
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
        options: those of `plan`: ``ratio``, ``target``, ``importance``, ``data``, ``loss``, ``forward``, ``ignore``,
            ``scope``, ``axes``, ``round_to``, ``min_channels``, ``max_ratio``, ``outputs``,
            ``latency``.

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
    graph, dead, decided = _planned(model, example_inputs, options)
    if verify:
        slim = decided.apply(model)
        verify_removal(graph, slim, decided, dead).raise_for_error()
        if not inplace:
            return slim
        del slim  # before the model itself is changed, so that there is never a third set of weights
    return decided.apply(model, inplace=inplace)
