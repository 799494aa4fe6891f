"""Prune every language model class of transformers by a plain call: right or refused, share kept, loads or not.

Each class has a process of its own with a limit. Results of earlier runs are kept and completed.

    python benchmarks/zoo_deploy.py [--only PATTERN] [--limit 60]
"""

from __future__ import annotations

import fnmatch
import json
import os
import tempfile
from collections import Counter
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from harness import of_zoo
from harness.children import Report, one_line, run_apart
from harness.environment import environment
from support import oracle
from zoo_check import built, checked, jittered, parameters
from zoo_models.entry import Entry
from zoo_models.transformers_classes import entries

import structprune

RATIO = 0.5
COLUMNS = ("not built", "not run", "refused", "wrong", "right", "loads")


def loads(entry: Entry) -> tuple[bool, str, float]:
    """Whether `from_pretrained` gives the pruned model, why not, and the share of parameters that is left."""
    model, inputs = built(entry)
    plan = structprune.plan(model, inputs, ratio=RATIO)
    slim: Any = plan.apply(model)
    kept = parameters(slim) / parameters(model)
    if not plan.slices:
        return False, f"nothing goes: {plan.settings.left.get('nothing', '')}", kept
    if "config" in plan.settings.left:
        return False, plan.settings.left["config"], kept
    with tempfile.TemporaryDirectory() as folder:
        slim.save_pretrained(folder)
        again = type(slim).from_pretrained(folder).eval()
    with torch.no_grad():
        ours, theirs = (oracle.call(each, inputs) for each in (slim, again))
    same = all(torch.equal(a, b) for (_, a), (_, b) in zip(oracle.leaves(ours), oracle.leaves(theirs), strict=True))
    return same, "" if same else "the loaded model computes something else", kept


def by_hand(entry: Entry) -> float:
    """The relative error against a copy whose removed heads and inner channels are zero, in double precision.

    No norm runs over these channels, so that zeros in the weights say all. It is asked where the judge of the zoo
    disagrees, which also follows how reductions treat what is off.
    """
    model, inputs = built(entry)
    model, inputs = jittered(model, torch.float64), oracle.double(inputs)
    plan = structprune.plan(model, inputs, ratio=RATIO, axes=["heads", "mlp"], uniform=False)
    if not plan.slices or plan.settings.over_survivors:
        raise ValueError("nothing to compare")
    masked = oracle.switch_off(model, plan.removed)
    return oracle.relative_error(oracle.call(plan.apply(model), inputs), oracle.call(masked, inputs))


def work_of(entry: Entry) -> Any:
    """Work for a process of its own."""

    def work(report: Report) -> None:
        checked(entry, (RATIO,))(report)
        try:
            loaded, why, kept = loads(entry)
        except Exception as error:  # recorded as what came of it
            loaded, why, kept = False, f"{type(error).__name__}: {error}"[:300], 1.0
        report({"loads": loaded, "why": why, "kept": kept})
        try:
            report({"by_hand": str(by_hand(entry))})
        except Exception as error:  # recorded as what came of it
            report({"by_hand": one_line(error, 100)})

    return work


def outcome(facts: dict[str, Any]) -> str:
    """One of `COLUMNS`."""
    model, slim = facts.get("model", {}), facts.get(str(RATIO), {})
    if model.get("failed") == "built" or not model:
        return "not built"
    if model.get("failed") == "runs":
        return "not run"
    if slim.get("stage") == "done":
        return "loads" if facts.get("loads") else "right"
    stage = slim.get("failed", "")
    return "wrong" if stage in ("right", "same shapes", "runs slim", "compared", "own verify agrees") else "refused"


def why_of(facts: dict[str, Any]) -> str:
    """What a reader should know of a class."""
    parts = (facts.get("model", {}), facts.get(str(RATIO), {}))
    hand = (
        f" (heads and inner channels against zeros by hand: {facts.get('by_hand', 'not asked')})"
        if outcome(facts) == "wrong"
        else ""
    )
    errors = [part["error"] for part in parts if "error" in part]
    return (errors or [facts.get("why") or facts.get("died", "")])[0].replace("|", "/").replace("\n", " ")[:180] + hand


def as_markdown(models: dict[str, Any]) -> str:
    """The table."""
    lines = [
        "# Language models of transformers, pruned by half by a plain call",
        "",
        f"transformers {transformers.__version__}: every causal, encoder-decoder and "
        "image-text class, built from its own configuration made small, and run on text, with an image or sound "
        "where it runs on nothing less.",
        "*right*: exact against the original with its channels off, saved and loaded by structprune; *loads*: right, "
        "and `from_pretrained` gives the same outputs to the bit.",
        "",
    ]
    counts: dict[str, Counter[str]] = {}
    for key, facts in models.items():
        counts.setdefault(key.partition("/")[0], Counter())[outcome(facts)] += 1
    lines += [f"| kind | {' | '.join(COLUMNS)} |", f"|---|{'--:|' * len(COLUMNS)}"]
    lines += [f"| {kind} | {' | '.join(str(found[name]) for name in COLUMNS)} |" for kind, found in counts.items()]
    lines += ["", "| class | outcome | kept | why |", "|---|---|--:|---|"]
    for key, facts in models.items():
        kept = f"{facts['kept']:.0%}" if "kept" in facts and outcome(facts) in ("right", "loads") else ""
        why = "" if outcome(facts) == "loads" else why_of(facts)
        lines.append(f"| {key.partition('/')[2]} | {outcome(facts)} | {kept} | {why} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run what is asked for, and write after each class."""
    parser = of_zoo.parser(__doc__, only="patterns of names, separated by commas", limit=60.0, name="zoo_deploy")
    options = parser.parse_args()
    path, models = of_zoo.begun(options)
    known = entries()
    order = [entry.key for entry in known]
    for entry in known:
        patterns = [f"*{pattern}*" for pattern in options.only.split(",")] if options.only else []
        if entry.key in models if not patterns else not any(fnmatch.fnmatch(entry.key, p) for p in patterns):
            continue
        models[entry.key] = run_apart(work_of(entry), options.limit)
        models = dict(sorted(models.items(), key=lambda item: order.index(item[0])))
        path.write_text(json.dumps({"environment": environment(), "ratio": RATIO, "models": models}, indent=1) + "\n")
        path.with_suffix(".md").write_text(as_markdown(models))
        print(entry.key, outcome(models[entry.key]), why_of(models[entry.key])[:150], flush=True)


if __name__ == "__main__":
    main()
