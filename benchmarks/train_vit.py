"""Train the small vision transformer that `benchmarks/recovery.py` prunes: some 8 minutes on one thread of a CPU.

Run ``python benchmarks/train_vit.py``. Weights go to ``benchmarks/.cache/vit_cifar10.safetensors``, which is not part
of the repository, and the figures of the run to ``results/train_vit.json``. The test set is looked at once, at the end.
"""

from __future__ import annotations

import argparse
import json
import math
import time

import torch
import torch.nn.functional as F
from harness import cifar
from harness.environment import environment
from harness.vit import CACHE, CONFIG, LOG, WEIGHTS, build, load_vit
from safetensors.torch import save_file
from torch import Tensor

BATCH = 64
PEAK = 1.5e-3
WARMUP = 0.05
DECAY = 0.05


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Random crops of the images with four pixels of zeros around them, and random flips."""
    n, _, height, width = images.shape
    padded = F.pad(images, (4, 4, 4, 4))
    top, left = torch.randint(9, (2, n, 1), generator=generator)
    flip = torch.rand(n, 1, generator=generator) < 0.5
    columns = torch.arange(width).expand(n, -1)
    columns = left + torch.where(flip, columns.flip(1), columns)
    rows = top + torch.arange(height)
    at = torch.arange(n)[:, None, None]
    return padded[at, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def rate(step: int, steps: int) -> float:
    """Learning rate: linear warm-up, then half a cosine."""
    done = step / steps
    return PEAK * (done / WARMUP if done < WARMUP else 0.5 * (1 + math.cos(math.pi * (done - WARMUP) / (1 - WARMUP))))


def train(half: int, full: int, seed: int) -> dict[str, float | int]:
    """Train for `half` epochs on a random half of the patches of each image, then for `full` epochs on all of them."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = build(patch_drop_rate=0.5).train()
    for block in model.blocks:  # the fused kernel is slower backwards on a CPU
        block.attn.fused_attn = False
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}], fused=True
    )
    images, labels = cifar.train_images()
    each = len(labels) // BATCH
    steps, used, loss = each * (half + full), time.process_time(), torch.zeros(())
    for epoch in range(half + full):
        model.patch_drop.prob = 0.5 if epoch < half else 0.0
        order, total = torch.randperm(len(labels), generator=generator), 0.0
        for number in range(each):
            picked = order[number * BATCH : (number + 1) * BATCH]
            for group in optimizer.param_groups:
                group["lr"] = rate(epoch * each + number, steps)
            with torch.autocast("cpu", torch.bfloat16):
                out = model(augmented(images[picked], generator))
                loss = F.cross_entropy(out.float(), labels[picked], label_smoothing=0.1)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            total += float(loss.detach())
        print(f"epoch {epoch + 1}: loss {total / each:.4f}, {time.process_time() - used:.0f} s", flush=True)
    CACHE.mkdir(exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, WEIGHTS)
    return {
        "epochs_on_half_of_the_patches": half, "epochs": full, "seed": seed,
        "last_loss": total / each, "cpu_seconds": time.process_time() - used,
    }  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--half", type=int, default=4, help="epochs on half of the patches")
    parser.add_argument("--full", type=int, default=1, help="epochs on all patches")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = train(given.half, given.full, given.seed)
    found["test_accuracy"] = cifar.accuracy(load_vit())
    LOG.write_text(json.dumps({"environment": environment(), "config": CONFIG, **found}, indent=1) + "\n")
    print(json.dumps(found))
