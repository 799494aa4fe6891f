"""The registry of small networks, each one way in which channels can be coupled.

A case is a module class with a decorator that says what to feed it and what pruning by half must thin. Every network
ends in a layer whose output must keep its shape. Spatial and sequence sizes are odd primes and channels are even, so
that one is never mistaken for the other.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Dims = int | tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """One small network, its inputs, and what must and must not be thinned."""

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Any]
    thins: Mapping[str, Dims] = field(default_factory=dict)
    pinned: Mapping[str, str] = field(default_factory=dict)  # layer -> text that explains why it stays whole

    def __str__(self) -> str:
        """Name the test."""
        return self.name


CASES: dict[str, Case] = {}


def case(
    inputs: Callable[[], Any], thins: Mapping[str, Dims] | None = None, *, pinned: Mapping[str, str] | None = None
) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Register the decorated module; it must thin something or say why it cannot."""

    def register(network: type[nn.Module]) -> type[nn.Module]:
        assert network.__name__ not in CASES, f"two cases are called {network.__name__}"
        assert thins or pinned, f"{network.__name__} expects nothing"
        CASES[network.__name__] = Case(network.__name__, network, inputs, thins or {}, pinned or {})
        return network

    return register


def normal(*shape: int, seed: int = 0) -> Tensor:
    """A fixed normal tensor, whatever the global generator's state."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def image(channels: int = 3, size: int = 7, dims: int = 2) -> Callable[[], Tensor]:
    """A batch of two images (or series, or volumes)."""
    return lambda: normal(2, channels, *(size,) * dims)


def tokens(width: int = 8, length: int = 5) -> Callable[[], Tensor]:
    """A batch of two sequences of vectors."""
    return lambda: normal(2, length, width)


def ids(vocabulary: int = 13, length: int = 5) -> Callable[[], Tensor]:
    """A batch of two sequences of token ids."""
    return lambda: torch.arange(2 * length).reshape(2, length) % vocabulary


def features(width: int = 6) -> Callable[[], Tensor]:
    """A batch of three vectors."""
    return lambda: normal(3, width)


def all_cases() -> list[Case]:
    """Every case of every ``cases_*`` file beside this one."""
    for path in sorted(Path(__file__).parent.glob("cases_*.py")):
        importlib.import_module(f"support.{path.stem}")
    return list(CASES.values())
