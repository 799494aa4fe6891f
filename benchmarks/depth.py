"""Whole branches removed: exactness over the zoo, and a ResNet-56 without some of its blocks.

    python benchmarks/depth.py exact             # models of tests/test_zoo.py; --only for some, --most for all branches
    python benchmarks/depth.py resnet56          # needs the data, see `harness.cifar`
    python benchmarks/depth.py speed             # the same at measured speeds: channels, blocks, both
    python benchmarks/depth.py macs              # the same at equal MACs, timed afterwards; --network ViT for another
    python benchmarks/depth.py llama             # tokens a second of a Llama of half a billion random weights
    python benchmarks/depth.py stories           # a small trained Llama

Results go to ``results/depth.json`` and ``results/depth.md``. In the first part each branch alone and random subsets of
them are removed, and the result is compared in float64 with the original that computes its branches and takes them as
zero. What the library refuses is counted, with its reasons.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import depth_speed
import torch
from harness import ROOT, cifar
from harness.children import one_line
from harness.environment import as_line, environment
from harness.of_zoo import make_torchvision_importable

RESULTS = ROOT / "benchmarks" / "results" / "depth"
TOLERANCE = 1e-10
SUBSETS = 3
SEED = 0
IMAGES = 256
ROWS, ROUNDS = 8192, 1  # of `recover`: a short run


def exactness(key: str, most: int) -> dict[str, Any]:
    """One model of the zoo: branches alone, at most `most` drawn at random, and subsets of all."""
    sys.path.insert(0, str(ROOT / "tests"))
    from support import oracle
    from support.depth import error_without, removable
    from support.zoo import entry_of, zoo_check

    import structprune

    model, inputs = zoo_check.built(entry_of(key))
    model, inputs = zoo_check.jittered(model, torch.float64).eval(), oracle.double(inputs)
    found = structprune.branches(model, inputs)
    names = [branch.name for branch in found]
    draw = random.Random(SEED)
    sets = [[name] for name in (names if len(names) <= most else draw.sample(names, most))]
    for _ in range(SUBSETS if len(names) > 1 else 0):
        drawn = draw.sample(names, draw.randint(2, len(names)))
        sets.append(removable(model, inputs, drawn))
    facts: dict[str, Any] = {"branches": len(names), "tried": len(sets), "exact": 0, "refused": {}, "wrong": {}}
    for chosen in sets:
        try:
            _, error = error_without(model, inputs, chosen)
        except structprune.errors.PlanError as reason:
            facts["refused"][", ".join(chosen)] = one_line(reason)
            continue
        if error <= TOLERANCE:
            facts["exact"] += 1
        else:
            facts["wrong"][", ".join(chosen)] = error
    return facts


def resnet56(share: float, write: Callable[[dict[str, Any]], None]) -> None:
    """A trained ResNet-56 of which blocks go until `share` of its MACs is left, as it is and recovered."""
    import structprune

    model = cifar.load_resnet(56)
    images, _ = cifar.train_images(IMAGES, seed=SEED)
    x = images[:1]
    data = list(images.split(128))
    facts: dict[str, Any] = {"dense": cifar.accuracy(model), "macs": structprune.cost(model, x).macs}
    for score, greedy in (("influence", False), ("kl", True)):
        start = time.perf_counter()
        names = structprune.choose_branches(model, x, data[:1], target={"macs": share}, score=score, greedy=greedy)
        chosen_in = time.perf_counter() - start
        slim = structprune.remove_branches(model, x, names)
        row = {"removed": list(names), "macs": structprune.cost(slim, x).macs, "choice_s": round(chosen_in, 1)}
        row["accuracy"] = cifar.accuracy(slim)
        start = time.perf_counter()
        row["recovered"] = cifar.accuracy(structprune.recover(slim, model, data, rows=ROWS, rounds=ROUNDS))
        row["recovery_s"] = round(time.perf_counter() - start, 1)
        facts[f"{score}, greedy" if greedy else score] = row
        print(score, greedy, {key: value for key, value in row.items() if key != "removed"}, flush=True)
        write(facts)


def markdown(facts: dict[str, Any]) -> str:
    """The results as a page."""
    lines = ["# Whole branches and blocks removed", "", as_line(facts["environment"]), ""]
    models = facts.get("exact", {})
    if models:
        tried, exact = (sum(m.get(key, 0) for m in models.values()) for key in ("tried", "exact"))
        wrong = sum(len(m.get("wrong", {})) for m in models.values())
        lines += [
            "## Exactness", "",
            f"{exact} of {tried} removals in {len(models)} models are exact (relative error at most {TOLERANCE:g} in "
            f"float64), {wrong} are wrong, the others are refused. At most {facts['most']} branches of a model are "
            f"tried alone, drawn at random, and {SUBSETS} random subsets of all of which something is left.", "",
            "| model | branches | tried | exact | refused | wrong |", "|---|--:|--:|--:|--:|--:|",
        ]  # fmt: skip
        for key, m in models.items():
            if "error" in m:
                lines.append(f"| {key} | {m['error']} | | | | |")
            else:
                counts = (m["branches"], m["tried"], m["exact"], len(m["refused"]), len(m["wrong"]))
                lines.append(f"| {key} | " + " | ".join(map(str, counts)) + " |")
        reasons = {f"{key}: {name}": why for key, m in models.items() for name, why in m.get("refused", {}).items()}
        lines += ["", "Refused:", "", *(f"- `{name[:90]}`: {why}" for name, why in reasons.items()), ""]
    if "resnet56" in facts:
        net = facts["resnet56"]
        lines += [
            "## ResNet-56 on CIFAR-10", "",
            f"Dense {net['dense']:.2f}%, {net['macs']:,} MACs. Blocks are chosen on 128 training images without "
            f"labels, and recovered on {IMAGES} ({ROUNDS} round, {ROWS} rows); one draw.", "",
            "| score | blocks removed | MACs | accuracy | recovered |", "|---|--:|--:|--:|--:|",
        ]  # fmt: skip
        for score, row in net.items():
            if isinstance(row, dict):
                fewer = f"{net['macs'] / row['macs']:.2f}x fewer"
                lines.append(
                    f"| {score} | {len(row['removed'])} | {fewer} | {row['accuracy']:.2f}% | {row['recovered']:.2f}% |"
                )
    return "\n".join([*lines, "", *depth_speed.markdown(facts)]).rstrip() + "\n"


def main() -> None:
    """Run one part and write all results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("exact", "resnet56", "speed", "macs", "stories", "llama"))
    parser.add_argument("--network", choices=tuple(depth_speed.NETWORKS), default="ResNet-56", help="for macs")
    parser.add_argument("--only", default="", help="models whose name contains this")
    parser.add_argument("--most", type=int, default=8, help="branches of a model that are tried alone")
    parser.add_argument("--share", type=float, default=1 / 1.5, help="of the MACs of ResNet-56 that is to be left")
    parser.add_argument("--output", default=str(RESULTS))
    options = parser.parse_args()
    make_torchvision_importable()
    path = Path(options.output).with_suffix(".json")

    def write(**parts: Any) -> None:
        facts: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        facts |= {"environment": environment(), **parts}
        path.write_text(json.dumps(facts, indent=1) + "\n")
        path.with_suffix(".md").write_text(markdown(facts))

    if options.part == "resnet56":
        resnet56(options.share, lambda found: write(resnet56=found))
        return
    known: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    if options.part == "speed":
        depth_speed.resnet56(known.get("speed", {}), lambda found: write(speed=found))
        return
    if options.part == "macs":
        networks: dict[str, Any] = known.get("at equal MACs", {})
        name = options.network
        depth_speed.at_equal_macs(
            name, networks.get(name, {}), lambda found: write(**{"at equal MACs": {**networks, name: found}})
        )
        return
    if options.part == "llama":
        depth_speed.large_llama({}, lambda found: write(**{"large llama": found}))
        return
    if options.part == "stories":
        depth_speed.stories({}, lambda found: write(stories=found))
        return
    sys.path.insert(0, str(ROOT / "tests"))
    from test_zoo import MODELS

    models: dict[str, Any] = json.loads(path.read_text()).get("exact", {}) if path.exists() else {}
    for key in [key for key in MODELS if options.only in key]:
        try:
            found = exactness(key, options.most)
        except Exception as error:  # recorded as what came of the model
            found = {"error": one_line(error)}
        models[key] = found
        print(key, {name: value for name, value in found.items() if name not in ("refused", "wrong")}, flush=True)
        write(exact=models, most=options.most)


if __name__ == "__main__":
    main()
