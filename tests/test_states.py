"""Any state that a model may be in: frozen, half precision, on meta, in inference mode, with hooks and odd inputs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import oracle
from support.cases import CASES, all_cases, normal
from support.snapshot import assert_untouched, snapshot
from torch import Tensor, nn

import structprune
from structprune.errors import PlanError

all_cases()
INPUTS = normal(2, 3, 7, 7)
CONTEXTS = {"plain": nullcontext, "no_grad": torch.no_grad, "inference_mode": torch.inference_mode}


def network() -> Any:
    return CASES["InvertedResidual"].build()


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("inplace", [False, True])
def test_gradient_modes(context: str, inplace: bool) -> None:
    model = oracle.jitter(network(), seed=0)
    twin = oracle.jitter(network(), seed=0)
    manager: Callable[[], AbstractContextManager[Any]] = CONTEXTS[context]
    with manager():
        plan = structprune.plan(model, INPUTS.double(), ratio=0.5)
        slim = structprune.prune(model, INPUTS.double(), ratio=0.5, inplace=inplace)
    assert (slim is model) == inplace
    oracle.check(twin, slim, plan, INPUTS.double())


def test_a_model_born_in_inference_mode() -> None:
    with torch.inference_mode():
        model = network().eval()
        slim = structprune.prune(model, INPUTS, ratio=0.5)
        assert slim(INPUTS).shape == model(INPUTS).shape
    assert slim.expand.out_channels == 12


def test_the_result_of_no_grad_can_be_trained() -> None:
    with torch.no_grad():
        slim = structprune.prune(network(), INPUTS, ratio=0.5)
    slim(INPUTS).sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in slim.parameters())


def test_frozen_parameters_stay_frozen() -> None:
    model = network().requires_grad_(False)
    model.head.bias.requires_grad_(True)
    before = snapshot(model)
    slim = structprune.prune(model, INPUTS, ratio=0.5)
    assert_untouched(model, before)
    assert slim.expand.out_channels == 12
    assert [name for name, p in slim.named_parameters() if p.requires_grad] == ["head.bias"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_types(dtype: torch.dtype) -> None:
    model = network().to(dtype).eval()
    slim = structprune.prune(model, INPUTS.to(dtype), ratio=0.5)
    assert slim.expand.out_channels == 12
    assert {p.dtype for p in slim.parameters()} == {dtype}
    assert slim(INPUTS.to(dtype)).dtype == dtype


def test_types_may_differ_within_a_model() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.conv2 = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3).to(torch.bfloat16)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv2(self.conv1(x).to(self.conv2.weight.dtype)).float()

    slim = structprune.prune(Mixed().eval(), INPUTS, ratio=0.5)
    assert (slim.conv1.weight.dtype, slim.conv2.weight.dtype) == (torch.float32, torch.bfloat16)
    assert slim.conv2.in_channels == 4


def test_meta_has_nothing_to_rank() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4))
    with pytest.raises(PlanError, match="on the meta device and have no values to rank"):
        structprune.plan(model, torch.empty(2, 6, device="meta"), ratio=0.5)


def test_meta() -> None:
    """Plans without data; only an order that needs no weights is possible."""
    with torch.device("meta"):
        model, inputs = network(), torch.empty(2, 3, 7, 7)
    before = snapshot(model)
    plan = structprune.plan(model, inputs, ratio=0.5, importance="random")
    slim = plan.apply(model)
    assert_untouched(model, before)
    assert all(p.is_meta for p in slim.parameters())
    assert slim.expand.out_channels == 12
    assert slim(inputs).shape == (2, 4, 7, 7)
    real = plan.apply(network())
    assert real(INPUTS).shape == (2, 4, 7, 7)


class Nested(nn.Module):
    """Keyword inputs, some nested and some no tensors; a nest of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.mid = nn.Linear(6, 8), nn.Linear(5, 8), nn.Linear(8, 12)
        self.a, self.b = nn.Linear(12, 3), nn.Linear(12, 2)
        self.unused = nn.Linear(7, 9)
        self.spare = nn.Parameter(torch.zeros(8, 8))

    def forward(self, *, left: Tensor, extra: dict[str, Any], scale: float = 1.0, mask: Tensor | None = None) -> Any:
        x = F.relu(self.left(left) + scale * self.right(extra["right"][0]))
        x = self.mid(x if mask is None else x * mask)
        return {"a": self.a(x), "rest": (self.b(x), [x.sum(-1, keepdim=True)]), "none": None, "scale": scale}


def test_keyword_inputs_nested_outputs_and_unused_parameters() -> None:
    model = oracle.jitter(Nested(), seed=0)
    inputs = {"left": normal(2, 6).double(), "extra": {"right": [normal(2, 5).double(), 3]}, "scale": 0.5}
    plan = structprune.plan(model, inputs, ratio=0.5, importance="random")
    slim = plan.apply(model)
    oracle.check(model, slim, plan, inputs)
    assert (slim.mid.in_features, slim.mid.out_features) == (4, 6)
    for name in ("unused.weight", "unused.bias", "spare"):
        assert torch.equal(slim.get_parameter(name), model.get_parameter(name))
        assert name not in plan.removed


def test_a_dataclass_and_a_named_tuple_come_out() -> None:
    @dataclass
    class Output:
        logits: Tensor
        hidden: Tensor | None = None

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(6, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Any:
            values, _ = torch.max(x, dim=0, keepdim=True)
            return Output(self.fc2(self.fc1(x))), torch.return_types.max((values, values))

    slim = structprune.prune(Wrapped(), normal(3, 6), ratio=0.5)
    assert slim.fc1.out_features == 4
    assert slim(normal(3, 6))[0].logits.shape == (3, 4)


@pytest.mark.parametrize("training", [True, False])
def test_mode_hooks_and_random_state_are_as_they_were(training: bool) -> None:
    """Dropout would draw numbers, batch norm would move its statistics, hooks would be called."""
    calls: list[str] = []
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(), nn.Conv2d(8, 4, 3)).train(training)
    model[1].eval()
    model[0].register_forward_hook(lambda *_: calls.append("forward"))
    model[0].weight.register_hook(lambda gradient: calls.append("backward"))
    model(INPUTS).sum().backward()
    before = snapshot(model)
    plan = structprune.plan(model, INPUTS, ratio=0.5, importance="random")
    assert_untouched(model, before)
    slim = structprune.prune(model, INPUTS, ratio=0.5)
    assert_untouched(model, before)
    structprune.verify(model, plan.apply(model), plan, INPUTS)
    structprune.cost(model, INPUTS)
    assert_untouched(model, before)
    assert [module.training for module in slim.modules()] == [module.training for module in model.modules()]
    calls.clear()
    slim(INPUTS)
    assert calls == ["forward"], "the slim model keeps its hooks"


def test_inplace_keeps_the_identity_of_everything() -> None:
    model = network()
    parameters, modules = dict(model.named_parameters()), dict(model.named_modules())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert structprune.prune(model, INPUTS, ratio=0.5, inplace=True) is model
    assert all(parameters[name] is p for name, p in model.named_parameters())
    assert all(modules[name] is m for name, m in model.named_modules())
    before = model.expand.weight.detach().clone()
    model(INPUTS).sum().backward()
    optimizer.step()
    assert not torch.equal(model.expand.weight, before)


def test_gradients_follow_their_parameters() -> None:
    model = network()
    model(INPUTS).sum().backward()
    plan = structprune.plan(model, INPUTS, ratio=0.5)
    (gone,) = plan.removed["expand.bias"].values()
    kept = [i for i in range(24) if i not in gone]
    expected = model.expand.bias.grad[kept].clone()
    slim = plan.apply(model)
    assert torch.equal(slim.expand.bias.grad, expected)


def test_a_plan_survives_its_json() -> None:
    model = oracle.jitter(network(), seed=0)
    plan = structprune.plan(model, INPUTS.double(), ratio=0.5)
    again = type(plan).from_json(plan.to_json())
    assert again == plan
    oracle.check(model, again.apply(model), plan, INPUTS.double())


def test_ignored_layers_stay_whole() -> None:
    model = network()
    for ignored in ("expand", model.expand):
        slim = structprune.prune(model, INPUTS, ratio=0.5, ignore=[ignored])
        assert slim.expand.weight.shape == model.expand.weight.shape
        assert slim.depth.weight.shape == model.depth.weight.shape, "what goes with it stays whole too"


class KeptResult(nn.Module):
    """Keeps a result in a dict from one evaluation to the next, as LeViT keeps its attention biases."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.gain, self.head = nn.Linear(8, 16), nn.Parameter(torch.rand(16)), nn.Linear(16, 4)
        self.kept: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        key = str(x.device)
        if key not in self.kept:
            self.kept[key] = self.gain.detach() * 2
        return self.head(torch.tanh(self.fc(x)) * self.kept[key])


@pytest.mark.parametrize("inplace", [False, True])
def test_results_that_a_forward_keeps_are_dropped(inplace: bool) -> None:
    model, x = KeptResult().eval(), normal(2, 8)
    model(x)
    plan = structprune.plan(model, x, ratio=0.5)
    slim = plan.apply(model, inplace=inplace)
    assert slim(x).shape == (2, 4)
    assert slim.kept["cpu"].shape == (8,)
    assert inplace or model.kept["cpu"].shape == (16,)
