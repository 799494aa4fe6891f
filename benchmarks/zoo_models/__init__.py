"""The models of ``zoo.py``, one file a family."""

from __future__ import annotations

from zoo_models import generation, speech, timm_families, torchvision_families, transformers_families, yolo
from zoo_models.entry import Entry

FAMILIES = {
    "torchvision": torchvision_families.entries,
    "timm": timm_families.entries,
    "transformers": transformers_families.entries,
    "generation": generation.entries,
    "speech": speech.entries,
    "yolo": yolo.entries,
}


def entries() -> list[Entry]:
    """All models, by family."""
    return [entry for family in FAMILIES.values() for entry in family()]
