"""Models of the zoo, which the benchmarks define, for tests."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

BENCHMARKS = str(Path(__file__).resolve().parents[2] / "benchmarks")
if BENCHMARKS not in sys.path:
    sys.path.insert(0, BENCHMARKS)

import zoo_check  # noqa: E402, found only once the path is there
import zoo_report  # noqa: E402, found only once the path is there
from zoo_models import FAMILIES  # noqa: E402, found only once the path is there

if TYPE_CHECKING:
    from zoo_models.entry import Entry

__all__ = ["each_of", "entry_of", "zoo_check", "zoo_report"]

# Packages that may be missing.
LIBRARIES = ("torchvision", "timm", "transformers")


def each_of(keys: Sequence[str]) -> Callable[[Any], Any]:
    """Mark a test that takes the `key` of a model: it runs once for each, whatever the libraries warn of."""

    def mark(test: Any) -> Any:
        quiet = pytest.mark.filterwarnings(*(f"ignore:::{library}" for library in LIBRARIES))
        return quiet(pytest.mark.parametrize("key", keys)(test))

    return mark


def entry_of(key: str) -> Entry:
    """The model of this name; the test is skipped where its library is not installed."""
    family, _, name = key.partition("/")
    if family in LIBRARIES and importlib.util.find_spec(family) is None:
        pytest.skip(f"{family} is not installed")
    (entry,) = [entry for entry in FAMILIES[family]() if entry.name == name]
    return entry
