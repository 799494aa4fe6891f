"""CIFAR-10 and the residual networks trained on it: model, data, accuracy.

The folder with ``cifar10/`` and ``resnet_cifar10/`` is named by the environment variable ``STRUCTPRUNE_DATA``; without
it, ``shared/data`` beside the repository is looked for.
"""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from harness import ROOT

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def data_folder() -> Path | None:
    """Where the data lies, or None if it is not on this machine."""
    named = os.environ.get("STRUCTPRUNE_DATA")
    # In a linked worktree the repository proper may lie elsewhere, so its parents are looked through too.
    places = [Path(named)] if named else [parent / "shared" / "data" for parent in ROOT.parents]
    return next((place for place in places if (place / "cifar10" / "test.npz").is_file()), None)


def require_data() -> Path:
    """The folder with the data.

    Raises:
        FileNotFoundError: it is not on this machine; the message says how to name it.
    """
    folder = data_folder()
    if folder is None:
        raise FileNotFoundError(
            "CIFAR-10 and its trained networks are not here. Set STRUCTPRUNE_DATA to the folder with cifar10/ and "
            "resnet_cifar10/."
        )
    return folder


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut; where the shape changes, the shortcut is thinned out and zero-padded."""

    def __init__(self, fan_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(fan_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.pad = (channels - fan_in) // 2

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.pad:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(out + x)


class CifarResNet(nn.Module):
    """He et al., Deep Residual Learning, 2016, section 4.2: 6n + 2 layers, shortcuts of option A."""

    def __init__(self, depth: int, classes: int = 10) -> None:
        super().__init__()
        if (depth - 2) % 6:
            raise ValueError(f"The depth of a CIFAR ResNet is 6n + 2, not {depth}.")
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, blocks, 1)
        self.layer2 = self._stage(16, 32, blocks, 2)
        self.layer3 = self._stage(32, 64, blocks, 2)
        self.linear = nn.Linear(64, classes)

    @staticmethod
    def _stage(fan_in: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
        first = BasicBlock(fan_in, channels, stride)
        return nn.Sequential(first, *(BasicBlock(channels, channels, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


def load_resnet(depth: int) -> CifarResNet:
    """The trained network of this depth (20 or 56), in eval mode."""
    model = CifarResNet(depth)
    state = load_file(require_data() / "resnet_cifar10" / f"resnet{depth}.safetensors")
    missing, unexpected = model.load_state_dict(state, strict=False)
    # The file holds no counters of batches; all else has to fit.
    wrong = [*unexpected, *(name for name in missing if not name.endswith("num_batches_tracked"))]
    if wrong:
        raise ValueError(f"The weights of resnet{depth} do not fit: {wrong}.")
    return model.eval()


def normalised(images: np.ndarray) -> Tensor:
    """Float images ``(n, 3, 32, 32)``, normalised, of bytes ``(n, 32, 32, 3)``."""
    x = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float().div_(255)
    return x.sub_(torch.tensor(MEAN).view(3, 1, 1)).div_(torch.tensor(STD).view(3, 1, 1)).contiguous()


@lru_cache(maxsize=2)
def _arrays(part: str) -> tuple[np.ndarray, np.ndarray]:
    with np.load(require_data() / "cifar10" / f"{part}.npz") as held:
        return held["images"], held["labels"].astype(np.int64)


def train_arrays() -> tuple[np.ndarray, np.ndarray]:
    """The 50,000 training images as bytes, shape ``(n, 32, 32, 3)``, and their labels."""
    return _arrays("train")


def train_images(n: int | None = None, seed: int = 0) -> tuple[Tensor, Tensor]:
    """`n` training images drawn without replacement (all of them if None), and their labels; not augmented."""
    images, labels = _arrays("train")
    order = np.random.default_rng(seed).permutation(len(labels))
    picked = np.arange(len(labels)) if n is None else order[:n]
    return normalised(images[picked]), torch.from_numpy(labels[picked])


def test_set() -> tuple[Tensor, Tensor]:
    """The 10,000 test images and their labels."""
    images, labels = _arrays("test")
    return normalised(images), torch.from_numpy(labels)


def batches(images: Tensor, labels: Tensor, size: int = 128) -> list[tuple[Tensor, Tensor]]:
    """Pairs of at most `size` images and labels, in order; views, so no memory is taken."""
    return list(zip(images.split(size), labels.split(size), strict=True))


def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean loss of a batch."""
    return F.cross_entropy(model(batch[0]), batch[1])


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor | None = None, labels: Tensor | None = None, size: int = 500) -> float:
    """Share of images classified rightly, in percent, in eval mode; the test set if none are given."""
    if images is None or labels is None:
        images, labels = test_set()
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    right = 0
    try:
        for x, y in batches(images, labels, size):
            right += int((model(x.to(device)).argmax(1).cpu() == y).sum())
    finally:
        model.train(training)
    return 100 * right / len(labels)
