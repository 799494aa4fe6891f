"""Planning leaves the model alone: other threads may run it, or plan others, meanwhile."""

from __future__ import annotations

import functools
import math
import sys
import threading
from collections.abc import Iterator
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import structprune
from structprune.tracing.shadow import shadow_of
from structprune.tracing.state import meta_like
from structprune.tracing.trace import trace


@pytest.fixture(autouse=True)
def _eager_switching() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def test_a_forward_beside_a_plan_runs() -> None:
    model, x = nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 3)), torch.randn(2, 6)
    expected, failed, stop = model(x), [], threading.Event()

    def serve() -> None:
        while not stop.is_set():
            try:
                torch.testing.assert_close(model(x), expected)
            except (RuntimeError, AssertionError) as error:
                failed.append(error)

    thread = threading.Thread(target=serve)
    thread.start()
    for _ in range(20):
        structprune.plan(model, x)
    stop.set()
    thread.join()
    assert failed == []


def test_plans_in_several_threads_leave_python_as_it_was() -> None:
    square_root, call = math.sqrt, nn.Module.__call__

    def work(width: int) -> None:
        model = nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 3))
        for _ in range(10):
            structprune.plan(model, torch.randn(2, 6))

    threads = [threading.Thread(target=work, args=(width,)) for width in (8, 12, 16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert math.sqrt is square_root
    assert nn.Module.__call__ is call


class _Settings:
    def __init__(self, width: int) -> None:
        self.width = width


class _Holder:
    """A hook that holds a module."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return self.module(output)


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)
        self.settings = _Settings(8)
        self.later: list[Any] = [self.b, {"head": self.c}]
        self.shown: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.shown.append(1)
        self.settings.width = 9
        return self.later[1]["head"](self.later[0](self.a(x)))


def test_a_shadow_shares_no_module_with_the_model() -> None:
    model = _Net()
    model.a.register_forward_hook(_Holder(model.b))
    model.b.register_forward_hook(lambda module, args, output: model.b.weight.mean() + output)
    model.c.forward = MethodType(nn.Linear.forward, model.c)  # type: ignore[method-assign]  # as users patch forwards
    model.a.forward = functools.partial(nn.Linear.forward, model.a)  # type: ignore[method-assign]  # as above
    shadow = shadow_of(model, lambda _, tensor: meta_like(tensor)).model
    assert shadow.later[0] is shadow.b
    assert shadow.b is not model.b
    assert shadow.c.forward.__self__ is shadow.c
    assert shadow(torch.empty(1, 4, device="meta")).is_meta  # every weight that is reached is a stand-in
    assert (model.shown, model.settings.width) == ([], 8)


def test_what_a_forward_leaves_behind_is_left_on_the_shadow() -> None:
    model = _Net()
    trace(model, torch.randn(1, 4))
    assert (model.shown, model.settings.width) == ([], 8)


class _Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)
        self.settings = _Settings(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).reshape(len(x), self.settings.width))


def test_settings_are_those_of_the_model_after_a_plan() -> None:
    model = _Scaled()
    plan = structprune.plan(model, torch.randn(1, 4), ratio=0.5, round_to=1)
    assert model.settings.width == 8
    assert plan.apply(model).settings.width == 4


MODULE = nn.Linear(8, 8)


class _Global(nn.Module):
    """Reaches a module of its own through a global."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), MODULE

    def forward(self, x: Tensor) -> Tensor:
        return MODULE(self.a(x))


def test_a_tensor_reached_through_a_global_is_the_models_own() -> None:
    found = trace(_Global(), torch.randn(1, 4))
    assert {str(node.target) for node in found.nodes if node.meta["name"] == "parameter"} >= {"b.weight", "b.bias"}
    assert not found.real
