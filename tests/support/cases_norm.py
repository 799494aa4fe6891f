"""Norms over channels, by module, by function and by hand."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.cases import case, features, image, tokens
from support.cases_conv import conv


@case(image(), {"conv1.weight": 0, "norm.weight": 0, "norm.bias": 0, "conv2.weight": 1})
class GroupNormNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm, self.conv2 = conv(3, 16), nn.GroupNorm(4, 16), conv(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(F.silu(self.norm(self.conv1(x))))


@case(image(), {"stem.weight": 0, "n1.weight": 0, "a.weight": (0, 1), "n2.weight": 0, "head.weight": 1})
class GroupNormResidual(nn.Module):
    """One group (a layer norm over all) on a residual stream, another grouping inside the branch."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.head = conv(3, 8), conv(8, 12), conv(12, 8), conv(8, 4)
        self.n1, self.n2 = nn.GroupNorm(1, 8), nn.GroupNorm(3, 12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(x + self.b(F.relu(self.n2(self.a(self.n1(x))))))


@case(image(), {"conv1.weight": 0, "norm.weight": 0, "norm.bias": 0, "conv2.weight": (0, 1), "head.weight": 1})
class InstanceNormNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.head = conv(3, 8), conv(8, 8), conv(8, 4)
        self.norm, self.bare = nn.InstanceNorm2d(8, affine=True), nn.InstanceNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.bare(self.conv2(F.relu(self.norm(self.conv1(x))))))


@case(features(), {"fc1.weight": 0, "norm.weight": 0, "norm.running_mean": 0, "fc2.weight": 1})
class BatchNorm1dMlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.norm, self.fc2 = nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.relu(self.norm(self.fc1(x))))


@case(features(), {"fc1.weight": 0, "bn.running_var": 0, "fc2.weight": 1})
class BareBatchNorm(nn.Module):
    """Without weight and bias only the statistics are left to slice."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.bn, self.fc2 = nn.Linear(6, 16), nn.BatchNorm1d(16, affine=False), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.elu(self.bn(self.fc1(x))))


@case(tokens(), {"up.weight": 0, "norm.weight": 0, "norm.bias": 0, "down.weight": 1})
class LayerNormMlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.norm(self.up(x))))


@case(image(), {"conv1.weight": 0, "norm.weight": 0, "conv2.weight": 1})
class LayerNorm2d(nn.Module):
    """Over channels of channels-first images, through two permutes, with the shape taken at run time."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm, self.conv2 = conv(3, 8), nn.LayerNorm(8), conv(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv1(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        x = F.layer_norm(x.movedim(1, -1), x.shape[1:2]).movedim(-1, 1)
        return self.conv2(x)


@case(image(size=3), {"conv1.weight": 0, "norm.weight": 0, "norm.bias": 0, "conv2.weight": 1})
class LayerNormOverImage(nn.Module):
    """The normalised shape has the channels and the image."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm, self.conv2 = conv(3, 8), nn.LayerNorm((8, 3, 3)), conv(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(F.relu(self.norm(self.conv1(x))))


class RmsNorm(nn.Module):
    """As language models write it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


@case(tokens(), {"embed.weight": 0, "norm.weight": 0, "gate.weight": (0, 1), "down.weight": (0, 1), "head.weight": 1})
class HandRmsNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Linear(8, 16), RmsNorm(16), nn.Linear(16, 4)
        self.gate, self.up, self.down = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        y = self.norm(x)
        return self.head(self.norm(x + self.down(F.silu(self.gate(y)) * self.up(y))))


@case(tokens(), {"up.weight": 0, "norm.weight": 0, "down.weight": 1})
class RmsNormModule(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(8, 16), nn.RMSNorm(16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.norm(self.up(x)))


@case(image(), {"conv1.weight": 0, "weight": 0, "bias": 0, "conv2.weight": 1})
class HandLayerNorm2d(nn.Module):
    """ConvNeXt's channels-first norm: mean and variance over dimension 1, weights widened by indexing."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv(3, 8), conv(8, 4)
        self.weight, self.bias = nn.Parameter(torch.ones(8)), nn.Parameter(torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        mean = x.mean(1, keepdim=True)
        var = (x - mean).pow(2).mean(1, keepdim=True)
        x = (x - mean) / torch.sqrt(var + 1e-6)
        return self.conv2(self.weight[:, None, None] * x + self.bias[:, None, None])


@case(image(), {"conv1.weight": 0, "gamma": 1, "beta": 1, "up.weight": 1, "conv2.weight": 1})
class GlobalResponseNorm(nn.Module):
    """ConvNeXt V2: each channel's norm over the image, divided by its mean over the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.up, self.conv2 = conv(3, 8), conv(8, 8, 1), conv(8, 4)
        self.gamma, self.beta = nn.Parameter(torch.ones(1, 8, 1, 1)), nn.Parameter(torch.zeros(1, 8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.conv1(x))
        g = torch.linalg.vector_norm(x, ord=2, dim=(2, 3), keepdim=True)
        n = g / (g.mean(dim=1, keepdim=True) + 1e-6)
        x = x + torch.addcmul(self.beta, self.gamma, x * n)
        return self.conv2(self.up(x))


@case(features(), {"fc1.weight": 0, "fc2.weight": 1})
class CosineFeatures(nn.Module):
    """Unit length by F.normalize, by norm and by einsum."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(6, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.normalize(self.fc1(x), dim=-1)
        x = x / (1 + x.norm(dim=-1, keepdim=True))
        x = x / (1 + torch.einsum("nc,nc->n", x, x)[:, None])
        return self.fc2(x)


@case(features(), pinned={"fc1": "the weights for it are normalised together"})
class CosineClassifier(CosineFeatures):
    """Weights of unit length too: with fewer inputs they would be longer."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.normalize(self.fc1(x), dim=-1), F.normalize(self.fc2.weight, dim=1))


@case(image(), pinned={"conv1": "averaged over"})
class StandardisedConv(nn.Module):
    """Big-transfer's convolution: each filter is standardised over its inputs before use."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv(3, 8), conv(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.conv2.weight
        mean, var = weight.mean((1, 2, 3), keepdim=True), weight.var((1, 2, 3), keepdim=True, unbiased=False)
        return F.conv2d(F.relu(self.conv1(x)), (weight - mean) / (var + 1e-5).sqrt(), self.conv2.bias, padding=1)
