"""`PlanOptions`: what may be asked for when channels are to go. Each option is one entry here.

The keywords of `plan`, `prune`, `Pruner`, `SoftPruner` and the integrations, their description and their checks, the
options of the command line, and what ``plan.settings.asked`` records all come from these entries.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypedDict, TypeVar, get_type_hints

from structprune.coupling.graph import ChannelGraph, Layer
from structprune.coupling.roles import AXES
from structprune.importance.base import CRITERIA, Importance
from structprune.importance.data import Batches, Forward, Loss
from structprune.latency.measure import LATENCY_BACKENDS, Latency
from structprune.planning.allocation import ALLOCATIONS, Allocation
from structprune.planning.checks import (
    BRANCH_SCORES,
    DEPTH,
    WIDTHS,
    check_allocation,
    check_axes,
    check_branch_score,
    check_data,
    check_devices,
    check_flag,
    check_function,
    check_ignore,
    check_importance,
    check_latency,
    check_max_ratio,
    check_min_channels,
    check_outputs,
    check_ratios,
    check_round_to,
    check_scope,
    check_target,
)
from structprune.planning.contradictions import refuse_contradictions
from structprune.planning.option import Option, as_is, importance_as_json, layers_as_json
from structprune.planning.ratios import Ratio, ratio_as_json
from structprune.planning.rounding import RoundTo
from structprune.planning.scopes import SCOPES, Curves, Scope, scope_as_json
from structprune.planning.targets import TARGETS
from structprune.tracing.trace import OutputName

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """Which channels are to go, and how many; checked when it is made.

    Attributes:
        ratio: share of the channels to remove, from 0 to below 1; or a mapping from layers or blocks (modules, dotted
            names, patterns like ``"layer3.*"``) to such shares, where what no key matches stays whole. Without a target
            it is 0.5. A function from a `Group` to a share is a ratio too.
        target: instead of a ratio, what is to remain of ``"params"``, ``"macs"``, ``"memory"`` (bytes of weights and of
            activations at their peak), ``"kv_cache"`` (bytes of keys and values for each token of a language model),
            ``"channels"`` or ``"latency"``: a fraction, or an amount above 1; several at once if wanted. Latency is
            measured: a fraction of the time that the model takes on the example inputs, or milliseconds; see
            `latency`. Or exact sizes in the words of the model's configuration, such as ``{"intermediate_size": 9216,
            "num_attention_heads": 24, "num_hidden_layers": 28}``; what is not named stays.
        importance: what a channel is worth: a name (``"l2"``, ``"taylor"``, any of `structprune.importance.CRITERIA`),
            an object of `structprune.importance`, or a callable that gives scores (see
            `structprune.importance.base.Importance`).
        data: an iterable of batches, for criteria that look at data.
        loss: called with the model and a batch, returns a scalar, the mean over the batch; for criteria that need
            gradients.
        forward: called with the model and a batch; by default the model is called on a tensor, the first of a pair, or
            a dict of keyword arguments.
        ignore: layers (modules or dotted names) to leave whole, inputs and outputs; one alone need not be in a list.
        ignore_outputs: layers whose outputs stay whole, while their inputs may lose channels (torch-pruning's
            ``ignored_layers``); of a block, the outputs of all layers in it.
        scope: ``"local"``: each group loses the ratio; ``"global"``: all compete; ``"isomorphic"``: groups of the same
            structure compete; ``"per_cost"`` (with a target): all compete by their scores as they are, over what a
            channel saves of the target; or sets of layer names or patterns: the layers of a set compete; or a function
            of the group: groups for which it gives the same compete; or a `structprune.Sensitivity`. By default
            ``"local"``, with a target of latency ``"global"``: there, and with a sensitivity, what is lost is weighed
            against the time that is saved.
        allocation: how the widths for a target are chosen. ``"greedy"``: channels go in one order until the target is
            met; ``"exact"``: those of all groups at once, by a mixed-integer programme, so that least importance is
            lost within all limits (up to ten seconds; all groups compete, so `scope` is ``"global"``, ``"per_cost"`` or
            a `structprune.Sensitivity`, by default global); ``"auto"``: the same in at most about two seconds, and
            greedy where there is no target or groups do not compete.
        axes: which kinds of channels may go: any of ``"hidden"`` (the width of a residual stream), ``"mlp"``,
            ``"channels"`` (of convolutions inside a block), ``"groups"`` (of a convolution in groups, as a whole),
            ``"heads"``, ``"head_size"``, ``"experts"``. By default all, but of heads and head size, or groups and
            channels in them, only the one that comes nearer to the ratio: this is ``"widths"``. Whole parts go where
            they are named: ``"blocks"`` (residual blocks, layers of a stack) and ``"branches"`` (attention apart from
            MLP; see `structprune.branches`), alone or beside kinds of channels, as in ``("blocks", "widths")``.
        uniform: one width for each axis over all layers, whose channels are chosen by score layer by layer; where the
            model is built from a configuration (``model.config``), in steps that it can describe, so that the class
            built from the new one has the shapes of the pruned model. None: so for such a model, unless `ratio` or
            `scope` tell layers apart; of its axes those go that the configuration can describe, and whole heads before
            positions in them. Axes that are named go in any case.
        branch_score: what a block or branch is worth: ``"loss"``, how much the loss rises without it, the default where
            there is one; ``"error"``, by how much the outputs change, the default otherwise; ``"kl"``, the divergence
            of the scores of classes or tokens; ``"influence"``, ``"angular"``, ``"taylor"`` or ``"fisher"`` (see
            `structprune.choose_branches`). Measured on `data`; without it, on the example inputs.
        round_to: widths that change become multiples of this; ``"auto"`` takes what the model's device and type run
            fast, and less for narrow layers; 1 does not round. Where no multiple is left, a group stays whole.
        min_channels: no group keeps fewer channels.
        max_ratio: no group loses a greater share of its channels.
        tensor_parallel: so many devices share each layer: heads, key-value heads and widths that change are multiples
            of it.
        outputs: names (keys, attributes or positions, dotted if nested) of the outputs that must keep their shape; the
            others may lose channels. By default all keep it.
        latency: where and how the time is measured for a target of latency: `structprune.Latency`; by default in eager
            mode where the example inputs are. Widths are then rounded to the steps in which the operations' time
            falls. ``plan.settings.measured`` tells what was predicted and measured, and whether the target is met.

    Raises:
        PlanError: an option is of the wrong type or out of its range, or two of them contradict each other.

    Example:
        >>> PlanOptions(ratio=0.25, ignore="head").ignore
        ('head',)
        >>> PlanOptions(max_ratio=2)
        Traceback (most recent call last):
        structprune.errors.PlanError: max_ratio is 2; it is a share of the channels, from 0 to 1.
    """

    ratio: Annotated[
        Ratio | None,
        Option(
            check=check_ratios,
            form="shares",
            help="Share to remove: NUMBER, or LAYER=NUMBER (name or pattern), repeated.",
            plain=ratio_as_json,
        ),
    ] = None
    target: Annotated[
        Mapping[str, float] | None,
        Option(
            check=check_target,
            form="amounts",
            help=f"What is to remain: NAME=NUMBER of {', '.join(TARGETS)}, repeated.",
            plain=as_is,
        ),
    ] = None
    scope: Annotated[
        Scope | None,
        Option(
            check=check_scope,
            form="scope",
            help=f"{', '.join(SCOPES)}; a JSON file of `structprune sensitivity`; or LAYER,LAYER,... repeated.",
            words=SCOPES,
            plain=scope_as_json,
        ),
    ] = None
    allocation: Annotated[
        Allocation,
        Option(
            check=check_allocation,
            form="word",
            help=f"How widths are chosen for a target: {', '.join(ALLOCATIONS)}.",
            words=ALLOCATIONS,
            plain=as_is,
        ),
    ] = "greedy"
    axes: Annotated[
        Iterable[str] | None,
        Option(
            check=check_axes,
            form="words",
            help=f"What may go: {', '.join((*AXES, WIDTHS, *DEPTH))}.",
            words=(*AXES, WIDTHS, *DEPTH),
            plain=as_is,
        ),
    ] = None
    uniform: Annotated[
        bool | None,
        Option(check=check_flag, form="flag", help="One width for each axis over all layers.", plain=as_is),
    ] = None
    branch_score: Annotated[
        str | None,
        Option(
            check=check_branch_score,
            form="word",
            help=f"What a block or branch is worth: {', '.join(BRANCH_SCORES)}.",
            words=BRANCH_SCORES,
            plain=as_is,
        ),
    ] = None
    round_to: Annotated[
        RoundTo,
        Option(check=check_round_to, form="step", help="Widths become multiples of this number, or auto.", plain=as_is),
    ] = "auto"
    min_channels: Annotated[
        int, Option(check=check_min_channels, form="count", help="No group keeps fewer.", plain=as_is)
    ] = 1
    max_ratio: Annotated[
        float, Option(check=check_max_ratio, form="share", help="No group loses a greater share.", plain=as_is)
    ] = 1.0
    tensor_parallel: Annotated[
        int | None, Option(check=check_devices, form="devices", help="Devices that share each layer.", plain=as_is)
    ] = None
    importance: Annotated[
        str | Importance,
        Option(
            check=check_importance,
            form="criterion",
            help="A criterion by name, or module:object for one of your own.",
            words=CRITERIA,
            plain=importance_as_json,
        ),
    ] = "l2"
    data: Annotated[
        Iterable[Any] | Batches | None,
        Option(
            check=check_data,
            form="maker",
            help="module:function that makes the batches, for criteria that look at data.",
        ),
    ] = None
    loss: Annotated[
        Loss | None,
        Option(
            check=check_function,
            form="function",
            help="module:function of (model, batch): a mean loss, for criteria that need gradients.",
        ),
    ] = None
    forward: Annotated[
        Forward | None,
        Option(
            check=check_function, form="function", help="module:function of (model, batch) that runs the model on it."
        ),
    ] = None
    ignore: Annotated[
        Iterable[Layer] | Layer,
        Option(check=check_ignore, form="names", help="Layer to leave whole, repeated.", plain=layers_as_json),
    ] = ()
    ignore_outputs: Annotated[
        Iterable[Layer] | Layer,
        Option(
            check=check_ignore, form="names", help="Layer whose outputs stay whole, repeated.", plain=layers_as_json
        ),
    ] = ()
    outputs: Annotated[
        Iterable[OutputName] | OutputName | None,
        Option(
            check=check_outputs,
            form="names",
            help="Output that keeps its shape, repeated; by default all do.",
            plain=as_is,
        ),
    ] = None
    latency: Annotated[
        Latency | None,
        Option(
            check=check_latency,
            form="latency",
            help=f"How time is measured: {', '.join(LATENCY_BACKENDS)}; or backend=NAME,threads=N,runs=N.",
            words=LATENCY_BACKENDS,
        ),
    ] = None

    def __post_init__(self) -> None:
        for name, option in OPTIONS.items():
            object.__setattr__(self, name, option.check(name, getattr(self, name)))
        refuse_contradictions(self)

    @property
    def depth(self) -> frozenset[str]:
        """Which of ``"blocks"`` and ``"branches"`` may go."""
        return frozenset(self.axes or ()).intersection(DEPTH)

    @property
    def width_axes(self) -> tuple[str, ...] | None:
        """Which kinds of channels may go; None for all, as by default."""
        if self.axes is None or WIDTHS in self.axes:
            return None
        return tuple(axis for axis in self.axes if axis not in DEPTH)

    @property
    def dimensions(self) -> dict[str, int]:
        """The exact sizes that the target asks for, in the words of the model's configuration."""
        return {name: int(amount) for name, amount in (self.target or {}).items() if name not in TARGETS}

    @property
    def times(self) -> bool:
        """Whether the target asks for a time, so that time has to be measured."""
        return self.target is not None and "latency" in self.target

    @property
    def ratio_or_default(self) -> Ratio:
        """The ratio, which without a target is 0.5."""
        return 0.5 if self.ratio is None else self.ratio

    @property
    def scope_or_default(self) -> Scope:
        """The scope, which is ``"local"``, and for a target of latency or an exact allocation ``"global"``."""
        return self.scope or ("global" if self.times or self.allocation == "exact" else "local")

    @property
    def all_compete(self) -> bool:
        """Whether all groups compete for what goes."""
        return self.scope_or_default in ("global", "per_cost") or isinstance(self.scope, Curves)

    @property
    def allocates_exactly(self) -> bool:
        """Whether the widths of all groups are chosen at once."""
        return self.allocation != "greedy" and self.target is not None and self.all_compete

    def is_uniform(self, configured: bool) -> bool:
        """Whether all layers get the same widths; by default if the model is built from a configuration."""
        if self.uniform is not None:
            return self.uniform
        told_apart = isinstance(self.ratio, Mapping) or callable(self.ratio)
        return configured and not told_apart and isinstance(self.scope_or_default, str)

    def recorded(self, graph: ChannelGraph) -> dict[str, Any]:
        """What is asked for as plain data, with the names that `graph` has for modules."""
        values = {name: getattr(self, name) for name in OPTIONS} | {"scope": self.scope_or_default}
        if self.target is None:
            values["ratio"] = self.ratio_or_default
        del values["ratio" if self.target is not None else "target"]
        return {
            name: None if value is None else plain(value, graph)
            for name, value in values.items()
            if (plain := OPTIONS[name].plain) is not None
        }


OPTIONS: dict[str, Option] = {
    name: next(part for part in hint.__metadata__ if isinstance(part, Option))
    for name, hint in get_type_hints(PlanOptions, include_extras=True).items()
}


class PlanKeywords(TypedDict, total=False):
    """The fields of `PlanOptions` for type checkers and editors, in functions that take them as keywords."""

    ratio: Ratio | None
    target: Mapping[str, float] | None
    scope: Scope | None
    allocation: Allocation
    axes: Iterable[str] | None
    uniform: bool | None
    branch_score: str | None
    round_to: RoundTo
    min_channels: int
    max_ratio: float
    tensor_parallel: int | None
    importance: str | Importance
    data: Iterable[Any] | Batches | None
    loss: Loss | None
    forward: Forward | None
    ignore: Iterable[Layer] | Layer
    ignore_outputs: Iterable[Layer] | Layer
    outputs: Iterable[OutputName] | OutputName | None
    latency: Latency | None


def takes_options(thing: T) -> T:
    """Write the options into the signature and the docstring of a function or class that takes ``**options``."""
    described: Any = thing
    signature = inspect.signature(described)
    own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    written = get_type_hints(PlanKeywords)
    options = [p.replace(annotation=written[p.name]) for p in inspect.signature(PlanOptions).parameters.values()]
    described.__signature__ = signature.replace(parameters=[*own, *options])
    if described.__doc__:  # not where Python leaves docstrings out
        about = inspect.cleandoc(PlanOptions.__doc__ or "").partition("Attributes:\n")[2].partition("\n\n")[0]
        doc = inspect.cleandoc(described.__doc__)
        described.__doc__ = re.sub(
            r"^ *options: .*\n(?: {8}.*\n)*", lambda line: f"{line[0]}{about}\n", doc, flags=re.M
        )
    return thing
