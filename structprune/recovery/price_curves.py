"""What `Reconstruction` has found of each group, as importance and as scope."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from structprune.coupling.groups import Group
from structprune.importance.weight import LnNorm

# What is equal for the same group in another graph of the same model.
Key = tuple[tuple[str, int, bytes, bytes], ...]


def key_of(group: Group) -> Key:
    """What is the same for the group of another graph of the same model."""
    return tuple((m.tensor, m.dim, m.positions.tobytes(), m.channels.tobytes()) for m in group.members)


@dataclass(frozen=True, slots=True)
class Curve:
    """What the removal of a group's channels costs.

    Attributes:
        order: the channels in the order in which they are removed.
        error: of the consumers once each is removed, shape ``(channels - 1,)``.
        price: change of the output over what the channel saves, for each removal, shape ``(channels - 1,)``.
        saved: what one channel saves.
    """

    order: np.ndarray
    error: np.ndarray
    price: np.ndarray
    saved: float


class FittedReconstruction:
    """Scores and prices of the groups of one model; give it to `structprune.plan` as importance and as scope."""

    def __init__(self, curves: dict[Key, Curve]) -> None:
        self._curves = curves
        self._norm = LnNorm(2.0)

    def __repr__(self) -> str:
        return "reconstruction"

    def _curve(self, group: Group) -> Curve | None:
        return self._curves.get(key_of(group))

    def __call__(self, group: Group, tensors: Mapping[str, Tensor]) -> Tensor:
        """Scores of shape ``(group.channels,)``: the error once a channel and all those before it are removed.

        A group that no layer consumes linearly is ranked by the L2 norm.
        """
        curve = self._curve(group)
        if curve is None:
            return self._norm(group, tensors)
        scores = np.zeros(group.channels)
        steps = np.append(curve.error, np.inf if len(curve.error) == 0 else curve.error[-1] * 2 + 1)
        # The order counts where errors are equal.
        scores[curve.order] = np.nan_to_num(steps, posinf=1.0) + np.arange(group.channels) * 1e-9
        return torch.from_numpy(scores)

    def depth(self, group: Group, kept: np.ndarray) -> np.ndarray:
        """What the last removed channel costs when `kept` channels are kept: change of the output over what it saves.

        With 8 channels, ``kept`` = 7 asks for ``price[0]``, of the first removal, and ``kept`` = 1 for ``price[6]``.
        """
        curve = self._curve(group)
        if curve is None:
            top = max((c.price.max() for c in self._curves.values() if len(c.price)), default=1.0)
            return 1e3 * top * (1 + group.channels - kept)
        return curve.price[np.minimum(group.channels - kept, group.channels - 1) - 1]

    def total(self, group: Group, kept: np.ndarray) -> np.ndarray:
        """The change of the output when the group alone keeps `kept` channels, of all removals together.

        Prices 1, 2 and 4 of channels that save 10 each: 10, 30 and 70 for ``kept`` = 3, 2 and 1 of 4 channels.
        """
        curve = self._curve(group)
        if curve is None:
            return np.cumsum(self.depth(group, np.arange(group.channels - 1, -1, -1)))[group.channels - kept - 1]
        changes = np.cumsum(curve.price) * curve.saved
        return changes[np.minimum(group.channels - kept, group.channels - 1) - 1]
