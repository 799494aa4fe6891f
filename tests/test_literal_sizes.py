"""Sizes written as numbers in a forward: the network still prunes with one call."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support import oracle
from support.cases import normal
from support.snapshot import assert_untouched, snapshot
from torch import Tensor, nn

import structprune


class CifarNet(nn.Module):
    """Three convolutions, and a view whose size is a product of literals."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, width, 3), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, 2 * width, 3), nn.BatchNorm2d(2 * width)
        self.conv3, self.bn3 = nn.Conv2d(2 * width, 4 * width, 3), nn.BatchNorm2d(4 * width)
        self.fc1, self.fc2, self.fc3 = nn.Linear(16 * width, 2048), nn.Linear(2048, 512), nn.Linear(512, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(F.max_pool2d(F.relu(self.conv1(x)), 2, 2))
        x = self.bn2(F.max_pool2d(F.relu(self.conv2(x)), 2, 2))
        x = self.bn3(F.max_pool2d(F.relu(self.conv3(x)), 2, 2))
        x = x.view(-1, 1024 * 2 * 2)
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x)))))


class NarrowCifarNet(CifarNet):
    """The same with a quarter of the channels, small enough for float64."""

    def __init__(self) -> None:
        super().__init__(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(F.max_pool2d(F.relu(self.conv1(x)), 2, 2))
        x = self.bn2(F.max_pool2d(F.relu(self.conv2(x)), 2, 2))
        x = self.bn3(F.max_pool2d(F.relu(self.conv3(x)), 2, 2))
        x = x.view(-1, 32 * 2 * 2)
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x)))))


class Inner(nn.Module):
    """A block whose own forward holds the literal; the network around it has no literal."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).reshape(-1, 2, 4, 5, 5).transpose(1, 2).reshape(-1, 8, 5, 5)


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first, self.second, self.head = nn.Conv2d(3, 4, 1), Inner(), Inner(), nn.Conv2d(16, 3, 1)

    def forward(self, x: Tensor, twice: bool = True) -> Tensor:
        x = self.stem(x)
        return self.head(torch.cat((self.first(x), self.second(x) if twice else self.first(x)), 1))


def test_cifar_network_has_the_size_it_is_known_by_and_prunes() -> None:
    model = CifarNet().eval()
    assert sum(p.numel() for p in model.parameters()) == 15_355_402
    inputs = normal(2, 3, 32, 32)
    before = snapshot(model)
    plan = structprune.plan(model, inputs, ratio=0.5)
    slim = structprune.prune(model, inputs, ratio=0.5)
    assert_untouched(model, before)
    assert (slim.conv1.out_channels, slim.conv2.out_channels, slim.conv3.out_channels) == (128, 256, 512)
    assert (slim.fc1.in_features, slim.fc1.out_features, slim.fc2.out_features) == (2048, 1024, 256)
    assert structprune.verify(model, slim, plan, inputs).max_relative_error < 1e-4
    assert isinstance(slim, CifarNet)


def test_another_batch_size_goes_through_the_rewritten_view() -> None:
    model = oracle.jitter(NarrowCifarNet(), seed=0)
    inputs = normal(2, 3, 32, 32).double()
    plan = structprune.plan(model, inputs, ratio=0.5, importance="random")
    slim = plan.apply(model)
    oracle.check(model, slim, plan, inputs)
    oracle.check(model, slim, plan, normal(5, 3, 32, 32, seed=1).double())
    assert model(inputs).shape == (2, 10), "the original keeps its own forward"


def test_a_literal_in_a_block_used_twice() -> None:
    model = oracle.jitter(Outer(), seed=0)
    inputs = normal(2, 3, 5, 5).double()
    for seed in range(3):
        plan = structprune.plan(model, inputs, ratio=0.5, importance=structprune.Random(seed))
        slim = plan.apply(model)
        oracle.check(model, slim, plan, inputs)
    assert slim.first.conv.out_channels < 8
    assert slim.second.conv.out_channels < 8


@pytest.mark.parametrize("batch", [1, 3])
def test_the_rewritten_network_survives_saving_its_weights(batch: int) -> None:
    model = oracle.jitter(NarrowCifarNet(), seed=1)
    inputs = normal(2, 3, 32, 32).double()
    plan = structprune.plan(model, inputs, ratio=0.5)
    slim, again = plan.apply(model), plan.apply(NarrowCifarNet().double().eval())
    again.load_state_dict(slim.state_dict())
    x = normal(batch, 3, 32, 32, seed=2).double()
    assert torch.equal(slim(x), again(x))
