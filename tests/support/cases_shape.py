"""Operations that move, split, merge, widen or overwrite channels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.cases import case, features, image, tokens
from support.cases_conv import conv

CONV_LINEAR = {"conv1.weight": 0, "conv1.bias": 0, "fc.weight": 1}


class ConvLinear(nn.Module):
    """A convolution to 8 x 5 x 5, then a linear layer; how one reaches the other is the subject."""

    def __init__(self, width: int = 200) -> None:
        super().__init__()
        self.conv1, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(width, 4)


@case(image(), CONV_LINEAR)
class Flatten(ConvLinear):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.flatten(F.relu(self.conv1(x)), 1))


@case(image(), CONV_LINEAR)
class FlattenBatchNorm(ConvLinear):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.flat = nn.BatchNorm1d(200), nn.Flatten()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.norm(self.flat(self.conv1(x)))))


@case(image(), CONV_LINEAR)
class ViewMinusOne(ConvLinear):
    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        return self.fc(x.view(x.size(0), -1))


@case(image(), CONV_LINEAR)
class ViewLiteral(ConvLinear):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv1(x).view(-1, 8 * 5 * 5))


@case(image(), CONV_LINEAR)
class ViewByFeatures(ConvLinear):
    """The size is read from the next layer."""

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv1(x).reshape(-1, self.fc.in_features))


@case(image(), CONV_LINEAR)
class FlattenChannelsLast(ConvLinear):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv1(x).permute(0, 2, 3, 1).flatten(1))


@case(image(), CONV_LINEAR)
class MeanChannelsLast(ConvLinear):
    def __init__(self) -> None:
        super().__init__(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.gelu(self.conv1(x)).movedim(1, -1).mean((1, 2)))


@case(image(), {"conv1.weight": 0, "a.weight": (0, 1), "b.weight": (0, 1), "head.weight": 1})
class Split(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.a, self.b, self.head = conv(3, 16), conv(8, 8), conv(8, 12), conv(20, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        left, right = torch.split(x, x.shape[1] // 2, dim=1)
        return self.head(torch.cat([self.b(right), self.a(left)], 1))


@case(image(), {"conv1.weight": 0, "a.weight": (0, 1), "b.weight": (0, 1), "head.weight": 1})
class SplitSizes(nn.Module):
    """Unequal parts from a list of attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes = (12, 8, 4)
        self.conv1, self.a, self.b, self.head = conv(3, 24), conv(12, 8), conv(8, 8), conv(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        first, second, third = self.conv1(x).split(self.sizes, dim=1)
        return self.head(torch.cat([F.relu(self.a(first) + self.b(second)), third], 1))


@case(image(), {"conv1.weight": 0, "a.weight": (0, 1), "head.weight": 1})
class NarrowAndSlice(nn.Module):
    """Res2Net: parts by slice and narrow, one passed on untouched."""

    def __init__(self) -> None:
        super().__init__()
        self.width = 8
        self.conv1, self.a, self.head = conv(3, 16), conv(8, 8), conv(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        return self.head(torch.cat([self.a(x[:, : self.width]), x.narrow(1, self.width, self.width)], 1))


@case(image(), {"conv1.weight": 0, "up.weight": 0, "conv2.weight": 1})
class PixelShuffle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.up, self.conv2 = conv(3, 8), conv(8, 32), conv(8, 4)
        self.shuffle = nn.PixelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.shuffle(self.up(F.relu(self.conv1(x)))))


@case(image(size=6), {"conv1.weight": 0, "conv2.weight": (0, 1), "head.weight": 1})
class PixelUnshuffle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.head = conv(3, 8), conv(32, 8), conv(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.conv2(F.pixel_unshuffle(self.conv1(x), 2))))


@case(image(size=6), {"embed.weight": 0, "merge.weight": (0, 1), "norm.weight": 0, "head.weight": 1})
class PatchMerging(nn.Module):
    """Swin's: four strided views side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(3, 8), nn.LayerNorm(32)
        self.merge, self.head = nn.Linear(32, 16, bias=False), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.permute(0, 2, 3, 1))
        parts = [x[..., i::2, j::2, :] for j in (0, 1) for i in (0, 1)]
        return self.head(self.merge(self.norm(torch.cat(parts, -1))))


@case(image(), {"conv1.weight": 0, "scale.weight": 0, "shift.weight": 0, "conv2.weight": 1})
class Broadcasts(nn.Module):
    """Features modulated by vectors, widened by indexing, unsqueeze, expand and plain broadcasting."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv(3, 8), conv(8, 4)
        self.scale, self.shift, self.one = nn.Linear(3, 8), nn.Linear(3, 8), conv(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        y, pooled = self.conv1(x), x.mean((2, 3))
        y = y * self.scale(pooled)[:, :, None, None] + self.shift(pooled).unsqueeze(-1).unsqueeze(-1).expand_as(y)
        return self.conv2(y * self.one(x) + 1.5)


@case(image(), {"a.weight": 0, "b.weight": 0, "c.weight": 0, "head.weight": 1})
class StackUnbind(nn.Module):
    """Three branches stacked, mixed, and taken apart (selective kernels)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = conv(3, 8), conv(3, 8, 5), conv(3, 8, 1), conv(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        stacked = torch.stack([self.a(x), self.b(x), self.c(x)], dim=1)
        weight = stacked.mean((3, 4), keepdim=True).softmax(dim=1)
        a, b, c = (stacked * weight).unbind(1)
        return self.head(a + b * torch.sigmoid(c) + stacked.sum(dim=1))


@case(image(), {"conv1.weight": 0, "conv2.weight": 1})
class Resampling(nn.Module):
    """Interpolation, padding and pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv(3, 8), conv(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(self.conv1(x), scale_factor=2, mode="bilinear", align_corners=False)
        x = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), 3, stride=2)
        x = F.interpolate(F.pad(x, (0, 1, 0, 1)), size=(5, 5), mode="nearest")
        return self.conv2(F.max_pool2d(x, 2, ceil_mode=True) + F.adaptive_max_pool2d(x, (3, 3)))


@case(image(), {"conv1.weight": 0, "conv2.weight": 0, "head.weight": 1})
class WriteIntoSlices(nn.Module):
    """A result assembled in place in a tensor of zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.head = conv(3, 8), conv(3, 8), conv(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.conv1(x), self.conv2(x)
        out = x.new_zeros(x.shape[0], 8 + 8, *x.shape[2:])
        out[:, :8] = a
        out[:, 8:] += b
        return self.head(out)


@case(image(), {"conv1.weight": 0, "conv2.weight": 0, "head.weight": 1})
class WriteIntoSlicesBySize(WriteIntoSlices):
    """The same with sizes read from the tensors."""

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.conv1(x), self.conv2(x)
        k = a.size(1)
        out = torch.zeros(x.shape[0], k + b.shape[1], *x.shape[2:], dtype=x.dtype)
        out[:, :k] = a
        out[:, k:].copy_(b)
        return self.head(out)


@case(image(), {"conv1.weight": 0, "conv2.weight": 1})
class PartialShift(nn.Module):
    """Temporal-shift style: a part of the channels is moved in place before the next layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.fold = conv(3, 8), conv(8, 4), 4

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        y = x.clone()
        y[:, : self.fold, 1:] = x[:, : self.fold, :-1]
        return self.conv2(y.add_(x).relu_())


@case(tokens(), {"fc1.weight": 0, "fc2.weight": 1, "head.weight": 1}, pinned={"fc2": "index"})
class Reordered(nn.Module):
    """Channels flipped, rolled and permuted by a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.head = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4)
        self.register_buffer("order", torch.randperm(16, generator=torch.Generator().manual_seed(1)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc2(F.silu(self.fc1(x).flip(-1)))
        return self.head(x.index_select(-1, self.order) * torch.sigmoid(x[..., self.order]))


@case(features(), {"fc1.weight": 0, "fc2.weight": (0, 1), "head.weight": 1})
class Repeats(nn.Module):
    """Channels repeated as a whole, each by itself, and along the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.head = nn.Linear(6, 8), nn.Linear(16, 8), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc2(torch.relu(self.fc1(x)).repeat(1, 2))
        x = x.repeat_interleave(2, dim=1)
        return self.head(x.repeat(2, 1)[: x.shape[0]] + x)


@case(tokens(8, 6), {"fc1.weight": 0, "fc2.weight": 1})
class EinopsLike(nn.Module):
    """(b, (h w), c) to (b, h, w, (c1 c2)) and so on, as einops lowers its patterns."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 24), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        b, n, c = x.shape
        x = x.reshape(b, 2, n // 2, 3, c // 3).permute(0, 3, 1, 2, 4)
        gate, value, skip = x[:, 0], x[:, 1], x[:, 2]
        x = torch.sigmoid(gate) * value
        return self.fc2(torch.cat((x, skip), dim=-1).reshape(b, n, -1))


@case(image(size=6), {"mix.weight": 0})
class UnfoldFold(nn.Module):
    """Patches as columns: each channel's pixels stay together."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.mix = conv(3, 8), nn.Linear(32, 32)
        self.out = nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = F.unfold(self.conv1(x), kernel_size=2, stride=2).transpose(1, 2)
        x = self.out(F.relu(self.mix(x))).transpose(1, 2)
        return F.fold(x, output_size=(6, 6), kernel_size=2, stride=2)
