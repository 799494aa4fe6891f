"""Parameters and buffers used bare, shared or tied."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.cases import case, features, image, tokens
from support.cases_conv import conv


@case(features(), {"w1": 0, "b1": 0, "w2": (0, 1), "w3": (0, 1), "w4": 0})
class BareWeights(nn.Module):
    """Weights used by F.linear, @, matmul and einsum, one of them stored transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.b1 = nn.Parameter(torch.empty(16, 6)), nn.Parameter(torch.empty(16))
        self.w2, self.w3 = nn.Parameter(torch.empty(16, 12)), nn.Parameter(torch.empty(8, 12))
        self.w4 = nn.Parameter(torch.empty(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.linear(x, self.w1, self.b1))
        x = F.relu(x @ self.w2)
        x = F.relu(torch.matmul(x, self.w3.t()))
        return torch.einsum("bi,io->bo", x, self.w4)


@case(image(), {"stem.weight": 0, "gamma": 0, "bias": 1, "head.weight": 1})
class BareParameters(nn.Module):
    """A layer scale, and a bias added by hand in the shape that broadcasts."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.head = conv(3, 8), conv(8, 8), conv(8, 4)
        self.gamma, self.bias = nn.Parameter(torch.ones(8)), nn.Parameter(torch.zeros(1, 8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x) + self.bias
        return self.head(x + self.a(x) * self.gamma.view(-1, 1, 1))


@case(image(), {"conv1.weight": 0, "mean": 0, "scale": 1, "table": 0, "conv2.weight": 1})
class BareBuffers(nn.Module):
    """Statistics frozen into buffers, and a plain tensor that is no buffer at all."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv(3, 8), conv(8, 4)
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("scale", torch.ones(1, 8, 1, 1))
        self.table = torch.linspace(0.5, 1.5, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = (self.conv1(x) - self.mean.reshape(1, -1, 1, 1)) * self.scale
        return self.conv2(x * self.table[None, :, None, None])


@case(image(), {"weight": (0, 1), "stem.weight": 0, "head.weight": 1})
class BareConvWeight(nn.Module):
    """F.conv2d on a parameter, once grouped by attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.channels = 8
        self.stem, self.head = conv(3, 8), conv(8, 4)
        self.weight, self.depth = nn.Parameter(torch.empty(8, 8, 3, 3)), nn.Parameter(torch.empty(8, 1, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(self.stem(x), self.weight, padding=1)
        return self.head(F.conv2d(x, self.depth, padding=1, groups=self.channels))


@case(features(16), {"encode.weight": 0, "encode.bias": 0})
class TiedAutoencoder(nn.Module):
    """The decoder is the encoder transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.bias = nn.Linear(16, 12), nn.Parameter(torch.zeros(16))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.sigmoid(self.encode(x)) - 0.5, self.encode.weight.t(), self.bias)


@case(features(), {"fc1.weight": 0, "a.weight": (0, 1), "b.weight": (0, 1), "head.weight": 1})
class TiedLayers(nn.Module):
    """Two modules hold one weight but each its own bias."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.a, self.b, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.b(F.relu(self.a(self.fc1(x))))))


@case(image(), {"stem.weight": 0, "tower.0.weight": (0, 1), "tower.1.weight": 0, "tower.3.weight": 1})
class SharedTower(nn.Module):
    """A detection head's tower on two levels of a pyramid."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.next = conv(3, 8), conv(8, 8, stride=2)
        self.tower = nn.Sequential(conv(8, 12), nn.BatchNorm2d(12), nn.ReLU(inplace=True), conv(12, 4))

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.stem(x)
        y = self.next(x)
        up = F.interpolate(y, size=x.shape[-2:], mode="nearest")
        return [self.tower(x + up), self.tower(y)]


@case(features(), {"shared.weight": 0, "head.weight": 1})
class SiameseOnOneInput(nn.Module):
    """One layer sees the input twice; the input's channels may not go, its own may."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.head = nn.Linear(6, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.shared(x), self.shared(x.flip(1))
        return self.head((a - b).abs() + a * b)


@case(image(), {"a.weight": 0, "b.weight": 0, "head.weight": 1})
class MaskedBranches(nn.Module):
    """torch.where and masked_fill between branches, masks from one channel of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = conv(3, 8), conv(3, 8), conv(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        mask = x[:, :1] > 0
        y = torch.where(mask, self.a(x), self.b(x))
        return self.head(y.masked_fill(x.sum(1, keepdim=True) < 0, 0.0))


@case(features(), {"experts": 2, "out": 1})
class DenseExperts(nn.Module):
    """A mixture of experts computed densely with stacked weights."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(6, 4)
        self.experts, self.out = nn.Parameter(torch.empty(4, 6, 16)), nn.Parameter(torch.empty(4, 16, 8))

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(torch.einsum("bi,eih->ebh", x, self.experts))
        y = torch.bmm(hidden, self.out)
        return (y * self.gate(x).softmax(-1).t()[..., None]).sum(0)


@case(features(), {"fc1.weight": 0, "fc2.weight": 1})
class LowRank(nn.Module):
    """A weight multiplied together in the forward (an adapter merged on the fly)."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(6, 16), nn.Linear(16, 4)
        self.down, self.up = nn.Parameter(torch.empty(8, 16)), nn.Parameter(torch.empty(4, 8))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.relu(self.fc1(x)), self.fc2.weight + 0.5 * (self.up @ self.down), self.fc2.bias)


@case(tokens(), {"pre.weight": 0, "left.weight": 1, "right.weight": 1})
class BilinearPair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pre, self.bilinear = nn.Linear(8, 16), nn.Bilinear(12, 16, 4)
        self.left, self.right = nn.Linear(16, 12), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.pre(x))
        return self.bilinear(self.left(x), self.right(x))
