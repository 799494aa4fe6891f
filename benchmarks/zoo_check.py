"""One model of the zoo: traced, planned, applied, and compared with the original whose channels are off."""

from __future__ import annotations

import math
import re
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from harness import peer
from harness.children import OverTime, Report, at_most, one_line, source_of, without_folders
from support import oracle
from torch import nn
from zoo_models.entry import Entry

import structprune
from structprune.channels.propagate import has_rule
from structprune.tracing.trace import trace

TOLERANCE = 1e-10
# Switching the removed channels off must change the output by more than this, relative to its largest entry.
LEAST_CHANGE = 1e-6
# The oracle holds five copies in double precision; larger models are compared by `structprune.verify` in single.
LARGEST_FOR_ORACLE = 150_000_000
SEED = 0


def parameters(model: nn.Module) -> int:
    """Entries of all parameters."""
    return sum(p.numel() for p in model.parameters())


def built(entry: Entry) -> tuple[nn.Module, Any]:
    """The model in evaluation mode and its inputs, the same ones each time."""
    torch.manual_seed(SEED)
    model, inputs = entry.build()
    return model.eval(), inputs


def in_double(entry: Entry, inputs: Any) -> tuple[nn.Module, Any]:
    """The same model and inputs in float64, each entry of a tensor its own random number."""
    with torch.no_grad():  # weights that a hook computes are then leaves, which deepcopy asks for
        model = built(entry)[0]
    for module in model.modules():
        # transformers runs experts by a kernel that has no float64; its plain loop computes the same.
        if hasattr(getattr(module, "config", None), "_experts_implementation"):
            module.config._experts_implementation = "eager"
    return oracle.jitter(model, SEED), oracle.double(inputs)


def shapes(output: Any) -> list[tuple[str, list[int]]]:
    """Where each tensor of an output stands, and its shape."""
    return [(path, list(t.shape)) for path, t in oracle.leaves(output)]


def _general(reason: str) -> str:
    """A reason without the names and numbers of this model, so that equal ones can be counted."""
    reason = re.sub(r"'[^']*'", "'…'", reason)
    reason = re.sub(r"\(?[\w/.-]+\.py:\d+[^)]*\)?", "(…)", reason)
    reason = re.sub(r"\b[\w]+(\.[\w]+)+\b", "…", reason)
    return re.sub(r"\d+", "N", reason)[:160]


def prunable(graph: structprune.DependencyGraph) -> dict[str, Any]:
    """The share of the channels of all weights that may go, and why the others may not.

    The channels of a weight are the entries of its first two dimensions; a dimension of one entry is none.
    """
    total = free = 0
    reasons: Counter[str] = Counter()
    examples: dict[str, str] = {}
    for node in graph.trace.nodes:
        if node.meta["name"] != "parameter":
            continue
        rows = graph.channels.rows[node.meta["index"]]
        for dim, row in enumerate(rows if len(rows) >= 2 else ()):
            if row.size == 1:
                continue
            pinned = graph.components.pinned[graph.components.of(row)] if row.free else None
            if dim < 2:
                total += row.size
                free += int((~pinned).sum()) if pinned is not None else 0
            # Positions of a kernel are no channels.
            if dim < 2 and (pinned is None or pinned.any()):
                reason = graph._reason(row)
                reasons[_general(reason)] += 1
                examples.setdefault(_general(reason), f"{node.target}, dim {dim}: {without_folders(reason)}")
    top = [{"reason": reason, "axes": n, "example": examples[reason]} for reason, n in reasons.most_common(8)]
    return {"prunable": free / total if total else 0.0, "pinned": top}


class _Stages:
    """Runs stages one after the other and notes where it stopped."""

    def __init__(self, report: Callable[[dict[str, Any]], None]) -> None:
        self.facts: dict[str, Any] = {}
        self._report = report
        self.failed = False

    def run(self, stage: str, function: Callable[[], Any]) -> Any:
        if self.failed:
            return None
        start = time.perf_counter()
        self.facts["stage"] = stage
        self._report(self.facts)
        try:
            result = function()
        except Exception as error:
            self.failed = True
            self.facts |= {"failed": stage, "error": one_line(error, 600), "at": source_of(error, "structprune")}
            self._report(self.facts)
            return None
        self.facts[f"{stage}_s"] = round(time.perf_counter() - start, 3)
        return result

    def note(self, **facts: Any) -> None:
        self.facts |= facts
        self._report(self.facts)


def _compared(original: nn.Module, plan: structprune.Plan, inputs: Any, expected_shapes: Any) -> float:
    """Largest relative error in float64 against the oracle; infinite where shapes differ."""
    slim = plan.apply(original)
    expected, widened = oracle.reference(original, plan.removed, inputs)
    if widened:
        with oracle._Run((), smooth=False):
            output = oracle.call(slim, inputs)
    else:
        output = oracle.call(slim, inputs)
    if shapes(output) != expected_shapes:
        raise AssertionError(f"output shapes changed: {shapes(output)[:3]} instead of {expected_shapes[:3]}")
    return oracle.relative_error(output, expected)


def _right(error: float, tolerance: float) -> None:
    if not error <= tolerance:
        raise AssertionError(f"relative error {error:.3g} against the original with its channels off")


def _changed(original: nn.Module, plan: structprune.Plan, inputs: Any) -> float:
    """How far the removed channels move the output; where they do not, equality proves nothing."""
    with oracle._Run((), smooth=True):
        off = oracle.call(oracle.switch_off(original, plan.removed), inputs)
        return oracle.relative_error(off, oracle.call(original, inputs))


def _matters(changed: float) -> None:
    if changed <= LEAST_CHANGE:
        raise AssertionError(f"switching the channels off changes the output by {changed:.3g}: nothing is proved")


def _at_ratio(stages: _Stages, model: nn.Module, inputs: Any, double: Any, ratio: float, before: Any) -> None:
    """Plan, apply and compare; `double` is the model and its inputs in float64, or nothing for large models."""
    plan = stages.run("planned", lambda: structprune.plan(model, inputs, ratio=ratio))
    slim = stages.run("applied", lambda: plan.apply(model))
    if stages.failed:
        return
    stages.note(kept=parameters(slim) / parameters(model), removed=len(plan.thinnings))
    output = stages.run("runs slim", lambda: oracle.call(slim, inputs))
    stages.run("same shapes", lambda: _same_shapes(output, before))
    if stages.failed:
        return
    if double is None:
        report = stages.run("compared", lambda: structprune.verify(model, slim, plan, inputs))
        if not stages.failed:
            stages.note(relative_error=report.max_relative_error, judge="verify in float32")
            stages.run("right", report.raise_for_error)
        return
    error = stages.run("compared", lambda: _compared(double[0], plan, double[1], before))
    if stages.failed:
        return
    stages.note(relative_error=error if math.isfinite(error) else str(error), judge="oracle in float64")
    stages.run("right", lambda: _right(error, TOLERANCE))
    if plan.removed:
        changed = stages.run("switched off", lambda: _changed(double[0], plan, double[1]))
        stages.note(changed=changed if stages.failed or math.isfinite(changed) else str(changed))
        stages.run("comparison proves something", lambda: _matters(changed))
    stages.run("own verify agrees", lambda: structprune.verify(model, slim, plan, inputs).raise_for_error())


def _same_shapes(output: Any, before: Any) -> None:
    if shapes(output) != before:
        raise AssertionError(f"output shapes changed: {shapes(output)[:3]} instead of {before[:3]}")


def checked(entry: Entry, ratios: tuple[float, ...]) -> Callable[[Report], None]:
    """Work for a process of its own: the model at each ratio."""

    def work(report: Report) -> None:
        first = _Stages(lambda facts: report({"model": dict(facts)}))
        model, inputs = first.run("built", lambda: built(entry)) or (None, None)
        if first.failed:
            return
        first.note(parameters=parameters(model))
        before = first.run("runs", lambda: shapes(oracle.call(model, inputs)))
        first.run("traced", lambda: trace(model, inputs, leaves=has_rule))
        graph = first.run("solved", lambda: structprune.DependencyGraph(model, inputs))
        if first.failed:
            return
        first.note(**prunable(graph))
        double = in_double(entry, inputs) if parameters(model) <= LARGEST_FOR_ORACLE else None
        for ratio in ratios:
            stages = _Stages(lambda facts, ratio=ratio: report({str(ratio): dict(facts)}))
            _at_ratio(stages, model, inputs, double, ratio, before)
            if not stages.failed:
                stages.note(stage="done")

    return work


def peer_outcome(entry: Entry, limit: float) -> Callable[[Report], None]:
    """Work for a process of its own: whether torch-pruning comes to an end and leaves a model that runs."""

    def work(report: Report) -> None:
        model, inputs = built(entry)
        before, size = shapes(oracle.call(model, inputs)), parameters(model)
        start = time.perf_counter()
        report({"outcome": "does not finish"})
        try:
            with at_most(limit):
                peer.prune(model, inputs, 0.5, peer.last_layers(model, inputs), peer.heads_of(model))
            taken = time.perf_counter() - start
            after = shapes(oracle.call(model, inputs))
        except OverTime:
            return
        except Exception as error:
            report({"outcome": "crashes", "error": one_line(error)})
            return
        outcome = "runs" if after == before else "output shapes change"
        report({"outcome": outcome, "kept": parameters(model) / size, "seconds": taken})

    return work
