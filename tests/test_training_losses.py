"""Distillation and penalties against loops written out from their papers, their gradients, and their refusals."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from support.networks import IDS, IMAGE, Residual, Transformer
from torch import Tensor, nn

import structprune
from structprune.errors import PlanError
from structprune.training import (
    FeatureDistillation,
    GroupLasso,
    GrowingRegularisation,
    NormScalePenalty,
    distillation_loss,
)

NETWORKS = [(Residual, IMAGE), (Transformer, IDS)]


def convolutional() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3, groups=2), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    ).double()  # fmt: skip


X = torch.zeros(1, 3, 8, 8, dtype=torch.float64)


# -- soft labels -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("shape", [(5, 7), (2, 3, 7)])
def test_distillation_is_the_formula(shape: tuple[int, ...], temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    total = []
    for z, v in zip(student.reshape(-1, 7).numpy(), teacher.reshape(-1, 7).numpy(), strict=True):
        q, p = (np.exp(u / temperature) / np.exp(u / temperature).sum() for u in (z, v))
        total.append(temperature**2 * sum(p[i] * np.log(p[i] / q[i]) for i in range(7)))
    np.testing.assert_allclose(distillation_loss(student, teacher, temperature=temperature), np.mean(total))


def test_the_gradient_tends_to_that_of_matching_logits() -> None:
    """Hinton et al., equation 4: at a high temperature the gradient is (z - v) / N for logits with mean zero."""
    z, v = (torch.randn(1, 10, dtype=torch.float64) for _ in range(2))
    z, v = (z - z.mean()).requires_grad_(), v - v.mean()
    distillation_loss(z, v, temperature=1e4).backward()
    torch.testing.assert_close(z.grad, (z - v).detach() / 10, atol=1e-4, rtol=0)


def test_padding_and_the_class_dimension() -> None:
    student, teacher = torch.randn(2, 5, 3), torch.randn(2, 5, 3)
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 0, 0, 0, 0]])
    student[1, 4] = torch.nan
    found = distillation_loss(student, teacher, mask=mask)
    torch.testing.assert_close(found, distillation_loss(student[mask.bool()], teacher[mask.bool()]))
    moved = distillation_loss(student.movedim(2, 1), teacher.movedim(2, 1), dim=1, mask=mask)
    torch.testing.assert_close(moved, found)
    assert distillation_loss(student, teacher, mask=mask * 0) == 0


def test_no_gradient_reaches_the_teacher_and_half_precision_is_widened() -> None:
    student, teacher = torch.randn(4, 3, dtype=torch.bfloat16), torch.randn(4, 3, requires_grad=True)
    student.requires_grad_()
    found = distillation_loss(student, teacher)
    assert found.dtype == torch.float32
    found.backward()
    assert teacher.grad is None
    assert student.grad is not None


def test_distillation_refuses() -> None:
    with pytest.raises(PlanError, match="shape"):
        distillation_loss(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(PlanError, match="temperature"):
        distillation_loss(torch.zeros(2, 3), torch.zeros(2, 3), temperature=0.0)
    with pytest.raises(PlanError, match="mask"):
        distillation_loss(torch.zeros(2, 3), torch.zeros(2, 3), mask=torch.ones(3))


# -- features ----------------------------------------------------------------------------------------------------------


def test_features_are_compared_on_the_channels_that_are_left() -> None:
    dense = convolutional().eval()
    slim = structprune.prune(dense, X, ratio=0.5, round_to=1)
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    seen: dict[tuple[int, str], Tensor] = {}
    for number, model in enumerate((slim, dense)):
        for name in ("1", "3", "8"):
            model.get_submodule(name).register_forward_hook(
                lambda _m, _a, out, key=(number, name): seen.__setitem__(key, out.detach())
            )
    with FeatureDistillation(slim, dense, ["1", "3", "8"]) as features:
        slim(x), dense(x)
        found = features.loss()
    wanted = []
    for name in ("1", "3", "8"):  # the last one has all its outputs
        left = structprune.kept(slim).get(f"{name}.bias", {}).get(0, range(4))
        theirs = seen[1, name][:, list(left)]
        wanted.append(((seen[0, name] - theirs) ** 2).mean() / (theirs**2).mean())
    torch.testing.assert_close(found, torch.stack(wanted).mean().float(), rtol=1e-5, atol=1e-7)
    assert wanted[0] < 1e-20 < wanted[2]
    found.backward()
    assert slim[0].weight.grad is not None
    assert dense[0].weight.grad is None


def test_channels_of_layers_without_a_bias() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(5, 8)
            self.up = nn.ConvTranspose1d(8, 6, 3, bias=False)
            self.mix = nn.Linear(6, 10, bias=False)
            self.norm = nn.LayerNorm(10, bias=False)
            self.head = nn.Linear(10, 2)

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.norm(self.mix(self.up(self.embed(ids).transpose(1, 2)).transpose(1, 2))))

    torch.manual_seed(0)
    ids = torch.arange(4)[None]
    dense = Mixed()
    for layer in ("embed", "up", "mix"):
        # Only this layer's channels go, so that in front of it nothing has changed.
        slim = structprune.prune(dense, ids, ratio={layer: 0.5}, round_to=1)
        assert slim.get_submodule(layer).weight.numel() * 2 == dense.get_submodule(layer).weight.numel()
        with FeatureDistillation(slim, dense, [layer]) as features:
            slim(ids), dense(ids)
            assert float(features.loss().detach()) < 1e-12
    with FeatureDistillation(slim, dense, ["norm"]) as features:  # its mean is one over other channels now
        slim(ids), dense(ids)
        assert float(features.loss().detach()) > 1e-3


def test_feature_hooks_go_and_errors_say_what_is_missing() -> None:
    dense = convolutional()
    slim = structprune.prune(dense, X, ratio=0.5)
    features = FeatureDistillation(slim, dense, ["3"])
    with features:
        slim(X.repeat(2, 1, 1, 1))
        with pytest.raises(PlanError, match="'3' has not run in the teacher"):
            features.loss()
    assert not any(m._forward_hooks for model in (slim, dense) for m in model.modules())
    with FeatureDistillation(slim, slim, ["3"]) as features:
        slim(X.repeat(2, 1, 1, 1))
        with pytest.raises(PlanError, match="before the first pruning"):
            features.loss()
    for layers, text in ((["nowhere"], "no layer 'nowhere'"), ([], "layers is empty"), (["2"], "is a ReLU")):
        with pytest.raises(PlanError, match=text):
            FeatureDistillation(slim, dense, layers)


# -- penalties ---------------------------------------------------------------------------------------------------------


def literal_norms(model: nn.Module, x: Any) -> list[tuple[float, int]]:
    """Sum of squares and number of entries for each channel, by loops."""
    tensors = dict(model.named_parameters())
    found = []
    for group in structprune.DependencyGraph(model, x).groups():
        for channel in range(group.channels):
            squares, count = 0.0, 0
            for member in group.members:
                for at, owner in zip(member.positions, member.channels, strict=True):
                    if owner == channel and member.tensor in tensors:
                        part = tensors[member.tensor].detach().select(member.dim, int(at)).double()
                        squares, count = squares + float((part**2).sum()), count + part.numel()
            found.append((squares, count))
    return found


@pytest.mark.parametrize(("build", "x"), NETWORKS, ids=["residual", "transformer"])
def test_group_lasso_is_the_formula(build: Any, x: Any) -> None:
    torch.manual_seed(0)
    model = build()
    penalty = GroupLasso(structprune.DependencyGraph(model, x), strength=0.3)
    wanted = 0.3 * sum(np.sqrt(count) * np.sqrt(squares) for squares, count in literal_norms(model, x))
    np.testing.assert_allclose(float(penalty(model).detach()), wanted, rtol=1e-5)


def test_group_lasso_of_chosen_groups() -> None:
    model = convolutional()
    graph = structprune.DependencyGraph(model, X)
    parts = [float(GroupLasso(graph, 1.0, groups=[group])(model).detach()) for group in graph.groups()]
    assert len(parts) > 1
    np.testing.assert_allclose(float(GroupLasso(graph, 1.0)(model).detach()), sum(parts))


def functional(model: nn.Module, penalty: Any, names: list[str]) -> Any:
    """The penalty as a function of some parameters, for gradcheck."""

    def call(*values: Tensor) -> Tensor:
        twin = copy.deepcopy(model)
        for name, value in zip(names, values, strict=True):
            path, _, key = name.rpartition(".")
            module = twin.get_submodule(path)
            del module._parameters[key]
            # A parameter that is computed: what the penalty finds by name has to carry the gradient.
            module._parameters[key] = value  # type: ignore[assignment]  # a plain tensor, where a Parameter is expected
        return penalty(twin)

    return call


def penalties(model: nn.Module) -> dict[str, Any]:
    graph = structprune.DependencyGraph(model, X)
    growing = GrowingRegularisation(structprune.plan(model, X, ratio=0.5), increment=0.5)
    growing.step()
    return {"lasso": GroupLasso(graph, 0.1), "scales": NormScalePenalty(graph, 0.1), "growing": growing}


@pytest.mark.parametrize("kind", ["lasso", "scales", "growing"])
def test_gradients(kind: str) -> None:
    model = convolutional()
    penalty = penalties(model)[kind]
    names = ["1.weight"] if kind == "scales" else ["0.weight", "1.weight", "3.weight"]
    values = [model.get_parameter(name).detach().clone().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(functional(model, penalty, names), values)


def test_the_lasso_of_a_channel_that_is_zero_has_no_gradient() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    with torch.no_grad():
        model[0].weight[1], model[0].bias[1], model[1].weight[:, 1] = 0, 0, 0
    penalty = GroupLasso(structprune.DependencyGraph(model, torch.randn(1, 2)))
    penalty(model).backward()
    assert (model[0].weight.grad[1] == 0).all()
    assert (model[0].weight.grad[[0, 2]] != 0).all()


def test_norm_scales_are_summed_where_channels_may_go() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 3), nn.BatchNorm2d(2)  # the last ones are outputs
    )  # fmt: skip
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([1.0, -2.0, 3.0, 0.0]))
    graph = structprune.DependencyGraph(model, X.float())
    penalty = NormScalePenalty(graph, strength=0.5)
    value = penalty(model)
    assert float(value.detach()) == 3.0
    value.backward()
    assert model[1].weight.grad.tolist() == [0.5, -0.5, 0.5, 0.0]
    assert all(p.grad is None for name, p in model.named_parameters() if name != "1.weight")


def test_growing_regularisation_weighs_what_the_plan_removes_once() -> None:
    model = convolutional()
    plan = structprune.plan(model, X, ratio=0.5)
    penalty = GrowingRegularisation(plan, increment=0.3, ceiling=0.5)
    assert float(penalty(model).detach()) == 0
    penalty.step(), penalty.step()
    assert penalty.done
    assert penalty.coefficient == 0.5
    tensors, total = dict(model.named_parameters()), 0.0
    for name, dims in plan.removed.items():
        if name in tensors:
            value = tensors[name].detach().numpy()
            for place in np.ndindex(value.shape):
                total += value[place] ** 2 * any(place[dim] in gone for dim, gone in dims.items())
    value = penalty(model)
    np.testing.assert_allclose(float(value.detach()), 0.25 * total)
    value.backward()
    gone = list(plan.removed["0.weight"][0])
    torch.testing.assert_close(model[0].weight.grad[gone], 0.5 * model[0].weight.detach()[gone])
    again = GrowingRegularisation(plan)
    again.load_state_dict(penalty.state_dict())
    assert again.coefficient == 0.5


def test_growth_drives_the_channels_out() -> None:
    torch.manual_seed(0)
    model = convolutional()
    plan = structprune.plan(model, X, ratio=0.5)
    penalty = GrowingRegularisation(plan, increment=0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    for _ in range(60):
        optimizer.zero_grad()
        penalty(model).backward()
        optimizer.step()
        penalty.step()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(plan.apply(model).eval()(x), model.eval()(x), atol=1e-3, rtol=0)


@pytest.mark.parametrize("kind", ["lasso", "scales", "growing"])
def test_a_pruned_model_is_refused_and_a_wrapped_one_is_not(kind: str) -> None:
    model = convolutional()
    penalty = penalties(model)[kind]
    value = penalty(model)
    assert torch.equal(penalty(nn.DataParallel(model)), value)
    assert torch.equal(penalty(copy.deepcopy(model)), value)
    slim = structprune.prune(model, X, ratio=0.5)
    with pytest.raises(PlanError, match="was pruned since"):
        penalty(slim)
    with pytest.raises(PlanError, match=r"Give the model of the"):
        penalty(nn.Linear(2, 2))


@pytest.mark.parametrize("kind", ["lasso", "scales", "growing"])
def test_penalties_follow_the_model_to_another_device(kind: str) -> None:
    model = convolutional()
    penalty = penalties(model)[kind]
    penalty(model)
    assert penalty(model.to("meta")).device.type == "meta"


def test_penalties_refuse() -> None:
    model = convolutional()
    graph = structprune.DependencyGraph(model, X)
    with pytest.raises(PlanError, match="strength"):
        GroupLasso(graph, -1.0)
    with pytest.raises(PlanError, match=r"groups is \[\]"):
        GroupLasso(graph, groups=[])
    with pytest.raises(PlanError, match="nothing to penalise"):
        NormScalePenalty(graph, kinds=("layer_norm",))
    with pytest.raises(PlanError, match=r"kinds is \('bn',\)"):
        NormScalePenalty(graph, kinds=("bn",))
    with pytest.raises(PlanError, match="removes nothing"):
        GrowingRegularisation(structprune.plan(model, X, ratio=0.0))
    with pytest.raises(PlanError, match="increment"):
        GrowingRegularisation(structprune.plan(model, X, ratio=0.5), increment=0.0)
