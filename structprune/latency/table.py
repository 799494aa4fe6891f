"""`LatencyTable`: the measured time of operations over their widths, its steps, and what lies between."""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from structprune.errors import PlanError
from structprune.latency.eager import Point
from structprune.latency.specs import OpSpec
from structprune.schema import json_of, up_to_date

SCHEMA = 2
# At most so many lengths of an axis are measured; its step is no coarser than one of these shares of it, and no finer
# than the other. A coarser one would leave narrow layers as they are, whatever another axis of the operation gains.
NODES = 8
COARSEST = 4
FINEST = 16
# Below one step, lengths are multiples of this share of it.
BELOW = 4
# A step that saves less than this share of what it would save if time followed the width is none.
STEP_SAVES = 0.5
FLAT = 0.05
# A time above so many times that of a wider operation is measured again.
ODD = 1.25
Timer = Callable[[Sequence[Point]], Sequence[float]]


@dataclass(frozen=True)
class Grid:
    """One operation's times.

    Attributes:
        steps: for each axis, the step in which its time falls: between multiples of it, lengths cost as much as the
            next multiple. Lengths below one step that were measured cost what they were seen to.
        nodes: for each axis, the lengths that were measured, ascending; the last is the full one.
        seconds: the times, for the last axis fastest.
        scan: for each axis, times at lengths just below the full one, by length.
    """

    steps: tuple[int, ...]
    nodes: tuple[tuple[int, ...], ...]
    seconds: tuple[float, ...]
    scan: tuple[tuple[tuple[int, float], ...], ...]

    def __call__(self, widths: tuple[int, ...]) -> float:
        """The time at these lengths: bilinear between the nodes, on the steps; in proportion below the first node."""
        share = 1.0
        corners: list[list[tuple[int, float]]] = []
        for width, step, nodes in zip(widths, self.steps, self.nodes, strict=True):
            rounded = width if nodes[0] <= width < step else -(-width // step) * step
            if rounded < nodes[0]:
                # Down to nothing at all, an operation keeps half of what it cost at the first node.
                share *= 0.5 + 0.5 * rounded / nodes[0]
            corners.append(_corners(min(max(rounded, nodes[0]), nodes[-1]), nodes))
            share *= max(1.0, width / nodes[-1])
        total = 0.0
        for corner in product(*corners):
            at, weight = 0, share
            for (index, part), nodes in zip(corner, self.nodes, strict=True):
                at, weight = at * len(nodes) + index, weight * part
            total += weight * self.seconds[at]
        return total


def _corners(width: int, nodes: tuple[int, ...]) -> list[tuple[int, float]]:
    """The nodes around a length, by number, with their weights."""
    right = bisect_left(nodes, width)
    if nodes[right] == width:
        return [(right, 1.0)]
    part = (width - nodes[right - 1]) / (nodes[right] - nodes[right - 1])
    return [(right - 1, 1 - part), (right, part)]


@dataclass
class LatencyTable:
    """Times of operations on one device with one backend.

    Attributes:
        conditions: what the times were measured under: backend, device, threads, versions.
        grids: the times by the operations' keys.

    Example:
        >>> from structprune.latency.specs import OpSpec
        >>> spec = OpSpec("matmul", (("rows", 1), ("in", 16), ("out", 16)), ("out",), (("weight", True),))
        >>> table = LatencyTable({"backend": "none"})
        >>> table.measure([spec], lambda points: [1e-3 * widths[0] for _, widths in points])
        1
        >>> f"{table.seconds(spec, (12,)):.3f}"
        '0.012'
    """

    conditions: Mapping[str, Any]
    grids: dict[str, Grid] = field(default_factory=dict[str, Grid])
    _known: dict[Point, float] = field(default_factory=dict[Point, float], repr=False, compare=False)

    def seconds(self, spec: OpSpec, widths: tuple[int, ...]) -> float:
        """The time of an operation at these lengths of its axes, in seconds; none of it is left at length 0.

        Raises:
            PlanError: the table does not hold the operation.
        """
        point = spec, widths
        seconds = self._known.get(point)
        if seconds is None:
            seconds = self._known[point] = 0.0 if 0 in widths else self.grid(spec)(widths)
        return seconds

    def grid(self, spec: OpSpec) -> Grid:
        """All times of an operation.

        Raises:
            PlanError: the table does not hold it.
        """
        try:
            return self.grids[spec.key]
        except KeyError:
            raise PlanError(f"The latency table does not hold {spec.key}. Measure it first.") from None

    def measure(self, specs: Iterable[OpSpec], timer: Timer) -> int:
        """Measure those operations that the table does not hold; tells how many.

        First each axis is scanned just below its full length, which shows in which steps the time falls; then the
        operation is timed on a grid of such steps.

        Args:
            specs: the operations.
            timer: gives the seconds of operations at lengths of their axes.
        """
        todo = [spec for spec in dict.fromkeys(specs) if spec.key not in self.grids]
        scanned = [point for spec in todo for point in _scan_points(spec)]
        # Twice, as steps are read off single times.
        first, second = _timed(timer, scanned), _timed(timer, scanned)
        scans = {point: min(first[point], second[point]) for point in first}
        steps = {spec: tuple(_step(spec, i, scans) for i in range(len(spec.axes))) for spec in todo}
        nodes = {spec: tuple(map(_nodes, spec.widths, steps[spec])) for spec in todo}
        # All that is compared is measured together, the full size as well.
        times = _timed(timer, [(spec, widths) for spec in todo for widths in product(*nodes[spec])])
        _settle(times, scans, timer)
        for spec in todo:
            seconds = tuple(times[spec, widths] for widths in product(*nodes[spec]))
            scan = tuple(
                tuple((w, scans[spec, _with(spec, i, w)]) for w in _scan(full)) for i, full in enumerate(spec.widths)
            )
            self.grids[spec.key] = Grid(steps[spec], nodes[spec], seconds, scan)
        self._known.clear()
        return len(todo)

    # -- JSON ----------------------------------------------------------------------------------------------------

    def to_json(self) -> str:
        """The table as JSON text."""
        grids = {key: [g.steps, g.nodes, g.seconds, g.scan] for key, g in self.grids.items()}
        return json.dumps({"schema": SCHEMA, "conditions": dict(self.conditions), "grids": grids})

    @classmethod
    def from_json(cls, text: str) -> LatencyTable:
        """The table that `to_json` wrote.

        Raises:
            PlanError: the text is no whole table, or one of a later schema.
        """
        with json_of("a latency table", PlanError):
            data = up_to_date(json.loads(text), SCHEMA, {}, "it")
            return cls(data["conditions"], {key: _grid(*parts) for key, parts in data["grids"].items()})


def _grid(steps: Any, nodes: Any, seconds: Any, scan: Any) -> Grid:
    """A grid from its JSON, after checking that it is whole."""
    grid = Grid(
        tuple(int(step) for step in steps),
        tuple(tuple(int(n) for n in axis) for axis in nodes),
        tuple(float(s) for s in seconds),
        tuple(tuple((int(w), float(s)) for w, s in axis) for axis in scan),
    )
    expected = 1
    for axis in grid.nodes:
        expected *= len(axis)
    if len(grid.seconds) != expected or not len(grid.steps) == len(grid.nodes) == len(grid.scan):
        raise ValueError(f"a grid holds {len(grid.seconds)} times where its nodes ask for {expected}")
    if any(list(axis) != sorted(set(axis)) or not axis for axis in grid.nodes) or min(grid.seconds) <= 0:
        raise ValueError("a grid holds lengths out of order, or times that are no positive numbers")
    return grid


# -- where to measure --------------------------------------------------------------------------------------------


def _timed(timer: Timer, points: Sequence[Point]) -> dict[Point, float]:
    points = list(dict.fromkeys(points))
    return dict(zip(points, map(float, timer(points)), strict=True)) if points else {}


def _settle(times: dict[Point, float], scans: Mapping[Point, float], timer: Timer) -> None:
    """Measure again, twice at most, what took far longer than a wider operation did: other work held it up.

    Of several times of the same the least counts.
    """
    seen: dict[OpSpec, dict[tuple[int, ...], float]] = {}
    for (spec, widths), taken in [*scans.items(), *times.items()]:
        held = seen.setdefault(spec, {})
        held[widths] = min(taken, held.get(widths, taken))
    for attempt in range(3):
        odd: list[Point] = []
        for point in times:
            spec, widths = point
            wider = [t for at, t in seen[spec].items() if all(a >= b for a, b in zip(at, widths, strict=True))]
            times[point] = seen[spec][widths]
            if times[point] > ODD * min(wider):
                odd.append(point)
        if attempt == 2 or not odd:
            return
        for (spec, widths), taken in _timed(timer, odd).items():
            seen[spec][widths] = min(taken, seen[spec][widths])


def _with(spec: OpSpec, axis: int, width: int) -> tuple[int, ...]:
    return tuple(width if i == axis else full for i, full in enumerate(spec.widths))


def _top(full: int) -> int:
    """The length from which the steps are looked for downwards: a multiple of all of them, if there is one."""
    largest = 1 << max(0, full.bit_length() - 2)
    return full - full % max(1, min(64, largest))


def _candidates(full: int) -> list[int]:
    """The steps that an axis may have."""
    least = 1 << max(0, (full // FINEST).bit_length() - 1)
    half = _top(full) // 2
    return [*(step for step in (1, 2, 4, 8, 16, 32, 64) if least <= step < half), *([half] if half else [])]


def _scan(full: int) -> list[int]:
    """The lengths at which an axis is scanned."""
    top = _top(full)
    return sorted({top, *(top - step for step in _candidates(full))})


def _scan_points(spec: OpSpec) -> list[Point]:
    return [(spec, _with(spec, i, w)) for i, full in enumerate(spec.widths) for w in _scan(full)]


def _step(spec: OpSpec, axis: int, scans: Mapping[Point, float]) -> int:
    """The smallest step whose saving is worth its width; the coarsest if even half the length saves next to nothing."""
    full = spec.widths[axis]
    top = _top(full)

    def saved(less: int) -> float:
        return scans[spec, _with(spec, axis, top)] - scans[spec, _with(spec, axis, top - less)]

    candidates = _candidates(full)
    coarsest = max((step for step in candidates if step <= full // COARSEST), default=1)
    if not candidates:
        return coarsest
    half = candidates[-1]
    if saved(half) < FLAT * scans[spec, _with(spec, axis, top)]:
        return coarsest
    slope = saved(half) / half
    return min(coarsest, next(step for step in candidates if saved(step) >= STEP_SAVES * slope * step))


def _nodes(full: int, step: int) -> tuple[int, ...]:
    """The lengths of an axis to measure, at most `NODES`: its step and parts of it, multiples of it, the full one."""
    stride = -(-full // (step * 8)) * step
    first = sorted({step // BELOW, step // 2, step} - {0, full})
    rest = [*(length for length in range(stride, full, stride) if length > step), full]
    room, last = NODES - len(first), len(rest) - 1
    if last >= room:
        rest = [rest[round(i * last / (room - 1))] for i in range(room)]
    return *first, *rest
