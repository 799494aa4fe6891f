"""Layers that stay whole for a reason, because a channel that is off would still be felt elsewhere."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.cases import case, features, image, tokens
from support.cases_conv import conv


@case(features(), pinned={"fc": "output", "norm": "output"})
class NothingToRemove(nn.Module):
    """Every channel is an input or an output."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm = nn.Linear(6, 8), nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.fc(x))


@case(features(), {"fc2.weight": 0}, pinned={"fc1": "sort"})
class SortedChannels(nn.Module):
    """Which channel goes where depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(6, 8), nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(F.relu(self.fc2(self.fc1(x).sort(dim=-1).values)))


@case(features(), {"fc2.weight": 0}, pinned={"fc1": "cumsum"})
class CumulativeChannels(nn.Module):
    """Each channel adds up those before it, so a removed one would still count in the next."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(6, 8), nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(F.relu(self.fc2(torch.cumsum(torch.sigmoid(self.fc1(x)), dim=-1))))


@case(image(), {"conv2.weight": 0}, pinned={"conv1": "local_response_norm"})
class LocalResponseNorm(nn.Module):
    """Neighbouring channels normalise each other; with one gone the neighbours would be others."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.head = conv(3, 8), conv(8, 8), conv(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.conv2(F.local_response_norm(torch.sigmoid(self.conv1(x)), 3))))


@case(image(), {"conv2.weight": 0}, pinned={"conv1": "amax"})
class MaximumOverChannels(nn.Module):
    """CBAM's spatial attention: the largest channel wins, and a channel that is off takes part with its zero."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.head = conv(3, 8), conv(8, 8), conv(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        return self.head(F.relu(self.conv2(x * torch.sigmoid(x.amax(1, keepdim=True)))))


@case(features(), {"fc3.weight": 0})
class SumOfGates(nn.Module):
    """A gate of nothing is one half, so a sum or a product of gates feels the channels that are off."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3, self.head = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        total = torch.sigmoid(self.fc1(x)).sum(dim=-1, keepdim=True)
        product = torch.exp(0.1 * self.fc1(x)) @ torch.sigmoid(self.fc2(x)).t()
        return self.head(self.fc3(x) * total + product.mean(1, keepdim=True))


@case(tokens(), {"v.weight": 0, "head.weight": 1})
class LinearAttention(nn.Module):
    """Attention by kernel features ``elu + 1``: those of a channel that is off are one."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.head = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = F.elu(self.q(x)) + 1, F.elu(self.k(x)) + 1, self.v(x)
        context = torch.einsum("bnd,bne->bde", k, v)
        scale = 1 / torch.einsum("bnd,bd->bn", q, k.sum(dim=1))
        return self.head(torch.einsum("bnd,bde,bn->bne", q, context, scale))
