"""Merging channels: exact where they are equal, refused or left where they cannot be merged, and what it costs."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.cluster.hierarchy import linkage
from support.cases import Case, all_cases
from support.importance_nets import build, graph_of, group_of, images
from support.oracle import relative_error
from support.randomize import double, jitter
from support.runs import call
from support.snapshot import assert_untouched, snapshot
from torch import nn

import structprune
from structprune.errors import RecoveryError, StructpruneError, VerificationError
from structprune.importance import Folding
from structprune.importance.base import fitted, indices, padded
from structprune.importance.clustering import merging_costs, nearest_clusters
from structprune.importance.mergeable import Mergeable
from structprune.planning.build import plan_removal
from structprune.tracing.state import held_tensors

torch.set_num_threads(1)
HOW = ("mean", "scaled")


def made_equal(model: nn.Module, group, mergeable: Mergeable, channel: int = 1, like: int = 0) -> nn.Module:
    """A copy in which all that makes one channel of a group is what makes another."""
    model = copy.deepcopy(model)
    tensors = {name: held.tensor for name, held in held_tensors(model).items()}
    for member in group.members:
        if not mergeable.summed(member) and tensors[member.tensor].is_floating_point():
            table, _ = padded(*indices(member, torch.device("cpu")), group.channels)
            along = tensors[member.tensor].data.movedim(member.dim, 0)
            along[table[channel]] = along[table[like]]
    return model


@pytest.mark.parametrize("case", all_cases(), ids=str)
def test_equal_channels_are_merged_exactly_and_all_others_are_left(case: Case) -> None:
    model, x = jitter(case.build(), seed=0), double(case.inputs())
    graph = structprune.DependencyGraph(model, x)
    mergeable = Mergeable(graph)
    for number, group in enumerate(graph.groups()):
        if group.channels < 2:
            continue
        equal = made_equal(model, group, mergeable)
        graph_of_equal = structprune.DependencyGraph(equal, x)
        try:
            slim = plan_removal(graph_of_equal, graph_of_equal.groups()[number].components[1:2]).apply(equal)
        except StructpruneError:  # a size that has to be a multiple of something
            continue
        with torch.no_grad():
            expected = slim if mergeable.obstacle(group) else equal
            for how in HOW:
                folded = structprune.fold(slim, equal, x, how=how)
                assert relative_error(call(folded, x), call(expected, x)) < 1e-10, (group, mergeable.obstacle(group))


def conv_net() -> nn.Sequential:
    """Convolutions with batch norms, in float64."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3, groups=2),
            nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4),
        )  # fmt: skip
    return jitter(net, seed=1)


def removed(model: nn.Module, x: torch.Tensor, layer: str, channels: list[int]) -> nn.Module:
    graph = structprune.DependencyGraph(model, x)
    return plan_removal(graph, graph.chosen(layer, channels)).apply(model)


@pytest.mark.parametrize("given", [False, True], ids=["weights", "activations"])
@pytest.mark.parametrize("how", HOW)
def test_channels_that_share_a_function_between_filter_and_norm_otherwise(how: str, given: bool) -> None:
    model, x = conv_net(), torch.randn(4, 3, 9, 9, dtype=torch.float64)
    model[3] = nn.Conv2d(8, 6, 3).double()
    conv, norm = model[0], model[1]
    with torch.no_grad():
        for channel, like, factor in ((5, 1, 1.7), (6, 2, 0.4), (7, 2, 3.0)):
            conv.weight[channel], conv.bias[channel] = factor * conv.weight[like], factor * conv.bias[like]
            norm.running_mean[channel] = factor * norm.running_mean[like]
            norm.running_var[channel] = factor**2 * (norm.running_var[like] + norm.eps) - norm.eps
            norm.weight[channel], norm.bias[channel] = norm.weight[like], norm.bias[like]
        slim = removed(model, x, "0", [1, 6, 7])
        folded = structprune.fold(slim, model, x, how=how, data=[x] if given else None)
        assert folded[0].out_channels == 5
        assert relative_error(folded(x), model(x)) < 1e-10
        assert relative_error(slim(x), model(x)) > 1e-3


def test_multiples_are_exact_behind_a_relu() -> None:
    model, x = conv_net(), torch.randn(4, 3, 9, 9, dtype=torch.float64)
    model[1] = nn.Identity()
    with torch.no_grad():
        model[0].weight[1], model[0].bias[1] = 2.5 * model[0].weight[0], 2.5 * model[0].bias[0]
        model[0].weight[5], model[0].bias[5] = 2.5 * model[0].weight[4], 2.5 * model[0].bias[4]
        slim = removed(model, x, "0", [1, 5])  # the same position of both groups of the next convolution
        assert relative_error(structprune.fold(slim, model, x, how="scaled")(x), model(x)) < 1e-10
        assert relative_error(structprune.fold(slim, model, x, how="mean")(x), model(x)) > 1e-3


def test_a_channel_that_is_off_adds_nothing() -> None:
    model, x = conv_net(), torch.randn(4, 3, 9, 9, dtype=torch.float64)
    model[3] = nn.Conv2d(8, 6, 3).double()
    with torch.no_grad():
        for vector in (model[0].weight, model[0].bias, model[1].running_mean, model[1].bias):
            vector[3] = 0
        for how in HOW:
            assert relative_error(structprune.fold(removed(model, x, "0", [3]), model, x, how=how)(x), model(x)) < 1e-10


def test_the_mean_of_uncorrelated_filters_varies_as_each_of_them() -> None:
    """Of white inputs, behind the norm; merged without that, the deviation would be half of it."""
    torch.manual_seed(0)
    layer, norm = nn.Linear(64, 8, bias=False), nn.BatchNorm1d(8)
    model = nn.Sequential(layer, norm, nn.Linear(8, 3)).double().eval()
    rows = torch.linalg.qr(torch.randn(64, 8, dtype=torch.float64)).Q.T
    x = torch.randn(20000, 64, dtype=torch.float64)
    with torch.no_grad():
        rows[1:5] = 0.8 * rows[0] + 0.6 * rows[1:5]  # so that they are more alike than they are to nothing
        layer.weight.copy_(rows)
        norm.running_var.copy_(model[0](x).var(0))
        model[2].weight.fill_(1.0)
        slim = removed(model, x[:8], "0", [1, 2, 3, 4])
        folded = structprune.fold(slim, model, x[:8], how="mean")
        spread = folded[:2](x).std(0)
        assert float(spread[0]) == pytest.approx(1.0, abs=0.02)
        # The four with their common part: a mean deviation of less than one before the norm.
        assert float(folded[0](x).std(0)[0]) == pytest.approx(float(folded[1].running_var[0].sqrt()), rel=0.02)


def test_heads_and_the_mlp_of_a_transformer_are_merged_and_the_stream_is_not() -> None:
    model, x = build("attention"), images()
    graph = graph_of(model)
    mergeable = Mergeable(graph)
    merged = {(group.name, group.axis) for group in graph.groups() if mergeable.obstacle(group) is None}
    assert ("qkv", "heads") in merged
    assert ("down", "mlp") in merged
    assert not any(axis in ("hidden", "head_size") for _, axis in merged)
    stream = next(group for group in graph.groups() if group.axis == "hidden")
    assert "layer_norm" in (mergeable.obstacle(stream) or "")
    slim = structprune.prune(model, x, importance="folding", ratio=0.5, round_to=1, axes=["hidden"])
    assert torch.equal(structprune.fold(slim, model, x)(x), slim(x))


def test_a_wrong_merge_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = build("attention"), images()
    slim = structprune.prune(model, x, ratio=0.5, round_to=1, axes=["head_size"])
    monkeypatch.setattr(Mergeable, "obstacle", lambda self, group: None)
    with pytest.raises(VerificationError, match="Merged channels differ from equal ones by"):
        structprune.fold(slim, model, x)


@pytest.mark.parametrize("name", ["chain", "residual", "attention"])
def test_folding_loses_less_than_removing_and_leaves_both_models(name: str) -> None:
    model, x = build(name), images(64)
    slim = structprune.prune(model, x[:2], importance="folding", ratio=0.4, round_to=1, axes=["channels", "mlp"])
    before = snapshot(model), snapshot(slim)
    state = torch.get_rng_state()
    folded = structprune.fold(slim, model, x[:2], how="scaled", data=[x])
    assert_untouched(model, before[0])
    assert_untouched(slim, before[1])
    assert torch.equal(torch.get_rng_state(), state)
    assert structprune.kept(folded) == structprune.kept(slim)
    with torch.no_grad():
        wanted = model(x)
        assert F.mse_loss(folded(x), wanted) < F.mse_loss(slim(x), wanted)
    recovered = structprune.recover(folded, model, [x])
    assert structprune.kept(recovered) == structprune.kept(slim)


def test_several_rounds_and_narrow_types() -> None:
    model, x = conv_net().float(), torch.randn(4, 3, 9, 9)
    slim = structprune.prune(model, x, ratio={"0": 0.25}, round_to=1, importance="folding")
    slim = structprune.prune(slim, x, ratio={"0": 0.34}, round_to=1, importance="folding")
    folded = structprune.fold(slim, model, x)
    assert folded[0].out_channels == 4
    assert folded(x).dtype == torch.float32
    half = copy.deepcopy(model).bfloat16()
    slim = structprune.prune(half, x.bfloat16(), ratio={"0": 0.5}, round_to=1, importance="folding")
    assert structprune.fold(slim, half, x.bfloat16())(x.bfloat16()).isfinite().all()


class Block(nn.Module):
    """A residual branch."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.relu(self.inside(x))


def test_what_is_refused() -> None:
    model, x = conv_net(), torch.randn(4, 3, 9, 9, dtype=torch.float64)
    slim = structprune.prune(model, x, ratio=0.5, round_to=1)
    with pytest.raises(RecoveryError, match="how is 'median'"):
        structprune.fold(slim, model, x, how="median")
    short = nn.Sequential(nn.Linear(4, 4), Block(), nn.Linear(4, 2)).double()
    cut = structprune.remove_branches(short, torch.zeros(2, 4, dtype=torch.float64), ["1"])
    with pytest.raises(RecoveryError, match="Branches were removed"):
        structprune.fold(cut, short, torch.zeros(2, 4, dtype=torch.float64))
    with pytest.raises(RecoveryError, match="on the meta device"):
        structprune.fold(slim, copy.deepcopy(model).to("meta"), x)
    with pytest.raises(RecoveryError, match="in the model that was pruned it was"):
        structprune.fold(slim, nn.Sequential(nn.Conv2d(3, 9, 3)).double(), x)


# -- the criterion ---------------------------------------------------------------------------------------------------


def test_costs_are_those_of_ward() -> None:
    points = np.random.default_rng(0).normal(size=(20, 4)) + 100  # far from zero
    costs = np.sort(merging_costs(points @ points.T, np.ones(20)))
    heights = linkage(points, "ward")[:, 2]
    np.testing.assert_allclose(costs[:-1], heights**2 / 2, rtol=1e-6)
    np.testing.assert_allclose(costs[-1], 20 * np.square(points.mean(0)).sum(), rtol=1e-6)


def _greedy(points: np.ndarray, mass: np.ndarray) -> list[float]:
    """The same with masses and zero, one merge after the other."""
    means, masses, costs = list(points), list(mass), []
    while means:
        found = [(m * np.square(c).sum(), i, None) for i, (c, m) in enumerate(zip(means, masses, strict=True))]
        for i in range(len(means)):
            for j in range(i):
                apart = np.square(means[i] - means[j]).sum()
                found.append((masses[i] * masses[j] / (masses[i] + masses[j]) * apart, i, j))
        cost, i, j = min(found, key=lambda each: each[0])
        costs.append(cost)
        if j is not None:
            means[j] = (masses[i] * means[i] + masses[j] * means[j]) / (masses[i] + masses[j])
            masses[j] += masses[i]
        del means[i], masses[i]
    return costs


def test_costs_with_masses_and_zero_are_those_of_the_cheapest_merge_each_time() -> None:
    generator = np.random.default_rng(1)
    points, mass = generator.normal(size=(25, 3)), generator.random(25)
    np.testing.assert_allclose(np.sort(merging_costs(points @ points.T, mass)), _greedy(points, mass), rtol=1e-6)
    assert (merging_costs(points @ points.T, np.zeros(25)) == 0).all()


@pytest.mark.parametrize("clusters", [2, 3, 4])
def test_one_of_each_cluster_stays(clusters: int) -> None:
    generator = np.random.default_rng(2)
    centres = 10 * np.eye(4)[:clusters] + 10
    label = np.repeat(np.arange(clusters), 5)
    points = centres[label] + 0.1 * generator.normal(size=(len(label), 4))
    products = points @ points.T
    stay = np.sort(merging_costs(products, np.ones(len(label))).argsort()[-clusters:])
    assert label[stay].tolist() == list(range(clusters))
    assert (nearest_clusters(products, np.ones(len(label)), stay) == label).all()


def test_channels_are_compared_with_scale_and_shift() -> None:
    model = build("chain")
    group = group_of(graph_of(model), "first")
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    conv, norm = model.first, model.norm
    filters = conv.weight.flatten(1)
    filters = filters / filters.norm(dim=1, keepdim=True) * norm.weight[:, None]
    filters = torch.cat([filters, norm.bias[:, None]], 1).detach().numpy()
    mass = model.second.weight.detach().square().sum((0, 2, 3)).numpy()
    found = fitted(Folding(), graph_of(model))(group, tensors)
    np.testing.assert_allclose(np.sort(found.numpy()), _greedy(filters, mass), rtol=1e-6)


def test_channels_are_compared_by_their_values() -> None:
    model, x = build("chain"), images(16)
    group = group_of(graph_of(model), "first")
    with torch.no_grad():
        values = model.features(x).movedim(1, 0).flatten(1).numpy()
    values = (values - values.mean(1, keepdims=True)) / np.sqrt(values.shape[1])
    mass = model.second.weight.detach().square().sum((0, 2, 3)).numpy()
    found = fitted(Folding("activations"), graph_of(model), [x[:5], x[5:]])(group, {})
    np.testing.assert_allclose(np.sort(found.numpy()), _greedy(values, mass), rtol=1e-6)
