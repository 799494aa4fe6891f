"""One model of the zoo: traced, planned, applied, and compared with the original whose channels are off."""

from __future__ import annotations

import math
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from harness.children import Report, one_line, source_of, without_folders
from support import oracle
from support.runs import Run
from torch import nn
from zoo_models.entry import Entry

import structprune
from structprune.ops import op_of
from structprune.tracing.trace import trace

# Switching the removed channels off must change the output by more than this, relative to its largest entry.
LEAST_CHANGE = 1e-6
# The oracle holds four copies of a model. Larger ones than this it holds in float32, one of them the model itself.
LARGEST_IN_DOUBLE = 150_000_000
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
SEED = 0
_PRODUCTS = frozenset({"matmul", "bmm", "einsum", "python.einsum"})
_PASSING = frozenset({"dropout", "to", "type_as", "add", "mul", "permute", "transpose", "reshape", "view", "type"})


def parameters(model: nn.Module) -> int:
    """Entries of all parameters."""
    return sum(p.numel() for p in model.parameters())


def built(entry: Entry) -> tuple[nn.Module, Any]:
    """The model in evaluation mode and its inputs, the same ones each time."""
    torch.manual_seed(SEED)
    model, inputs = entry.build()
    return model.eval(), inputs


def jittered(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model itself with each entry of a tensor its own random number of this type."""
    for module in model.modules():
        # transformers runs experts by a kernel that has no float64; its plain loop computes the same.
        if hasattr(getattr(module, "config", None), "_experts_implementation"):
            module.config._experts_implementation = "eager"
    return oracle.jitter(model, SEED, dtype)


def judge_of(entry: Entry, model: nn.Module, inputs: Any) -> oracle.Oracle:
    """What tells whether the pruned model is right; a large model's is over the model itself, which it changes.

    It is in float32 too where the forward makes no numbers of doubles: one that fills in ``torch.finfo(dtype).min``,
    say, and adds to it, or does so in a float32 tensor.
    """
    if parameters(model) > LARGEST_IN_DOUBLE:
        return oracle.Oracle(jittered(model, torch.float32), inputs)
    with torch.no_grad():  # weights that a hook computes are then leaves, which deepcopy asks for
        double, doubles = jittered(built(entry)[0], torch.float64), oracle.double(inputs)
    if gives_numbers(double, doubles):
        return oracle.Oracle(double, doubles)
    return oracle.Oracle(jittered(built(entry)[0], torch.float32), inputs)


def gives_numbers(model: nn.Module, inputs: Any) -> bool:
    """Whether a model runs on these inputs without overflow."""
    try:
        with Run(smooth=False):  # as the judge runs it, without casts down
            output = oracle.call(model, inputs)
    except RuntimeError as error:
        if "overflow" not in str(error):
            raise
        return False
    return all(bool(t.isfinite().all()) for _, t in oracle.leaves(output) if t.is_floating_point())


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
        rows = graph.channels.axes[node.meta["index"]]
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
    why = [{"reason": reason, "axes": n, "example": examples[reason]} for reason, n in reasons.most_common()]
    return {"prunable": free / total if total else 0.0, "pinned": why}


def attends(graph: structprune.DependencyGraph) -> bool:
    """Whether a model is one of attention: scaled dot products, or a softmax whose result is multiplied as a matrix."""
    if any(node.meta["name"] == "scaled_dot_product_attention" for node in graph.trace.nodes):
        return True
    weights = {node for node in graph.trace.nodes if node.meta["name"] == "softmax"}
    for node in graph.trace.nodes:
        if weights.intersection(node.all_input_nodes):
            if node.meta["name"] in _PRODUCTS:
                return True
            if node.meta["name"] in _PASSING:
                weights.add(node)
    return False


class _Stages:
    """Runs stages one after the other and notes where it stopped."""

    def __init__(self, report: Callable[[dict[str, Any]], None]) -> None:
        self.facts: dict[str, Any] = {}
        self._report = report
        self.failed = False

    def run(self, stage: str, function: Callable[[], Any]) -> Any:
        if self.failed:
            return None
        start = time.process_time()  # of one thread: what it takes alone on a core, whatever runs beside it
        self.facts["stage"] = stage
        self._report(self.facts)
        try:
            result = function()
        except Exception as error:  # recorded as what came of the stage
            self.failed = True
            self.facts |= {"failed": stage, "error": one_line(error, 600), "at": source_of(error, "structprune")}
            self._report(self.facts)
            return None
        self.facts[f"{stage}_s"] = round(time.process_time() - start, 3)
        return result

    def note(self, **facts: Any) -> None:
        self.facts |= facts
        self._report(self.facts)


def _same_shapes(output: Any, before: Any) -> None:
    if shapes(output) != before:
        raise AssertionError(f"output shapes changed: {shapes(output)[:3]} instead of {before[:3]}")


def saved_exactly(entry: Entry, model: nn.Module, slim: nn.Module, inputs: Any, output: Any) -> None:
    """Save the pruned model, load it into one with other weights, and compare every bit of its state and its output.

    Buffers that no state dict holds (rotary frequencies, say) are those of `model` in both: no file could tell them.
    """
    state = model.state_dict()
    unsaved = {name: buffer for name, buffer in model.named_buffers() if name not in state}

    def factory() -> nn.Module:
        torch.manual_seed(SEED + 1)
        made = entry.build()[0].eval()
        for name, buffer in unsaved.items():  # some have another shape once the model has run
            path, _, key = name.rpartition(".")
            made.get_submodule(path).register_buffer(key, buffer.clone(), persistent=False)
        return made

    with tempfile.TemporaryDirectory() as folder:
        again = structprune.load(factory, structprune.save(slim, folder))
    ours, theirs = slim.state_dict(), again.state_dict()
    other = [name for name in ours if name not in theirs or not same_bits(ours[name], theirs[name])]
    if other or len(ours) != len(theirs):
        raise AssertionError(f"the loaded model has another state: {other[:3]}")
    for (path, one), (_, two) in zip(oracle.leaves(output), oracle.leaves(oracle.call(again, inputs)), strict=True):
        if not same_bits(one, two):
            raise AssertionError(f"the loaded model has another output {path}")


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equality in which NaN equals itself."""
    return one.dtype == other.dtype and torch.equal(one.isnan(), other.isnan()) and torch.equal(
        one.nan_to_num(), other.nan_to_num()
    )  # fmt: skip


def _right(error: float, tolerance: float) -> None:
    if not error <= tolerance:
        raise AssertionError(f"relative error {error:.3g} against the original with its channels off")


def _matters(changed: float) -> None:
    if not changed > LEAST_CHANGE:
        raise AssertionError(f"switching the channels off changes the output by {changed:.3g}: nothing is proved")


def _compared(judge: oracle.Oracle, plan: structprune.Plan, slim: nn.Module | None, before: Any) -> dict[str, Any]:
    """Relative errors of the judge's own pruned model, or of `slim` where it is that."""
    expected = judge.expect(plan.removed, plan.settings.get("over_survivors", ()))
    output = judge.output(plan.apply(judge.original) if slim is None else slim, expected.widened)
    _same_shapes(output, before)
    found = {"relative_error": oracle.relative_error(output, expected.output), "changed": expected.changed}
    return {name: value if math.isfinite(value) else str(value) for name, value in found.items()}


def _at_ratio(
    stages: _Stages, entry: Entry, model: nn.Module, judge: oracle.Oracle, inputs: Any, ratio: float, before: Any
) -> None:
    """Plan, apply, save and load, and compare."""
    plan = stages.run("planned", lambda: structprune.plan(model, inputs, ratio=ratio, uniform=False))
    slim = stages.run("applied", lambda: plan.apply(model))
    if stages.failed:
        return
    stages.note(kept=parameters(slim) / parameters(model), removed=len(plan.slices))
    output = stages.run("runs slim", lambda: oracle.call(slim, inputs))
    stages.run("same shapes", lambda: _same_shapes(output, before))
    stages.run("saved and loaded", lambda: saved_exactly(entry, model, slim, inputs, output))
    same = judge.original is model
    found = stages.run("compared", lambda: _compared(judge, plan, slim if same else None, before))
    if stages.failed:
        return
    stages.note(**found, judge=str(judge.dtype).removeprefix("torch."))
    stages.run("right", lambda: _right(float(found["relative_error"]), TOLERANCE[judge.dtype]))
    if plan.removed:
        stages.run("comparison proves something", lambda: _matters(float(found["changed"])))
    stages.run("own verify agrees", lambda: structprune.verify(model, slim, plan, inputs).raise_for_error())


def checked(entry: Entry, ratios: tuple[float, ...]) -> Callable[[Report], None]:
    """Work for a process of its own: the model at each ratio."""

    def work(report: Report) -> None:
        first = _Stages(lambda facts: report({"model": dict(facts)}))
        model, inputs = first.run("built", lambda: built(entry)) or (None, None)
        if first.failed:
            return
        first.note(parameters=parameters(model))
        before = first.run("runs", lambda: shapes(oracle.call(model, inputs)))
        first.run("traced", lambda: trace(model, inputs, operations=op_of))
        graph = first.run("solved", lambda: structprune.DependencyGraph(model, inputs))
        if first.failed:
            return
        first.note(**prunable(graph), attends=attends(graph))
        judge = first.run("judged", lambda: judge_of(entry, model, inputs))
        if first.failed:
            return
        for ratio in ratios:
            stages = _Stages(lambda facts, ratio=ratio: report({str(ratio): dict(facts)}))
            _at_ratio(stages, entry, model, judge, inputs, ratio, before)
            if not stages.failed:
                stages.note(stage="done")

    return work
