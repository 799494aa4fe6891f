"""Batches of images from a folder, as the networks of torchvision and timm take them, or from a function."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import typer
from torch import Tensor, nn

from structprune.cli.models import Loaded, named_object
from structprune.extras import require

ENDINGS = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm"})
# Those of ImageNet, which torchvision's weights and most of timm's were trained with.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# The shorter side is this much longer than the crop.
_MARGIN = 1.143


@dataclass(frozen=True)
class Images:
    """Files of images with what a network takes of them.

    Attributes:
        files: the images.
        size: height and width of the crop.
        mean: of each channel.
        std: of each channel.
        batch: images in one batch.
    """

    files: tuple[Path, ...]
    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    batch: int

    def __len__(self) -> int:
        return -(-len(self.files) // self.batch)

    def __iter__(self) -> Iterator[Tensor]:
        for start in range(0, len(self.files), self.batch):
            yield torch.stack([self._read(file) for file in self.files[start : start + self.batch]])

    def _read(self, file: Path) -> Tensor:
        """One image: the shorter side scaled, the middle cut out, channels first."""
        image = require("PIL.Image", "Reading images", "models")
        height, width = self.size
        with image.open(file) as opened:
            picture = opened.convert("RGB")
        scale = max(height, width) * _MARGIN / min(picture.size)
        picture = picture.resize((max(width, round(picture.width * scale)), max(height, round(picture.height * scale))))
        left, top = (picture.width - width) // 2, (picture.height - height) // 2
        pixels = np.asarray(picture.crop((left, top, left + width, top + height)), dtype=np.float32) / 255
        return torch.from_numpy((pixels - self.mean) / self.std).float().permute(2, 0, 1)


def images_in(folder: Path, model: nn.Module, inputs: Any, samples: int, batch: int, seed: int) -> Images:
    """Some images of a folder and those below it, drawn at random.

    Raises:
        typer.BadParameter: there are none, or the model takes something else than images.
    """
    if not isinstance(inputs, Tensor) or inputs.dim() != 4 or inputs.shape[1] != 3:
        raise typer.BadParameter("--data is a folder, but the model takes no images; give module:function of batches.")
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in ENDINGS)
    if not files:
        raise typer.BadParameter(f"There is no image in {folder} or in the folders below it.")
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(seed))[:samples].tolist()
    config: dict[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    height, width = inputs.shape[2:]
    return Images(
        tuple(files[i] for i in order),
        (int(height), int(width)),
        tuple(config.get("mean", _MEAN)),
        tuple(config.get("std", _STD)),
        batch,
    )


def batches_of(data: str, loaded: Loaded, samples: int, batch: int, seed: int) -> list[Tensor]:
    """Batches without labels from a folder of images, or what ``module:function`` makes, on the device of the model."""
    if Path(data).is_dir():
        given: Any = images_in(Path(data), loaded.model, loaded.inputs, samples, batch, seed)
    elif ":" in data:
        given = named_object(data)()
    else:
        raise typer.BadParameter(f"--data is {data!r}; give a folder of images, or module:function of batches.")
    device = next(loaded.model.parameters()).device
    batches = [each[0] if isinstance(each, (tuple, list)) else each for each in given]
    if not batches or not all(isinstance(each, Tensor) for each in batches):
        raise typer.BadParameter(f"{data} gives no batches of tensors, nor pairs that begin with one.")
    return [each.to(device) for each in batches]
