"""The handwritten digits of scikit-learn: 1,797 images of 8 x 8, and networks for them in the manner of LeNet."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

TRAIN, CHOOSE = 1000, 297  # the other 500 are the test set


def digits() -> dict[str, tuple[Tensor, Tensor]]:
    """Images ``(n, 1, 8, 8)`` in [-1, 1] and labels: to train on, to choose by, and to test on."""
    held = load_digits()
    order = torch.randperm(len(held.target), generator=torch.Generator().manual_seed(0))
    x = torch.from_numpy(held.images).float().unsqueeze(1)[order] / 8 - 1
    y = torch.from_numpy(held.target).long()[order]
    ends = {"train": (0, TRAIN), "choose": (TRAIN, TRAIN + CHOOSE), "test": (TRAIN + CHOOSE, len(y))}
    return {name: (x[a:b], y[a:b]) for name, (a, b) in ends.items()}


def lenet_300_100() -> nn.Module:
    """Two hidden layers of 300 and 100."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)
    )


def lenet_5() -> nn.Module:
    """Two convolutions of 20 and 50 channels, and linear layers of 500 and 10."""
    return nn.Sequential(
        nn.Conv2d(1, 20, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(20, 50, 2), nn.ReLU(), nn.Flatten(),
        nn.Linear(200, 500), nn.ReLU(), nn.Dropout(0.5), nn.Linear(500, 10),
    )  # fmt: skip


def epochs(
    model: nn.Module, data: tuple[Tensor, Tensor], first: int, last: int, rate: float, penalty: object = None
) -> Iterator[None]:
    """Train with Adam and a rate that falls to zero along a cosine over `last` epochs, from epoch `first` on."""
    x, y = data
    optimizer = torch.optim.Adam(model.parameters(), rate)
    for epoch in range(first, last):
        model.train()
        for group in optimizer.param_groups:
            group["lr"] = rate * 0.5 * (1 + torch.cos(torch.tensor(epoch / last * torch.pi)).item())
        for batch in torch.randperm(len(x)).split(50):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x[batch]), y[batch])
            if callable(penalty):
                loss = loss + penalty(model)
            loss.backward()
            optimizer.step()
        model.eval()
        yield


@torch.no_grad()
def accuracy(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    """Share of images classified rightly, in percent, in eval mode."""
    model.eval()
    return 100 * float((model(data[0]).argmax(1) == data[1]).float().mean())
