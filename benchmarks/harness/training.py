"""Training of the networks that benchmarks prune and nobody ships: augmented CIFAR-10, on one thread of a CPU."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from harness import cifar

T = TypeVar("T", bound=nn.Module)

PAD = 4
WARMUP = 0.05


@dataclass(frozen=True)
class Epoch:
    """How one epoch is trained.

    Attributes:
        begin: called with the model before it.
        prepare: changes each batch of images, once it is augmented.
    """

    begin: Callable[[nn.Module], object] = lambda model: None
    prepare: Callable[[Tensor], Tensor] = lambda images: images


def half_is_fast() -> bool:
    """Whether the processor has instructions for bfloat16: half the time then, and 20 times as much without."""
    return torch.cpu._is_avx512_bf16_supported()


def half_if_fast() -> torch.autocast:
    """Operations in bfloat16 where that is fast, in float32 elsewhere."""
    return torch.autocast("cpu", torch.bfloat16, enabled=half_is_fast())


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Random crops of the images with four pixels of zeros around them, and random flips."""
    n, _, height, width = images.shape
    padded = F.pad(images, (PAD, PAD, PAD, PAD))
    top, left = torch.randint(2 * PAD + 1, (2, n, 1), generator=generator)
    flip = torch.rand(n, 1, generator=generator) < 0.5
    columns = torch.arange(width).expand(n, -1)
    columns = left + torch.where(flip, columns.flip(1), columns)
    rows = top + torch.arange(height)
    at = torch.arange(n)[:, None, None]
    return padded[at, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def rate(done: float) -> float:
    """The learning rate as a share of its peak, after a share of all steps: linear warm-up, then half a cosine."""
    return done / WARMUP if done < WARMUP else 0.5 * (1 + math.cos(math.pi * (done - WARMUP) / (1 - WARMUP)))


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, epochs: Sequence[Epoch], *, peak: float, batch: int, seed: int
) -> dict[str, float | int]:
    """Train on the training set of CIFAR-10, in bfloat16 where that is fast, with smoothed labels.

    Args:
        model: in training mode.
        optimizer: of its parameters; the learning rate is set at each step.
        epochs: one for each.
        peak: the greatest learning rate.
        batch: images in a batch; what is left of an epoch is left out.
        seed: of crops, flips and order.

    Returns:
        The mean loss of the last epoch, and the CPU seconds of all.
    """
    generator = torch.Generator().manual_seed(seed)
    images, labels = cifar.train_images()
    each = len(labels) // batch
    used, total = time.process_time(), 0.0
    for number, epoch in enumerate(epochs):
        epoch.begin(model)
        order, total = torch.randperm(len(labels), generator=generator), 0.0
        for step in range(each):
            picked = order[step * batch : (step + 1) * batch]
            for group in optimizer.param_groups:
                group["lr"] = peak * rate((number * each + step) / (each * len(epochs)))
            with half_if_fast():
                out = model(epoch.prepare(augmented(images[picked], generator)))
                loss = F.cross_entropy(out.float(), labels[picked], label_smoothing=0.1)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            total += float(loss.detach())
        print(f"epoch {number + 1}: loss {total / each:.4f}, {time.process_time() - used:.0f} s", flush=True)
    return {"last_loss": total / each, "cpu_seconds": time.process_time() - used}


def save(model: nn.Module, path: Path) -> None:
    """Keep the weights for `trained`; the folder is made if it is not there."""
    path.parent.mkdir(exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path)


def trained(model: T, path: Path, command: str) -> T:
    """The model with the weights that were kept, in eval mode.

    Raises:
        FileNotFoundError: it has not been trained on this machine; the message says by which command it is.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not here. Run {command} first.")
    model.load_state_dict(load_file(path))
    return model.eval()
