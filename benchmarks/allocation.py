"""Exact allocation beside the greedy one: importance kept at the same limit, and the seconds that it takes.

ResNet-56 has its trained weights, the others random ones: widths and costs are what counts here. Channels are scored by
L2 and compete in the global scope. The importance kept is the mean, over all channels that may go, of the share of the
importance that their layer keeps: a geometric mean, which is what the exact allocation maximises, so that a layer left
with little of it counts as it should. It is not accuracy: a group counts by its number of channels, so the 12 heads of
the ViT, which go together with its residual stream, weigh next to nothing beside 36,864 channels of its MLPs, and are
what goes. Seconds were taken on a machine with other work on it.

Run from the root: ``python benchmarks/allocation.py``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from math import exp, log
from time import perf_counter
from typing import Any

import torch
from harness import RESULTS
from harness.cifar import load_resnet
from harness.environment import as_line, environment
from support.torchvision_shim import make_torchvision_importable
from torch import nn

from structprune.api import coupled_channels
from structprune.coupling.groups import Group
from structprune.errors import PlanError
from structprune.importance.base import fitted
from structprune.planning.decide import Decision, Ranking, decide_channels
from structprune.planning.options import PlanOptions

FILE = RESULTS / "allocation.json"
PAGE = RESULTS / "allocation.md"
SPEED_UPS = (2, 3, 4, 5)
Made = tuple[nn.Module, Any]


def _torchvision(name: str) -> Callable[[], Made]:
    def make() -> Made:
        make_torchvision_importable()
        import torchvision

        return getattr(torchvision.models, name)(weights=None).eval(), torch.randn(1, 3, 224, 224)

    return make


def _llama() -> Made:
    """The shape of a language model of 1.1 billion parameters, with half of its layers, so that it fits in memory."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=11, num_attention_heads=32,
        num_key_value_heads=4, max_position_embeddings=128, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval(), {"input_ids": torch.randint(0, 32000, (1, 64))}


NETWORKS: dict[str, Callable[[], Made]] = {
    "ResNet-56": lambda: (load_resnet(56).eval(), torch.randn(1, 3, 32, 32)),
    "ResNet-50": _torchvision("resnet50"),
    "MobileNetV2": _torchvision("mobilenet_v2"),
    "ViT-B/16": _torchvision("vit_b_16"),
    "Llama, 11 layers of 2048": _llama,
}


def importance_kept(decision: Decision, scores: dict[Group, Any]) -> float:
    """The share of the importance that layers keep: the geometric mean over the channels that may go."""
    lost, channels = 0.0, 0
    for group, kept in decision.kept.items():
        ordered = sorted(scores[group].tolist(), reverse=True)
        lost -= group.channels * log(sum(ordered[:kept]) / sum(ordered))
        channels += group.channels
    return exp(-lost / channels)


def rows_of(name: str) -> list[dict[str, Any]]:
    """One row for each target: what each allocation keeps and the seconds that the decision takes."""
    torch.manual_seed(0)
    model, inputs = NETWORKS[name]()
    graph = coupled_channels(model, inputs, PlanOptions())
    rows: list[dict[str, Any]] = []
    targets = [{"macs": 1 / speed_up} for speed_up in SPEED_UPS] + [{"macs": 1 / 2, "params": 1 / 2}]
    for target in targets:
        row: dict[str, Any] = {"network": name, "target": target}
        for allocation in ("greedy", "auto", "exact"):
            options = PlanOptions(target=target, scope="global", allocation=allocation)
            with torch.no_grad():
                ranking = Ranking(graph, fitted(options.importance, graph, None, None, None))
                ranking.rank(graph.groups())
                begun = perf_counter()
                try:
                    decision = decide_channels(graph, options, ranking)
                except PlanError as error:
                    row[allocation] = {"refused": str(error).partition(":")[0]}
                    continue
            row[allocation] = {
                "seconds": round(perf_counter() - begun, 2),
                "kept": importance_kept(decision, ranking.scores),
                "reached": dict(decision.settings.reached),
            }
        print(row, flush=True)
        rows.append(row)
    return rows


def page(data: dict[str, Any]) -> str:
    """The results as a table."""
    lines = [
        "# Exact and greedy allocation",
        "",
        (__doc__ or "").partition("Run from")[0].partition("\n\n")[2].strip(),
        "",
        "| network | remains | kept: greedy | auto | exact | seconds: greedy | auto | exact |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in data["rows"]:
        asked = ", ".join(f"{name} {share:.3g}" for name, share in row["target"].items())
        each = [row[allocation] for allocation in ("greedy", "auto", "exact")]
        if any("refused" in found for found in each):
            lines.append(f"| {row['network']} | {asked} | cannot be met | | | | | |")
            continue
        kept = " | ".join(f"{100 * found['kept']:.2f}%" for found in each)
        lines.append(f"| {row['network']} | {asked} | {kept} | {' | '.join(str(found['seconds']) for found in each)} |")
    return "\n".join([*lines, "", as_line(data["versions"]), ""])


def main() -> None:
    """Measure all networks, or those named, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", choices=list(NETWORKS), default=list(NETWORKS))
    names = parser.parse_args().only
    torch.set_num_threads(1)
    data = {"rows": [row for name in names for row in rows_of(name)], "versions": environment()}
    FILE.write_text(json.dumps(data, indent=1) + "\n")
    PAGE.write_text(page(data))


if __name__ == "__main__":
    main()
