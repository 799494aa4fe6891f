"""Code for torch-pruning runs on structprune, and keeps the same channels where torch-pruning is right."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import timm
import torch
import torch_pruning as theirs
import torchvision
from torch import nn

import structprune
import structprune.compat.torch_pruning as ours
from structprune.errors import PinnedError, PlanError

X = torch.randn(1, 3, 64, 64)
BOTH = (theirs, ours)
MODELS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "resnet18": (lambda: torchvision.models.resnet18(num_classes=10), "fc"),
    "mobilenet_v2": (lambda: torchvision.models.mobilenet_v2(num_classes=10), "classifier.1"),
}


def make(name: str) -> tuple[nn.Module, str]:
    torch.manual_seed(0)
    build, last = MODELS[name]
    return build().eval(), last


def pruned(
    tp: ModuleType, model: nn.Module, last: str, kind: str = "MagnitudePruner", importance: Any = None, **options: Any
) -> tuple[nn.Module, Any]:
    model = copy.deepcopy(model)
    importance = tp.importance.MagnitudeImportance(p=2) if importance is None else importance(tp)
    steps = options.get("iterative_steps", 1)
    pruner = getattr(tp.pruner, kind)(model, X, importance, ignored_layers=[model.get_submodule(last)], **options)
    for _ in range(steps):
        pruner.step()
    return model, pruner


def assert_same(one: nn.Module, other: nn.Module) -> None:
    left, right = one.state_dict(), other.state_dict()
    assert {name: tuple(t.shape) for name, t in left.items()} == {name: tuple(t.shape) for name, t in right.items()}
    assert all(torch.equal(left[name], right[name]) for name in left)


# -- the same channels ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "options",
    [
        {"pruning_ratio": 0.3},
        {"global_pruning": True},
        {"round_to": 8},
        {"iterative_steps": 2},
        {"global_pruning": True, "max_pruning_ratio": 0.9},
    ],
    ids=str,
)
def test_the_same_channels_stay(name: str, options: dict[str, Any]) -> None:
    model, last = make(name)
    (old, _), (new, _) = (pruned(tp, model, last, **options) for tp in BOTH)
    assert_same(old, new)
    assert new(X).shape == (1, 10)


IMPORTANCES: dict[str, Callable[[ModuleType], Any]] = {
    "l1": lambda tp: tp.importance.GroupMagnitudeImportance(p=1, normalizer=None, group_reduction="sum"),
    "max": lambda tp: tp.importance.GroupMagnitudeImportance(group_reduction="max", normalizer="max"),
    "bias": lambda tp: tp.importance.GroupMagnitudeImportance(bias=True, normalizer="gaussian"),
    "bn scale": lambda tp: tp.importance.BNScaleImportance(),
    "lamp": lambda tp: tp.importance.LAMPImportance(),
    "fpgm": lambda tp: tp.importance.FPGMImportance(),
    "own": lambda tp: lambda group: torch.arange(len(group[0][1]), dtype=torch.float).flip(0),
}


@pytest.mark.parametrize("name", IMPORTANCES)
def test_criteria_choose_the_same_channels(name: str) -> None:
    model, last = make("resnet18")
    torch.manual_seed(1)
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias)
    (old, _), (new, _) = (pruned(tp, model, last, importance=IMPORTANCES[name]) for tp in BOTH)
    assert_same(old, new)


def test_gradients_choose_the_same_channels() -> None:
    model, last = make("resnet18")
    model(X).square().sum().backward()

    def hessian(tp: ModuleType) -> Any:
        importance = tp.importance.HessianImportance()
        importance.zero_grad()
        return importance

    results = []
    for tp in BOTH:
        mine = copy.deepcopy(model)
        for parameter, of in zip(mine.parameters(), model.parameters(), strict=True):
            parameter.grad = None if of.grad is None else of.grad.clone()
        # Of norms, torch-pruning takes group norms for batch norms.
        taylor = tp.importance.TaylorImportance(multivariable=True, target_types=[nn.Conv2d, nn.Linear])
        pruner = tp.pruner.MagnitudePruner(mine, X, taylor, ignored_layers=[mine.get_submodule(last)])
        pruner.step()
        results.append(mine)
    assert_same(*results)
    with pytest.raises(PlanError, match="call accumulate_grad"):
        pruned(ours, model, last, importance=hessian)
    with pytest.raises(PlanError, match=r"call loss\.backward"):
        pruned(ours, make("resnet18")[0], last, importance=lambda tp: tp.importance.TaylorImportance())


def test_ratios_by_layer() -> None:
    model, _ = make("resnet18")
    results = []
    for tp in BOTH:
        mine = copy.deepcopy(model)
        ratios = {mine.layer1: 0.25, (mine.layer2[0].conv1, mine.layer3[0].conv1): 0.75}
        pruner = tp.pruner.BasePruner(
            mine, X, tp.importance.MagnitudeImportance(), pruning_ratio_dict=ratios, ignored_layers=[mine.fc]
        )
        pruner.step()
        results.append(mine)
    assert_same(*results)


# -- groups -----------------------------------------------------------------------------------------------------------


def test_a_group_by_index() -> None:
    model, _ = make("resnet18")
    results = []
    for tp in BOTH:
        mine = copy.deepcopy(model)
        graph = tp.DependencyGraph().build_dependency(mine, example_inputs=X)
        group = graph.get_pruning_group(mine.layer1[0].conv1, tp.prune_conv_out_channels, idxs=[2, 6, 9])
        assert graph.check_pruning_group(group)
        group.prune()
        back = graph.get_pruning_group(mine.layer2[0].conv1, tp.prune_conv_in_channels, idxs=[0, 5])
        back.prune()
        results.append((mine, graph.pruning_history()))
    assert_same(results[0][0], results[1][0])
    assert [entry[:2] for entry in results[0][1]] == [entry[:2] for entry in results[1][1]]


def test_over_pruning_is_seen_and_outputs_stay() -> None:
    model, _ = make("resnet18")
    graph = ours.DependencyGraph().build_dependency(model, X)
    whole = graph.get_pruning_group(model.layer1[0].conv1, ours.prune_conv_out_channels, list(range(64)))
    assert not graph.check_pruning_group(whole)
    assert "layer1.0.conv1" in str(whole)
    some = graph.get_pruning_group(model.layer1[0].conv1, ours.prune_conv_out_channels, [2, 6, 9])
    assert tuple(ours.importance.MagnitudeImportance()(some).shape) == (3,)
    assert "idxs=[0, 1" in whole.details()
    with pytest.raises(PlanError):
        whole.prune()
    with pytest.raises(PinnedError, match="'conv1' may not be removed: it is a dimension of the model's input"):
        graph.get_pruning_group(model.conv1, ours.prune_conv_in_channels, [0])
    graph.get_pruning_group(model.fc, ours.prune_linear_out_channels, [0]).prune()
    assert model(X).shape == (1, 9)  # by hand, an output may go


def test_interactive_steps_and_histories() -> None:
    model, last = make("resnet18")
    mine = copy.deepcopy(model)
    pruner = ours.pruner.MagnitudePruner(mine, X, ours.importance.MagnitudeImportance(), ignored_layers=[mine.fc])
    for group in pruner.step(interactive=True):
        assert len(group[0].idxs)
        group.prune()
    whole, _ = pruned(ours, model, last)
    assert_same(whole, mine)
    again = copy.deepcopy(model)
    ours.DependencyGraph().build_dependency(again, X).load_pruning_history(pruner.pruning_history())
    assert_same(whole, again)
    with pytest.raises(ValueError, match="All 1 steps were taken"):
        pruner.step()


def test_state_dicts_hold_what_makes_the_model_again(tmp_path: Any) -> None:
    model, last = make("resnet18")
    slim, _ = pruned(ours, model, last)
    slim.note = 8
    ours.save(ours.state_dict(slim), tmp_path / "slim.pt")
    again = ours.load_state_dict(make("resnet18")[0], ours.load(tmp_path / "slim.pt"))
    assert_same(slim, again)
    assert again.note == 8


def test_one_layer_alone() -> None:
    for kind, make, idxs in (
        ("conv", lambda: nn.Conv2d(3, 8, 3), [0, 5]),
        ("conv", lambda: nn.ConvTranspose2d(3, 8, 3), [1]),
        ("linear", lambda: nn.Linear(4, 8), [2, 3]),
        ("batchnorm", lambda: nn.BatchNorm2d(8), [7]),
        ("depthwise_conv", lambda: nn.Conv2d(8, 8, 3, groups=8), [0, 1, 2]),
    ):
        results = []
        for tp in BOTH:
            torch.manual_seed(0)
            layer = make()
            getattr(tp, f"prune_{kind}_out_channels")(layer, idxs)
            if kind in ("conv", "linear"):
                getattr(tp, f"prune_{kind}_in_channels")(layer, [0])
            results.append(layer)
        assert_same(*results)
        assert str(results[0]) == str(results[1])
    with pytest.raises(PlanError, match="Let a graph do it"):
        ours.prune_conv_out_channels(nn.Conv2d(4, 4, 1, groups=2), [0])
    with pytest.raises(PlanError, match="some of the channels 0 to 2"):
        ours.prune_linear_out_channels(nn.Linear(2, 3), [3])


class Scaled(nn.Module):
    """Knows its width beside its parameters."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.scale = width, nn.Parameter(torch.rand(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale


class ScaledPruner(ours.function.BasePruningFunc):
    def prune_out_channels(self, layer: Scaled, idxs: list[int]) -> Scaled:
        keep = [i for i in range(layer.width) if i not in idxs]
        layer.scale = self._prune_parameter_and_grad(layer.scale, keep, pruning_dim=0)
        layer.width = len(keep)
        return layer


class WrongPruner(ScaledPruner):
    def prune_out_channels(self, layer: Scaled, idxs: list[int]) -> Scaled:
        return super().prune_out_channels(layer, [i + 1 for i in idxs])


def test_customized_pruners_are_asked_and_checked() -> None:
    def group(pruner: Any) -> tuple[nn.Sequential, Any]:
        model = nn.Sequential(nn.Linear(3, 6), Scaled(6), nn.Linear(6, 2))
        graph = ours.DependencyGraph()
        graph.register_customized_layer(Scaled, pruner)
        graph.build_dependency(model, torch.randn(2, 3))
        return model, graph.get_pruning_group(model[0], pruner.prune_out_channels, [1, 4])

    model, found = group(ScaledPruner())
    found.prune()
    assert (model[1].width, model[0].out_features, model(torch.ones(1, 3)).shape) == (4, 4, (1, 2))
    model, found = group(WrongPruner())
    with pytest.raises(PlanError, match="makes other tensors of '1'"):
        found.prune()
    assert model[0].out_features == 6


def test_groups_made_before_a_removal_still_mean_their_channels() -> None:
    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 12), nn.Linear(6, 2), nn.Linear(6, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            left, right = torch.split(self.a(x), [self.b.in_features, self.c.in_features], 1)
            return self.b(left) + self.c(right)

    model = Split()
    pruner = ours.pruner.MagnitudePruner(model, torch.randn(1, 4), ours.importance.MagnitudeImportance())
    groups = list(pruner.step(interactive=True))
    again = copy.deepcopy(model)
    kept = {i: model.a.weight[i].clone() for i in range(12)}
    gone = {i for group in groups for item in group for i in item.idxs if item.dep.layer is model.a}
    for group in groups:
        group.prune()
    assert torch.equal(model.a.weight, torch.stack([row for i, row in kept.items() if i not in gone]))
    assert model(torch.ones(1, 4)).shape == (1, 2)
    ours.DependencyGraph().build_dependency(again, torch.randn(1, 4)).load_pruning_history(pruner.pruning_history())
    assert_same(model, again)


# -- where ours is right ----------------------------------------------------------------------------------------------


def test_heads_need_not_be_listed() -> None:
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, num_classes=10).eval()
    pruner = ours.pruner.MagnitudePruner(
        vit, X, ours.importance.MagnitudeImportance(), ignored_layers=[vit.head], prune_num_heads=True,
        prune_head_dims=False, head_pruning_ratio=0.3,
    )  # fmt: skip
    pruner.step()
    assert (vit.blocks[0].attn.num_heads, vit.blocks[0].attn.head_dim) == (2, 64)
    assert vit(X).shape == (1, 10)


def test_the_models_outputs_stay_without_being_named() -> None:
    model, _ = make("resnet18")
    ours.pruner.MagnitudePruner(model, X, ours.importance.MagnitudeImportance()).step()
    assert model(X).shape == (1, 10)


def test_a_forward_of_ones_own() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x) * scale)

    model, batch = Two(), {"x": torch.ones(2, 4), "s": torch.ones(1)}
    ours.pruner.MagnitudePruner(
        model, batch, ours.importance.MagnitudeImportance(), forward_fn=lambda m, b: m(b["x"], b["s"])
    ).step()
    assert model.a.out_features == 4


# -- sparse training --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["BNScalePruner", "GroupNormPruner", "GrowingRegPruner"])
def test_regularisers_pull_by_the_same_gradients(kind: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(96, 4)
    )
    x = torch.randn(2, 3, 8, 8)
    # Of norms, torch-pruning's growing penalty changes a copy of the gradient.
    of = "0" if kind == "GrowingRegPruner" else "01"
    found = []
    for tp in BOTH:
        mine = copy.deepcopy(model)
        importance = tp.importance.MagnitudeImportance(p=2, normalizer=None, group_reduction="sum")
        pruner = getattr(tp.pruner, kind)(mine, x, importance, reg=0.1, ignored_layers=[mine[5]])
        mine.eval()(x).sum().backward()
        if kind == "GrowingRegPruner":
            pruner.update_reg()
        pruner.regularize(mine)
        found.append({name: p.grad for name, p in mine.named_parameters() if name.split(".")[0] in of})
    for name, gradient in found[0].items():
        assert torch.allclose(gradient, found[1][name], atol=1e-5), name


def test_what_utils_count() -> None:
    model, _ = make("resnet18")
    macs, params = ours.utils.count_ops_and_params(model, X)
    their_macs, their_params = theirs.utils.count_ops_and_params(model, X)
    assert params == their_params
    assert 0.9 < macs / their_macs <= 1
    assert ours.utils.count_params(model) == params
    _, _, by_layer, of_params = ours.utils.count_ops_and_params(model, X, layer_wise=True)
    assert by_layer[model] == macs == sum(by_layer[child] for child in model.children())
    assert of_params[model.fc] == 5130
    assert structprune.cost(model, X).macs == macs


def test_what_is_elsewhere_is_named() -> None:
    with pytest.raises(AttributeError, match="importance='kfac'"):
        _ = ours.importance.OBDCImportance
    with pytest.raises(AttributeError, match="no attribute 'NopeImportance'"):
        _ = ours.importance.NopeImportance
    with pytest.raises(TypeError, match="argument 'nope'"):
        ours.pruner.BasePruner(nn.Linear(2, 2), torch.ones(1, 2), ours.importance.MagnitudeImportance(), nope=1)
