"""Time the whole call (trace, group, rank by L2, remove half) against torch-pruning on the same models.

Both tools run in one process on one thread, in turns, each on a fresh copy of the model; each model has a process of
its own with a time limit. Memory is taken in further processes, one for each tool.

    python benchmarks/tool_speed.py [--models resnet18,swin_t] [--quick] [--limit 60]
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from harness import RESULTS, peer
from harness.children import OverTime, Report, at_most, one_line, run_apart
from harness.environment import environment
from harness.memory import peak_above
from rich.console import Console
from speed_models import CHAINS, LLAMA_70B, MODELS
from speed_report import as_markdown, growth, table
from support.torchvision_shim import make_torchvision_importable
from torch import nn

import structprune
from structprune.ops import op_of
from structprune.tracing.trace import trace

RATIO = 0.5
SLOW = 8.0  # seconds; what takes longer is timed once


def ours(model: nn.Module, inputs: Any) -> nn.Module:
    """The whole call."""
    return structprune.plan(model, inputs, ratio=RATIO, importance="l2").apply(model, inplace=True)


def theirs(model: nn.Module, inputs: Any, heads: list[str]) -> nn.Module:
    """The whole call of the peer."""
    peer.prune(model, inputs, RATIO, [model.get_submodule(name) for name in heads], peer.heads_of(model))
    return model


def seconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def rounds(first: float, quick: bool) -> int:
    """How often to repeat what took `first` seconds at the first time."""
    return 1 if quick or first > SLOW else 3 if first > 2 else 7


def parts(model: nn.Module, inputs: Any, repeats: int) -> dict[str, float]:
    """Medians of the steps of our own call, and what surgery costs against copying the surviving bytes once."""
    found: dict[str, list[float]] = {"trace": [], "graph": [], "plan": [], "surgery": [], "copy": []}
    for _ in range(repeats):
        slim = copy.deepcopy(model)
        found["trace"].append(seconds(lambda slim=slim: trace(slim, inputs, operations=op_of)))
        whole = seconds(lambda slim=slim: structprune.DependencyGraph(slim, inputs))
        found["graph"].append(max(0.0, whole - found["trace"][-1]))
        start = time.perf_counter()
        plan = structprune.plan(slim, inputs, ratio=RATIO, importance="l2")
        found["plan"].append(time.perf_counter() - start)
        found["surgery"].append(seconds(lambda slim=slim, plan=plan: plan.apply(slim, inplace=True)))
        thinned = {sliced.tensor for sliced in plan.slices}
        held = {**dict(slim.named_parameters()), **dict(slim.named_buffers())}
        survivors = [tensor.detach() for name, tensor in held.items() if name in thinned]
        found["copy"].append(seconds(lambda survivors=survivors: [tensor.clone() for tensor in survivors]))
    medians = {name: statistics.median(values) for name, values in found.items()}
    return {**medians, "surgery_over_copy": medians["surgery"] / medians["copy"] if medians["copy"] else 0.0}


class _Turns:
    """Calls of both tools on fresh copies of one model; a tool that fails once is not called again."""

    def __init__(self, name: str, limit: float, report: Report) -> None:
        self.model, self.inputs, self._heads = MODELS[name]()
        self._limit, self._report = limit, report
        self.tools = ["ours", "peer"]

    def once(self, tool: str) -> float | None:
        fresh = copy.deepcopy(self.model)
        call = (
            (lambda: ours(fresh, self.inputs)) if tool == "ours" else (lambda: theirs(fresh, self.inputs, self._heads))
        )
        try:
            with at_most(self._limit):
                return seconds(call)
        except OverTime:
            self._report({f"{tool}_failed": f"over {self._limit:g} s"})
        except Exception as error:  # either tool may raise anything; that is what is recorded
            self._report({f"{tool}_failed": one_line(error)})
        self.tools.remove(tool)
        return None


def compare(name: str, limit: float, quick: bool) -> Callable[[Report], None]:
    """Work for a process of its own: both tools in turns."""

    def work(report: Report) -> None:
        turns = _Turns(name, limit, report)
        report({"parameters": sum(p.numel() for p in turns.model.parameters())})
        first = {tool: turns.once(tool) for tool in ("ours", "peer")}  # also the warm-up
        times = {tool: [first[tool]] if first[tool] > SLOW else [] for tool in turns.tools}
        again = {tool: rounds(first[tool], quick) for tool in turns.tools if first[tool] <= SLOW}
        for turn in range(max(again.values(), default=0)):
            for tool in [tool for tool, count in again.items() if turn < count and tool in turns.tools]:
                times[tool].append(turns.once(tool))
        for tool in turns.tools:
            report({tool: statistics.median(times[tool]), f"{tool}_all": times[tool]})
        if "ours" in turns.tools:
            report({"parts": parts(turns.model, turns.inputs, rounds(first["ours"], quick))})

    return work


def plan_only(quick: bool) -> Callable[[Report], None]:
    """Work for a process of its own: planning the large model on ``meta``, time and memory."""

    def work(report: Report) -> None:
        model, inputs, _ = MODELS[LLAMA_70B]()
        report({"parameters": sum(p.numel() for p in model.parameters())})
        taken: list[float] = []

        def run() -> Any:
            start = time.perf_counter()
            plan = structprune.plan(model, inputs, ratio=RATIO, importance="random")  # there is nothing to rank
            taken.append(time.perf_counter() - start)
            return plan

        try:
            above, whole = peak_above(run)
            if not quick:
                run()
            steps = {"trace": seconds(lambda: trace(model, inputs, operations=op_of)), "plan": min(taken)}
        except Exception as error:  # recorded as what came of the model
            report({"ours_failed": one_line(error)})
            return
        report({"ours": min(taken), "ours_memory": above, "ours_peak": whole, "parts": steps})

    return work


def memory(name: str, tool: str) -> Callable[[Report], None]:
    """Work for a process of its own: the memory of one call."""

    def work(report: Report) -> None:
        model, inputs, heads = MODELS[name]()
        run = (lambda: ours(model, inputs)) if tool == "ours" else (lambda: theirs(model, inputs, heads))
        report({f"{tool}_memory": peak_above(run)[0]})

    return work


def measure(name: str, limit: float, quick: bool) -> dict[str, Any]:
    if name == LLAMA_70B:
        return run_apart(plan_only(quick), 3 * limit)
    found = run_apart(compare(name, limit, quick), 20 * limit)
    for tool in ("ours", "peer"):
        if tool in found and not quick:
            more = run_apart(memory(name, tool), 2 * limit)
            found |= {key: value for key, value in more.items() if key.endswith("_memory")}
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="", help="names of models, separated by commas; all by default")
    parser.add_argument("--quick", action="store_true", help="one repeat, no memory, short chains")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds that one call may take")
    parser.add_argument("--output", default=str(RESULTS / "tool_speed"), help="where to write, without a suffix")
    options = parser.parse_args()
    names = [name.strip() for name in options.models.split(",") if name.strip()]
    unknown = [name for name in names if name not in MODELS]
    if unknown:
        parser.error(f"unknown models {unknown}; there are: {', '.join(MODELS)}")
    if not names:
        names = [name for name in MODELS if not (options.quick and CHAINS.get(name, 0) > 1000)]
    torch.set_num_threads(1)
    torch.manual_seed(0)
    make_torchvision_importable()
    import torch_pruning
    import torchvision
    import transformers

    del torch_pruning, torchvision, transformers  # imported here, so that no process imports them while it is timed
    console = Console(file=sys.stdout, width=130)
    found: dict[str, Any] = {}
    for name in names:
        found[name] = measure(name, options.limit, options.quick)
        console.print(f"{name}: {found[name].get('ours', found[name])}", highlight=False, soft_wrap=True)
    result = {"environment": environment(), "limit": options.limit, "ratio": RATIO, "models": found}
    result["growth"] = growth(found, CHAINS)
    console.print(table(result))
    RESULTS.mkdir(exist_ok=True)
    with open(f"{options.output}.json", "w") as file:
        json.dump(result, file, indent=1)
        file.write("\n")
    with open(f"{options.output}.md", "w") as file:
        file.write(as_markdown(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
