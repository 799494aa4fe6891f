"""What torch-pruning's ``utils`` measure and keep."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
from torch import nn

from structprune.benchmarking import benchmark as timed
from structprune.coupling.costs import cost, count_layers
from structprune.dependency_graph import DependencyGraph
from structprune.planning.plan import Plan, plans_of, replay


def count_params(module: nn.Module) -> int:
    """How many parameters a model has."""
    return sum(parameter.numel() for parameter in module.parameters())


def count_ops_and_params(model: nn.Module, example_inputs: Any, layer_wise: bool = False) -> tuple[Any, ...]:
    """Multiply-accumulates of convolutions and matrix products, and parameters; with `layer_wise`, also by module."""
    if not layer_wise:
        return (total := cost(model, example_inputs)).macs, total.params
    graph = DependencyGraph(model, example_inputs)
    layers = count_layers(graph.model, graph.trace, graph.channels, lambda axis: axis.size)
    inside = {
        module: [each for name, each in layers.items() if f".{name}.".startswith(f".{path}." if path else "")]
        for path, module in model.named_modules()
    }
    macs, params = (
        {m: sum(getattr(e, kind) for e in each) for m, each in inside.items()} for kind in ("macs", "params")
    )
    return macs[model], params[model], macs, params


def measure_latency(model: nn.Module, example_inputs: Any, repeat: int = 300, warmup: int = 50) -> tuple[float, float]:
    """Mean and standard deviation of a forward, in milliseconds."""
    result = timed({"model": model}, example_inputs, runs=repeat, warmup=warmup, memory=False, explanations=False)
    seconds = np.array(result.timings[0].seconds)
    return float(seconds.mean() * 1e3), float(seconds.std() * 1e3)


def _after(model: nn.Module) -> None:
    lines = difflib.unified_diff(_printed.pop().splitlines(), str(model).splitlines(), "before", "after", "", "", 0, "")
    sys.stdout.write("".join(f"{line}\n" for line in lines))


benchmark = SimpleNamespace(measure_latency=measure_latency)
_printed: list[str] = []
# torch-pruning's way to print what became of the layers.
print_tool = SimpleNamespace(before_pruning=lambda model: _printed.append(str(model)), after_pruning=_after)


def state_dict(model: nn.Module) -> dict[str, Any]:
    """Tensors, plans and plain attributes of a pruned model: enough to make it again from the model as it was built."""
    plain = {
        path: {name: value for name, value in vars(module).items() if type(value) in (int, float, str, bool)}
        for path, module in model.named_modules()
    }
    return {"tensors": model.state_dict(), "plans": [plan.to_json() for plan in plans_of(model)], "attributes": plain}


def load_state_dict(model: nn.Module, state_dict: Mapping[str, Any]) -> nn.Module:
    """Prune `model`, as it was built, like the model that `state_dict` came from, and load the rest, in place."""
    replay(model, map(Plan.from_json, state_dict["plans"]))
    model.load_state_dict(state_dict["tensors"])
    for path, attributes in state_dict["attributes"].items():
        vars(model.get_submodule(path)).update(attributes)
    return model
