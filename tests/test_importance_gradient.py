"""Criteria of gradients and curvature against slow and literal implementations of their definitions."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from support.importance_nets import (
    Chain,
    TwoEnds,
    build,
    cross_entropy,
    graph_of,
    group_of,
    images,
    labels,
    pairs,
    scores_of,
)
from torch import Tensor, nn

from structprune.errors import PlanError
from structprune.importance.base import fitted
from structprune.importance.curvature import OBD, hessian_diagonal
from structprune.importance.data import Batches
from structprune.importance.gradient import SNIP, Taylor, WeightTaylor
from structprune.importance.layer_curvature import KFAC, OBS
from structprune.planning.build import tensors_of


@pytest.fixture
def net() -> Chain:
    model = build("chain")
    assert isinstance(model, Chain)
    return model


def first(net: nn.Module, importance: object) -> list[float]:
    return scores_of(graph_of(net), importance)["0 first"].tolist()


def sample_derivatives(net: Chain) -> Tensor:
    """For each sample and channel: the sum over positions of gradient x activation."""
    found = torch.zeros(8, 4, dtype=torch.float64)
    for n in range(8):
        maps = net.features(images()[n : n + 1]).detach().requires_grad_(True)
        F.cross_entropy(net.rest(maps), labels()[n : n + 1]).backward()
        for channel in range(4):
            found[n, channel] = sum((maps.grad[0, channel] * maps.detach()[0, channel]).flatten().tolist())
    return found


# ------------------------------------------------------------------------------------------------------------- gates


def test_taylor(net: Chain) -> None:
    derivatives = sample_derivatives(net)
    assert first(net, "taylor") == pytest.approx(
        [sum(abs(v) for v in derivatives[:, c].tolist()) / 8 for c in range(4)]
    )
    assert first(net, "taylor_signed") == pytest.approx([abs(sum(derivatives[:, c].tolist())) / 8 for c in range(4)])


def test_a_loss_that_is_a_sum_gives_the_same_scores(net: Chain) -> None:
    graph = graph_of(net)

    def summed(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1], reduction="sum")

    for name in ("taylor", "group_fisher", "weight_taylor", "obd_fisher", "kfac"):
        ready = fitted(name, graph, Batches(pairs(3, 5), loss=summed, reduction="sum"))
        found = ready(group_of(graph, "first"), tensors_of(graph))
        assert found.tolist() == pytest.approx(first(net, name))


def consumers_scaled(net: nn.Module, layers: list[str], channel: int, factor: float) -> nn.Module:
    result = copy.deepcopy(net)
    with torch.no_grad():
        for layer in layers:
            result.get_parameter(f"{layer}.weight")[:, channel] *= factor
    return result


def losses(net: nn.Module) -> Tensor:
    with torch.no_grad():
        return F.cross_entropy(net(images()), labels(), reduction="none")


@pytest.mark.parametrize(("name", "ends"), [("first", ["second"]), ("stem", ["branch", "head"])])
def test_gates_are_derivatives_by_a_factor_on_all_that_consumes_the_channel(name: str, ends: list[str]) -> None:
    net = build("chain") if name == "first" else TwoEnds().double()
    graph = graph_of(net)
    group, tensors, step = group_of(graph, name), tensors_of(graph), 1e-4
    slopes, curves = [], []
    for channel in range(group.channels):
        up, down = (losses(consumers_scaled(net, ends, channel, 1 + s)) for s in (step, -step))
        slopes.append((up - down) / (2 * step))
        curves.append(float(((up + down - 2 * losses(net)) / step**2).mean()))
    batches = Batches(pairs(5, 3), loss=cross_entropy)
    found = {n: fitted(n, graph, batches)(group, tensors).tolist() for n in ("taylor", "taylor_signed", "group_fisher")}
    assert found["taylor"] == pytest.approx([float(s.abs().mean()) for s in slopes], rel=1e-5)
    assert found["taylor_signed"] == pytest.approx([abs(float(s.mean())) for s in slopes], rel=1e-4)
    assert found["group_fisher"] == pytest.approx([float(s.square().mean()) / 2 for s in slopes], rel=1e-5)
    assert fitted(OBD("fisher", "gates"), graph, batches)(group, tensors).tolist() == found["group_fisher"]
    second = fitted(OBD("hutchinson", "gates", probes=3000), graph, batches)(group, tensors)
    torch.testing.assert_close(
        second, torch.tensor(curves).double().abs() / 2, rtol=0.05, atol=0.05 * float(second.max())
    )


def test_gates_of_heads_are_derivatives_by_a_factor_on_a_head() -> None:
    net = build("attention")
    graph = graph_of(net)
    (heads,) = [key for key, found in scores_of(graph, "taylor_signed").items() if len(found) == 4]
    expected = []
    for head in range(4):
        both = []
        for sign in (1, -1):
            changed = copy.deepcopy(net)
            changed.out.weight.data[:, 3 * head : 3 * head + 3] *= 1 + sign * 1e-5
            both.append(losses(changed).mean())
        expected.append(abs(float(both[0] - both[1])) / 2e-5)
    assert scores_of(graph, "taylor_signed")[heads].tolist() == pytest.approx(expected, rel=1e-5)


def test_samples_that_lie_behind_other_dimensions() -> None:
    """Tokens first, samples second: the samples are found all the same; where they cannot be, the error says so."""

    class TokensFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.head = nn.Linear(3, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = x.flatten(2).permute(2, 0, 1)
            return self.head(torch.tanh(self.up(x))).mean(0)

    class Interleaved(TokensFirst):
        def forward(self, x: Tensor) -> Tensor:
            x = x.flatten(2).permute(2, 0, 1)
            hidden = torch.tanh(self.up(x)).reshape(12, -1, 6)
            return self.head(hidden).reshape(36, -1, 3).mean(0)

    torch.manual_seed(0)
    net = TokensFirst().double()
    whole, single = (scores_of(graph_of(net), "taylor", pairs(*sizes))["0 up"] for sizes in ((7,), (1,) * 7))
    torch.testing.assert_close(whole, single)
    graph = graph_of(Interleaved().double())
    with pytest.raises(PlanError, match="Give batches of one sample"):
        fitted("taylor", graph, pairs(7), cross_entropy)
    scores_of(graph, "taylor", pairs(1, 1, 1))


# ----------------------------------------------------------------------------------------------------------- weights


def weight_and_gradient(net: Chain) -> list[list[tuple[Tensor, Tensor]]]:
    """For each channel of the first convolution the weights that go with it, and their gradients, slice by slice."""
    model = copy.deepcopy(net)
    cross_entropy(model, (images(), labels())).backward()
    tensors = (model.first.weight, model.first.bias, model.norm.weight, model.norm.bias)
    return [
        [(p.detach()[c], p.grad[c]) for p in tensors]
        + [(model.second.weight.detach()[:, c], model.second.weight.grad[:, c])]
        for c in range(4)
    ]


@pytest.mark.parametrize("reduce", ["sum", "mean", "max", "first"])
def test_weight_taylor(net: Chain, reduce: str) -> None:
    join = {"sum": sum, "mean": lambda v: sum(v) / len(v), "max": max, "first": lambda v: v[0]}[reduce]
    element, multivariable, group = [], [], []
    for parts in weight_and_gradient(net):
        products = [[w * g for w, g in zip(a.flatten().tolist(), b.flatten().tolist(), strict=True)] for a, b in parts]
        element.append(join([sum(map(abs, p)) for p in products]))
        multivariable.append(join([abs(sum(p)) for p in products]))
        group.append(abs(sum(sum(p) for p in products)))
    assert first(net, WeightTaylor("element", reduce)) == pytest.approx(element)
    assert first(net, WeightTaylor("multivariable", reduce)) == pytest.approx(multivariable)
    assert first(net, WeightTaylor("group")) == pytest.approx(group)


def test_snip(net: Chain) -> None:
    model = copy.deepcopy(net)
    cross_entropy(model, (images(), labels())).backward()
    whole = sum(float((p.detach() * p.grad).abs().sum()) for p in model.parameters())
    expected = [sum(float((w * g).abs().sum()) for w, g in parts) / whole for parts in weight_and_gradient(net)]
    assert first(net, SNIP()) == pytest.approx(expected)


# --------------------------------------------------------------------------------------------------------- curvature


def test_obd_by_the_empirical_fisher_matrix(net: Chain) -> None:
    expected = [0.0] * 4
    for n in range(8):
        model = copy.deepcopy(net)
        cross_entropy(model, (images()[n : n + 1], labels()[n : n + 1])).backward()
        for c in range(4):
            for p in (model.first.weight, model.first.bias, model.norm.weight, model.norm.bias):
                expected[c] += sum((p.detach()[c] * p.grad[c]).flatten().square().tolist()) / 16
            expected[c] += sum((model.second.weight * model.second.weight.grad)[:, c].flatten().square().tolist()) / 16
    assert first(net, "obd_fisher") == pytest.approx(expected)


def test_hutchinson_is_exact_for_a_diagonal_hessian() -> None:
    x = torch.tensor([1.0, 2.0, -1.0], dtype=torch.float64, requires_grad=True)
    y = torch.tensor([[3.0]], dtype=torch.float64, requires_grad=True)
    value = (torch.tensor([1.0, -2.0, 0.5]) * x**3).sum() + y.square().sum() * 4
    for found, expected in zip(hessian_diagonal(value, [x, y], 1, 0), ([6.0, -24.0, -3.0], [[8.0]]), strict=True):
        assert found.tolist() == pytest.approx(expected) if found.dim() == 1 else found.tolist() == expected


def test_hutchinson_of_something_linear() -> None:
    x = torch.ones(3, requires_grad=True)
    assert hessian_diagonal(x.sum(), [x], 2, 0)[0].tolist() == [0, 0, 0]


def test_obd_by_hutchinson_comes_near_the_hessian() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(108, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    names = [name for name, _ in net.named_parameters()]
    weights = {name: p.detach() for name, p in net.named_parameters()}

    sizes = [weights[name].numel() for name in names]

    def loss(flat: Tensor) -> Tensor:
        parts = zip(names, flat.split(sizes), strict=True)
        values = {name: part.reshape(weights[name].shape) for name, part in parts}
        return F.cross_entropy(torch.func.functional_call(net, values, (images(),)), labels())

    flat = torch.cat([weights[name].flatten() for name in names])
    saliency = torch.autograd.functional.hessian(loss, flat).diagonal().abs() * flat.square() / 2
    parts = dict(zip(names, saliency.split(sizes), strict=True))
    expected = parts["1.weight"].reshape(3, -1).sum(1) + parts["1.bias"] + parts["3.weight"].reshape(3, 3).sum(0)
    found = scores_of(graph_of(net), OBD("hutchinson", probes=2000))["0 1"]
    # The absolute value of a noisy estimate is a little too large for each of the many entries near zero.
    torch.testing.assert_close(found, expected, rtol=0.25, atol=0)


def features_of(kind: str) -> tuple[nn.Module, str]:
    torch.manual_seed(1)
    layers = {
        "linear": [nn.Flatten(), nn.Linear(108, 6), nn.Tanh(), nn.Linear(6, 4)],
        "conv": [nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 4, 3, stride=2, padding=1)],
        "dilated": [nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 4, (3, 2), dilation=2, padding="same")],
        "grouped": [nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 4, 3, groups=2)],
        "transposed": [nn.Conv2d(3, 6, 1), nn.ReLU(), nn.ConvTranspose2d(6, 4, 3, stride=2, padding=1)],
        "transposed in groups": [nn.Conv2d(3, 6, 1), nn.ReLU(), nn.ConvTranspose2d(6, 4, 3, stride=2, groups=2)],
    }[kind]
    net = nn.Sequential(*layers)
    if kind != "linear":
        net.append(nn.Tanh()).append(nn.Flatten()).append(nn.LazyLinear(3))
        net(images(1).float())
    return net.double(), "3" if kind == "linear" else "2"


def columns_of(layer: nn.Module, x: Tensor) -> tuple[Tensor, list[list[int]]]:
    """What each single weight adds to the outputs (entries of the output x weights), and the weights of each input.

    One column for each weight of the layer, found by running it with that weight alone.
    """
    base, found, owners = copy.deepcopy(layer), [], []
    if base.bias is not None:
        base.bias.data.zero_()
    inputs = base.weight.shape[0] if isinstance(base, nn.ConvTranspose2d) else x.shape[1]
    owners = [[] for _ in range(inputs)]
    groups = getattr(base, "groups", 1)
    with torch.no_grad():
        for number in range(base.weight.numel()):
            one = torch.zeros(base.weight.numel(), dtype=torch.float64)
            one[number] = layer.weight.flatten()[number]
            base.weight.data = one.reshape(base.weight.shape)
            found.append(base(x).flatten())
            place = [int(i) for i in torch.unravel_index(torch.tensor(number), base.weight.shape)]
            if isinstance(base, nn.ConvTranspose2d):
                owners[place[0]].append(number)
            else:
                owners[place[1] + place[0] // (base.weight.shape[0] // groups) * base.weight.shape[1]].append(number)
    return torch.stack(found, 1), owners


@pytest.mark.parametrize("kind", ["linear", "conv", "dilated", "grouped", "transposed", "transposed in groups"])
def test_obs_is_the_error_that_is_left_by_least_squares(kind: str) -> None:
    """Take a channel's weights away and choose all others anew: what remains of the layer's output is the score."""
    net, number = features_of(kind)
    layer = net[int(number)]
    with torch.no_grad():
        x = net[: int(number)](images(40))
        columns, owners = columns_of(layer, x)
        target = columns.sum(1)
    graph = graph_of(net)
    group = next(g for g in graph.groups() if g.channels == (3 if "groups" in kind or kind == "grouped" else 6))
    ready = fitted(OBS(damping=1e-11), graph, [images(40)[:20], images(40)[20:]])
    scores = ready(group, tensors_of(graph))
    stem = next(m for m in group.members if m.dim == 0 and m.tensor in ("0.weight", "1.weight"))
    for channel in range(group.channels):
        gone = [n for p in stem.positions[stem.channels == channel] for n in owners[p]]
        kept = [n for n in range(columns.shape[1]) if n not in gone]
        answer = torch.linalg.lstsq(columns[:, kept], target.unsqueeze(1), driver="gelsd").solution[:, 0]
        error = float((columns[:, kept] @ answer - target).square().sum())
        assert float(scores[channel]) == pytest.approx(error / (target.numel() / 4), rel=1e-4, abs=1e-9)


def test_obs_of_a_channel_that_another_can_stand_in_for() -> None:
    """Where two channels are the same up to a factor, either may go without loss: the other takes over its weights."""
    net, _ = features_of("linear")
    with torch.no_grad():
        net[1].weight[5], net[1].bias[5] = net[1].weight[2], net[1].bias[2]
    scores = scores_of(graph_of(net), OBS(damping=1e-9))["0 1"]
    assert float(scores[[2, 5]].max()) < 1e-6 * float(scores[[0, 1, 3, 4]].min())


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("kind", ["linear", "conv", "grouped"])
def test_kfac_is_the_quadratic_form_of_the_kronecker_product(kind: str, inverse: bool) -> None:
    net, number = features_of(kind)
    layer = net[int(number)]
    groups = getattr(layer, "groups", 1)
    x = net[: int(number)](images()).detach()
    y = layer(x).detach().requires_grad_(True)
    F.cross_entropy(net[int(number) + 1 :](y), labels(), reduction="sum").backward()
    gradient = y.grad.flatten(2).transpose(1, 2).reshape(-1, 4) if y.dim() > 2 else y.grad
    if kind == "linear":
        patches = x.unsqueeze(1)
    else:
        patches = F.unfold(x, 3, stride=layer.stride, padding=layer.padding).transpose(1, 2)
    rows = patches.flatten(0, 1)
    second = rows.T @ rows / 8
    kernel = rows.shape[1] // 6
    inside = rows.shape[1] // groups
    if groups > 1:  # each group of the convolution is a layer of its own inputs
        second = torch.block_diag(*(second[i : i + inside, i : i + inside] for i in range(0, len(second), inside)))
    outer = gradient.T @ gradient / len(gradient)
    weight = torch.zeros(4, rows.shape[1], dtype=torch.float64)
    for out in range(4):
        start = out // (4 // groups) * inside
        weight[out, start : start + inside] = layer.weight[out].detach().flatten()
    graph = graph_of(net)
    group = next(g for g in graph.groups() if g.channels == (3 if groups > 1 else 6))
    found = fitted(KFAC(inverse, damping=1e-3), graph, Batches(pairs(5, 3), loss=cross_entropy))(
        group, tensors_of(graph)
    )
    for channel in range(group.channels):
        places = [channel] if groups == 1 else [channel, channel + 3]
        columns = [p * kernel + k for p in places for k in range(kernel)]
        if inverse:
            damped = second.clone()
            for start in range(0, len(second), inside):
                part = damped[start : start + inside, start : start + inside]
                part += torch.eye(inside) * part.diagonal().mean() * 1e-3
            full = torch.kron(outer + torch.eye(4) * 1e-12, damped)  # positive, so that it can be inverted
            gone = [out * rows.shape[1] + c for out in range(4) for c in columns]
            curvature = torch.linalg.inv(torch.linalg.inv(full)[gone][:, gone])
        else:
            full = torch.kron(outer, second)
            gone = [out * rows.shape[1] + c for out in range(4) for c in columns]
            curvature = full[gone][:, gone]
        taken = weight[:, columns].flatten()
        expected = float(taken @ curvature @ taken) / 2
        assert float(found[channel]) == pytest.approx(expected, rel=1e-3)


def test_a_layer_whose_moments_are_unknown() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right, self.join = nn.Linear(108, 4), nn.Linear(108, 5), nn.Bilinear(4, 5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.join(self.left(x.flatten(1)), self.right(x.flatten(1)))

    graph = graph_of(Both().double())
    for name in ("obs", "kfac"):
        with pytest.raises(PlanError, match="neither a convolution nor a product"):
            fitted(name, graph, pairs(4), cross_entropy)
    assert scores_of(graph, "wanda").keys() == {"0 left", "1 right"}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Taylor("during"), "average is 'during'; give one of 'after', 'before'"),
        (lambda: WeightTaylor("slice"), "'multivariable'"),
        (lambda: SNIP("median"), "reduce is 'median'"),
        (lambda: OBD("exact"), "'hutchinson'"),
        (lambda: OBD(variables="filters"), "'weights', 'gates'"),
        (lambda: OBD(probes=0), "at least 1"),
        (lambda: OBS(damping=0), "above 0"),
        (lambda: KFAC(reduce="median"), "reduce is 'median'"),
    ],
)
def test_bad_arguments(make: object, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        make()
