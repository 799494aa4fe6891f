"""Operations that only real numbers can run: the model is traced on its weights, and no literal in it is rewritten."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import structprune


class _Copied(nn.Module):
    """A copied view over strides that no view can take; on the meta device it raises."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.h = nn.Linear(6, 8), nn.Linear(8, 6)
        self.c, self.d = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        copied = torch.view_copy(self.a(x).transpose(0, 1), [10, 8])
        return self.d(self.c(self.h(copied)).relu())


def test_a_plan_for_a_trace_on_real_numbers_is_applied() -> None:
    torch.manual_seed(0)
    model, x = _Copied().double().eval(), torch.randn(2, 5, 6).double()
    assert structprune.DependencyGraph(model, x).trace.real
    plan = structprune.plan(model, x, ratio=0.5, round_to=1)
    assert not plan.literal_edits
    slim = structprune.Plan.from_json(plan.to_json()).apply(model)
    assert (slim.a.out_features, slim.c.out_features) == (8, 4)
    assert structprune.verify(model, slim, plan, x).ok
