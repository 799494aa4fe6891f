"""Attention: torch's modules, packed and separate projections, by hand, windowed."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.cases import case, image, normal, tokens

QKV = {"embed.weight": 0, "attn.qkv.weight": (0, 1), "attn.qkv.bias": 0, "attn.proj.weight": (0, 1), "head.weight": 1}


class Block(nn.Module):
    """Embed, normalise, attend with a residual, read out; the attention is the subject."""

    def __init__(self, attn: nn.Module, width: int = 16) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Linear(8, width), nn.LayerNorm(width), nn.Linear(width, 4)
        self.attn = attn

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head(x + self.attn(self.norm(x)))


class TimmAttention(nn.Module):
    """timm's: head count and size are attributes, one projection for all three."""

    def __init__(self, width: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.attn_dim = heads, width // heads, width
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(b, n, self.attn_dim))


class RuntimeSizeAttention(TimmAttention):
    """The head size follows from the width at run time."""

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])
        return self.proj(x.transpose(1, 2).reshape(b, n, c))


class ChunkAttention(TimmAttention):
    """Thirds first, then heads, with the size left to ``-1``."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
        return self.proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class ScaleAttention(TimmAttention):
    """By hand, the scale kept as an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = self.head_dim**-0.5

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        attn = ((q * self.scale) @ k.transpose(-2, -1)).softmax(dim=-1)
        return self.proj((attn @ v).transpose(1, 2).reshape(b, n, -1))


class BertAttention(nn.Module):
    """Three projections, matmul, the scale from the head size at run time."""

    def __init__(self, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.num_attention_heads, self.attention_head_size = heads, width // heads
        self.all_head_size = width
        self.query, self.key, self.value, self.proj = (nn.Linear(width, width) for _ in range(4))

    def heads(self, x: Tensor) -> Tensor:
        shape = x.size()[:-1] + (self.num_attention_heads, self.attention_head_size)  # noqa: RUF005, as models have it
        return x.view(shape).permute(0, 2, 1, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(self.query(x)), self.heads(self.key(x)), self.heads(self.value(x))
        scores = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(self.attention_head_size)
        scores = scores.masked_fill(torch.ones(5, 5, dtype=torch.bool).triu(1), float("-inf"))
        context = torch.matmul(F.softmax(scores, dim=-1), v).permute(0, 2, 1, 3).contiguous()
        return self.proj(context.view(*context.size()[:-2], self.all_head_size))


class EinsumAttention(BertAttention):
    """The same contractions spelt with einsum, the scale from the tensor's own size."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).reshape(2, 5, self.num_attention_heads, -1) for p in (self.query, self.key, self.value))
        attn = torch.einsum("bihd,bjhd->bhij", q, k).div(q.shape[-1] ** 0.5).softmax(-1)
        return self.proj(torch.einsum("bhij,bjhd->bihd", attn, v).reshape(2, 5, -1))


class BmmAttention(BertAttention):
    """Heads folded into the batch for ``bmm``."""

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        h = self.num_attention_heads

        def fold(t: Tensor) -> Tensor:
            return t.view(b, n, h, c // h).transpose(1, 2).reshape(b * h, n, c // h)

        q, k, v = fold(self.query(x)), fold(self.key(x)), fold(self.value(x))
        attn = torch.bmm(q, k.transpose(1, 2)).mul(0.25).softmax(-1)
        return self.proj(torch.bmm(attn, v).view(b, h, n, c // h).transpose(1, 2).reshape(b, n, c))


class ConvAttention(nn.Module):
    """Over pixels of a feature map, queries and keys narrower than values."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Conv2d(16, 8, 1), nn.Conv2d(16, 8, 1), nn.Conv2d(16, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(1, 2)[..., None]
        b, c, h, w = x.shape
        q = self.query(x).view(b, -1, h * w).permute(0, 2, 1)
        attn = torch.softmax(torch.bmm(q, self.key(x).view(b, -1, h * w)), dim=-1)
        y = torch.bmm(self.value(x).view(b, -1, h * w), attn.permute(0, 2, 1)).view(b, c, h, w)
        return y.squeeze(-1).transpose(1, 2)


SEPARATE = {"embed.weight": 0, **{f"attn.{n}.weight": (0, 1) for n in ("query", "key", "value", "proj")}}


def _register(attention: type[nn.Module], thins: dict[str, int | tuple[int, ...]]) -> None:
    def build(self: Block) -> None:
        Block.__init__(self, attention())

    name = attention.__name__
    case(tokens(), thins)(type(name, (Block,), {"__init__": build, "__module__": __name__}))


for _attention in (TimmAttention, RuntimeSizeAttention, ChunkAttention, ScaleAttention):
    _register(_attention, {**QKV})
for _attention in (BertAttention, BmmAttention):
    _register(_attention, {**SEPARATE})
_register(
    EinsumAttention, {"embed.weight": 0, "attn.query.weight": 1, "attn.value.weight": (0, 1), "attn.proj.weight": 1}
)
_register(ConvAttention, {f"attn.{n}.weight": (0, 1) for n in ("query", "key", "value")})


@case(tokens(), {"embed.weight": 0, "attn.in_proj_weight": 1, "head.weight": 1})
class MultiheadAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(8, 16), nn.Linear(16, 4)
        self.attn = nn.MultiheadAttention(16, 4, batch_first=True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embed(x)
        y, weights = self.attn(x, x, x)
        return self.head(x + y), weights


@case(tokens(), {"embed.weight": 0, "attn.in_proj_weight": 1, "attn.out_proj.weight": 0, "head.weight": 1})
class MultiheadAttentionSequenceFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(8, 16), nn.Linear(16, 4)
        self.attn = nn.MultiheadAttention(16, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).transpose(0, 1)
        return self.head(x + self.attn(x, x, x, need_weights=False)[0]).transpose(0, 1)


@case(lambda: (normal(2, 5, 8), normal(2, 7, 6)), {"embed.weight": 0, "memory.weight": 0, "head.weight": 1})
class CrossAttention(nn.Module):
    """Queries, keys and values of three widths."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.memory = nn.Linear(8, 16), nn.Linear(6, 12)
        self.wide, self.head = nn.Linear(12, 20), nn.Linear(16, 4)
        self.attn = nn.MultiheadAttention(16, 4, kdim=12, vdim=20, batch_first=True)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        x, memory = self.embed(x), self.memory(memory)
        return self.head(x + self.attn(x, memory, self.wide(memory), need_weights=False)[0])


LAYER = {"embed.weight": 0, "layer.linear1.weight": (0, 1), "layer.linear2.weight": (0, 1), "layer.norm1.weight": 0}


@case(tokens(), LAYER)
class EncoderLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(8, 16), nn.Linear(16, 4)
        self.layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.embed(x)))


@case(tokens(), LAYER)
class DecoderLayer(nn.Module):
    """Norm first, causal, with cross attention to the same stream."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(8, 16), nn.Linear(16, 4)
        self.layer = nn.TransformerDecoderLayer(16, 2, 24, norm_first=True, activation="gelu", batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        mask = nn.Transformer.generate_square_subsequent_mask(5, dtype=x.dtype)
        return self.head(self.layer(x, x.flip(1), tgt_mask=mask, tgt_is_causal=True))


@case(image(size=6), {"embed.weight": 0, "qkv.weight": (0, 1), "proj.weight": (0, 1), "head.weight": 1})
class WindowAttention(nn.Module):
    """Swin's: 3 x 3 windows of a shifted image, with a table of relative position biases per head."""

    def __init__(self) -> None:
        super().__init__()
        self.window, self.num_heads, self.shift = 3, 4, 1
        self.embed, self.qkv, self.proj = nn.Conv2d(3, 16, 1), nn.Linear(16, 48), nn.Linear(16, 16)
        self.table, self.head = nn.Parameter(torch.zeros(25, 4)), nn.Linear(16, 4)
        yx = torch.stack(torch.meshgrid(torch.arange(3), torch.arange(3), indexing="ij")).flatten(1)
        offset = (yx[:, :, None] - yx[:, None, :]).permute(1, 2, 0) + 2
        self.register_buffer("index", offset[..., 0] * 5 + offset[..., 1])

    def forward(self, x: Tensor) -> Tensor:
        x = torch.roll(self.embed(x).permute(0, 2, 3, 1), (-self.shift, -self.shift), dims=(1, 2))
        b, h, w, c = x.shape
        s = self.window
        x = x.view(b, h // s, s, w // s, s, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, s * s, c)
        n = x.shape[0]
        q, k, v = self.qkv(x).reshape(n, s * s, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4)
        bias = self.table[self.index.view(-1)].view(s * s, s * s, -1).permute(2, 0, 1).contiguous()
        attn = (q * (c // self.num_heads) ** -0.5) @ k.transpose(-2, -1) + bias.unsqueeze(0)
        x = self.proj((attn.softmax(-1) @ v).transpose(1, 2).reshape(n, s * s, c))
        x = x.view(b, h // s, w // s, s, s, c).permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, c)
        return self.head(torch.roll(x, (self.shift, self.shift), dims=(1, 2)))


@case(image(size=6), {"patch.weight": 0, "cls": 2, "pos": 2, "norm.weight": 0, "head.weight": 1})
class ClassToken(nn.Module):
    """Patches, a class token, a positional table; read from the token."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.norm, self.head = nn.Conv2d(3, 16, 3, stride=3), nn.LayerNorm(16), nn.Linear(16, 4)
        self.cls, self.pos = nn.Parameter(torch.zeros(1, 1, 16)), nn.Parameter(torch.zeros(1, 5, 16))
        self.mix = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.cls.expand(x.shape[0], -1, -1), x), dim=1) + self.pos
        x = x + self.mix(x, x, x, need_weights=False)[0]
        return self.head(self.norm(x)[:, 0])
