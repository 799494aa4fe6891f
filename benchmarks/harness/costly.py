"""Networks of the shapes whose recovery is measured for its cost; their weights are random, which cost does not see."""

from __future__ import annotations

from itertools import pairwise

import torch
from support.torchvision_shim import make_torchvision_importable
from torch import Tensor, nn


def gpt(width: int, layers: int, heads: int, vocabulary: int) -> nn.Module:
    """A GPT-2 for windows of 256 tokens."""
    make_torchvision_importable()
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=vocabulary, n_positions=256, n_embd=width, n_layer=layers, n_head=heads, use_cache=False
    )
    return GPT2LMHeadModel(config).eval()


class WideKernels(nn.Module):
    """Five convolutions with kernels of 64x1; those of 128 input channels have 8,192 features.

    Takes ``(batch, 1, time, 1)``, time above 64.
    """

    def __init__(self, channels: int = 128, narrow: int = 12) -> None:
        super().__init__()
        widths = (1, channels, narrow, channels, narrow, channels)
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(fan_in, fan_out, (64, 1), padding=(32, 0), bias=False), nn.BatchNorm2d(fan_out), nn.ReLU()
            )
            for fan_in, fan_out in pairwise(widths)
        )
        self.head = nn.Linear(channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of shape ``(batch, 10)``."""
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean((2, 3)))


class _FeedForward(nn.Sequential):
    def __init__(self, width: int) -> None:
        super().__init__(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, width))


class _Convolution(nn.Module):
    """Pointwise with a gate, depthwise over 31 steps, pointwise."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.gated = nn.Conv1d(width, 2 * width, 1)
        self.depthwise = nn.Conv1d(width, width, 31, padding=15, groups=width)
        self.batch_norm = nn.BatchNorm1d(width)
        self.pointwise = nn.Conv1d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.glu(self.gated(self.norm(x).transpose(1, 2)), 1)
        x = nn.functional.silu(self.batch_norm(self.depthwise(x)))
        return self.pointwise(x).transpose(1, 2)


class _ConformerBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.first, self.last = _FeedForward(width), _FeedForward(width)
        self.convolution = _Convolution(width)
        self.norm, self.heads = nn.LayerNorm(width), heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.final = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + 0.5 * self.first(x)
        batch, steps, width = x.shape
        query, key, value = (
            part.reshape(batch, steps, self.heads, width // self.heads).transpose(1, 2)
            for part in self.qkv(self.norm(x)).chunk(3, -1)
        )
        attended = nn.functional.scaled_dot_product_attention(query, key, value)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, steps, width))
        x = x + self.convolution(x)
        return self.final(x + 0.5 * self.last(x))


class Conformer(nn.Module):
    """Blocks of feed-forward, attention, convolution, feed-forward (Gulati et al., 2020).

    Takes ``(batch, steps, 80)``.
    """

    def __init__(self, width: int, blocks: int, heads: int) -> None:
        super().__init__()
        self.into = nn.Linear(80, width)
        self.blocks = nn.Sequential(*(_ConformerBlock(width, heads) for _ in range(blocks)))
        self.head = nn.Linear(width, 128)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of shape ``(batch, steps, 128)``."""
        return self.head(self.blocks(self.into(x)))


def spread_norms(model: nn.Module, x: Tensor) -> nn.Module:
    """Batch norms with the statistics of `x`, as after training: else activations die out with depth."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum = None
    with torch.no_grad():
        model.train()(x)
    return model.eval()
