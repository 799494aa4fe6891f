"""What the removal of channels costs, from what was measured at a few levels."""

from __future__ import annotations

import numpy as np


def prices(error: np.ndarray, counts: list[int], measured: list[float]) -> np.ndarray:
    """What each removal costs: the slope of the lower convex hull of the distance, shape ``(channels - 1,)``.

    The distance was measured for some counts of removed channels. Between two of them the ratio of distance to error is
    taken to change evenly on a logarithmic scale. Distances 0, 1, 5, 6 after 0 to 3 removals have a hull 0, 1, 3.5, 6:
    the prices are 1, 2.5 and 2.5.

    Args:
        error: of the consumers after each removal, shape ``(channels - 1,)``.
        counts: of the channels removed at each level.
        measured: the distance of the outputs at each level.
    """
    at = np.maximum(error[np.asarray(counts) - 1], 1e-30)
    ratio = np.log(np.maximum(np.asarray(measured), 1e-12) / at)
    removed = np.arange(1, len(error) + 1)
    distance = np.maximum.accumulate(np.concatenate([[0.0], error * np.exp(np.interp(removed, counts, ratio))]))
    hull = [0]
    for count in removed:
        # The last corner is no corner if the slope up to it is not below the slope from it to here.
        while len(hull) > 1 and (distance[count] - distance[hull[-1]]) * (hull[-1] - hull[-2]) <= (
            distance[hull[-1]] - distance[hull[-2]]
        ) * (count - hull[-1]):
            hull.pop()
        hull.append(int(count))
    lengths = np.diff(hull)
    return np.repeat(np.diff(distance[hull]) / lengths, lengths)
