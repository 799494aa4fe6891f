"""Published criteria on ResNet-20 for CIFAR-10: masked, cut, and the two compared on the whole test set.

FPGM (He et al., 2019, algorithm 1, one step on the trained network) and TVSPrune (Murti et al., 2023: a filter goes if
the least distance between pairs of classes is below a share of its layer's mean; repeated). Tables of other tools show
masked 84.1% falling to 78.6% and 66.06% to 1% once cut; here both have to be the same network.

Run ``python benchmarks/masked_is_cut.py`` with the data at hand (see `harness.cifar`); results go to
``results/masked_is_cut.*``.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from typing import Any

import torch
from harness import RESULTS, cifar
from harness.environment import as_line, environment
from torch import Tensor, nn

import structprune
from structprune import masks
from structprune.importance import FPGM, TVSeparability
from structprune.importance.base import fitted
from structprune.masks import Mask
from structprune.masks.compacting import permanent

DEPTH, IMAGES = 20, 500


def fpgm_filters(model: nn.Module, share: float) -> nn.Module:
    """The filters nearest to all others of their layer are set to zero, as in the paper: biases and norms stay."""
    masked = copy.deepcopy(model)
    found: dict[str, Tensor] = {}
    for name, weight in masked.named_parameters():
        if weight.dim() == 4:
            rows = weight.detach().flatten(1).double()
            nearest = torch.cdist(rows, rows).sum(1).argsort()[: int(share * len(rows))]
            found[name] = torch.ones_like(weight, dtype=torch.bool)
            found[name][nearest] = False
    Mask(found).apply(masked)
    return masked


def fpgm_channels(model: nn.Module, x: Tensor, share: float) -> nn.Module:
    """Whole coupled channels by the same distances."""
    plan = structprune.plan(model, x, ratio=share, importance=FPGM(), scope="local", round_to=1)
    return masks.from_plan(plan, copy.deepcopy(model))


def tvs_channels(model: nn.Module, x: Tensor, data: list[Any], share: float, rounds: int) -> nn.Module:
    """Channels whose classes are nearest, below a share of the mean of their layer, round after round."""
    masked = copy.deepcopy(model)
    for _ in range(rounds):
        current = permanent(masked)
        graph = structprune.DependencyGraph(current, x)
        score = fitted(TVSeparability(), graph, data)
        tensors = dict(current.named_parameters()) | dict(current.named_buffers())
        chosen: dict[str, float] = {}
        for group in graph.groups():
            scores = score(group, tensors)
            living = scores > 0  # a channel that is off tells no classes apart
            low = scores < share * scores[living].mean() if bool(living.any()) else ~living
            chosen[group.name] = min(float(low.double().mean()), 1 - 1 / group.channels)
        plan = structprune.plan(
            current, x, ratio=lambda group, chosen=chosen: chosen[group.name], importance=TVSeparability(), data=data,
            scope="local", round_to=1,
        )  # fmt: skip
        masked = masks.from_plan(plan, masked)
    return masked


def main() -> None:
    """Mask, cut, compare, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--test", type=int, default=10_000, help="images of the test set")
    given = parser.parse_args()
    torch.set_num_threads(1)
    model = cifar.load_resnet(DEPTH)
    images, labels = (part[: given.test] for part in cifar.test_set())
    x = images[:2]
    data = cifar.batches(*cifar.train_images(IMAGES))
    cases: dict[str, Callable[[], nn.Module]] = {
        "FPGM, 10% of the filters zeroed": lambda: fpgm_filters(model, 0.1),
        "FPGM, 30% of the filters zeroed": lambda: fpgm_filters(model, 0.3),
        "FPGM, 10% of the channels": lambda: fpgm_channels(model, x, 0.1),
        "TVSPrune, below 0.2 of the mean, 2 rounds": lambda: tvs_channels(model, x, data, 0.2, 2),
        "TVSPrune, below 0.4 of the mean, 2 rounds": lambda: tvs_channels(model, x, data, 0.4, 2),
    }
    params = sum(p.numel() for p in model.parameters())
    dense = cifar.accuracy(model, images, labels)
    rows: list[dict[str, Any]] = []
    for name, make in cases.items():
        masked = make()
        slim = masks.compact(masked, x)
        with torch.no_grad():
            # In float64, where rounding hides nothing.
            wanted, got = (permanent(m).double()(images[:200].double()) for m in (masked, slim))
        rows.append({
            "case": name,
            "params": sum(p.numel() for p in slim.parameters()),
            "masked": cifar.accuracy(masked, images, labels),
            "cut": cifar.accuracy(slim, images, labels),
            "difference": float((wanted - got).abs().max() / wanted.abs().max()),
        })  # fmt: skip
        print(rows[-1], flush=True)
    lines = [
        "# Masked is cut",
        "",
        f"Made by `python benchmarks/masked_is_cut.py`. ResNet-{DEPTH}, no training after pruning, {given.test:,} test "
        f"images, dense {dense:.2f}%, {params:,} parameters; TVSPrune looks at {IMAGES:,} training images. "
        f"{as_line(environment())}.",
        "",
        "| | parameters left | masked, % | cut, % | largest difference of outputs |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        left = f"{row['params']:,} ({row['params'] / params:.0%})"
        numbers = f"{row['masked']:.2f} | {row['cut']:.2f} | {row['difference']:.0e}"
        lines.append(f"| {row['case']} | {left} | {numbers} |")
    lines += ["", "Tables of other tools: masked 84.1% and cut 78.6%; masked 66.06% and cut 1%."]
    (RESULTS / "masked_is_cut.md").write_text("\n".join(lines) + "\n")
    record = {"environment": environment(), "dense": dense, "rows": rows}
    (RESULTS / "masked_is_cut.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
