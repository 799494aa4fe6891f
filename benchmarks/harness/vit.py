"""A small vision transformer for CIFAR-10, as `benchmarks/train_vit.py` trains it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from support.torchvision_shim import make_torchvision_importable
from torch import nn

from harness import ROOT
from harness.training import trained

CACHE = ROOT / "benchmarks" / ".cache"
WEIGHTS = CACHE / "vit_cifar10.safetensors"
LOG = ROOT / "benchmarks" / "results" / "train_vit.json"
CONFIG = {
    "img_size": 32, "patch_size": 4, "num_classes": 10, "embed_dim": 96, "depth": 6, "num_heads": 4, "mlp_ratio": 4.0,
    "class_token": False, "global_pool": "avg",
}  # fmt: skip


def build(**changes: Any) -> nn.Module:
    """Timm's VisionTransformer: 64 patches of 4x4, width 96, 6 blocks of 4 heads; not trained."""
    make_torchvision_importable()
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(**{**CONFIG, **changes})


def load_vit(path: Path = WEIGHTS) -> nn.Module:
    """The trained network, in eval mode; see `harness.training.trained`."""
    return trained(build(), path, "python benchmarks/train_vit.py (8 minutes)")


def log() -> dict[str, Any]:
    """What the training reported."""
    return json.loads(LOG.read_text())
