"""Scores that are computed once and used for several plans of the same network."""

from __future__ import annotations

from typing import Any

from torch import Tensor

import structprune
from harness import cifar
from structprune.coupling.groups import Group
from structprune.importance import fitted
from structprune.importance.base import comparable


class Scores:
    """What a criterion gave to each group of the network, so that it is fitted once for all scopes and targets."""

    def __init__(self, importance: Any, graph: structprune.DependencyGraph, data: Any) -> None:
        self._ready = fitted(importance, graph, data, cifar.cross_entropy)
        self.comparable = comparable(self._ready)
        self._groups = {group.name: group for group in graph.groups()}
        self._known: dict[str, Tensor] = {}

    def __call__(self, group: Group, tensors: Any) -> Tensor:
        if group.name not in self._known:
            self._known[group.name] = self._ready(self._groups[group.name], tensors).detach()
        return self._known[group.name]
