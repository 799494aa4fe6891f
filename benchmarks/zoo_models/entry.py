"""One model of the zoo."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Entry:
    """How a model is made.

    Attributes:
        family: the package or the kind of model.
        name: unique within the family.
        build: makes the model, with random weights, and its example inputs.
    """

    family: str
    name: str
    build: Callable[[], tuple[nn.Module, Any]]

    @property
    def key(self) -> str:
        """Family and name."""
        return f"{self.family}/{self.name}"
