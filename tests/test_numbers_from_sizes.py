"""Numbers that are computed from sizes and lose where they came from: made up for, or what they depend on stays whole.

The result must be exact in every case; nothing here says whether channels go, except where that is the point.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import structprune
from structprune.coupling.rehearsed import Rehearsals
from structprune.errors import PlanError

WIDTH = 8


class _Net(nn.Module):
    """Two layers, with something between them that looks at the width."""

    def __init__(self, between: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.between = between
        self.a, self.n, self.b = nn.Linear(6, WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 6)
        self.c, self.d = nn.Linear(6, WIDTH), nn.Linear(WIDTH, 3)
        self.layers = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
        self.by_name = nn.ModuleDict({"layer_8": nn.Linear(3, 3), "layer_4": nn.Linear(3, 3)})

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.between(self, self.a(x))
        return self.d(self.c(self.b(hidden)).relu()) if hidden.shape[-1] != 3 else hidden


def _list_of(m: Any, x: Tensor) -> Tensor:
    return x * [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0][x.shape[-1]]


def _loop(m: Any, x: Tensor) -> Tensor:
    for _ in range(x.shape[-1]):
        x = x * 1.1
    return x


def _named(m: Any, x: Tensor) -> Tensor:
    return x * {"8": 2.0, "4": 3.0}.get(str(x.shape[-1]), 5.0)


def _branch(m: Any, x: Tensor) -> Tensor:
    return x * 2 if int(x.shape[-1]) > WIDTH - 1 else x


def _cell(m: Any, x: Tensor) -> Tensor:
    table: dict[int, int] = {int(x.shape[-1]): 3}
    return x * table.get(WIDTH, 1)


def _chosen_tensor(m: Any, x: Tensor) -> Tensor:
    return [x, x * 2, x * 3][int(x.shape[-1]) % 3]


def _array(m: Any, x: Tensor) -> Tensor:
    return x * torch.from_numpy(np.array([float(len(x[0, 0]))]))


def _constant(m: Any, x: Tensor) -> Tensor:
    return x * torch.tensor(float(int(x.shape[-1])), dtype=x.dtype)


def _counted_entries(m: Any, x: Tensor) -> Tensor:
    return x * torch.arange(int(x.shape[-1])).max().item()


BETWEEN: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "int": lambda m, x: x * int(x.shape[-1]) ** -0.5,
    "round": lambda m, x: x * round(x.shape[-1] / 3),
    "round of a size": lambda m, x: x * round(x.shape[-1]),
    "len": lambda m, x: x * len(x[0, 0]),
    "log": lambda m, x: x * math.log(x.shape[-1]),
    "floor": lambda m, x: x * math.floor(x.shape[-1] / 3),
    "isqrt": lambda m, x: x * math.isqrt(x.shape[-1]),
    "gcd": lambda m, x: x * math.gcd(x.shape[-1], 16),
    "numpy": lambda m, x: x * float(np.sqrt(x.shape[-1])),
    "index": lambda m, x: x * operator.index(x.shape[-1]),
    "bit_length": lambda m, x: x * x.shape[-1].bit_length(),
    "and": lambda m, x: x * (x.shape[-1] & 12),
    "shift": lambda m, x: x * (x.shape[-1] >> 1),
    "format": lambda m, x: x * float(f"{x.shape[-1]}"),
    "nbytes": lambda m, x: x * (x.stride(-2) + 1),
    "sum": lambda m, x: x * sum(x.shape),
    "max": lambda m, x: x * max(5, x.shape[-1]),
    "bool": lambda m, x: x * 2 if bool(int(x.shape[-1]) & 8) else x,
    "prod": lambda m, x: x * math.prod(x.shape),
    "mean by hand": lambda m, x: x + x.sum(-1, keepdim=True) / int(x.shape[-1]),
    "out_features": lambda m, x: x * m.a.out_features**-0.5,
    "in_features": lambda m, x: x * m.b.in_features,
    "normalized_shape": lambda m, x: m.n(x) * m.n.normalized_shape[0],
    "weight": lambda m, x: x * m.a.weight.shape[0],
    "int of an attribute": lambda m, x: x * int(m.a.out_features),
    "other layer": lambda m, x: x * math.log(m.c.out_features),
    "list": _list_of,
    "range": _loop,
    "str": _named,
    "branch": _branch,
    "dict": _cell,
    "chosen tensor": _chosen_tensor,
    "array": _array,
    "constant": _constant,
    "entries": _counted_entries,
}


def _check(model: nn.Module, x: Tensor, **options: Any) -> structprune.Plan:
    plan = structprune.plan(model, x, round_to=1, **options)
    report = structprune.verify(model, plan.apply(model), plan, x)
    assert report.ok, str(report)
    return plan


@pytest.mark.parametrize("ratio", [0.25, 0.5])
@pytest.mark.parametrize("name", BETWEEN)
def test_the_result_is_exact(name: str, ratio: float) -> None:
    torch.manual_seed(0)
    model, x = _Net(BETWEEN[name]).double().eval(), torch.randn(2, 5, 6).double()
    plan = _check(model, x, ratio=ratio)
    assert plan.slices  # what has nothing to do with the number goes all the same


def test_the_reason_names_the_line_and_what_happens_there() -> None:
    model, x = _Net(BETWEEN["log"]).double().eval(), torch.randn(2, 5, 6).double()
    graph = structprune.DependencyGraph(model, x)
    dead = graph.components.removed(graph.chosen("a", [1, 2]))
    assert not graph.settle(dead)
    assert "a number in mul becomes" in graph.pinned()["a.weight, dim 0"]
    assert "test_numbers_from_sizes.py" in graph.pinned()["a.weight, dim 0"]
    assert "c.weight, dim 0" not in graph.pinned()


def test_a_removal_by_hand_is_refused() -> None:
    model, x = _Net(BETWEEN["log"]).double().eval(), torch.randn(2, 5, 6).double()
    graph = structprune.DependencyGraph(model, x)
    with pytest.raises(PlanError, match=r"a number in mul becomes .* at .*test_numbers_from_sizes"):
        graph.prune_group("a", [1, 2])
    graph.prune_group("c", [1, 2])
    assert model.c.out_features == WIDTH - 2


def test_a_literal_beside_a_question_for_a_value_stays() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.h = nn.Linear(6, 8), nn.Linear(8, 3)
            self.register_buffer("g", torch.tensor(2.0))

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            return self.h(torch.cat([x[..., 4:], x[..., :4]], -1) * self.g.item())

    _check(Net().double().eval(), torch.randn(2, 5, 6).double(), ratio=0.5)


class _Calls:
    count = 0


def test_a_forward_that_is_never_twice_the_same_is_pruned_by_what_is_known() -> None:
    class Net(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            _Calls.count += 1
            return torch.add(super().forward(x), torch.zeros((), dtype=x.dtype), alpha=_Calls.count)

    model, x = Net(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).double().eval(), torch.randn(2, 6).double()
    plan = _check(model, x, ratio=0.5)
    assert plan.slices
    assert "two runs of the forward differ" in plan.settings["rehearsal"]
    assert "not checked there" in plan.settings["rehearsal"]
    assert "two runs of the forward differ" in str(plan).replace("\n", " ")


def test_a_number_beside_a_counter_is_found_on_the_same_line() -> None:
    class Net(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            _Calls.count += 1
            h = self[0](x)
            return self[1]((h * math.log(int(h.shape[-1]))).add(_Calls.count * 1e-30))

    torch.manual_seed(0)
    model, x = Net(nn.Linear(6, 8), nn.Linear(8, 3)).double().eval(), torch.randn(2, 6).double()
    assert not _check(model, x, ratio=0.5).slices


def test_a_forward_that_takes_other_ways_says_from_where_on_nothing_is_checked() -> None:
    class Net(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            _Calls.count += 1
            x = self[0](x)
            return self[1](x.relu() if _Calls.count == 1 else x.relu().relu())

    model, x = Net(nn.Linear(6, 8), nn.Linear(8, 3)).double().eval(), torch.randn(2, 6).double()
    _Calls.count = 0
    plan = structprune.plan(model, x, ratio=0.5, round_to=1)
    assert plan.slices
    assert "there and from there on" in plan.settings["rehearsal"]
    assert "rehearsal" not in structprune.plan(nn.Sequential(*model), x, ratio=0.5).settings


def test_ordinary_networks_rehearse_as_they_were_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    original = Rehearsals._at

    def noted(self: Rehearsals, *args: Any) -> Any:
        found = original(self, *args)
        seen.append(found)
        return found

    monkeypatch.setattr(Rehearsals, "_at", noted)
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    layer.eval()
    _check(layer.double(), torch.randn(2, 5, 16).double(), ratio=0.5)
    conv = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 4, 3))
    _check(conv.double().eval(), torch.randn(1, 3, 8, 8).double(), ratio=0.5)
    assert seen == [[], []]


def _under_vmap(m: Any, x: Tensor) -> Tensor:
    return torch.vmap(lambda entry: entry * 2 + entry.sum())(x)


def _element(m: Any, x: Tensor) -> Tensor:
    return x * x[0, 0, 0].item()


class _Other(Tensor):
    pass


def _subclass(m: Any, x: Tensor) -> Tensor:
    return (x.as_subclass(_Other) * 2).as_subclass(Tensor)


@pytest.mark.parametrize("between", [_under_vmap, _element, _subclass])
def test_what_the_tracer_does_not_see_is_exact(between: Callable[[Any, Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    _check(_Net(between).double().eval(), torch.randn(2, 5, 6).double(), ratio=0.5)


def test_a_literal_in_a_hook_is_exact() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).double().eval()
    model[0].register_forward_hook(lambda module, args, out: out.view(-1, 2, 4).flip(1).reshape(-1, 8))
    _check(model, torch.randn(2, 6).double(), ratio=0.5)
