"""Layers whose weight is a parameter normalised over its inputs, with no gain that makes up for a change of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        dims = (1, 2, 3)
        w = self.weight - self.weight.mean(dims, keepdim=True)
        return F.conv2d(x, w / (w.pow(2).mean(dims, keepdim=True) + 1e-5).sqrt(), self.bias, padding=self.padding)


class ByBatchNorm(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        flat = F.batch_norm(self.weight.reshape(1, len(self.weight), -1), None, None, training=True, momentum=0.0)
        return F.conv2d(x, flat.reshape_as(self.weight), self.bias, padding=self.padding)


def _weight(function: Callable[[Tensor], Tensor]) -> type[nn.Module]:
    class Computed(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, function(self.weight), self.bias)

    return Computed


class Afterwards(nn.Linear):
    """The result is divided by the lengths of the weights."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) / self.weight.norm(dim=1) + self.bias


class SharedLength(nn.Linear):
    """The lengths are used twice, so they make up for nothing."""

    def __init__(self, size: int, out: int) -> None:
        super().__init__(size, out)
        self.length = nn.Parameter(torch.rand(out, 1) + 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, torch._weight_norm(self.weight, self.length, 0), self.bias) + self.length[:, 0]


# Name -> class and its arguments.
COMPUTED: dict[str, tuple[type[nn.Module], tuple[Any, ...]]] = {
    "standardised": (Standardised, (8, 8, 3, 1, 1)),
    "standardised by a batch norm": (ByBatchNorm, (8, 8, 3, 1, 1)),
    "normalize": (_weight(F.normalize), (8, 8)),
    "over its length": (_weight(lambda w: w / w.norm(dim=1, keepdim=True)), (8, 8)),
    "over its sum": (_weight(lambda w: w / w.abs().sum(1, keepdim=True)), (8, 8)),
    "over all": (_weight(lambda w: w / w.abs().mean()), (8, 8)),
    "centred": (_weight(lambda w: w - w.mean(1, keepdim=True)), (8, 8)),
    "softmax": (_weight(lambda w: w.softmax(1)), (8, 8)),
    "layer norm": (_weight(lambda w: F.layer_norm(w, w.shape[1:])), (8, 8)),
    "afterwards": (Afterwards, (8, 8)),
    "shared length": (SharedLength, (8, 8)),
}
