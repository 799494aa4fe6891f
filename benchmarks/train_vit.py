"""Train the small vision transformer that `benchmarks/recovery.py` prunes: some 8 minutes on one thread of a CPU.

Run ``python benchmarks/train_vit.py``. Weights go to ``benchmarks/.cache/vit_cifar10.safetensors``, which is not part
of the repository, and the figures of the run to ``results/train_vit.json``. The test set is looked at once, at the end.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from typing import Any

import torch
from harness import cifar
from harness.environment import environment
from harness.training import Epoch, save, train
from harness.vit import CONFIG, LOG, WEIGHTS, build, load_vit

BATCH = 64
PEAK = 1.5e-3
DECAY = 0.05


def drop_patches(share: float, model: Any) -> None:
    """Leave out so many of each image's patches from now on."""
    model.patch_drop.prob = share


def run(half: int, full: int, seed: int) -> dict[str, float | int]:
    """Train for `half` epochs on a random half of the patches of each image, then for `full` epochs on all of them."""
    torch.manual_seed(seed)
    model: Any = build(patch_drop_rate=0.5).train()
    for block in model.blocks:  # the fused kernel is slower backwards on a CPU
        block.attn.fused_attn = False
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}], fused=True
    )
    epochs = [*[Epoch(partial(drop_patches, 0.5))] * half, *[Epoch(partial(drop_patches, 0.0))] * full]
    found = train(model, optimizer, epochs, peak=PEAK, batch=BATCH, seed=seed)
    save(model, WEIGHTS)
    return {"epochs_on_half_of_the_patches": half, "epochs": full, "seed": seed, **found}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--half", type=int, default=4, help="epochs on half of the patches")
    parser.add_argument("--full", type=int, default=1, help="epochs on all patches")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = run(given.half, given.full, given.seed)
    found["test_accuracy"] = cifar.accuracy(load_vit())
    LOG.write_text(json.dumps({"environment": environment(), "config": CONFIG, **found}, indent=1) + "\n")
    print(json.dumps(found))
