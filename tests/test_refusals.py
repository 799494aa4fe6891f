"""What cannot be done is refused: what, where and what to do, and the model is bit for bit what it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.cases import CASES, all_cases, normal
from support.snapshot import assert_untouched, snapshot
from torch import Tensor, nn

import structprune
from structprune.errors import PinnedError, PlanError, SurgeryError, TraceError, UnknownLayerError

all_cases()
INPUTS = normal(2, 3, 7, 7)


def network() -> Any:
    model = CASES["ConvBnRelu"].build()
    model(INPUTS).sum().backward()
    return model


@torch.library.custom_op("structprune_tests::mystery", mutates_args=())
def mystery(x: Tensor) -> Tensor:
    """An operation that nobody has a rule for."""
    return x.flip(1) * 2


@mystery.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Unruly(nn.Module):
    """Uses the operation without a rule between two layers, and has a part that does not meet it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3 = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.ops.structprune_tests.mystery(self.conv1(x))
        return self.conv3(F.relu(self.conv2(x)))


class DataDependent(nn.Module):
    """Two ways through, and the data choose."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = [self.a(row) if row.sum() > 0 else self.b(row) for row in x]
        return self.head(torch.stack(hidden)[x[:, 0].argsort()])


class Failing(nn.Module):
    """The user's own mistake."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] != 3:
            raise KeyError("only three colours here")
        return self.fc(self.conv1(x))


def refused(model: nn.Module, error: type[Exception], action: Callable[[], Any]) -> str:
    """The message of the refusal of `action`, which must leave `model` alone."""
    before = snapshot(model)
    with pytest.raises(error) as caught:
        action()
    assert_untouched(model, before)
    return str(caught.value)


def test_an_operation_without_a_rule_pins_what_it_touches_and_says_where() -> None:
    model = Unruly()
    graph = structprune.DependencyGraph(model, INPUTS)
    explanation = graph.explain("conv1")
    assert "mystery" in explanation
    assert "test_refusals.py" in explanation
    message = refused(model, PinnedError, lambda: graph.prune_group("conv1", [0]))
    assert "conv1" in message
    assert "mystery" in message
    slim = structprune.prune(model, INPUTS, ratio=0.5)
    assert (slim.conv1.out_channels, slim.conv2.out_channels, slim.conv3.out_channels) == (8, 4, 4)


def test_ways_that_the_data_choose_are_never_silently_half_seen() -> None:
    """Either a clear refusal, or a result that is right for these ways and leaves the unseen layers whole."""
    model = DataDependent()
    inputs = normal(3, 6)
    before = snapshot(model)
    try:
        slim = structprune.prune(model, inputs, ratio=0.5)
    except TraceError as refusal:
        text = str(refusal)
        assert "test_refusals.py" in text or "data" in text
    else:
        assert slim(inputs).shape == model(inputs).shape
        assert slim.a.out_features == slim.b.out_features == slim.head.in_features
    assert_untouched(model, before)


def test_all_channels() -> None:
    model = network()
    graph = structprune.DependencyGraph(model, INPUTS)
    message = refused(model, PlanError, lambda: graph.prune_group("conv1", range(8)))
    assert "conv1" in message


@pytest.mark.parametrize("name", ["conv9", "conv1.weigth", "conv1.bias.0"])
def test_an_unknown_layer(name: str) -> None:
    model = network()
    graph = structprune.DependencyGraph(model, INPUTS)
    for action in (graph.group, graph.explain, lambda layer: graph.prune_group(layer, [0])):
        assert name in refused(model, UnknownLayerError, lambda action=action: action(name))
    assert name in refused(model, UnknownLayerError, lambda: structprune.plan(model, INPUTS, ignore=[name]))


def test_a_module_of_another_model() -> None:
    model = network()
    graph = structprune.DependencyGraph(model, INPUTS)
    stranger = nn.Conv2d(3, 8, 3)
    assert "Conv2d" in refused(model, UnknownLayerError, lambda: graph.group(stranger))


def test_a_layer_that_the_forward_does_not_use() -> None:
    model = network()
    model.spare = nn.Linear(4, 4)
    graph = structprune.DependencyGraph(model, INPUTS)
    assert "spare" in refused(model, UnknownLayerError, lambda: graph.group("spare"))


@pytest.mark.parametrize("indices", [[8], [-1], [0, 99]])
def test_indices_out_of_range(indices: list[int]) -> None:
    model = network()
    graph = structprune.DependencyGraph(model, INPUTS)
    message = refused(model, PlanError, lambda: graph.prune_group("conv1", indices))
    assert "conv1" in message
    assert "7" in message, "the range that is allowed"


def test_repeated_indices() -> None:
    model = network()
    graph = structprune.DependencyGraph(model, INPUTS)
    message = refused(model, PlanError, lambda: graph.prune_group("conv1", [2, 3, 2]))
    assert "repeated" in message
    assert "conv1" in message


def test_no_indices() -> None:
    model = network()
    before = snapshot(model)
    plan = structprune.DependencyGraph(model, INPUTS).prune_group("conv1", [])
    assert not plan.removed
    assert_untouched(model, before)


def test_the_output_layer() -> None:
    model = network()
    graph = structprune.DependencyGraph(model, INPUTS)
    message = refused(model, PinnedError, lambda: graph.prune_group("conv2", [0]))
    assert "conv2" in message
    assert "output" in message


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 1.5, float("nan")])
def test_a_bad_ratio(ratio: float) -> None:
    model = network()
    assert "ratio" in refused(model, PlanError, lambda: structprune.plan(model, INPUTS, ratio=ratio))


def test_an_unknown_importance() -> None:
    model = network()
    message = refused(model, PlanError, lambda: structprune.plan(model, INPUTS, importance="magic"))
    assert "magic" in message
    assert "l2" in message, "what there is"


def test_the_users_own_error_shows() -> None:
    model = Failing()
    calls = (structprune.DependencyGraph, structprune.plan, structprune.prune, structprune.cost)
    for function in calls:
        before = snapshot(model)
        with pytest.raises(
            TraceError, match=r"KeyError: 'only three colours here' \(.*test_refusals\.py:\d+\)"
        ) as caught:
            function(model, normal(2, 4, 7, 7))
        assert isinstance(caught.value.__cause__, KeyError)
        with pytest.raises(TraceError, match=r"shapes cannot be multiplied|must match|expected"):
            function(model, INPUTS)
        with pytest.raises(TraceError, match=r"unexpected keyword|wrong"):
            function(model, {"wrong": INPUTS})
        assert_untouched(model, before)


def test_example_inputs_that_are_none_of_the_three_kinds() -> None:
    model = network()
    message = refused(model, PlanError, lambda: structprune.plan(model, 3.5))
    assert "tensor" in message


@pytest.mark.parametrize("step", ["describe_layers", "rewritten_classes", "smaller_tensors"])
def test_surgery_that_fails_half_way_leaves_everything(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    plan = structprune.plan(model, INPUTS, ratio=0.5)
    graph = structprune.DependencyGraph(model, INPUTS)
    output = model.eval()(INPUTS)
    real = getattr(structprune.surgery.apply, step)

    def fault(*args: Any, **kwargs: Any) -> Any:
        real(*args, **kwargs)  # the damage is done before the fault
        raise MemoryError("injected")

    monkeypatch.setattr(structprune.surgery.apply, step, fault)
    for action in (
        lambda: plan.apply(model),
        lambda: plan.apply(model, inplace=True),
        lambda: graph.prune_group("conv1", [0]),
        lambda: structprune.prune(model, INPUTS, inplace=True),
    ):
        assert "injected" in refused(model, MemoryError, action)
    assert torch.equal(model(INPUTS), output)


def test_a_plan_for_another_model() -> None:
    plan = structprune.plan(network(), INPUTS, ratio=0.5)
    other = CASES["Residual"].build()
    message = refused(other, SurgeryError, lambda: plan.apply(other))
    assert "conv1" in message
    narrow = network()
    plan.apply(narrow, inplace=True)
    refused(narrow, SurgeryError, lambda: plan.apply(narrow, inplace=True))


def test_a_half_right_plan_is_applied_to_nothing() -> None:
    """The first tensors fit, a later one does not."""
    plan = structprune.plan(network(), INPUTS, ratio=0.5)
    model = network()
    model.conv2 = nn.Conv2d(12, 4, 3)
    refused(model, SurgeryError, lambda: plan.apply(model, inplace=True))
