"""Small networks in which a criterion can be told what is right, and data for them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from structprune.coupling.graph import ChannelGraph
from structprune.coupling.groups import Group
from structprune.errors import PlanError
from structprune.importance.base import Importance, check_scores, fitted
from structprune.importance.data import Batches
from structprune.planning.build import tensors_of


class Chain(nn.Module):
    """conv - norm - ReLU - conv - tanh - mean - linear: ``features`` is what the second convolution sees."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.second = nn.Conv2d(4, 5, 3, stride=2, padding=1)
        self.last = nn.Linear(5, 3)

    def features(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.first(x)))

    def rest(self, features: Tensor) -> Tensor:
        return self.last(torch.tanh(self.second(features)).mean((2, 3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self.features(x))


class Residual(nn.Module):
    """A residual stream that ends at two layers, a depthwise and a grouped convolution, a flattened map."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.expand = nn.Conv2d(8, 12, 1)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.project = nn.Conv2d(12, 8, 1)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.head = nn.Linear(8 * 2 * 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = x + self.project(F.relu(self.depthwise(F.relu(self.expand(x)))))
        x = F.relu(self.grouped(x))
        return self.head(F.max_pool2d(x, 3).flatten(1))


class TwoEnds(nn.Module):
    """A residual stream that ends at a branch and at the head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(108, 5)
        self.branch = nn.Linear(5, 4)
        self.back = nn.Linear(4, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x.flatten(1))
        return self.head(x + self.back(torch.tanh(self.branch(x))))


class Attention(nn.Module):
    """Tokens, attention with heads, an MLP whose weights are bare parameters, a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 4
        self.embed = nn.Linear(3, 12)
        self.norm = nn.LayerNorm(12)
        self.qkv = nn.Linear(12, 36)
        self.out = nn.Linear(12, 12)
        self.up = nn.Parameter(torch.randn(12, 10) / 3)
        self.down = nn.Parameter(torch.randn(10, 12) / 3)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.flatten(2).transpose(1, 2))
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, -1)
        x = x + self.out(mixed)
        x = x + F.gelu(x @ self.up) @ self.down
        return self.head(x.mean(1))


NETS = {"chain": Chain, "residual": Residual, "attention": Attention}


def build(name: str) -> nn.Module:
    """A network with weights, biases and norms that are all in use, in float64."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = NETS[name]()
        for tensor in [*net.parameters(), *net.buffers()]:
            if tensor.is_floating_point():
                tensor.data += torch.rand_like(tensor) * 0.3
    return net.double().eval()


def images(count: int = 8, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(count, 3, 6, 6, generator=generator, dtype=torch.float64).to(dtype)


def labels(count: int = 8) -> Tensor:
    return torch.arange(count) % 3


def pairs(*sizes: int, dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    """The first samples in batches of these sizes."""
    x, y = images(sum(sizes), dtype), labels(sum(sizes))
    return list(zip(x.split(list(sizes)), y.split(list(sizes)), strict=True))


def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def graph_of(net: nn.Module) -> ChannelGraph:
    dtype = next(net.parameters()).dtype
    return ChannelGraph(net, images(2, dtype))


def group_of(graph: ChannelGraph, name: str) -> Group:
    return next(group for group in graph.groups() if group.name == name)


def scores_of(graph: ChannelGraph, importance: str | Importance, data: object = None) -> dict[str, Tensor]:
    """Scores of every group that the criterion can see, by the group's name and number."""
    batches = Batches(pairs(8) if data is None else data, loss=cross_entropy)
    ready = fitted(importance, graph, batches)
    tensors, found = tensors_of(graph), {}
    for number, group in enumerate(graph.groups()):
        try:
            found[f"{number} {group.name}"] = check_scores(ready(group, tensors), group).detach()
        except PlanError as error:
            if "ignore=" not in str(error):
                raise
    return found


def slices(net: nn.Module, channel: int) -> list[list[float]]:
    """Everything that goes with a channel of Chain's first convolution, tensor by tensor."""
    return [
        net.first.weight[channel].flatten().tolist(),
        [net.first.bias[channel].item()],
        [net.norm.weight[channel].item()],
        [net.norm.bias[channel].item()],
        net.second.weight[:, channel].flatten().tolist(),
    ]


def everything(net: nn.Module, channel: int) -> list[float]:
    return [value for part in slices(net, channel) for value in part]


def first(net: nn.Module, importance: str | Importance) -> list[float]:
    return scores_of(graph_of(net), importance)["0 first"].tolist()
