"""torchvision: all classification, segmentation, video and optical flow models, and the detectors' backbones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from unittest.mock import patch

import torch
from support.torchvision_shim import compiled_operators_load
from torch import Tensor, nn

from zoo_models.entry import Entry

# Models that take other inputs than one image of 64 x 64, by the beginning of their names.
_SHAPES: dict[str, tuple[int, ...]] = {
    "inception_v3": (1, 3, 96, 96),
    "maxvit": (1, 3, 224, 224),
    "s3d": (1, 3, 16, 224, 224),
    "mvit": (1, 3, 8, 64, 64),
    "swin3d": (1, 3, 8, 64, 64),
    "r3d": (1, 3, 8, 64, 64),
    "mc3": (1, 3, 8, 64, 64),
    "r2plus1d": (1, 3, 8, 64, 64),
    "raft": (1, 3, 128, 128),
    "vit_h_14": (1, 3, 56, 56),
}
_OPTIONS: dict[str, dict[str, Any]] = {
    "vit_h_14": {"image_size": 56},
    "vit": {"image_size": 64},
    "inception_v3": {"init_weights": False},
    "googlenet": {"init_weights": False},
}


def _first(table: dict[str, Any], name: str, default: Any) -> Any:
    return next((value for start, value in table.items() if name.startswith(start)), default)


def _make(name: str, **options: Any) -> tuple[nn.Module, Any]:
    import torchvision

    options |= _first(_OPTIONS, name, {})
    model = torchvision.models.get_model(name, weights=None, **options)
    x = torch.randn(_first(_SHAPES, name, (1, 3, 64, 64)))
    return model, (x, torch.randn_like(x)) if name.startswith("raft") else x


def _video(name: str) -> tuple[nn.Module, Any]:
    """MViT knows the size of its clips; its functions fix it, so that a smaller one has to be slipped in."""
    if not name.startswith("mvit"):
        return _make(name)
    from torchvision.models.video import mvit

    whole = mvit._mvit

    def small(**options: Any) -> nn.Module:
        frames, *size = _first(_SHAPES, name, ())[2:]
        return whole(**{**options, "spatial_size": tuple(size), "temporal_size": frames})

    with patch.object(mvit, "_mvit", small):
        return _make(name)


def _segmentation(name: str) -> tuple[nn.Module, Any]:
    return _make(name, weights_backbone=None)


class _Backbone(nn.Module):
    """A detector's backbone; its maps come out as a tuple."""

    def __init__(self, body: nn.Module):
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Sequence[Tensor]:
        return tuple(self.body(x).values())


def _backbone(name: str) -> tuple[nn.Module, Any]:
    import torchvision

    detector = torchvision.models.get_model(name, weights=None, weights_backbone=None)
    side = 300 if name.startswith("ssd300") else 64
    return _Backbone(detector.backbone), torch.randn(1, 3, side, side)


def _detector(name: str) -> tuple[nn.Module, Any]:
    import torchvision

    size = (300, 300) if name.startswith("ssd300") else (320, 320) if name.startswith("ssdlite") else (64, 64)
    model = torchvision.models.get_model(name, weights=None, weights_backbone=None)
    return model, ([torch.rand(3, *size)],)


def entries() -> list[Entry]:
    """All of them, as torchvision itself lists them."""
    from torchvision import models

    found = []
    for module, build in (
        (models, _make),
        (models.segmentation, _segmentation),
        (models.video, _video),
        (models.optical_flow, _make),
    ):
        found += [
            Entry("torchvision", name, lambda name=name, build=build: build(name))
            for name in models.list_models(module=module)
        ]
    found += [
        Entry("torchvision", f"{name}.backbone", lambda name=name: _backbone(name))
        for name in models.list_models(module=models.detection)
    ]
    if compiled_operators_load():
        found += [
            Entry("torchvision", name, lambda name=name: _detector(name))
            for name in models.list_models(module=models.detection)
        ]
    return found
