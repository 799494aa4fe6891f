"""Scores that are computed once and used for several plans of the same network."""

from __future__ import annotations

from typing import Any

from torch import Tensor

import structprune
from harness import cifar
from structprune.coupling.groups import Group
from structprune.importance import fitted
from structprune.importance.base import comparable
from structprune.importance.data import Loss

Key = tuple[tuple[str, int, bytes, bytes], ...]


class Scores:
    """What a criterion gave to each group of the network, so that it is fitted once for all scopes and targets."""

    def __init__(
        self, importance: Any, graph: structprune.DependencyGraph, data: Any, loss: Loss = cifar.cross_entropy
    ) -> None:
        self._ready = fitted(importance, graph, data, loss)
        self.comparable = comparable(self._ready)
        self._groups = {_key(group): group for group in graph.groups()}
        self._known: dict[Key, Tensor] = {}

    def __call__(self, group: Group, tensors: Any) -> Tensor:
        key = _key(group)
        if key not in self._known:
            self._known[key] = self._ready(self._groups[key], tensors).detach()
        return self._known[key]


def _key(group: Group) -> Key:
    """What is equal for the same group in another graph of the same model; a layer may make several groups."""
    return tuple((m.tensor, m.dim, m.positions.tobytes(), m.channels.tobytes()) for m in group.members)
