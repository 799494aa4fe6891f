"""VGG-19 with batch norms for CIFAR-10, as `benchmarks/train_vgg.py` trains it."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from harness import ROOT
from harness.training import trained

CACHE = ROOT / "benchmarks" / ".cache"
WEIGHTS = CACHE / "vgg19_cifar10.safetensors"
LOG = ROOT / "benchmarks" / "results" / "train_vgg.json"
# Channels of 3x3 convolutions; None is max pooling (Simonyan and Zisserman, 2015, table 1, E). A linear layer follows.
LAYERS = (64, 64, None, 128, 128, None, *[256] * 4, None, *[512] * 4, None, *[512] * 4)


def build() -> nn.Sequential:
    """The network, not trained: 20.0 M parameters, 398 M multiply-accumulates at 32 x 32."""
    layers: list[nn.Module] = []
    width = 3
    for channels in LAYERS:
        if channels is None:
            layers.append(nn.MaxPool2d(2))
        else:
            convolution = nn.Conv2d(width, channels, 3, padding=1, bias=False)
            layers += [convolution, nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]
            width = channels
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


def load_vgg(path: Path = WEIGHTS) -> nn.Sequential:
    """The trained network, in eval mode; see `harness.training.trained`."""
    return trained(build(), path, "python benchmarks/train_vgg.py (45 minutes)")
