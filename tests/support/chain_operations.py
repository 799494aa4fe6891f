"""More operations for `support.random_chains`: the kinds that networks were wrong by, in the spellings that people use.

Numbers from sizes, bounds from the end, tensors of indices, repeats, pairs of channels, packed sequences, grouped-query
attention, weights that a forward computes.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

Operation = Callable[[Tensor, Any], Tensor]


def _grouped_query(x: Tensor, m: Any) -> Tensor:
    """Four query heads, two heads of keys and values."""
    b, n, _ = x.shape
    q, k, v = (layer(x).view(b, n, -1, 4).transpose(1, 2) for layer in (m.q, m.k, m.v))
    k, v = (t[:, :, None].expand(-1, -1, q.shape[1] // t.shape[1], -1, -1).reshape(q.shape) for t in (k, v))
    return m.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def _packed(x: Tensor, m: Any) -> Tensor:
    packed, _ = m.a(pack_padded_sequence(x, torch.tensor([4, 3, 2]), batch_first=True))
    return pad_packed_sequence(packed, batch_first=True)[0]


def _last_state(x: Tensor, m: Any) -> Tensor:
    lengths = torch.tensor([4, 2, 3])
    _, state = m.a(pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False))
    return (state[0] if isinstance(state, tuple) else state)[-1][:, None].expand(-1, 4, -1)


def _heads(x: Tensor, m: Any) -> Tensor:
    q, k, v = m.a(x).view(3, 4, 3, 2, -1).permute(2, 0, 3, 1, 4).unbind(0)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def _scaled(x: Tensor, m: Any) -> Tensor:
    q = m.q(x)
    return (q @ m.k(x).mT * int(q.shape[-1]) ** -0.5).softmax(-1) @ m.v(x)


PLAIN: dict[str, Operation] = {
    "from the end": lambda x, m: x[..., -4:],
    "up to the end": lambda x, m: F.pad(x[..., :-3], (0, 3)),
    "between ends": lambda x, m: torch.cat([x[..., -4:-2], x[..., -2:]], -1),
    "narrow from the end": lambda x, m: x.narrow(-1, -4, 4),
    "half from the end": lambda x, m: torch.cat([x[..., -(x.shape[-1] // 2) :], x], -1),
    "size less two": lambda x, m: F.pad(x[..., : x.shape[-1] - 2], (0, 2)),
    "view -1": lambda x, m: x.reshape(3, -1).view(3, 4, -1),
    "pairs by -1": lambda x, m: x.reshape(3, 4, -1, 2).sum(-1).repeat(1, 1, 2),
    "fours by -1": lambda x, m: x.reshape(3, 4, -1, 4).transpose(-1, -2).reshape(3, 4, -1),
    "mean of all": lambda x, m: x + x.mean(),
    "mean of two": lambda x, m: x * x.mean((1, 2), keepdim=True),
    "over numel": lambda x, m: x * (x.sum() / x.numel()),
    "nanmean": lambda x, m: x + x.nanmean(-1, True),
    "NumPy's root": lambda x, m: x / np.sqrt(x.shape[-1]),
    "float of size": lambda x, m: x / float(x.shape[-1]),
    "isqrt": lambda x, m: x / math.isqrt(x.shape[-1]),
    "log of size": lambda x, m: x * math.log2(x.shape[-1]),
    "bit_length": lambda x, m: x * x.shape[-1].bit_length(),
    "index of size": lambda x, m: x / operator.index(x.shape[-1]),
    "digits": lambda x, m: x * len(str(x.shape[-1])),
    "from a list": lambda x, m: x * [0.1 * i for i in range(200)][x.shape[-1]],
    "tensor of size": lambda x, m: x / torch.tensor(x.shape[-1]),
    "as often": lambda x, m: sum((x for _ in range(x.shape[-1] // 2)), torch.zeros(())),
    "rest of size": lambda x, m: x * (x.shape[-1] % 3),
    "linspace": lambda x, m: x * torch.linspace(0, 1, x.shape[-1]),
    "eye": lambda x, m: x @ torch.eye(x.shape[-1]).to(x),
    "shuffled": lambda x, m: x.reshape(3, 4, 2, -1).transpose(2, 3).reshape(3, 4, -1),
    "reversed": lambda x, m: torch.stack(x.unbind(-1)[::-1], -1),
    "list of indices": lambda x, m: x[..., [0, 2, 1, -1]],
    "picked": lambda x, m: x.index_select(-1, torch.tensor([1, 0, 3, 3])),
    "first like all": lambda x, m: x[..., :1].expand_as(x) + x,
    "first to all": lambda x, m: x[..., :1].expand(-1, -1, x.shape[-1]) + x,
    "first as long": lambda x, m: torch.broadcast_to(x[..., :1], (3, 4, 8)),
    "copies": lambda x, m: x[:, :, None].expand(3, 4, 2, -1).flatten(2),
    "products of pairs": lambda x, m: (x[..., None] * x[..., None, :]).sum(-1),
    "sums of pairs": lambda x, m: (x[..., None] + x[..., None, :]).sum(-1),
    "some products": lambda x, m: torch.einsum("bnc,bnd->bncd", x, x).flatten(2)[..., :8],
    "covariance": lambda x, m: x @ torch.cov(x[0].T),
    "matrix of all": lambda x, m: x @ (x[0].T @ x[0]),
    "ones": lambda x, m: torch.cat([x, torch.ones_like(x)], -1),
    "count": lambda x, m: x * (1 + (x > 0).sum(-1, keepdim=True)),
    "rope": lambda x, m: x + torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(2),
    "hidden norm": lambda x, m: F.layer_norm(x, x.shape[-1:]),
}
HELD: dict[str, tuple[Callable[[int], dict[str, Any]], Operation]] = {
    "grouped query": (
        lambda c: {"q": nn.Linear(c, 16), "k": nn.Linear(c, 8), "v": nn.Linear(c, 8), "o": nn.Linear(16, 8)},
        _grouped_query,
    ),
    "attention": (lambda c: {"a": nn.Linear(c, 3 * c)}, _heads),
    "scores": (lambda c: {"q": nn.Linear(c, 8), "k": nn.Linear(c, 8), "v": nn.Linear(c, 8)}, _scaled),
    "weights of heads": (
        lambda c: {"a": nn.MultiheadAttention(c, 2, batch_first=True)},
        lambda x, m: m.a(x, x, x)[1] @ x,
    ),
    "packed LSTM": (lambda c: {"a": nn.LSTM(c, 8, batch_first=True)}, _packed),
    "packed GRU": (lambda c: {"a": nn.GRU(c, 8, batch_first=True, bidirectional=True)}, _packed),
    "last state": (lambda c: {"a": nn.GRU(c, 8, 2, batch_first=True)}, _last_state),
    "projected": (lambda c: {"a": nn.LSTM(c, 8, batch_first=True, proj_size=4)}, _last_state),
    "in four groups": (lambda c: {"a": nn.Conv1d(c, 8, 3, padding=1, groups=4)}, lambda x, m: m.a(x.mT).mT),
    "transposed in groups": (lambda c: {"a": nn.ConvTranspose1d(c, 8, 1, groups=2)}, lambda x, m: m.a(x.mT).mT),
    "groups by size": (
        lambda c: {"a": nn.Parameter(torch.rand(8, c // 2, 1))},
        lambda x, m: F.conv1d(x.mT, m.a, groups=x.shape[-1] // m.a.shape[1]).mT,
    ),
    "standardised": (
        lambda c: {"a": nn.Parameter(torch.randn(8, c))},
        lambda x, m: F.linear(x, (m.a - m.a.mean(1, True)) / (m.a.std(1, keepdim=True) + 1e-5)),
    ),
    "normalised": (lambda c: {"a": nn.Parameter(torch.randn(8, c))}, lambda x, m: F.linear(x, F.normalize(m.a, dim=1))),
    "tied": (lambda c: {"a": nn.Parameter(torch.randn(8, c))}, lambda x, m: F.relu(x @ m.a.T) @ m.a),
    "scaled by inputs": (lambda c: {"a": nn.Linear(c, 8)}, lambda x, m: m.a(x) / math.sqrt(m.a.in_features)),
    "distances": (lambda c: {"a": nn.Parameter(torch.randn(8, c))}, lambda x, m: torch.cdist(x, m.a)),
    "squeezed": (
        lambda c: {"a": nn.Linear(c, 4), "b": nn.Linear(4, c)},
        lambda x, m: x * torch.sigmoid(m.b(F.relu(m.a(x.mean(1))))).unsqueeze(1),
    ),
    "copied by index": (lambda c: {"a": torch.tensor([1, 3])}, lambda x, m: x.index_copy(-1, m.a, x[..., :2])),
    "filled tokens": (lambda c: {"a": torch.tensor([1, 3])}, lambda x, m: x.index_fill(1, m.a, 0.5)),
    "repeated by buffer": (lambda c: {"a": torch.tensor([1, 2, 0, 1])}, lambda x, m: x.repeat_interleave(m.a, 1)),
    "scattered": (lambda c: {"a": torch.randint(0, 4, (3, 4, c))}, lambda x, m: x.scatter_add(1, m.a, x)),
    "part of a buffer": (lambda c: {"a": torch.rand(64)}, lambda x, m: x * m.a[: x.shape[-1]]),
    "mixture": (
        lambda c: {"r": nn.Linear(c, 3), "a": nn.Parameter(torch.randn(3, c, 8))},
        lambda x, m: torch.einsum("bne,bnc,ecd->bnd", m.r(x).softmax(-1), x, m.a),
    ),
}
