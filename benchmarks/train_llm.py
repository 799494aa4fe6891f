"""Train the Llama of 5.9 M parameters that `benchmarks/llm.py` prunes: some 20 minutes on one thread of a CPU.

The small Llama of `harness.stories` writes the text, by sampling at temperature 1, and is the teacher: at each position
the loss is the cross-entropy with its probabilities. No real text is trained on, so that both halves of the real tokens
are new to the network: the first calibrates, the second judges, here once, at the end.

Run ``python benchmarks/train_llm.py`` with the data at hand (see `harness.cifar`). Text, weights and the state of the
training go to ``benchmarks/.cache``, which is not part of the repository, and the figures of the run to
``results/train_llm.json``. A run that was cut short goes on where its last state was saved, with other ``--steps`` if
so asked: the log then tells from which step on the schedule was for how many.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from typing import Any

import numpy as np
import torch
from harness import llm, stories
from harness.environment import environment
from harness.training import half_if_fast
from safetensors.torch import save_file
from torch import Tensor

ROW = 512  # tokens that are written in one go
ROWS = 256  # such rows in a file
BATCH = 8  # windows of 256 tokens
PEAK = 2e-3
WARMUP = 100
DECAY = 0.1
SAVE_SECONDS = 120.0


def text(files: int, seed: int) -> Tensor:
    """Rows of text, of shape ``(256 files, 512)``; what was written before is read."""
    llm.TEXT.mkdir(parents=True, exist_ok=True)
    parts: list[Tensor] = []
    for number in range(files):
        path = llm.TEXT / f"{seed}_{number:03}.npy"
        if not path.is_file():
            used = time.process_time()
            written = stories.written(stories.load_stories(), ROWS, 1000 * seed + number, length=ROW, batch=ROWS)
            np.save(path, written.numpy().astype(np.int16))
            print(f"text {number + 1} of {files}: {time.process_time() - used:.0f} CPU seconds", flush=True)
        parts.append(torch.from_numpy(np.load(path)))
    return torch.cat(parts)


def rate(step: int, steps: int) -> float:
    """Learning rate: linear warm-up, then half a cosine, to a hundredth of the peak."""
    if step < WARMUP:
        return PEAK * (step + 1) / WARMUP
    return PEAK * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / (steps - WARMUP))))


def batch(rows: Tensor, step: int, seed: int) -> Tensor:
    """Windows of 256 tokens that begin anywhere in the first half of rows; every row is drawn once in an epoch."""
    each = len(rows) // BATCH
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed * 1000 + step // each))
    picked = rows[order[step % each * BATCH :][:BATCH]]
    begin = torch.randint(ROW - stories.WINDOW + 1, (BATCH, 1), generator=torch.Generator().manual_seed(step))
    return picked.long().gather(1, begin + torch.arange(stories.WINDOW))


def weights(model: Any) -> dict[str, Tensor]:
    """All weights, the tied ones once."""
    kept = {name for name, _ in model.named_parameters()}
    return {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name in kept}


def train(rows: Tensor, steps: int, seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    teacher, model = stories.load_stories(), llm.build().train()
    matrices = [p for p in model.parameters() if p.dim() > 1]
    gains = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": DECAY}, {"params": gains, "weight_decay": 0.0}],
        betas=(0.9, 0.95), fused=True,
    )  # fmt: skip
    step, spent, losses, planned = 0, 0.0, [], dict[int, int]()
    if llm.STATE.is_file():
        state = torch.load(llm.STATE)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, spent, losses, planned = (state[key] for key in ("step", "cpu_seconds", "losses", "planned"))
    if steps not in planned.values():
        planned[step] = steps
    saved, used = time.monotonic(), time.process_time() - spent
    while step < steps:
        ids = batch(rows, step, seed)
        with torch.no_grad():
            aim = teacher(**stories.as_batch(ids)).logits.softmax(-1)
        for group in optimizer.param_groups:
            group["lr"] = rate(step, steps)
        with half_if_fast():
            logits = model(**stories.as_batch(ids)).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), aim.flatten(0, 1))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        losses.append(float(loss.detach()))
        if step % 50 == 0:
            mean = sum(losses[-50:]) / 50
            print(f"step {step} of {steps}: loss {mean:.4f}, {time.process_time() - used:.0f} s", flush=True)
        if time.monotonic() - saved > SAVE_SECONDS or step == steps:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
            state |= {"cpu_seconds": time.process_time() - used, "losses": losses, "planned": planned}
            torch.save(state, llm.STATE.with_suffix(".new"))
            llm.STATE.with_suffix(".new").replace(llm.STATE)
            save_file(weights(model), llm.WEIGHTS)
            saved = time.monotonic()
    return {
        "steps": steps, "steps_planned_from_step": planned, "windows_in_a_step": BATCH, "seed": seed,
        "last_loss": sum(losses[-50:]) / len(losses[-50:]),
        "cpu_seconds": round(time.process_time() - used),
    }  # fmt: skip


def main(files: int, steps: int, seed: int) -> None:
    rows = text(files, seed)
    found = train(rows, steps, seed)
    teacher, model, judge = stories.load_stories(), llm.load_llm(), stories.windows(1)
    found |= {
        "tokens_written": rows.numel(), "tokens_trained_on": steps * BATCH * stories.WINDOW,
        "params": sum(p.numel() for p in model.parameters()), "perplexity": stories.perplexity(model, judge),
        "perplexity_of_the_small_one": stories.perplexity(teacher, judge),
        "perplexity_first_half": stories.perplexity(model, stories.windows(0)),
    }  # fmt: skip
    llm.LOG.write_text(json.dumps({"environment": environment(), "config": llm.CONFIG, **found}, indent=1) + "\n")
    print(json.dumps(found))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=16, help="files of 131,072 tokens of text")
    parser.add_argument("--steps", type=int, default=1500, help="of 8 windows of 256 tokens")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    main(given.files, given.steps, given.seed)
