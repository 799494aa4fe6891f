"""Criteria of weights and activations against slow and literal implementations of their definitions."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.importance_nets import (
    Attention,
    Chain,
    TwoEnds,
    build,
    everything,
    first,
    graph_of,
    group_of,
    images,
    labels,
    pairs,
    scores_of,
    slices,
)
from torch import Tensor, nn

from structprune.coupling.graph import ChannelGraph
from structprune.errors import PlanError
from structprune.importance.activation import APoZ, L2Activation
from structprune.importance.base import fitted
from structprune.importance.redundancy import FPGM, Cosine, TVSeparability, hellinger
from structprune.importance.thinet import ThiNet, eliminated
from structprune.importance.weight import LAMP, LnNorm, NormScale, SliceNorm
from structprune.planning.build import tensors_of


@pytest.fixture
def net() -> Chain:
    model = build("chain")
    assert isinstance(model, Chain)
    return model


def features(net: Chain) -> Tensor:
    """What the second convolution sees: samples x channels x height x width."""
    return net.features(images()).detach()


# ------------------------------------------------------------------------------------------------------- activations


def test_mean_activation(net: Chain) -> None:
    maps = features(net).tolist()
    expected = []
    for channel in range(4):
        values = [abs(v) for sample in maps for row in sample[channel] for v in row]
        expected.append(sum(values) / len(values))
    assert first(net, "activation_mean") == pytest.approx(expected)


def test_l2_activation(net: Chain) -> None:
    maps = features(net).tolist()
    expected = []
    for channel in range(4):
        values = [v**2 for sample in maps for row in sample[channel] for v in row]
        expected.append(math.sqrt(sum(values) / len(values)))
    assert first(net, "activation_l2") == pytest.approx(expected)


@pytest.mark.parametrize("threshold", [0.0, 0.2])
def test_apoz(net: Chain, threshold: float) -> None:
    maps = features(net).tolist()
    expected = []
    for channel in range(4):
        values = [v for sample in maps for row in sample[channel] for v in row]
        expected.append(1 - sum(v <= threshold for v in values) / len(values))
    assert 0 < min(expected) < max(expected) < 1
    assert first(net, APoZ(threshold)) == pytest.approx(expected)


def test_hrank(net: Chain) -> None:
    net.first.weight.data[1, :, :, 0] = 0
    net.norm.bias.data -= 0.4
    maps = features(net).numpy()
    expected = [np.mean([np.linalg.matrix_rank(maps[n, c], tol=1e-6) for n in range(8)]) for c in range(4)]
    assert len(set(expected)) > 1
    assert first(net, "hrank") == pytest.approx(expected)


def test_wanda(net: Chain) -> None:
    maps, weight = features(net), net.second.weight.detach()
    expected = []
    for channel in range(4):
        norm = math.sqrt(sum(v**2 for v in maps[:, channel].flatten().tolist()) / maps[:, channel].numel())
        expected.append(sum(abs(w) * norm for w in weight[:, channel].flatten().tolist()))
    assert first(net, "wanda") == pytest.approx(expected)


def test_flap(net: Chain) -> None:
    maps, weight = features(net), net.second.weight.detach()
    expected = []
    for channel in range(4):
        fluctuation = np.var(maps[:, channel].numpy(), ddof=1)
        expected.append(fluctuation * sum(w**2 for w in weight[:, channel].flatten().tolist()))
    assert first(net, "flap") == pytest.approx(expected)


def test_wanda_to_the_second_power(net: Chain) -> None:
    """The mean square of what each weight adds to the outputs, summed."""
    maps, weight = features(net), net.second.weight.detach()
    expected = [sum(float((w * maps[:, c]).square().mean()) for w in weight[:, c].flatten().tolist()) for c in range(4)]
    assert first(net, "wanda_square") == pytest.approx(expected)


@pytest.mark.parametrize("centred", [True, False])
def test_thinet(net: Chain, centred: bool) -> None:
    """Algorithm 1 on the outputs themselves: the set that goes grows by the channel that leaves its sum smallest."""
    maps = features(net)
    parts = []
    for channel in range(4):
        alone = torch.zeros_like(maps)
        alone[:, channel] = maps[:, channel]
        found = F.conv2d(alone, net.second.weight, None, stride=2, padding=1).detach()
        parts.append(found - found.mean((0, 2, 3), keepdim=True) if centred else found)
    gone: list[int] = []
    before = highest = 0.0
    expected = [0.0] * 4
    while len(gone) < 4:
        errors = {
            c: float(sum(parts[other] for other in (*gone, c)).square().sum(1).mean())
            for c in range(4)
            if c not in gone
        }
        best = min(errors, key=lambda c: errors[c])
        highest = max(highest, errors[best] - before)
        expected[best], before = highest, errors[best]
        gone.append(best)
    scores = first(net, ThiNet(centred, positions=None))
    assert scores == pytest.approx(expected)
    assert sorted(range(4), key=lambda c: scores[c]) == gone


def test_thinet_looks_at_some_positions(net: Chain) -> None:
    whole = first(net, ThiNet(positions=None))
    assert first(net, ThiNet(positions=9)) == whole  # there are no more
    some = first(net, ThiNet(positions=3))
    assert some != whole
    assert some == first(net, ThiNet(positions=3))
    assert some != first(net, ThiNet(positions=3, seed=1))
    with pytest.raises(PlanError, match="positions is 0"):
        ThiNet(positions=0)


def test_of_two_channels_that_are_alike_one_is_cheap() -> None:
    parts = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.2]], dtype=torch.float64)
    scores = eliminated(parts @ parts.T)
    assert scores.tolist() == pytest.approx([1.0, 3.0, 1.44])
    parts[1] *= -1  # now they cancel: once one has gone, the other costs nothing more
    assert eliminated(parts @ parts.T).tolist() == pytest.approx([1.0, 1.0, 1.44])


def test_wanda_of_a_grouped_convolution() -> None:
    """A channel stands in each convolution group at the same place; each place meets the outputs of its own group."""
    net = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 4, 3, groups=2), nn.Flatten(), nn.Linear(64, 2))
    net = net.double()
    maps = torch.relu(net[0](images())).detach()
    norms = maps.square().mean((0, 2, 3)).sqrt()
    graph = graph_of(net)
    ready = fitted("wanda", graph, pairs(8))
    group = next(g for g in graph.groups() if any(m.tensor == "2.weight" and m.dim == 1 for m in g.members))
    weight = net[2].weight.detach()  # (4, 3, 3, 3): outputs 0 and 1 see inputs 0 to 2
    expected = [
        sum(
            float(weight[out, channel].abs().sum() * norms[part * 3 + channel])
            for part in range(2)
            for out in (2 * part, 2 * part + 1)
        )
        for channel in range(3)
    ]
    assert ready(group, tensors_of(graph)).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("pairs_of", ["min", "mean"])
def test_total_variation_separability(net: Chain, pairs_of: str) -> None:
    outputs, classes = features(net).mean((2, 3)).numpy(), labels().numpy()
    expected = []
    for channel in range(4):
        found = []
        for a, b in itertools.combinations(range(3), 2):
            one, two = outputs[classes == a, channel], outputs[classes == b, channel]
            s, t = one.std(), two.std()
            overlap = math.sqrt(2 * s * t / (s**2 + t**2)) * math.exp(
                -((one.mean() - two.mean()) ** 2) / (4 * (s**2 + t**2))
            )
            found.append(1 - overlap)
        expected.append(min(found) if pairs_of == "min" else sum(found) / len(found))
    assert first(net, TVSeparability(pairs_of)) == pytest.approx(expected)


def test_total_variation_is_above_the_bound(net: Chain) -> None:
    """The true total variation of two Gaussians, by integration, is no less than the score and grows with it."""
    grid = torch.linspace(-30, 30, 60001, dtype=torch.float64)

    def density(mean: float, deviation: float) -> Tensor:
        return torch.exp(-((grid - mean) ** 2) / (2 * deviation**2)) / (deviation * math.sqrt(2 * math.pi))

    for mean, deviation in ((0.0, 1.0), (0.5, 1.0), (2.0, 0.3), (0.0, 3.0)):
        true = 0.5 * float((density(0, 1) - density(mean, deviation)).abs().sum()) * 0.001
        one = torch.tensor([0.0, 1.0, mean, deviation**2], dtype=torch.float64)
        bound = float(hellinger(*one))
        assert bound - 1e-6 <= true <= math.sqrt(2 * bound) + 1e-3


def test_labels_are_needed_for_separability(net: Chain) -> None:
    graph = graph_of(net)
    with pytest.raises(PlanError, match="class of each sample"):
        fitted("tvs", graph, [images()])
    with pytest.raises(PlanError, match="single class"):
        fitted("tvs", graph, [(images(), torch.zeros(8))])
    by_function = scores_of(graph, TVSeparability(labels=lambda batch: labels(len(batch))), [images()])
    torch.testing.assert_close(by_function, scores_of(graph, "tvs"))


@pytest.mark.parametrize("reduce", ["sum", "mean", "max", "prod", "first"])
def test_a_group_with_two_ends(reduce: str) -> None:
    """The stream ends at the branch and at the head, and there it is another map."""
    net = TwoEnds().double()
    stream = net.stem(images().flatten(1))
    summed = stream + net.back(torch.tanh(net.branch(stream)))
    ends = [t.detach().square().mean(0).sqrt() for t in (stream, summed)]
    total = ends[0] + ends[1]
    joined = {"sum": total, "mean": total / 2, "max": torch.maximum(*ends), "prod": ends[0] * ends[1], "first": ends[0]}
    graph = graph_of(net)
    ready = fitted(L2Activation(reduce), graph, pairs(8))
    assert ready(group_of(graph, "stem"), tensors_of(graph)).tolist() == pytest.approx(joined[reduce].tolist())


def test_heads_are_seen_at_the_output_projection() -> None:
    net = build("attention")
    assert isinstance(net, Attention)
    graph = graph_of(net)
    seen: list[Tensor] = []
    handle = net.out.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    net(images())
    handle.remove()
    columns = seen[0].abs().mean((0, 1)).reshape(4, 3)
    scores = scores_of(graph, "activation_mean")
    heads = [key for key, found in scores.items() if len(found) == 4]
    assert len(heads) == 1
    assert scores[heads[0]].tolist() == pytest.approx(columns.mean(1).tolist())


def test_bare_parameters_are_layers_too() -> None:
    net = build("attention")
    graph = graph_of(net)
    group = next(g for g in graph.groups() if any(m.tensor == "up" for m in g.members) and g.channels == 10)
    ready = fitted("wanda", graph, pairs(8))
    seen: list[Tensor] = []
    with pytest.MonkeyPatch.context() as patch:
        real = F.gelu
        patch.setattr(F, "gelu", lambda x: seen.append(real(x).detach()) or real(x))
        net(images())
    norms = seen[0].flatten(0, 1).square().mean(0).sqrt()
    expected = norms * net.down.detach().abs().sum(1)
    assert ready(group, tensors_of(graph)).tolist() == pytest.approx(expected.tolist())


# ----------------------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("order", [1.0, 2.0, 3.0, math.inf])
def test_ln_norm(net: Chain, order: float) -> None:
    expected = [np.linalg.norm(np.array(everything(net, c)), ord=order) for c in range(4)]
    assert first(net, LnNorm(order)) == pytest.approx(expected)
    powers = expected if math.isinf(order) else [norm**order for norm in expected]
    assert first(net, LnNorm(order, root=False)) == pytest.approx(powers)


@pytest.mark.parametrize("reduce", ["sum", "mean", "max", "prod", "first"])
def test_slice_norm(net: Chain, reduce: str) -> None:
    join = {"sum": sum, "mean": np.mean, "max": max, "prod": np.prod, "first": lambda norms: norms[0]}[reduce]
    expected = [join([np.linalg.norm(part) for part in slices(net, c)]) for c in range(4)]
    assert first(net, SliceNorm(2.0, reduce)) == pytest.approx(expected)


def test_ln_norm_sees_that_weights_changed(net: Chain) -> None:
    norm = LnNorm(2)
    before = first(net, norm)
    with torch.no_grad():
        net.first.weight.mul_(2)
    assert first(net, norm) == first(net, LnNorm(2)) != before
    other = build("chain")
    assert first(other, norm) == before


def test_lamp(net: Chain) -> None:
    net.second.weight.data[:, 3] = net.second.weight.data[:, 2]
    squares = [sum(v**2 for v in everything(net, c)) for c in range(4)]
    expected = [s / sum(t for t in squares if t >= s) for s in squares]
    assert first(net, LAMP()) == pytest.approx(expected)


def test_lamp_of_equal_channels() -> None:
    net = nn.Sequential(nn.Linear(2, 3, bias=False), nn.Linear(3, 1, bias=False)).double()
    for parameter in net.parameters():
        nn.init.ones_(parameter)
    graph = ChannelGraph(net, torch.zeros(1, 2, dtype=torch.float64))
    scores = LAMP()(graph.groups()[0], tensors_of(graph))
    assert scores.tolist() == pytest.approx([1 / 3] * 3)


def test_norm_scale(net: Chain) -> None:
    net.norm.weight.data[2] *= -1
    assert first(net, NormScale()) == net.norm.weight.abs().tolist()
    graph = graph_of(build("attention"))
    with pytest.raises(PlanError, match="no scale of a norm of the kinds batch_norm"):
        fitted("bn_scale", graph)(graph.groups()[0], tensors_of(graph))
    stream = next(g for g in graph.groups() if any(m.tensor == "norm.weight" for m in g.members))
    scores = fitted(NormScale(("layer_norm",)), graph)(stream, tensors_of(graph))
    assert scores.tolist() == pytest.approx(graph.model.norm.weight.abs().tolist())


# --------------------------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: L2Activation("median"), "reduce is 'median'"),
        (lambda: TVSeparability("max"), "'min', 'mean'"),
        (lambda: FPGM("filters"), "'all'"),
        (lambda: Cosine("all"), "'nearest', 'mean'"),
        (lambda: NormScale(("norm",)), r"kinds is \('norm',\)"),
        (lambda: SliceNorm(0.0), "above 0"),
    ],
)
def test_bad_arguments(make: object, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        make()
