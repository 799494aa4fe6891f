"""How well criteria rank channels: rank correlation with the true change of the loss when a channel is switched off.

Every channel of the trained CIFAR ResNet-20 is switched off alone (all its slices of all tensors are zero). Scores come
from training images; the loss is measured on test images that no criterion saw, or with --same on the images that the
scores come from, which leaves out how far the loss on the one tells of the loss on the other. The correlation is
Spearman's: within each group of coupled channels, averaged over groups, and over all channels of the network.

    python benchmarks/oracle_ranking.py [--images 256] [--test 256] [--criteria l2,taylor] [--same]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
import torch.nn.functional as F
from harness import RESULTS, cifar
from harness.environment import as_line, environment
from rich.console import Console
from rich.progress import track
from scipy.stats import spearmanr
from torch import Tensor

from structprune.coupling.graph import ChannelGraph
from structprune.coupling.groups import Group
from structprune.importance.base import CRITERIA, fitted
from structprune.planning.build import tensors_of


def switched_off(group: Group, tensors: dict[str, Tensor], channel: int) -> list[tuple[Tensor, Tensor]]:
    """Zero all that goes with a channel; returns each changed tensor with what it was."""
    changed = []
    for member in group.members:
        positions = torch.from_numpy(member.positions[member.channels == channel])
        changed.append((tensors[member.tensor], tensors[member.tensor].clone()))
        tensors[member.tensor].index_fill_(member.dim, positions, 0)
    return changed


@torch.no_grad()
def true_changes(graph: ChannelGraph, images: Tensor, labels: Tensor) -> list[np.ndarray]:
    """For each group, the change of the mean loss when each of its channels alone is switched off."""
    tensors = {name: tensor.data for name, tensor in tensors_of(graph).items()}

    def loss() -> float:
        parts = zip(images.split(128), labels.split(128), strict=True)
        return sum(float(F.cross_entropy(graph.model(x), y, reduction="sum")) for x, y in parts) / len(labels)

    whole, found = loss(), []
    for group in track(graph.groups(), "switching off", console=Console(stderr=True)):
        changes = np.zeros(group.channels)
        for channel in range(group.channels):
            changed = switched_off(group, tensors, channel)
            changes[channel] = loss() - whole
            for tensor, before in reversed(changed):
                tensor.copy_(before)
        found.append(changes)
    return found


def correlations(scores: list[np.ndarray], changes: list[np.ndarray]) -> dict[str, float]:
    """Spearman's rank correlation within groups (mean and least) and over all channels."""
    within = [0.0 if len(set(s)) < 2 else spearmanr(s, c).statistic for s, c in zip(scores, changes, strict=True)]
    whole = spearmanr(np.concatenate(scores), np.concatenate(changes)).statistic
    return {"within": float(np.mean(within)), "least": float(np.min(within)), "all": float(whole)}


def as_markdown(report: dict[str, Any]) -> str:
    """The report as a table."""
    lines = [
        "# Rank correlation of criteria with the true change of the loss",
        "",
        f"CIFAR ResNet-20, {report['channels']} channels in {report['groups']} groups, each switched off alone. Scores "
        f"from {report['images']} training images, the true change of the mean loss on "
        f"{'the same images' if report['same'] else str(report['test']) + ' test images'}. "
        "Spearman's correlation: within each group (mean over groups, and the least), and over all channels at once "
        "with scores as they are. Made by `benchmarks/oracle_ranking.py`.",
        "",
        "| criterion | within groups | least group | all channels | seconds |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, row in sorted(report["criteria"].items(), key=lambda item: -item[1]["within"]):
        lines.append(f"| {name} | {row['within']:.3f} | {row['least']:.3f} | {row['all']:.3f} | {row['seconds']:.1f} |")
    return "\n".join([*lines, "", as_line(report["environment"]), ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--test", type=int, default=256)
    parser.add_argument("--same", action="store_true", help="measure the loss on the images that scores come from")
    parser.add_argument("--criteria", default=",".join(CRITERIA))
    chosen = parser.parse_args()
    if cifar.data_folder() is None:
        print("skipped: CIFAR-10 and its trained networks are not here; set STRUCTPRUNE_DATA to their folder")
        sys.exit(0)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    graph = ChannelGraph(cifar.load_resnet(20), torch.zeros(1, 3, 32, 32))
    data = cifar.batches(*cifar.train_images(chosen.images, seed=0), 128)
    images, labels = cifar.test_set()
    order = np.random.default_rng(0).permutation(len(labels))[: chosen.test]
    images, labels = images[order], labels[order]
    if chosen.same:
        images, labels = (torch.cat(parts) for parts in zip(*data, strict=True))
    changes = true_changes(graph, images, labels)
    tensors, rows = tensors_of(graph), {}
    for name in chosen.criteria.split(","):
        start = time.perf_counter()
        ready = fitted(name, graph, data, cifar.cross_entropy)
        scores = [ready(group, tensors).detach().double().numpy() for group in graph.groups()]
        rows[name] = {**correlations(scores, changes), "seconds": time.perf_counter() - start}
        print(name, rows[name], flush=True)
    report = {
        "images": chosen.images,
        "test": len(labels),
        "same": chosen.same,
        "groups": len(changes),
        "channels": sum(len(c) for c in changes),
        "criteria": rows,
        "changes": {group.name: c.tolist() for group, c in zip(graph.groups(), changes, strict=True)},
        "environment": environment(),
    }
    RESULTS.mkdir(exist_ok=True)
    name = "oracle_ranking_same" if chosen.same else "oracle_ranking"
    (RESULTS / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
    (RESULTS / f"{name}.md").write_text(as_markdown(report))


if __name__ == "__main__":
    main()
