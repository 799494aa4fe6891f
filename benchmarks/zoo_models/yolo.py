"""The shape of a YOLO detector: C2f or C3k2 blocks, SPPF, a neck, a decoupled head with DFL.

Written after the published architectures.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from zoo_models.entry import Entry


class Conv(nn.Module):
    """Convolution, batch norm, SiLU."""

    def __init__(self, width: int, out: int, kernel: int = 1, stride: int = 1, groups: int = 1):
        super().__init__()
        self.conv = nn.Conv2d(width, out, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(out)
        self.act = nn.SiLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class Bottleneck(nn.Module):
    def __init__(self, width: int, shortcut: bool = True, squeeze: float = 1.0):
        super().__init__()
        self.cv1 = Conv(width, int(width * squeeze), 3)
        self.cv2 = Conv(int(width * squeeze), width, 3)
        self.add = shortcut

    def forward(self, x: Tensor) -> Tensor:
        return x + self.cv2(self.cv1(x)) if self.add else self.cv2(self.cv1(x))


class C3k(nn.Module):
    """Two branches, one of them through bottlenecks, concatenated."""

    def __init__(self, width: int, n: int = 2, shortcut: bool = True):
        super().__init__()
        self.cv1, self.cv2 = Conv(width, width // 2), Conv(width, width // 2)
        self.cv3 = Conv(2 * (width // 2), width)
        self.m = nn.Sequential(*(Bottleneck(width // 2, shortcut) for _ in range(n)))

    def forward(self, x: Tensor) -> Tensor:
        return self.cv3(torch.cat((self.m(self.cv1(x)), self.cv2(x)), 1))


class C2f(nn.Module):
    """One convolution split in halves; each bottleneck's output joins the concatenation."""

    def __init__(self, width: int, out: int, n: int = 1, shortcut: bool = True, deep: bool = False):
        super().__init__()
        self.c = out // 2
        self.cv1 = Conv(width, 2 * self.c)
        self.cv2 = Conv((2 + n) * self.c, out)
        self.m = nn.ModuleList(C3k(self.c) if deep else Bottleneck(self.c, shortcut) for _ in range(n))

    def forward(self, x: Tensor) -> Tensor:
        y = list(self.cv1(x).chunk(2, 1))
        y.extend(m(y[-1]) for m in self.m)
        return self.cv2(torch.cat(y, 1))


class C2fSplit(C2f):
    """The same with ``split`` by the attribute ``c``."""

    def forward(self, x: Tensor) -> Tensor:
        y = list(self.cv1(x).split((self.c, self.c), 1))
        y.extend(m(y[-1]) for m in self.m)
        return self.cv2(torch.cat(y, 1))


class SPPF(nn.Module):
    def __init__(self, width: int, out: int, kernel: int = 5):
        super().__init__()
        self.cv1, self.cv2 = Conv(width, width // 2), Conv(width // 2 * 4, out)
        self.m = nn.MaxPool2d(kernel, 1, kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        y = [self.cv1(x)]
        y.extend(self.m(y[-1]) for _ in range(3))
        return self.cv2(torch.cat(y, 1))


class DFL(nn.Module):
    """The expectation of a distribution over bins, by a fixed convolution."""

    def __init__(self, bins: int = 16):
        super().__init__()
        self.conv = nn.Conv2d(bins, 1, 1, bias=False).requires_grad_(False)
        self.conv.weight.data[:] = torch.arange(bins, dtype=torch.float).view(1, bins, 1, 1)
        self.c1 = bins

    def forward(self, x: Tensor) -> Tensor:
        b, _, a = x.shape
        return self.conv(x.view(b, 4, self.c1, a).transpose(2, 1).softmax(1)).view(b, 4, a)


def _classes(width: int, out: int, depthwise: bool) -> list[Conv]:
    if depthwise:
        return [Conv(width, width, 3, groups=width), Conv(width, out), Conv(out, out, 3, groups=out), Conv(out, out)]
    return [Conv(width, out, 3), Conv(out, out, 3)]


class Detect(nn.Module):
    """Boxes and classes by two branches at each level."""

    def __init__(self, classes: int, widths: Sequence[int], bins: int = 16, depthwise: bool = False):
        super().__init__()
        self.nc, self.reg_max, self.no = classes, bins, classes + bins * 4
        c2, c3 = max(16, widths[0] // 4, bins * 4), max(widths[0], min(classes, 100))
        self.cv2 = nn.ModuleList(
            nn.Sequential(Conv(w, c2, 3), Conv(c2, c2, 3), nn.Conv2d(c2, 4 * bins, 1)) for w in widths
        )
        self.cv3 = nn.ModuleList(nn.Sequential(*_classes(w, c3, depthwise), nn.Conv2d(c3, classes, 1)) for w in widths)
        self.dfl = DFL(bins)

    def forward(self, x: Sequence[Tensor]) -> Tensor:
        maps = [torch.cat((box(m), cls(m)), 1) for m, box, cls in zip(x, self.cv2, self.cv3, strict=True)]
        joined = torch.cat([m.view(m.shape[0], self.no, -1) for m in maps], 2)
        box, cls = joined.split((self.reg_max * 4, self.nc), 1)
        return torch.cat((self.dfl(box), cls.sigmoid()), 1)


class Yolo(nn.Module):
    """Backbone, neck and head in small."""

    def __init__(self, block: type[C2f] = C2f, deep: bool = False, width: int = 16, classes: int = 20):
        super().__init__()
        w = [width, 2 * width, 4 * width, 8 * width]
        self.stem = Conv(3, w[0], 3, 2)
        self.p2 = nn.Sequential(Conv(w[0], w[1], 3, 2), block(w[1], w[1], 1, deep=deep))
        self.p3 = nn.Sequential(Conv(w[1], w[2], 3, 2), block(w[2], w[2], 2, deep=deep))
        self.p4 = nn.Sequential(Conv(w[2], w[3], 3, 2), block(w[3], w[3], 1, deep=deep), SPPF(w[3], w[3]))
        self.up = nn.Upsample(scale_factor=2.0)
        self.n3 = block(w[3] + w[2], w[2], 1, False, deep=deep)
        self.d3 = Conv(w[2], w[2], 3, 2)
        self.n4 = block(w[3] + w[2], w[3], 1, False, deep=deep)
        self.head = Detect(classes, (w[2], w[3]), depthwise=deep)

    def forward(self, x: Tensor) -> Tensor:
        p3 = self.p3(self.p2(self.stem(x)))
        p4 = self.p4(p3)
        n3 = self.n3(torch.cat((self.up(p4), p3), 1))
        n4 = self.n4(torch.cat((self.d3(n3), p4), 1))
        return self.head((n3, n4))


def entries() -> list[Entry]:
    """All of them."""
    image = lambda: torch.randn(1, 3, 64, 64)  # noqa: E731
    makes = {
        "c2f": lambda: (Yolo(C2f), image()),
        "c2f-split": lambda: (Yolo(C2fSplit), image()),
        "c3k2": lambda: (Yolo(C2f, deep=True), image()),
    }
    return [Entry("yolo", name, make) for name, make in makes.items()]
