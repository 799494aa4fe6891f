"""Convolutional networks: chains, branches, groups, depthwise, transposed, and the blocks of known families."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.cases import case, image


def conv(i: int, o: int, k: int = 3, **kwargs: int) -> nn.Conv2d:
    """A convolution that keeps the image's size."""
    return nn.Conv2d(i, o, k, padding=k // 2, **kwargs)


BN = ("weight", "bias", "running_mean", "running_var")


@case(image(), {"conv1.weight": 0, "conv1.bias": 0, **{f"bn.{n}": 0 for n in BN}, "conv2.weight": 1})
class ConvBnRelu(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn, self.conv2 = conv(3, 8), nn.BatchNorm2d(8), conv(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(F.relu(self.bn(self.conv1(x))))


@case(image(), {"stem.weight": 0, "a.weight": (0, 1), "b.weight": (0, 1), "norm.weight": 0, "head.weight": 1})
class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.head = conv(3, 8), conv(8, 12), conv(12, 8), conv(8, 4)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = F.relu(x + self.norm(self.b(F.relu(self.a(x)))), inplace=True)
        x += self.b(self.a(x))
        return self.head(x)


@case(image(), {"l0.weight": 0, "l1.weight": (0, 1), "n2.weight": 0, "l2.weight": (0, 1), "head.weight": 1})
class DenseBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.l0, self.l1, self.l2, self.head = conv(3, 8), conv(8, 6), conv(14, 8), conv(22, 5)
        self.n2 = nn.BatchNorm2d(14)

    def forward(self, x: Tensor) -> Tensor:
        kept = [self.l0(x)]
        kept.append(self.l1(F.relu(kept[0])))
        kept.append(self.l2(F.relu(self.n2(torch.cat(kept, 1)))))
        return self.head(torch.cat(kept, 1))


@case(image(), {"stem.weight": 0, "b1.weight": (0, 1), "b3.weight": (0, 1), "b5.weight": 0, "head.weight": 1})
class Inception(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.b1, self.b3, self.b5 = conv(3, 8), conv(8, 6, 1), conv(8, 8), conv(8, 10, 5)
        self.norm, self.head = nn.BatchNorm2d(32), conv(32, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        branches = (self.b1(x), self.b3(x), self.b5(x), F.max_pool2d(x, 3, 1, 1))
        return self.head(self.norm(torch.concat(branches, dim=-3)))


@case(image(), {"expand.weight": 0, "depth.weight": 0, "norm.weight": 0, "project.weight": (0, 1), "head.weight": 1})
class InvertedResidual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.expand, self.project, self.head = conv(3, 8), conv(8, 24, 1), conv(24, 8, 1), conv(8, 4)
        self.depth, self.norm = conv(24, 24, groups=24), nn.BatchNorm2d(24)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(x + self.project(F.relu6(self.norm(self.depth(F.relu6(self.expand(x)))))))


@case(image(), {"conv1.weight": 0, "depth.weight": 0, "conv2.weight": 1})
class DepthMultiplier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.depth, self.conv2 = conv(3, 8), conv(8, 24, groups=8), conv(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(F.relu(self.depth(self.conv1(x))))


@case(image(), {"conv1.weight": 0, "grouped.weight": 0, "grouped.bias": 0, "norm.weight": 0, "conv2.weight": 1})
class GroupedConv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.grouped, self.conv2 = conv(3, 16), conv(16, 24, groups=4), conv(24, 4)
        self.norm = nn.BatchNorm2d(24)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(F.relu(self.norm(self.grouped(F.relu(self.conv1(x))))))


@case(image(), {"stem.weight": 0, "reduce.weight": 0, "grouped.weight": 0, "expand.weight": (0, 1), "head.weight": 1})
class ResNeXtBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.reduce, self.expand = conv(3, 16), conv(16, 8, 1), conv(8, 16, 1)
        self.grouped, self.head = conv(8, 8, groups=2), conv(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(F.relu(x + self.expand(F.relu(self.grouped(F.relu(self.reduce(x)))))))


@case(image(), {"conv1.weight": 0, "up.weight": (0, 1), "up.bias": 0, "norm.weight": 0, "conv2.weight": 1})
class Transposed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.norm = conv(3, 8), conv(12, 4), nn.BatchNorm2d(12)
        self.up = nn.ConvTranspose2d(8, 12, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(F.relu(self.norm(self.up(F.relu(self.conv1(x))))))


@case(image(), {"conv1.weight": 0, "up.weight": 0, "up.bias": 0, "depth.weight": 0, "conv2.weight": 1})
class GroupedTransposed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv(3, 16), conv(24, 4)
        self.up = nn.ConvTranspose2d(16, 24, 2, stride=2, groups=4)
        self.depth = nn.ConvTranspose2d(24, 24, 2, groups=24)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.depth(F.relu(self.up(self.conv1(x)))))


@case(image(), {"stem.weight": 0, "one.weight": (0, 1), "depth.weight": 0, "two.weight": (0, 1), "head.weight": 1})
class ShuffleUnit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = conv(3, 16), conv(16, 4)
        self.one, self.depth, self.two = conv(8, 8, 1), conv(8, 8, groups=8), conv(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.stem(x).chunk(2, dim=1)
        x = torch.cat((left, self.two(self.depth(F.relu(self.one(right))))), dim=1)
        n, c, h, w = x.size()
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, -1, h, w)
        return self.head(x)


@case(image(), {"stem.weight": 0, "grouped.weight": 0, "head.weight": 1})
class GroupedShuffle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.groups = 4
        self.stem, self.grouped, self.head = conv(3, 16), conv(16, 16, groups=4), conv(16, 4)
        self.shuffle = nn.ChannelShuffle(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.grouped(self.stem(x))
        n, c, h, w = x.shape
        x = x.reshape(n, self.groups, c // self.groups, h, w).permute(0, 2, 1, 3, 4).reshape(n, c, h, w)
        return self.head(self.shuffle(F.relu(x)))


@case(image(), {"conv1.weight": 0, "down.weight": (0, 1), "up.weight": (0, 1), "conv2.weight": 1})
class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv(3, 16), conv(16, 4)
        self.pool, self.down, self.up = nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 8, 1), nn.Conv2d(8, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.conv1(x))
        return self.conv2(x * torch.sigmoid(self.up(F.relu(self.down(self.pool(x))))))


@case(image(), {"conv1.weight": 0, "down.weight": (0, 1), "up.weight": (0, 1), "conv2.weight": 1})
class SqueezeExciteByLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv(3, 16), conv(16, 4)
        self.down, self.up = nn.Linear(16, 8, bias=False), nn.Linear(8, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        b, c, _, _ = x.size()
        gate = F.hardsigmoid(self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, 1).view(b, c)))))
        return self.conv2(x * gate.view(b, c, 1, 1).expand_as(x))


@case(image(), {"head.weight": 1}, pinned={"conv1": "averaged over by std"})
class SpatialGate(nn.Module):
    """Spatial attention: where to look, from statistics over the channels, in which a channel at zero counts."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.spatial, self.head = conv(3, 8), conv(8, 8), conv(2, 1), conv(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        pooled = torch.cat([x.mean(1, keepdim=True), x.std(dim=1, keepdim=True)], dim=1)
        return self.head(self.conv2(x * torch.sigmoid(self.spatial(pooled))))


@case(image(), {"stem.weight": 0, "depth.weight": 0, "norm.weight": 0, "up.weight": (0, 1), "gamma": 0})
class ConvNeXtBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depth, self.head = conv(3, 8), conv(8, 8, 5, groups=8), conv(8, 4)
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(24, 8)
        self.gamma = nn.Parameter(torch.full((8,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.norm(self.depth(x).permute(0, 2, 3, 1))
        y = self.gamma * self.down(F.gelu(self.up(y)))
        return self.head(x + y.permute(0, 3, 1, 2))


@case(image(size=8), {"stem.weight": 0, "a.weight": (0, 1), "head.weight": 1})
class OptionAShortcut(nn.Module):
    """The parameter-free shortcut of the CIFAR ResNets: strided, with zeros on both sides of the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.head = conv(3, 8), conv(8, 16, stride=2), nn.Linear(16, 4)
        self.shortcut = lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, (16 - 8) // 2, (16 - 8) // 2))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(self.a(x) + self.shortcut(x))
        return self.head(x.mean((2, 3)))


@case(image(), {"conv1.weight": 0, "conv2.weight": 1, "prelu.weight": 0})
class PReluPerChannel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.prelu, self.conv2 = conv(3, 8), nn.PReLU(8), conv(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.prelu(self.conv1(x)))


@case(image(dims=1), {"conv1.weight": 0, "norm.running_var": 0, "conv2.weight": (0, 1), "head.weight": 1})
class Conv1dNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm = nn.Conv1d(3, 8, 3, padding=1), nn.BatchNorm1d(8)
        self.conv2, self.head = nn.Conv1d(8, 8, 3, padding=2, dilation=2), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv1(x)))
        return self.head(F.max_pool1d(self.conv2(x) + x, 2).transpose(1, 2))


@case(image(size=5, dims=3), {"conv1.weight": 0, "norm.weight": 0, "depth.weight": 0, "head.weight": 1})
class Conv3dNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm = nn.Conv3d(3, 8, 3), nn.BatchNorm3d(8)
        self.depth, self.head = nn.Conv3d(8, 8, 3, padding=1, groups=8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.flatten(F.adaptive_avg_pool3d(self.depth(self.norm(self.conv1(x))), 1), 1))


@case(image(), {"conv1.parametrizations.weight.original0": 0, "conv1.parametrizations.weight.original1": 0})
class WeightNormConv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.utils.parametrizations.weight_norm(conv(3, 8))
        self.conv2 = conv(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(F.relu(self.conv1(x)))


@case(image(), {"stem.weight": 0, "shared.weight": (0, 1), "head.weight": 1})
class SharedConv(nn.Module):
    """One layer at three places ties what goes in to what comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.shared, self.head = conv(3, 8), conv(8, 8), conv(8, 4)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for norm in self.norms:
            x = F.relu(norm(self.shared(x)))
        return self.head(x)
