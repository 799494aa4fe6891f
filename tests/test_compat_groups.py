"""What code for torch-pruning does by hand: groups, indices, modes, heads."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

import structprune.compat.torch_pruning as tp
from structprune.errors import PlanError, UnknownLayerError

X = torch.randn(1, 3, 64, 64)


def vit() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, num_classes=10)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))


@pytest.mark.parametrize("training", [True, False])
def test_the_models_mode_stays(training: bool) -> None:
    model = network().train(training)
    model[1].eval()
    before = [module.training for module in model.modules()]
    graph = tp.DependencyGraph().build_dependency(model, X)
    graph.get_pruning_group(model[0], tp.prune_conv_out_channels, [0]).prune()
    pruner = tp.pruner.GroupNormPruner(model, X, tp.importance.MagnitudeImportance())
    pruner.regularize(model)
    pruner.step()
    tp.utils.count_ops_and_params(model, X, layer_wise=True)
    assert [module.training for module in model.modules()] == before


def test_indices_are_those_of_the_layer() -> None:
    model = network()
    graph = tp.DependencyGraph().build_dependency(model, X)
    with pytest.raises(PlanError, match="go beyond"):
        graph.get_pruning_group(model[0], tp.prune_conv_out_channels, [9])
    with pytest.raises(UnknownLayerError, match="no layer and no parameter of the model"):
        graph.get_pruning_group(nn.Linear(2, 2), tp.prune_linear_out_channels, [0])
    with pytest.raises(PlanError, match="give one of prune_"):
        graph.get_pruning_group(model[0], print, [0])
    assert (graph.get_out_channels(model[1]), graph.get_in_channels(model[3])) == (8, 8)
    assert graph.is_out_channel_pruning_fn(tp.prune_conv_out_channels)
    assert graph.is_in_channel_pruning_fn(tp.prune_conv_in_channels)


def test_inputs_of_a_convolution_in_groups_are_those_of_each() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1, groups=2), nn.Conv2d(8, 2, 1))
    graph = tp.DependencyGraph().build_dependency(model, X)
    graph.get_pruning_group(model[1], tp.prune_conv_in_channels, [1, 5]).prune()
    assert (model[0].out_channels, model[1].in_channels, model[1].weight.shape[1]) == (6, 6, 3)
    assert model(X).shape == (1, 2, 64, 64)


def test_a_group_that_a_bare_parameter_begins() -> None:
    model = vit()
    graph = tp.DependencyGraph().build_dependency(model, X)
    graph.get_pruning_group(model.cls_token, tp.prune_parameter_out_channels, [0, 5]).prune()
    assert model.cls_token.shape == (1, 1, 190)
    assert model.patch_embed.proj.out_channels == 190
    assert model(X).shape == (1, 10)
    again = vit()
    tp.DependencyGraph().build_dependency(again, X).load_pruning_history(graph.pruning_history())
    assert torch.equal(again.eval()(X), model.eval()(X))


def test_channels_of_several_groups_at_once() -> None:
    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(12, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(torch.cat([self.a(x), self.b(x)], 1))

    model = Joined()
    before = copy.deepcopy(model)
    graph = tp.DependencyGraph().build_dependency(model, torch.randn(1, 4))
    group = graph.get_pruning_group(model.c, tp.prune_linear_in_channels, [1, 2, 7])
    assert [dep.target.name for dep, _ in group] == ["c", "a", "b"]
    assert [item.idxs for item in group] == [[1, 2, 7], [1, 2], [1]]
    assert [item.root_idxs for item in group] == [[1, 2, 7], [1, 2], [7]]
    scores = tp.importance.MagnitudeImportance(p=1, normalizer=None, group_reduction="sum")(group)
    weights = [before.c.weight[:, [1, 2, 7]].abs().sum(0), before.a.weight[[1, 2]], before.b.weight[[1]]]
    made = torch.cat([weights[1], weights[2]]).abs().sum(1)
    assert torch.allclose(scores, weights[0] + made)
    group.prune()
    assert torch.equal(model.c.weight, before.c.weight[:, [0, 3, 4, 5, 6, 8, 9, 10, 11]])


@pytest.mark.parametrize("interactive", [False, True])
def test_heads_are_counted(interactive: bool) -> None:
    model = vit()
    heads = {block.attn.qkv: block.attn.num_heads for block in model.blocks}
    pruner = tp.pruner.MagnitudePruner(
        model, X, tp.importance.MagnitudeImportance(), num_heads=heads, ignored_layers=[model.head],
        prune_num_heads=True, prune_head_dims=False, head_pruning_ratio=0.3,
    )  # fmt: skip
    for group in pruner.step(interactive=interactive) or ():
        group.prune()
    for block in model.blocks:  # as torch-pruning's examples do
        block.attn.num_heads = pruner.num_heads[block.attn.qkv]
        block.attn.head_dim = block.attn.qkv.out_features // (3 * block.attn.num_heads)
    assert heads == {block.attn.qkv: 2 for block in model.blocks}
    assert model(X).shape == (1, 10)


def test_parameters_may_be_ignored() -> None:
    model: Any = vit()
    pruner = tp.pruner.MagnitudePruner(model, X, tp.importance.MagnitudeImportance(), ignored_layers=[model.pos_embed])
    pruner.step()
    assert model.pos_embed.shape[-1] == 192
    assert model.blocks[0].mlp.fc1.out_features == 384


def test_steps_of_a_global_pruner_reach_the_share() -> None:
    model = network()
    pruner = tp.pruner.MagnitudePruner(
        model, X, tp.importance.MagnitudeImportance(), global_pruning=True, pruning_ratio=0.5, iterative_steps=2
    )
    widths: list[int] = []
    for _ in range(2):
        pruner.step()
        widths.append(model[0].out_channels)
    assert widths == [6, 4]


def test_halves_that_are_shuffled_lose_the_same_share() -> None:
    torch.manual_seed(0)
    model = torchvision.models.shufflenet_v2_x0_5(num_classes=10)
    before = [layer.out_channels for layer in model.modules() if isinstance(layer, nn.Conv2d)]
    tp.pruner.MagnitudePruner(model, X, tp.importance.MagnitudeImportance()).step()
    after = [layer.out_channels for layer in model.modules() if isinstance(layer, nn.Conv2d)]
    assert all(0.45 < now / old < 0.7 for now, old in zip(after, before, strict=True))
    assert model.eval()(X).shape == (1, 10)
