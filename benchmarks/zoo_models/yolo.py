"""YOLO detectors: C2f or C3k2 blocks, SPPF, C2PSA, a neck of three levels, a decoupled head with DFL and anchors.

Written after the published architectures.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from zoo_models.entry import Entry


class Conv(nn.Module):
    """Convolution, batch norm, SiLU or nothing."""

    def __init__(self, width: int, out: int, kernel: int = 1, stride: int = 1, groups: int = 1, act: bool = True):
        super().__init__()
        self.conv = nn.Conv2d(width, out, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(out)
        self.act = nn.SiLU(inplace=True) if act else nn.Identity()

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
        self.m = nn.ModuleList(self._branch(shortcut, deep) for _ in range(n))

    def _branch(self, shortcut: bool, deep: bool) -> nn.Module:
        del deep
        return Bottleneck(self.c, shortcut)

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


class C3k2(C2f):
    """C2f whose branches are C3k blocks in the deep stages, and narrow bottlenecks in the first ones."""

    def _branch(self, shortcut: bool, deep: bool) -> nn.Module:
        return C3k(self.c, 2, shortcut) if deep else Bottleneck(self.c, shortcut, squeeze=0.5)


class PositionAttention(nn.Module):
    """Attention over pixels, with keys half as wide as values and a depthwise convolution of the values beside it."""

    def __init__(self, width: int, heads: int, key_share: float = 0.5):
        super().__init__()
        self.num_heads, self.head_dim = heads, width // heads
        self.key_dim = int(self.head_dim * key_share)
        self.scale = self.key_dim**-0.5
        self.qkv = Conv(width, width + 2 * self.key_dim * heads, act=False)
        self.pe = Conv(width, width, 3, groups=width, act=False)
        self.proj = Conv(width, width, act=False)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        parts = self.qkv(x).view(b, self.num_heads, 2 * self.key_dim + self.head_dim, h * w)
        q, k, v = parts.split([self.key_dim, self.key_dim, self.head_dim], dim=2)
        weight = (q.transpose(-2, -1) @ k * self.scale).softmax(dim=-1)
        mixed = (v @ weight.transpose(-2, -1)).view(b, c, h, w)
        return self.proj(mixed + self.pe(v.reshape(b, c, h, w)))


class C2PSA(nn.Module):
    """Half of the channels through attention and a feed-forward, each with a shortcut."""

    def __init__(self, width: int, heads: int = 2):
        super().__init__()
        self.c = width // 2
        self.cv1, self.cv2 = Conv(width, 2 * self.c), Conv(2 * self.c, width)
        self.attn = PositionAttention(self.c, heads)
        self.ffn = nn.Sequential(Conv(self.c, 2 * self.c), Conv(2 * self.c, self.c, act=False))

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.cv1(x).split((self.c, self.c), dim=1)
        b = b + self.attn(b)
        b = b + self.ffn(b)
        return self.cv2(torch.cat((a, b), 1))


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
        anchors, strides = _anchors(x)
        near, far = self.dfl(box).chunk(2, 1)
        low, high = anchors - near, anchors + far
        return torch.cat((torch.cat(((low + high) / 2, high - low), 1) * strides, cls.sigmoid()), 1)


def _anchors(maps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The centre of each cell of each level, and the level's stride."""
    points, strides = [], []
    for level, m in enumerate(maps):
        h, w = m.shape[2:]
        y = torch.arange(h, device=m.device, dtype=m.dtype) + 0.5
        x = torch.arange(w, device=m.device, dtype=m.dtype) + 0.5
        rows, columns = torch.meshgrid(y, x, indexing="ij")
        points.append(torch.stack((columns, rows), -1).view(-1, 2))
        strides.append(torch.full((h * w, 1), 8.0 * 2**level, device=m.device, dtype=m.dtype))
    return torch.cat(points).T, torch.cat(strides).T


class Yolo(nn.Module):
    """Backbone, neck and head in small: three levels, at strides 8, 16 and 32."""

    def __init__(self, block: type[C2f] = C2f, attends: bool = False, width: int = 16, classes: int = 20):
        super().__init__()
        a, b, c, d, e = width, 2 * width, 4 * width, 8 * width, 8 * width
        self.stem = Conv(3, a, 3, 2)
        self.p2 = nn.Sequential(Conv(a, b, 3, 2), block(b, b, 1))
        self.p3 = nn.Sequential(Conv(b, c, 3, 2), block(c, c, 2))
        self.p4 = nn.Sequential(Conv(c, d, 3, 2), block(d, d, 2, deep=True))
        last = [C2PSA(e)] if attends else []
        self.p5 = nn.Sequential(Conv(d, e, 3, 2), block(e, e, 1, deep=True), SPPF(e, e), *last)
        self.up = nn.Upsample(scale_factor=2.0)
        self.inner = block(e + d, d, 1, False)
        self.n3 = block(d + c, c, 1, False)
        self.d3, self.n4 = Conv(c, c, 3, 2), block(c + d, d, 1, False)
        self.d4, self.n5 = Conv(d, d, 3, 2), block(d + e, e, 1, False, deep=True)
        self.head = Detect(classes, (c, d, e), depthwise=attends)

    def forward(self, x: Tensor) -> Tensor:
        p3 = self.p3(self.p2(self.stem(x)))
        p4 = self.p4(p3)
        p5 = self.p5(p4)
        inner = self.inner(torch.cat((self.up(p5), p4), 1))
        n3 = self.n3(torch.cat((self.up(inner), p3), 1))
        n4 = self.n4(torch.cat((self.d3(n3), inner), 1))
        n5 = self.n5(torch.cat((self.d4(n4), p5), 1))
        return self.head((n3, n4, n5))


def _ultralytics(name: str) -> tuple[nn.Module, Tensor]:
    """The package's own model; a check for those who have it, as its licence is not ours."""
    from ultralytics.nn.tasks import DetectionModel

    return DetectionModel(f"{name}.yaml", verbose=False), torch.randn(1, 3, 64, 64)


def entries() -> list[Entry]:
    """All of them."""
    image = lambda: torch.randn(1, 3, 64, 64)  # noqa: E731, short and used beside it
    makes = {
        "c2f": lambda: (Yolo(C2f), image()),
        "c2f-split": lambda: (Yolo(C2fSplit), image()),
        "c3k2-c2psa": lambda: (Yolo(C3k2, attends=True), image()),
    }
    if importlib.util.find_spec("ultralytics"):
        makes |= {f"ultralytics-{name}": lambda name=name: _ultralytics(name) for name in ("yolov8n", "yolo11n")}
    return [Entry("yolo", name, make) for name, make in makes.items()]
