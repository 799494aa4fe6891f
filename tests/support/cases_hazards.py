"""Networks that are easily pruned wrongly without an error: sizes used as numbers, factors, zeros that are not kept.

Each has a part that can be thinned safely; what else an engine thins here, it must get right.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.cases import case, image, tokens
from support.cases_conv import conv


@case(tokens(), {"embed.weight": 0, "head.weight": 1})
class ScaledEmbedding(nn.Module):
    """The root of the width multiplies the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.d_model, self.embed, self.head = 16, nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).view(-1, self.d_model) * math.sqrt(self.d_model)
        return self.head(torch.tanh(x)).view(2, 5, 4)


@case(tokens(), {"fc2.weight": 0, "head.weight": 1})
class SizeAsNumber(nn.Module):
    """One attribute is both a size to reshape to and a factor of the output."""

    def __init__(self) -> None:
        super().__init__()
        self.d, self.fc1, self.fc2, self.head = 16, nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.fc1(x).reshape(10, self.d))
        return self.head(F.relu(self.fc2(x))).view(2, 5, 4) * self.d


@case(tokens(), {"fc2.weight": 0, "head.weight": 1})
class SumOverSize(nn.Module):
    """A mean written as a sum divided by the size."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.head = nn.Linear(8, 16), nn.Linear(8, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc1(x)
        return self.head(self.fc2(x) * (y.sum(-1, keepdim=True) / y.shape[-1]))


@case(tokens(), {"fc.weight": 0, "head.weight": 1})
class SinusoidalPositions(nn.Module):
    """Computed in the forward from positions along the width, after a layer that has none."""

    def __init__(self) -> None:
        super().__init__()
        self.width = 16
        self.embed, self.fc, self.head = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        step = torch.arange(self.width, dtype=x.dtype)
        place = torch.arange(x.shape[1], dtype=x.dtype)[:, None]
        return self.head(F.relu(self.fc(self.embed(x) + torch.sin(place / 10000 ** (step / self.width)))))


class _Attention(nn.Module):
    """Values and a head; what the queries and keys are is the subject."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.head = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(8, 12), nn.Linear(12, 4)


@case(tokens(), {"v.weight": 0, "head.weight": 1})
class QueryIsKey(_Attention):
    """A factor put into the queries would be in the keys too."""

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x)
        return self.head(F.scaled_dot_product_attention(q, q, self.v(x)))


@case(tokens(), {"v.weight": 0, "head.weight": 1})
class QueryAndKeyShareALayer(_Attention):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.scaled_dot_product_attention(self.q(x), self.q(x.flip(1)), self.v(x)))


@case(tokens(), {"v.weight": 0, "head.weight": 1})
class QueryUsedTwice(_Attention):
    """Somewhere else the queries are wanted without the factor."""

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x)
        return self.head(F.scaled_dot_product_attention(q, self.k(x), self.v(x)) * q.mean(-1, keepdim=True))


@case(tokens(), {"v.weight": 0, "head.weight": 1})
class BoundedQuery(_Attention):
    """Between the layer and the attention stands what a factor does not pass."""

    def forward(self, x: Tensor) -> Tensor:
        q, k = torch.tanh(self.q(x)), F.normalize(self.k(x), dim=-1)
        return self.head(F.scaled_dot_product_attention(q, k, self.v(x)))


@case(tokens(), {"fc2.weight": 0, "head.weight": 1})
class OneTensorAttention(nn.Module):
    """Queries, keys and values are one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.head = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        return self.head(F.relu(self.fc2(F.scaled_dot_product_attention(x, x, x))))


@case(tokens(), {"fc2.weight": 0, "head.weight": 1})
class PositiveWeights(nn.Module):
    """Weights made positive in the forward: those of a channel that is off are one, and so is what they meet."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.head = nn.Linear(8, 16), nn.Linear(6, 8), nn.Linear(8, 4)
        self.weight = nn.Parameter(torch.zeros(6, 16))

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(torch.sigmoid(self.fc1(x)), self.weight.exp())
        return self.head(F.relu(self.fc2(x)))


@case(image(), {"conv2.weight": 0, "head.weight": 1})
class PositiveFilters(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.head = conv(3, 8), conv(6, 8), conv(8, 4)
        self.weight = nn.Parameter(torch.zeros(6, 8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(torch.sigmoid(self.conv1(x)), F.softplus(self.weight))
        return self.head(F.relu(self.conv2(x)))


@case(tokens(), {"fc.weight": 0, "head.weight": 1})
class Distances(nn.Module):
    """A cosine and a distance of vectors whose dead entries are not zero, and a distance that adds to each entry."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.fc, self.head = (nn.Linear(8, n) for n in (12, 12, 12, 8, 4))

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.a(x).exp(), self.b(x).cos()
        y = F.cosine_similarity(a, b, dim=-1) + F.pairwise_distance(a, self.c(x))
        y = y + F.pairwise_distance(self.b(x), self.c(x), eps=0.1)
        return self.head(F.relu(self.fc(x)) * y[..., None])


@case(
    tokens(), {"up.weight": 0, "conv.weight": 0, "select.weight": 1, "dt.weight": 0, "a": 0, "d": 0, "down.weight": 1}
)
class SelectiveScan(nn.Module):
    """Mamba's recurrence in small, one step after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.rank, self.state = 2, 4
        self.up, self.conv = nn.Linear(8, 32), nn.Conv1d(16, 16, 3, groups=16, padding=2)
        self.select, self.dt, self.down = nn.Linear(16, 10), nn.Linear(2, 16), nn.Linear(16, 4)
        self.a, self.d = nn.Parameter(torch.zeros(16, 4)), nn.Parameter(torch.ones(16))

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        x, gate = self.up(x).chunk(2, dim=-1)
        x = F.silu(self.conv(x.transpose(1, 2))[..., :length].transpose(1, 2))
        dt, b, c = self.select(x).split([self.rank, self.state, self.state], dim=-1)
        dt = F.softplus(self.dt(dt))[..., None]
        keep, write = torch.exp(-dt * self.a.exp()), dt * b[:, :, None]
        state, outputs = x.new_zeros(()), []
        for step in range(length):
            state = keep[:, step] * state + write[:, step] * x[:, step, :, None]
            outputs.append((state * c[:, step, None]).sum(-1))
        return self.down((torch.stack(outputs, 1) + x * self.d) * F.silu(gate))


@case(image(), {"conv1.weight": 0, "make.weight": 0, "conv2.weight": 1})
class MadeFilters(nn.Module):
    """Depthwise filters that the network makes from the image."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.make, self.conv2 = conv(3, 8), nn.Linear(3, 72), conv(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(x)
        weight = self.make(x.mean((0, 2, 3))).view(y.shape[1], 1, 3, 3)
        return self.conv2(F.conv2d(y, weight, groups=y.shape[1], padding=1))


@case(image(), {"conv1.weight": 0, "conv2.weight": 1})
class Maxout(nn.Module):
    """The larger of two neighbours."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv(3, 16), conv(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.conv1(x).unflatten(1, (-1, 2)).max(dim=2).values)
