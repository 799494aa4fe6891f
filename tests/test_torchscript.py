"""TorchScript inside a model: functions are opened, modules keep their channels, and everything else is pruned."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import structprune

# TorchScript is deprecated, and people still have it in their models.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.* is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.* is not supported:DeprecationWarning"),
]


def _scale(x: Tensor) -> Tensor:
    return x * x.size(-1) ** -0.5


def _gate(a: Tensor, b: Tensor) -> Tensor:
    return torch.sigmoid(a) * b


def _heads(a: Tensor, b: Tensor) -> Tensor:
    x = (a + b).reshape(a.shape[0], 2, a.shape[1] // 2)
    return x.relu().flatten(1)


def _literal(a: Tensor, b: Tensor) -> Tensor:
    return (a + b).view(-1, 4, 2).relu().flatten(1)


class _Net(nn.Module):
    """Two layers that meet in a helper, and another that has nothing to do with it."""

    def __init__(self, helper: Any) -> None:
        super().__init__()
        self.a, self.b, self.h = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 6)
        self.c, self.d = nn.Linear(6, 8), nn.Linear(8, 3)
        self.helper = lambda a, b: helper(a, b)  # compiled functions cannot be copied

    def forward(self, x: Tensor) -> Tensor:
        return self.d(self.c(self.h(self.helper(self.a(x), self.b(x)))).relu())


def _pruned(model: nn.Module, x: Tensor) -> Any:
    plan = structprune.plan(model, x, ratio=0.5, round_to=1)
    slim = plan.apply(model)
    report = structprune.verify(model, slim, plan, x)
    assert report.ok, str(report)
    other = structprune.Plan.from_json(plan.to_json()).apply(copy.deepcopy(model))
    assert torch.equal(other(x), slim(x))
    return slim


def _example(make: Callable[[], nn.Module]) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return make().double().eval(), torch.randn(2, 6).double()


@pytest.mark.parametrize("function", [_gate, _heads])
def test_scripted_functions_are_opened(function: Any) -> None:
    model, x = _example(lambda: _Net(torch.jit.script(function)))
    slim = _pruned(model, x)
    assert (slim.a.out_features, slim.c.out_features) == (4, 4)


def test_a_scripted_function_is_as_the_python_that_it_was_made_from() -> None:
    for function in (_gate, _heads, _literal):
        model, x = _example(lambda function=function: _Net(torch.jit.script(function)))
        written, _ = _example(lambda function=function: _Net(function))
        scripted = structprune.DependencyGraph(model, x)
        assert [n.meta["name"] for n in scripted.trace.nodes] == [
            n.meta["name"] for n in structprune.DependencyGraph(written, x).trace.nodes
        ]
        _pruned(model, x)


def test_what_a_scripted_function_computes_from_sizes_is_made_up_for() -> None:
    scripted = torch.jit.script(_scale)
    model, x = _example(lambda: _Net(lambda a, b: scripted(a + b)))
    assert _pruned(model, x).a.out_features == 4


def test_a_traced_function_pins_with_its_name_and_line() -> None:
    """Sizes stand in it as numbers, whatever its Python source says."""
    traced = torch.jit.trace(_heads, (torch.ones(2, 8), torch.ones(2, 8)))
    model, x = _example(lambda: _Net(traced))
    slim = _pruned(model, x)
    assert (slim.a.out_features, slim.c.out_features) == (8, 4)
    reason = structprune.DependencyGraph(model, x).pinned()["a.weight, dim 0"]
    assert "torchscript._heads" in reason
    assert "test_torchscript.py" in reason


def test_other_runs_of_scripted_functions_are_as_before() -> None:
    call = torch.jit.ScriptFunction.__call__
    model, x = _example(lambda: _Net(torch.jit.script(_gate)))
    structprune.plan(model, x, ratio=0.5)
    assert torch.jit.ScriptFunction.__call__ is call


def test_a_large_weight_in_a_scripted_function_is_verified() -> None:
    traced = torch.jit.trace(_gate, (torch.ones(2, 128, 160), torch.ones(2, 128, 160)))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.w = nn.Linear(8, 160), nn.Linear(160, 4), nn.Parameter(torch.randn(2, 128, 160))

        def forward(self, x: Tensor) -> Tensor:
            return self.b(traced(self.a(x) * 1.0, self.w)) + self.b(self.a(x) * self.w)

    model, x = Net().eval(), torch.randn(2, 128, 8)
    graph = structprune.DependencyGraph(model, x)
    plan = structprune.plan(model, x, ratio=0.5)
    assert structprune.verify(model, plan.apply(model), plan, x).ok
    assert "torchscript._gate" in graph.pinned()["w, dim 2"]


# -- modules -----------------------------------------------------------------------------------------------------------


class _Holder(nn.Module):
    """A scripted child between two layers; behind them, layers that are pruned."""

    def __init__(self, make: Callable[[nn.Module], Any]) -> None:
        super().__init__()
        self.a = nn.Linear(6, 8)
        self.s = make(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU()).double().eval())
        self.h, self.c, self.d = nn.Linear(8, 6), nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.d(self.c(self.h(self.s(self.a(x)))).relu())


_MAKE = {"script": torch.jit.script, "trace": lambda m: torch.jit.trace(m, torch.ones(2, 8).double())}


@pytest.mark.parametrize("make", _MAKE.values(), ids=_MAKE)
def test_a_scripted_child_stays_whole(make: Any) -> None:
    model, x = _example(lambda: _Holder(make))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    graph = structprune.DependencyGraph(model, x)
    for name in ("a.weight, dim 0", "s.0.weight, dim 1", "h.weight, dim 1"):
        assert "compiled TorchScript" in graph.pinned()[name]
        assert "test_torchscript.py" in graph.pinned()[name]
    slim = _pruned(model, x)
    assert (slim.a.out_features, slim.c.out_features) == (8, 4)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.is_leaf and parameter.requires_grad for parameter in slim.parameters())
    assert isinstance(slim.s, torch.jit.ScriptModule)
    assert slim.s is not model.s


def test_in_place_too() -> None:
    model, x = _example(lambda: _Holder(torch.jit.script))
    child = model.s
    structprune.prune(model, x, ratio=0.5, round_to=1, inplace=True)
    assert model.s is child
    assert model.c.out_features == 4


def test_its_parameters_are_counted() -> None:
    model, x = _example(lambda: _Holder(torch.jit.script))
    plan = structprune.plan(model, x, ratio=0.5, round_to=1)
    assert plan.before.params == sum(p.numel() for p in model.parameters())
    assert plan.after.params == sum(p.numel() for p in plan.apply(model).parameters())


def test_a_weight_that_it_shares_stays_and_stays_shared() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.h = nn.Linear(6, 8), nn.Linear(8, 6)
            self.s = torch.jit.script(self.h)

        def forward(self, x: Tensor) -> Tensor:
            return self.h(self.a(x).relu()) + self.s(torch.ones(1, 8, dtype=x.dtype))

    model, x = Net().eval(), torch.randn(2, 6)
    assert model.s.weight is model.h.weight
    plan = structprune.plan(model, x, ratio=0.5, round_to=1)
    slim: Any = plan.apply(model)
    assert slim.a.out_features == 8
    assert slim.s.weight is slim.h.weight


def test_a_child_that_decides_by_values_is_traced_on_them() -> None:
    class Deciding(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if bool(x.sum() > 0):
                return x * 2
            return x

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.s, self.h = nn.Linear(6, 8), torch.jit.script(Deciding()), nn.Linear(8, 6)
            self.c, self.d = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.d(self.c(self.h(self.s(self.a(x)))).relu())

    model, x = _example(Net)
    assert _pruned(model, x).c.out_features == 4


def test_a_model_that_is_scripted_as_a_whole_is_refused() -> None:
    with pytest.raises(structprune.errors.UnsupportedModelError, match="compiled TorchScript"):
        structprune.plan(torch.jit.script(nn.Linear(3, 4)), torch.ones(1, 3), ratio=0.5)
