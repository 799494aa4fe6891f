"""Forwards begun in the middle give what whole ones give."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import structprune
from structprune.graph import ChannelGraph
from structprune.recovery import measuring
from structprune.recovery.lockstep import Side, lanes
from structprune.recovery.measuring import output_of
from structprune.recovery.restart import KeepingLane, handed_over, restartable, restarted


class Plain(nn.Module):
    """A residual sum, parts of a tensor, and a result that is used much later."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.last = nn.Linear(8, 4)

    def forward(self, x):
        first = self.first(x)
        left, right = F.relu(first).chunk(2, 1)
        x = self.second(torch.cat([left, right.sigmoid()], 1)) + first
        return self.last((x * x.shape[0]).mean((2, 3))) + first.mean()


class InPlace(Plain):
    """Results, views of them and parts are written over, early and late."""

    def forward(self, x):
        x = F.relu(self.first(x), inplace=True)
        seen = x[:, :2]
        seen.mul_(2)
        other = self.second(x)
        other += x
        late = other.view(len(other), -1)
        late.clamp_(max=1)
        x[:, 0] = 0.5
        return self.last(F.relu(other, inplace=True).mean((2, 3))) + seen.mean() + x.mean()


class WritesItsInput(Plain):
    def forward(self, x):
        x = x.clone() if self.training else x.mul_(1.0)
        return super().forward(x)


@pytest.mark.parametrize("make", [Plain, InPlace])
def test_a_forward_begun_anywhere_ends_the_same(make):
    torch.manual_seed(0)
    model, x = make().eval(), torch.randn(2, 3, 5, 5)
    graph = ChannelGraph(model, x[:1])
    assert restartable(graph.trace)
    numbers = list(graph.trace.keys)
    wanted = output_of(graph, x.clone(), {})
    run = []

    def counted(operation):
        run.append(operation)
        return operation()

    with lanes(KeepingLane, model, [x.clone()], graph.trace, {(number, Side.BEFORE) for number in numbers}) as (kept,):
        for place, number in enumerate(numbers):
            kept.until((number, Side.BEFORE))
            for _ in range(2):  # what one writes over must be whole for the next
                run.clear()
                given = restarted(graph.trace, number, handed_over(graph.trace, number, kept.results))
                found = output_of(graph, x.clone(), {**dict.fromkeys(numbers, counted), **given})
                assert torch.equal(found, wanted)
                assert len(run) == len(numbers) - place
        assert torch.equal(kept.finish(), wanted)
        assert not kept.replay.asked


def test_what_is_not_needed_any_more_has_no_memory():
    model, x = nn.Sequential(*(nn.Linear(4, 4) for _ in range(5))), torch.randn(3, 4)
    graph = ChannelGraph(model, x)
    with lanes(KeepingLane, model, [x], graph.trace, set()) as (kept,):
        kept.finish()
    sizes = [result.untyped_storage().nbytes() for result in kept.results.values()]
    assert sizes[:-1] == [4] * 4
    assert sizes[-1] == 48
    assert all(result.shape == (3, 4) for result in kept.results.values())


def test_a_model_that_writes_its_input_over_is_run_whole():
    model, x = WritesItsInput().eval(), torch.randn(2, 3, 5, 5)
    assert not restartable(ChannelGraph(model, x).trace)
    graph = structprune.DependencyGraph(model, x)
    assert structprune.Reconstruction().fit(graph, [x]) is not None


@pytest.mark.parametrize("make", [Plain, InPlace])
def test_prices_are_those_of_whole_forwards(make, monkeypatch):
    torch.manual_seed(0)
    model, x = make().eval(), torch.randn(8, 3, 5, 5)
    graph = structprune.DependencyGraph(model, x)

    def prices():
        fitted = structprune.Reconstruction().fit(graph, [x.clone(), x.clone()])
        return [curve.price for curve in fitted._curves.values()]

    short = prices()
    monkeypatch.setattr(measuring, "restartable", lambda trace: False)
    whole = prices()
    assert len(short) == len(whole) >= 1
    for one, other in zip(short, whole, strict=True):
        assert one == pytest.approx(other, rel=1e-6)
