"""Forwards that branch on what their inputs alone decide are traced without numbers of weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import structprune
from structprune.errors import PinnedError, TraceError
from structprune.ops import op_of
from structprune.tracing.trace import Trace, trace


def traced(model: nn.Module, inputs: object) -> Trace:
    return trace(model, inputs, operations=op_of)


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 4)
        self.register_buffer("table", torch.arange(6) % 3)
        self.register_buffer("scale", torch.full((1,), 0.5))


class OnMask(Base):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        if mask.all():
            return self.head(self.one(x))
        return self.head(self.two(x) * mask[..., None])


class OnWrittenCopy(Base):
    """The tensor that decides was changed in place, through a view of it."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        flags = torch.zeros_like(mask)
        flags[:, 1:][mask[:, 1:] > 0] = 1
        return self.head(self.one(x)) if int(flags.sum()) == 4 else self.head(self.two(x))


class OnBuffer(Base):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.head(self.one(x)) if self.table.max().item() == 2 else self.head(self.two(x))


class Selected(Base):
    """How many tokens there are after the selection depends on the mask only."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.one(x)[mask.bool()]
        return self.head(x) if len(torch.nonzero(mask)) == x.shape[0] else self.head(2 * x)


CASES = [OnMask, OnWrittenCopy, OnBuffer, Selected]


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("full", [True, False])
def test_branches_on_inputs_are_followed_on_stand_ins(kind, full):
    torch.manual_seed(0)
    model, x, mask = kind(), torch.randn(2, 3, 8), torch.ones(2, 3, dtype=torch.long)
    if not full:
        mask[0, 2] = 0
    found = traced(model, (x, mask))
    assert not found.real
    used = {node.target for node in found.nodes if node.op == "get_attr"}
    expected = kind is OnBuffer or kind is Selected or full
    assert ("one.weight" in used, "two.weight" in used) == (expected, not expected)
    plan = structprune.plan(model, (x, mask), ratio=0.5)
    assert structprune.verify(model, plan.apply(model), plan, (x, mask)).ok


class OnWeights(Base):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        flags = torch.zeros(2)
        flags[0] = self.scale.sum()  # from here on the whole of it depends on weights
        return self.head(self.one(x)) if flags.sum() > 0 else self.head(self.two(x))


class OnChance(Base):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.head(self.one(x)) if torch.rand(()) > 2 else self.head(self.two(x))


@pytest.mark.parametrize("kind", [OnWeights, OnChance])
def test_what_depends_on_weights_or_chance_is_not_made_up(kind):
    model, inputs = kind(), (torch.randn(2, 3, 8), torch.ones(2, 3))
    assert traced(model, inputs).real
    with pytest.raises(TraceError, match="depends on weights"):
        traced(model.to("meta"), inputs)


class Outside(nn.Module):
    """A layer between two others that leaves torch and comes back; `way` says how."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.one, self.two, self.three = nn.Linear(4, 6), nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.two(self.one(x).relu()).detach()
        if self.way == "numpy":
            return self.three(torch.from_numpy(x.numpy() / 2))
        return self.three(torch.tensor(np.asarray(x) / 2 if self.way == "array" else x.tolist()))


@pytest.mark.parametrize("way", ["numpy", "array", "list"])
def test_what_is_handed_to_something_else_than_torch_stays_whole(way: str) -> None:
    model, x = Outside(way), torch.randn(5, 4)
    with pytest.raises(PinnedError, match=r"no rule for the operation (numpy|tolist|__array__)"):
        structprune.DependencyGraph(model, x).group("two")
    slim = structprune.prune(model, x, ratio=0.5)
    assert (slim.one.out_features, slim.two.out_features, slim.three.in_features) == (3, 8, 8)
    recovered = structprune.recover(slim, model, [torch.randn(16, 4)])
    # What comes after is not known to have changed.
    assert [row.layer for row in structprune.recovery_report(recovered).layers] == ["two"]
