"""Train the VGG-19 that `benchmarks/search.py` prunes: some 45 minutes on one thread of a CPU.

Run ``python benchmarks/train_vgg.py``. The first epochs see images of half the size, which takes a third of the time.
Weights go to ``benchmarks/.cache/vgg19_cifar10.safetensors``, which is not part of the repository, and the figures of
the run to ``results/train_vgg.json``. The test set is looked at once, at the end.
"""

from __future__ import annotations

import argparse
import json

import torch
import torch.nn.functional as F
from harness import cifar
from harness.environment import environment
from harness.training import Epoch, save, train
from harness.vgg import LOG, WEIGHTS, build, load_vgg
from torch import Tensor

BATCH = 128
PEAK = 0.1
DECAY = 5e-4


def halved(images: Tensor) -> Tensor:
    """Images of half the height and width."""
    return F.avg_pool2d(images, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", type=int, default=5, help="epochs on images of half the size")
    parser.add_argument("--full", type=int, default=5, help="epochs on whole images")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(given.seed)
    model = build().to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), PEAK, momentum=0.9, weight_decay=DECAY, nesterov=True)
    epochs = [*[Epoch(prepare=halved)] * given.small, *[Epoch()] * given.full]
    found = train(model, optimizer, epochs, peak=PEAK, batch=BATCH, seed=given.seed)
    save(model, WEIGHTS)
    told = {"epochs_on_half_the_size": given.small, "epochs": given.full, "seed": given.seed, **found}
    told["test_accuracy"] = cifar.accuracy(load_vgg())
    LOG.write_text(json.dumps({"environment": environment(), **told}, indent=1) + "\n")
    print(json.dumps(told))


if __name__ == "__main__":
    main()
