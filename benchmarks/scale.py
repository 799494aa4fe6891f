"""Recovery of a language model in bfloat16: processor seconds, and memory above what the process held before.

A Llama shape with random weights loses a quarter of its MLPs, and its layers are solved alone. Random weights say
nothing of accuracy. Run from the root: ``python benchmarks/scale.py`` (a quarter of an hour); ``--size small`` for a
Llama of 55 million parameters, ``--size long`` for the same on more tokens; ``--offload`` keeps activations in files.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from typing import Any

import torch
from harness import RESULTS
from harness.environment import as_line, environment
from harness.memory import own_peak_above
from support.torchvision_shim import make_torchvision_importable

import structprune

FILE, PAGE = RESULTS / "scale.json", RESULTS / "scale.md"
WINDOW, BATCH = 256, 4
# Hidden width, layers, MLP width, heads, windows.
SIZES = {"small": (512, 8, 1408, 8, 16), "long": (512, 8, 1408, 8, 256), "large": (1536, 16, 4096, 24, 32)}
ROWS = 8192  # positions that a layer is solved on


def run(size: str, offload: bool) -> dict[str, Any]:
    """Prune and recover one model, with activations in files or in memory."""
    make_torchvision_importable()
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, layers, mlp, heads, windows = SIZES[size]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000, hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads // 4, max_position_embeddings=512,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    tokens = torch.randint(config.vocab_size, (windows, WINDOW))
    data = [{"input_ids": part} for part in tokens.split(BATCH)]
    slim = structprune.prune(model, data[0], ratio=0.25, axes=("mlp",), importance="l2", verify=False)
    spent: list[float] = []

    def recovered() -> None:
        begin = time.process_time()
        with tempfile.TemporaryDirectory() as folder:
            where = folder if offload else None
            found = structprune.recover(slim, model, data, rounds=0, rows=ROWS, offload=where)
        report = structprune.recovery_report(found)
        spent.append(time.process_time() - begin)
        print(report.skipped, flush=True)

    above = own_peak_above(recovered)
    held = sum(p.numel() * p.element_size() for p in model.parameters())
    params = sum(p.numel() for p in model.parameters())
    found = {"params": params, "bytes": held, "tokens": tokens.numel(), "offload": offload}
    return found | {"seconds": spent[0], "above": above}


def page(facts: dict[str, Any]) -> str:
    """The results as a table."""
    lines = [
        "# Recovery of language models in bfloat16", "",
        "Made by `python benchmarks/scale.py` (and `--size small`). A Llama shape with random weights loses a quarter "
        f"of its MLPs, and its layers are solved alone, on {ROWS:,} positions. Random weights say nothing of accuracy. "
        "Memory is what the process holds itself at its peak, above what it held before; pages of mapped files, which "
        "the system drops when memory is short, are not counted. *Files*: `recover(offload=)`.", "",
        "| parameters | weights, GB | tokens | activations | CPU s | memory above, GB | over the weights |",
        "|--:|--:|--:|---|--:|--:|--:|",
    ]  # fmt: skip
    for row in facts["rows"].values():
        lines.append(
            f"| {row['params']:,} | {row['bytes'] / 1e9:.2f} | {row['tokens']:,} | "
            f"{'files' if row['offload'] else 'memory'} | {row['seconds']:.0f} | "
            f"{row['above'] / 1e9:.2f} | {row['above'] / row['bytes']:.1f} |"
        )
    notes = [f"{row['params']:,} parameters: {row['note']}." for row in facts["rows"].values() if "note" in row]
    return "\n".join([*lines, *(line for note in notes for line in ("", note)), "", as_line(facts["environment"]), ""])


def main() -> None:
    """Measure one size and write all results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=tuple(SIZES), default="large")
    parser.add_argument("--offload", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    facts: dict[str, Any] = json.loads(FILE.read_text()) if FILE.exists() else {"rows": {}}
    key = f"{given.size}, files" if given.offload else given.size
    facts["rows"][key] = run(given.size, given.offload)
    facts["environment"] = environment()
    FILE.write_text(json.dumps(facts, indent=1) + "\n")
    PAGE.write_text(page(facts))


if __name__ == "__main__":
    main()
