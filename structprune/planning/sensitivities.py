"""`sensitivity`: how a metric falls when each group alone is pruned, at several ratios."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track
from rich.table import Column, Table
from torch import nn

from structprune.checking import DATA, FLAG, ON_BATCH, PATH, function, real, require
from structprune.checking import several as several_of
from structprune.coupling.graph import ChannelGraph, Layer
from structprune.coupling.groups import Group
from structprune.distributed import Talk, dealt, failing_together, gathered, rank_and_count, several
from structprune.errors import PlanError
from structprune.extras import matplotlib_figure, save_figure
from structprune.files import target_of, write_text
from structprune.html import html_table
from structprune.importance.base import Importance, check_scores, fitted
from structprune.importance.data import Batches, Forward, Loss
from structprune.planning.build import plan_removal, tensors_of
from structprune.planning.checks import check_ignore
from structprune.planning.plan import Plan
from structprune.schema import json_of, up_to_date
from structprune.tracing.trace import ExampleInputs

_RATIOS = several_of(real(above=0, below=1), "shares of channels to remove, above 0 and below 1")
Metric = Callable[[nn.Module, Any], float]
RATIOS = (0.125, 0.25, 0.5, 0.75)
SAME = 1e-4  # share by which what the ranks measure of one and the same model may differ by rounding
SCHEMA = 1


@dataclass(frozen=True, slots=True)
class GroupCurve:
    """One group alone at several ratios.

    Attributes:
        group: its name.
        axis: what its channels are (see `structprune.coupling.roles.AXES`).
        channels: how many there are.
        kept: how many were kept at each measurement, descending.
        metric: what the metric was, in the same order.
    """

    group: str
    axis: str
    channels: int
    kept: tuple[int, ...]
    metric: tuple[float, ...]

    def drop(self, dense: float, kept: np.ndarray) -> np.ndarray:
        """How far the metric falls when `kept` channels are kept: interpolated, and never less for fewer channels."""
        shares = np.array([0.0, *(1 - k / self.channels for k in self.kept)])
        drops = np.maximum.accumulate(np.array([0.0, *(dense - value for value in self.metric)]))
        gone = 1 - kept / self.channels
        inside = np.interp(gone, shares, drops)
        # Beyond the last measurement the fall goes on at the rate that it had on the whole.
        return np.where(gone > shares[-1], drops[-1] * gone / max(shares[-1], 1e-9), inside)


@dataclass(frozen=True)
class Sensitivity:
    """What `sensitivity` measured. See `structprune.sensitivity` for an example.

    Attributes:
        dense: the metric of the whole model.
        curves: one for each group.
    """

    dense: float
    curves: tuple[GroupCurve, ...]

    def depth(self, group: Group, kept: np.ndarray) -> np.ndarray:
        """How far the metric falls when `group` alone keeps `kept` channels; so this is a ``scope`` for `plan`.

        Raises:
            PlanError: the group was not measured.
        """
        for curve in self.curves:
            if (curve.group, curve.axis, curve.channels) == (group.name, group.axis, group.channels):
                return curve.drop(self.dense, kept)
        raise PlanError(
            f"The sensitivity of {group.name!r} was not measured. Measure this very model, with all groups."
        )

    def table(self) -> Table:
        """A line for each group, most sensitive first: how far the metric falls at each ratio."""
        headings, lines = self._lines()
        table = Table(Column(headings[0], overflow="fold"), *headings[1:])
        for line in lines:
            table.add_row(*line)
        return table

    def __repr__(self) -> str:
        """How many groups were measured; the table is in `table`, all of it in the fields and in `to_json`."""
        return f"Sensitivity(dense={self.dense:.6g}, {len(self.curves)} groups)"

    def _repr_html_(self) -> str:
        """The same table for notebooks."""
        return html_table(*self._lines())

    def _lines(self) -> tuple[list[str], list[list[str]]]:
        worst = sorted(self.curves, key=lambda c: -max(self.dense - value for value in c.metric))
        lines: list[list[str]] = []
        for curve in worst:
            cells = [f"{m - self.dense:+.4g} ({k})" for k, m in zip(curve.kept, curve.metric, strict=True)]
            lines.append([curve.group, curve.axis, str(curve.channels), *cells])
        steps = max((len(line) - 3 for line in lines), default=0)
        return ["group", "axis", "channels", *(f"step {i + 1}" for i in range(steps))], lines

    def to_json(self) -> str:
        """All of it as JSON text."""
        return json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Sensitivity:
        """What `to_json` wrote.

        Raises:
            PlanError: the text is something else, or of a later schema.
        """
        with json_of("a sensitivity", PlanError):
            data = up_to_date(json.loads(text), SCHEMA, {}, "it")
            return cls(data["dense"], tuple(_curve(c) for c in data["curves"]))

    def plot(self, path: str | Path) -> None:
        """Draw a heat map: groups down, the share of channels removed across, the fall of the metric as colour.

        Raises:
            MissingExtraError: Matplotlib is not there.
        """
        shares = np.linspace(0, max(1 - c.kept[-1] / c.channels for c in self.curves), 17)
        drops = np.array([c.drop(self.dense, c.channels * (1 - shares)) for c in self.curves])
        figure = matplotlib_figure((6, 1 + 0.18 * len(self.curves)))
        axes = figure.subplots()
        image = axes.pcolormesh(shares, np.arange(len(self.curves)), drops, cmap="magma_r", shading="nearest")
        axes.set_yticks(np.arange(len(self.curves)), [c.group for c in self.curves], fontsize=6)
        axes.invert_yaxis()
        axes.set_xlabel("share of the channels removed")
        figure.colorbar(image, label="fall of the metric")
        save_figure(figure, path, 150)


def _curve(data: Mapping[str, Any]) -> GroupCurve:
    return GroupCurve(data["group"], data["axis"], data["channels"], tuple(data["kept"]), tuple(data["metric"]))


def sensitivity(
    model: nn.Module,
    example_inputs: ExampleInputs,
    loader: Any,
    metric: Metric,
    *,
    ratios: Sequence[float] = RATIOS,
    importance: str | Importance = "l2",
    data: Iterable[Any] | Batches | None = None,
    loss: Loss | None = None,
    forward: Forward | None = None,
    ignore: Iterable[Layer] | Layer = (),
    checkpoint: str | Path | None = None,
    progress: bool = False,
) -> Sensitivity:
    """Prune each group alone at several ratios and measure.

    Where ``torch.distributed`` is in use, every rank has to call it. A criterion that looks at data gets its share of
    them on each rank. The measurements are shared out over the ranks, so each of them gets a `loader` of the same data.
    If `metric` itself talks to the other ranks (each measures a share of the data, and their sums are added), all ranks
    do all measurements together. All ranks return the same; if one fails, all raise. The first rank writes the
    checkpoint.

    Args:
        model: any ``nn.Module`` whose forward can be traced; it is left as it was.
        example_inputs: a tensor, a tuple (positional) or a dict (keyword) that the model accepts.
        loader: given to `metric` as it is.
        metric: called without gradients on a model and `loader`; a number, the greater the better (accuracy, minus
            the perplexity).
        ratios: shares of the channels to remove.
        importance: which channels go first; see `structprune.plan`.
        data: an iterable of batches, for criteria that look at data; see `structprune.plan`.
        loss: called with the model and a batch, returns a scalar; for criteria that need gradients.
        forward: called with the model and a batch; see `structprune.plan`.
        ignore: layers (modules or dotted names) to leave whole.
        checkpoint: a JSON file to which each group is written once it is measured, and from which a run that was cut
            short goes on.
        progress: whether to draw a progress bar.

    Raises:
        PlanError: a ratio is no share, the metric returns no number, the checkpoint belongs to another model or other
            ratios, or the criterion needs data or a loss that is not given; or the ranks of ``torch.distributed``
            measure different data, or another has failed.

    Example:
        >>> import torch, structprune
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> x = torch.randn(16, 4)
        >>> result = structprune.sensitivity(model, x, x, lambda m, x: -float((m(x) - model(x)).abs().mean()))
        >>> [(curve.group, curve.kept) for curve in result.curves]
        [('0', (7, 6, 4, 2))]
    """
    named = {"metric": function("model", "loader"), "ratios": _RATIOS, "progress": FLAG}
    named |= {"data": DATA.or_none} if not isinstance(data, Batches) else {}
    named |= {"loss": ON_BATCH.or_none, "forward": ON_BATCH.or_none, "checkpoint": PATH.or_none}
    require(locals(), **named)
    if checkpoint is not None:
        target_of(Path(checkpoint))
    with failing_together(PlanError, "sensitivity"):
        graph = ChannelGraph(model, example_inputs, ignore=check_ignore("ignore", ignore))
        done = gathered(_resumed(checkpoint) if rank_and_count()[0] == 0 else None)[0]
        score = fitted(importance, graph, data, loss, forward)
        counts = {group: _kept(group, tuple(ratios), graph.bounds(group)) for group in graph.groups()}
        todo = [(group, kept) for group, kept in counts.items() if kept]
        if done and not _belongs(done, todo):
            raise PlanError(
                f"{checkpoint} was written for another model or other ratios. Delete it, or name another file."
            )
        dense, together = _of_whole(metric, model, loader, done)
        curves = list(done.curves) if done else []
        left = todo[len(curves) :]

        def measured(plan: Plan) -> float:
            return _measured(metric, loader, plan.apply(model))

        jobs = _jobs(graph, score, dense, measured, left)
        values = (job() for job in jobs) if together else dealt(jobs)
        for group, kept in track(left, "measuring", disable=not progress, transient=True):
            curves.append(GroupCurve(group.name, group.axis, group.channels, kept, tuple(islice(values, len(kept)))))
            if checkpoint is not None and rank_and_count()[0] == 0:
                _write(Path(checkpoint), Sensitivity(dense, tuple(curves)))
        return Sensitivity(dense, tuple(curves))


def _of_whole(metric: Metric, model: nn.Module, loader: Any, done: Sensitivity | None) -> tuple[float, bool]:
    """The metric of the whole model, and whether the ranks take it together: whether the metric talks to others.

    Raises:
        PlanError: they do not, and measure different data.
    """
    if not several():
        return (done.dense if done else _measured(metric, loader, model)), True
    with Talk() as talk:
        mine = _measured(metric, loader, model)
    told = gathered((mine, talk.heard))
    together = any(heard for _, heard in told)
    values = [value for value, _ in told]
    if not together and max(values) - min(values) > SAME * max(map(abs, values)):
        raise PlanError(
            f"The ranks measure {', '.join(f'{value:.6g}' for value in values)} of the same model. Give each of them a "
            "loader of the same data, since groups are shared out over them, or let metric take the mean over all."
        )
    return (done.dense if done else values[0]), together


def _jobs(
    graph: ChannelGraph,
    score: Importance,
    dense: float,
    measured: Callable[[Plan], float],
    groups: Iterable[tuple[Group, tuple[int, ...]]],
) -> Iterator[Callable[[], float]]:
    """For each group and number of channels that it keeps what measures the metric, one after the other."""
    tensors = tensors_of(graph)
    for group, kept in groups:
        orders = {
            member: member.components[np.argsort(check_scores(score(member, tensors), member).double().cpu().numpy())]
            for member in (group, *_partners(graph, group))
        }
        for count in kept:
            yield partial(_alone, graph, _removed(graph, group, count, orders), len(orders), dense, measured)


def _alone(
    graph: ChannelGraph, removed: np.ndarray, together: int, dense: float, measured: Callable[[Plan], float]
) -> float:
    """The metric without some components; what balanced groups lose together is shared out among them."""
    return dense - (dense - measured(plan_removal(graph, removed, config=False))) / together


def _belongs(done: Sensitivity, todo: Sequence[tuple[Group, tuple[int, ...]]]) -> bool:
    """Whether the curves of a checkpoint are the first of those that are to be measured."""
    return [(curve.group, curve.kept) for curve in done.curves] == [
        (group.name, kept) for group, kept in todo[: len(done.curves)]
    ]


def _balanced(graph: ChannelGraph, group: Group) -> tuple[list[Group], np.ndarray] | None:
    """The groups that are pruned together with `group`, it among them, and the numbers that fit."""
    known = graph.groups()
    for balanced in graph.balanced():
        members = [known[number] for number in balanced.groups]
        if group in members:
            return members, balanced.counts
    return None


def _partners(graph: ChannelGraph, group: Group) -> list[Group]:
    balanced = _balanced(graph, group)
    return [] if balanced is None else [member for member in balanced[0] if member is not group]


def _removed(graph: ChannelGraph, group: Group, count: int, orders: Mapping[Group, np.ndarray]) -> np.ndarray:
    """The components that go when `group` keeps `count` channels, or of balanced groups about as many."""
    balanced = _balanced(graph, group)
    if balanced is None:
        return orders[group][: group.channels - count]
    members, counts = balanced
    line = counts[np.abs(counts[:, members.index(group)] - count).argmin()]
    gone = [orders[member][: member.channels - keep] for member, keep in zip(members, line.tolist(), strict=True)]
    return np.concatenate(gone)


def _resumed(checkpoint: str | Path | None) -> Sensitivity | None:
    if checkpoint is None or not target_of(Path(checkpoint)).exists():
        return None
    return Sensitivity.from_json(Path(checkpoint).read_text(encoding="utf-8"))


def _measured(metric: Metric, loader: Any, model: nn.Module) -> float:
    with torch.no_grad():
        given = metric(model, loader)
    try:
        value = float(given)
    except (TypeError, ValueError) as error:
        raise PlanError(f"metric returned a {type(given).__name__}; let it return a number.") from error
    if math.isnan(value):
        raise PlanError("metric returned NaN. Check the data that loader gives.")
    return value


def _kept(group: Group, ratios: Sequence[float], bounds: tuple[int, int]) -> tuple[int, ...]:
    """The numbers of channels to try, descending, within what the forward allows (`ChannelGraph.bounds`)."""
    least, step = bounds
    lowest = -(-least // step) * step
    wanted = {max(lowest, round(group.channels * (1 - ratio) / step) * step) for ratio in ratios}
    most = (group.channels - 1) // step * step
    return tuple(sorted({min(n, most) for n in wanted}, reverse=True)) if most >= lowest else ()


def _write(path: Path, measured: Sensitivity) -> None:
    write_text(path, measured.to_json())
