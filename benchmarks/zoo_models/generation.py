"""Shapes of image and audio generation: a diffusion UNet, a decoder of latents, a vocoder."""

from __future__ import annotations

import importlib.util
import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, spectral_norm, weight_norm

from zoo_models.entry import Entry


def _sinusoid(t: Tensor, width: int) -> Tensor:
    frequencies = torch.exp(-math.log(10000.0) * torch.arange(width // 2, device=t.device) / (width // 2))
    angles = t[:, None] * frequencies[None]
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class ResBlock(nn.Module):
    """Group norm, SiLU, convolution, twice, with the time embedding added in between."""

    def __init__(self, width: int, out: int, time: int | None):
        super().__init__()
        self.norm1 = nn.GroupNorm(8, width)
        self.conv1 = nn.Conv2d(width, out, 3, padding=1)
        self.time = nn.Linear(time, out) if time else None
        self.norm2 = nn.GroupNorm(8, out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.shortcut = nn.Conv2d(width, out, 1) if width != out else nn.Identity()

    def forward(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        if self.time is not None:
            h = h + self.time(F.silu(t))[:, :, None, None]
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class Attention(nn.Module):
    """Self-attention over the pixels, as in diffusion UNets."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(8, width)
        self.qkv = nn.Conv1d(width, 3 * width, 1)
        self.out = nn.Conv1d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        q, k, v = self.qkv(self.norm(x).view(b, c, h * w)).chunk(3, dim=1)
        shape = (b * self.heads, c // self.heads, h * w)
        scale = 1 / math.sqrt(math.sqrt(c // self.heads))
        weight = torch.einsum("bct,bcs->bts", (q * scale).reshape(shape), (k * scale).reshape(shape)).softmax(-1)
        return x + self.out(torch.einsum("bts,bcs->bct", weight, v.reshape(shape)).reshape(b, c, h * w)).view(
            b, c, h, w
        )


class UNet(nn.Module):
    """Two levels down and up, skips concatenated, attention at the lower one."""

    def __init__(self, width: int = 32):
        super().__init__()
        self.width = width
        self.time = nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, 4 * width))
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.down1 = ResBlock(width, width, 4 * width)
        self.pool = nn.Conv2d(width, width, 3, stride=2, padding=1)
        self.down2 = ResBlock(width, 2 * width, 4 * width)
        self.attention = Attention(2 * width, 4)
        self.middle = ResBlock(2 * width, 2 * width, 4 * width)
        self.up2 = ResBlock(4 * width, 2 * width, 4 * width)
        self.up_conv = nn.Conv2d(2 * width, 2 * width, 3, padding=1)
        self.up1 = ResBlock(3 * width, width, 4 * width)
        self.norm = nn.GroupNorm(8, width)
        self.last = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        t = self.time(_sinusoid(t, self.width))
        a = self.down1(self.first(x), t)
        b = self.attention(self.down2(self.pool(a), t))
        h = self.up2(torch.cat([self.middle(b, t), b], dim=1), t)
        h = self.up_conv(F.interpolate(h, scale_factor=2.0, mode="nearest"))
        return self.last(F.silu(self.norm(self.up1(torch.cat([h, a], dim=1), t))))


class LatentDecoder(nn.Module):
    """The decoder half of an autoencoder of images."""

    def __init__(self, width: int = 64):
        super().__init__()
        self.first = nn.Conv2d(4, width, 3, padding=1)
        self.middle = nn.Sequential(ResBlock(width, width, None), Attention(width, 1), ResBlock(width, width, None))
        self.up = nn.ModuleList([ResBlock(width, width // 2, None), ResBlock(width // 2, width // 4, None)])
        self.convs = nn.ModuleList([nn.Conv2d(width // 2**i, width // 2**i, 3, padding=1) for i in (1, 2)])
        self.norm = nn.GroupNorm(4, width // 4)
        self.last = nn.Conv2d(width // 4, 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.middle(self.first(z))
        for block, conv in zip(self.up, self.convs, strict=True):
            h = conv(F.interpolate(block(h), scale_factor=2.0))
        return self.last(F.silu(self.norm(h)))


class DilatedBlock(nn.Module):
    """HiFi-GAN's residual block: pairs of convolutions, the first of each dilated."""

    def __init__(self, norm, width: int, kernel: int, dilations: tuple[int, ...] = (1, 3)):
        super().__init__()
        self.wide = nn.ModuleList(
            [norm(nn.Conv1d(width, width, kernel, dilation=d, padding=d * (kernel - 1) // 2)) for d in dilations]
        )
        self.near = nn.ModuleList([norm(nn.Conv1d(width, width, kernel, padding=kernel // 2)) for _ in dilations])

    def forward(self, x: Tensor) -> Tensor:
        for wide, near in zip(self.wide, self.near, strict=True):
            x = x + near(F.leaky_relu(wide(F.leaky_relu(x, 0.1)), 0.1))
        return x


class Vocoder(nn.Module):
    """HiFi-GAN's generator in small: transposed convolutions, each before a mean of residual blocks of two kernels."""

    def __init__(self, norm, width: int = 64, mels: int = 20, kernels: tuple[int, ...] = (3, 7)):
        super().__init__()
        self.first = norm(nn.Conv1d(mels, width, 7, padding=3))
        self.ups = nn.ModuleList(
            [norm(nn.ConvTranspose1d(width // 2**i, width // 2 ** (i + 1), 8, 4, padding=2)) for i in range(2)]
        )
        self.num_kernels = len(kernels)
        self.blocks = nn.ModuleList([DilatedBlock(norm, width // 2 ** (i + 1), k) for i in range(2) for k in kernels])
        self.last = norm(nn.Conv1d(width // 4, 1, 7, padding=3))

    def forward(self, mel: Tensor) -> Tensor:
        x = self.first(mel)
        for i, up in enumerate(self.ups):
            x = up(F.leaky_relu(x, 0.1))
            total = None
            for j in range(self.num_kernels):
                y = self.blocks[i * self.num_kernels + j](x)
                total = y if total is None else total + y
            x = total / self.num_kernels
        return torch.tanh(self.last(F.leaky_relu(x)))


class Discriminator(nn.Module):
    """Convolutions under a norm of their weights, flattened into a linear layer."""

    def __init__(self, norm):
        super().__init__()
        widths = (3, 16, 32, 48)
        self.convs = nn.ModuleList([norm(nn.Conv2d(a, b, 3, 2, 1)) for a, b in pairwise(widths)])
        self.last = norm(nn.Linear(48 * 16, 1))

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = F.leaky_relu(conv(x), 0.2)
        return self.last(x.flatten(1))


class _Sample(nn.Module):
    """A diffusers model whose output is a plain tensor, as its record is made of no nested tensors."""

    def __init__(self, body: nn.Module):
        super().__init__()
        self.body = body

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.body(*inputs, return_dict=False)[0]


def _diffusers_unet() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    from diffusers import UNet2DModel

    kinds = ("DownBlock2D", "AttnDownBlock2D"), ("AttnUpBlock2D", "UpBlock2D")
    model = UNet2DModel(
        sample_size=16,
        block_out_channels=(32, 64),
        norm_num_groups=8,
        down_block_types=kinds[0],
        up_block_types=kinds[1],
    )
    return _Sample(model), (torch.randn(2, 3, 16, 16), torch.tensor([3, 40]))


def _diffusers_decoder() -> tuple[nn.Module, Tensor]:
    from diffusers import AutoencoderKL

    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    model = AutoencoderKL(block_out_channels=(32, 64), norm_num_groups=8, **blocks)
    return _Sample(model), torch.randn(1, 3, 32, 32)


def entries() -> list[Entry]:
    """All of them."""
    image, mel = (lambda: torch.randn(2, 3, 32, 32)), (lambda: torch.randn(2, 20, 12))
    makes = {
        "unet-with-attention": lambda: (UNet(), (image(), torch.rand(2) * 100)),
        "latent-decoder": lambda: (LatentDecoder(), torch.randn(2, 4, 8, 8)),
        "vocoder-weight-norm-hook": lambda: (Vocoder(weight_norm), mel()),
        "vocoder-weight-norm-parametrized": lambda: (Vocoder(parametrizations.weight_norm), mel()),
        "discriminator-spectral-norm-hook": lambda: (Discriminator(spectral_norm), image()),
        "discriminator-spectral-norm-parametrized": lambda: (Discriminator(parametrizations.spectral_norm), image()),
    }
    if importlib.util.find_spec("diffusers"):
        makes |= {"diffusers-unet2d": _diffusers_unet, "diffusers-autoencoder-kl": _diffusers_decoder}
    return [Entry("generation", name, make) for name, make in makes.items()]
