"""The time of a whole network from the table: its operations, the bytes that all else moves, and a constant."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

import numpy as np
from torch import fx

from structprune.coupling.costs import is_view
from structprune.coupling.propagate import Channels
from structprune.errors import PlanError
from structprune.latency.specs import Count, Grouped, Use
from structprune.latency.table import LatencyTable
from structprune.latency.widths import Widths
from structprune.ops.relations import Axis
from structprune.tracing.trace import Trace

COARSER = 0.25
_NO_OPERATION = frozenset({"parameter", "constant", "input", "part"})


@dataclass(frozen=True, eq=False)
class Moved:
    """Bytes that elementwise operations, norms, pooling and the like read and write: a number times sizes of axes."""

    bytes: float
    axes: tuple[Axis, ...]

    def __call__(self, count: Count) -> float:
        """How many bytes when `count` gives the kept channels."""
        return self.bytes * prod(count(axis) for axis in self.axes)


def moved(recorded: Trace, channels: Channels, others: Iterable[fx.Node] = ()) -> list[Moved]:
    """What all nodes but `others` move; those over the same axes are added up."""
    left_out = set(others)
    by_axes: dict[tuple[object, ...], Moved] = {}
    for node in recorded.nodes:
        name = node.meta["name"]
        if node in left_out or name in _NO_OPERATION or is_view(node):
            continue
        for tensor in (node, *(n for n in node.all_input_nodes if n.meta["name"] not in ("parameter", "constant"))):
            shape = tensor.meta.get("shape")
            if not isinstance(shape, tuple):
                continue  # several results at once: each is counted where it is used
            axes = channels.axes[tensor.meta["index"]]
            free = tuple(axis for axis in axes if axis.free)
            key = tuple(axis.key for axis in free)
            fixed = prod(axis.size for axis in axes if not axis.free) * tensor.meta["dtype"].itemsize
            by_axes[key] = Moved(fixed + (by_axes[key].bytes if key in by_axes else 0), free)
    return list(by_axes.values())


@dataclass(frozen=True)
class Calibration:
    """What turns the table's sum, the bytes moved and a constant into the time of the network, in seconds."""

    operations: float = 1.0
    byte: float = 0.0
    constant: float = 0.0

    def __call__(self, operations: float, bytes_: float) -> float:
        """The time of a network whose operations take so long alone and which moves so many bytes beside them."""
        return self.operations * operations + self.byte * bytes_ + self.constant

    def scaled(self, factor: float) -> Calibration:
        """This calibration times `factor`."""
        return Calibration(self.operations * factor, self.byte * factor, self.constant * factor)


def calibrated(features: Sequence[tuple[float, float]], seconds: Sequence[float]) -> Calibration:
    """The calibration, of none but positive terms, that comes nearest to measured times, each by its own measure.

    Args:
        features: for each network, the sum over its operations in seconds and the bytes moved.
        seconds: the time of each, measured.

    Raises:
        PlanError: a time is no positive number.

    Example:
        >>> fit = calibrated([(1.0, 4.0), (0.5, 2.5), (0.25, 2.0)], [1.0 * 2 + 4, 0.5 * 2 + 2.5, 0.25 * 2 + 2])
        >>> f"{fit.operations:.3f} {fit.byte:.3f} {fit.constant:.3f}"
        '2.000 1.000 0.000'
    """
    # Here, since it imports most of scipy.
    from scipy.optimize import nnls

    measured = np.asarray(seconds, dtype=float)
    if not len(measured) or not np.isfinite(measured).all() or (measured <= 0).any():
        raise PlanError(f"The measured times {list(seconds)} are not all positive numbers; measure again.")
    columns = np.column_stack([np.asarray(features, dtype=float), np.ones(len(measured))])
    scale = columns.max(axis=0)
    scale[scale == 0] = 1.0
    terms = nnls(columns / scale / measured[:, None], np.ones(len(measured)))[0] / scale
    return Calibration(*terms.tolist())


def _coarsest(weights: dict[int, float]) -> int:
    """The largest step such that it and coarser ones take at least `COARSER` of the time."""
    total, above = sum(weights.values()), 0.0
    for step in sorted(weights, reverse=True):
        above += weights[step]
        if above >= COARSER * total:
            return step
    return 1


class TimeModel:
    """Predicts the time of a network from its kept channels.

    Args:
        recorded: the trace of the network.
        channels: its axes.
        operations: its operations that the table holds (`structprune.latency.specs.uses`).
        table: their times.

    Attributes:
        uses: the operations that the table holds.
        moved: the bytes that all others move.
        calibration: how both make the time.
        whole: the time of the whole network as measured, in seconds; predicted if it is not set.
    """

    def __init__(self, recorded: Trace, channels: Channels, operations: Sequence[Use], table: LatencyTable) -> None:
        self.table = table
        self.uses = tuple(operations)
        self.moved = moved(recorded, channels, (use.node for use in self.uses))
        self.calibration = Calibration()
        self.whole: float | None = None

    @cached_property
    def parts(self) -> list[Use | Moved]:
        """All that takes time, piece by piece."""
        return [*self.uses, *self.moved]

    def features(self, count: Count) -> tuple[float, float]:
        """Seconds of the operations by the table, and the bytes moved beside them."""
        return sum(self._of(use, count) for use in self.uses), sum(each(count) for each in self.moved)

    def seconds(self, count: Count) -> float:
        """The time of the network when `count` gives the kept channels of each axis."""
        return self.calibration(*self.features(count))

    def share(self, part: Use | Moved, count: Count) -> float:
        """What one of `parts` adds to the time, in seconds."""
        if isinstance(part, Moved):
            return self.calibration.byte * part(count)
        return self.calibration.operations * self._of(part, count)

    def steps(self, widths: Widths) -> list[int]:
        """For each group of `widths`, the step of its layers' widths in which most of its time falls.

        Of the operations that a group's width enters, those in which the time falls in coarser steps than the one
        given take less than `COARSER` of the time of all.
        """
        weights: list[dict[int, float]] = [{} for _ in widths.groups]
        for use in self.uses:
            seconds = self.table.seconds(use.spec, use.spec.widths)
            groups = use.spec.full.get("groups", 1) if isinstance(use, Grouped) else 1
            for axis, step in zip(use.spec.axes, self.table.grid(use.spec).steps, strict=True):
                for group in widths.groups_of(use.channels[axis]):
                    weights[group][groups * step] = weights[group].get(groups * step, 0.0) + seconds
        return [_coarsest(weight) for weight in weights]

    def _of(self, use: Use, count: Count) -> float:
        widths, scale = use.point(count)
        return scale * self.table.seconds(use.spec, widths)
