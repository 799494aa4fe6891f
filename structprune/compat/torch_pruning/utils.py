"""What torch-pruning's ``utils`` measure."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import nn

from structprune.benchmarking import benchmark
from structprune.coupling.costs import cost, count_layers
from structprune.dependency_graph import DependencyGraph


def count_params(module: nn.Module) -> int:
    """How many parameters a model has."""
    return sum(parameter.numel() for parameter in module.parameters())


def count_ops_and_params(model: nn.Module, example_inputs: Any, layer_wise: bool = False) -> tuple[Any, ...]:
    """Multiply-accumulates of convolutions and matrix products, and parameters; with `layer_wise`, also by module."""
    total = cost(model, example_inputs)
    if not layer_wise:
        return total.macs, total.params
    graph = DependencyGraph(model, example_inputs)
    layers = count_layers(graph.model, graph.trace, graph.channels, lambda axis: axis.size)
    modules = dict(graph.model.named_modules())
    macs = {modules[path]: layer.macs for path, layer in layers.items()}
    return total.macs, total.params, macs, {modules[path]: layer.params for path, layer in layers.items()}


def measure_latency(model: nn.Module, example_inputs: Any, repeat: int = 300, warmup: int = 50) -> tuple[float, float]:
    """Mean and standard deviation of a forward, in milliseconds."""
    found = benchmark({"model": model}, example_inputs, runs=repeat, warmup=warmup, memory=False, explanations=False)
    seconds = np.array(found.timings[0].seconds)
    return float(seconds.mean() * 1e3), float(seconds.std() * 1e3)
