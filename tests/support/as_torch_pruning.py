"""The adapter under torch-pruning's names, so that code written for torch-pruning imports it."""

from __future__ import annotations

import sys
from types import ModuleType

import structprune.compat.torch_pruning as adapter


def adapter_as_torch_pruning() -> dict[str, ModuleType]:
    """What to put into ``sys.modules``: names of torch-pruning's modules, and the adapter's in their place."""
    ours = adapter.__name__
    names = [name for name in sys.modules if name == ours or name.startswith(f"{ours}.")]
    modules = {f"torch_pruning{name.removeprefix(ours)}": sys.modules[name] for name in names}
    return modules | {
        "torch_pruning.pruner.function": adapter.function,
        "torch_pruning.pruner.importance": adapter.importance,
        "torch_pruning.pruner.algorithms.scheduler": adapter.pruner,
    }
