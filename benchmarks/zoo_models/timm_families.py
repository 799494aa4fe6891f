"""timm: the smallest model of each of its files, and a second one, as ``choose_timm.py`` found them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zoo_models.entry import Entry

CHOSEN = Path(__file__).with_name("timm_models.json")


def make(name: str, shape: list[int], resized: bool) -> tuple[nn.Module, Any]:
    """A timm model with random weights, and an input of `shape`."""
    import timm

    options = {"img_size": shape[-1]} if resized else {}
    return timm.create_model(name, pretrained=False, **options), torch.randn(shape)


def entries() -> list[Entry]:
    """The chosen models."""
    if not CHOSEN.exists():
        return []
    chosen: dict[str, list[dict[str, Any]]] = json.loads(CHOSEN.read_text())
    return [
        Entry("timm", f"{module}/{m['name']}", lambda m=m: make(m["name"], m["shape"], m["resized"]))
        for rank in (0, 1)
        for module, models in chosen.items()
        for m in models[rank : rank + 1]
    ]
