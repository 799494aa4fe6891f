"""Recovery: what the kept channels can express comes back exactly, and nothing else is touched."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from support.ranks import needs_distributed, on_two_ranks
from support.recovery_nets import (
    COPIED_FROM,
    GONE,
    IMAGES,
    KEPT,
    TOKENS,
    conv_net,
    copy_channels,
    copy_norm,
    data_of,
    error,
    jittered,
    linear_net,
    removal,
)
from torch import nn

import structprune
from structprune.equations.least_squares import RIDGES
from structprune.errors import RecoveryError
from structprune.planning.build import plan_removal


class Matrix(nn.Module):
    """A bare matrix product."""

    def __init__(self, fan_in, fan_out):
        super().__init__()
        self.matrix = nn.Parameter(torch.empty(fan_in, fan_out))

    def forward(self, x):
        return x @ self.matrix


class Addmm(nn.Module):
    """A product with its bias in one call, as GPT-2 has it."""

    def __init__(self, fan_in, fan_out):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(fan_in, fan_out))
        self.bias = nn.Parameter(torch.empty(fan_out))

    def forward(self, x):
        flat = x.view(-1, x.shape[-1])
        return torch.addmm(self.bias, flat, self.weight).view(*x.shape[:-1], -1)


CONSUMERS = {
    "conv": (lambda: conv_net(nn.Conv2d(8, 4, 3, padding=1)), IMAGES),
    "conv without bias": (lambda: conv_net(nn.Conv2d(8, 4, 3, bias=False)), IMAGES),
    "strided and dilated": (lambda: conv_net(nn.Conv2d(8, 4, (3, 2), (2, 1), (1, 0), (1, 2))), IMAGES),
    "same padding": (lambda: conv_net(nn.Conv2d(8, 4, 3, padding="same")), IMAGES),
    "circular padding": (lambda: conv_net(nn.Conv2d(8, 4, 3, padding=1, padding_mode="circular")), IMAGES),
    "norm behind": (lambda: conv_net(nn.Sequential(nn.Conv2d(8, 4, 3, bias=False), nn.BatchNorm2d(4))), IMAGES),
    "norm without scale behind": (
        lambda: conv_net(nn.Sequential(nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4, affine=False))),
        IMAGES,
    ),
    "transposed": (lambda: conv_net(nn.ConvTranspose2d(8, 4, 3, 2, 1, 1)), IMAGES),
    "grouped behind": (
        lambda: conv_net(nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=4))),
        IMAGES,
    ),
    "linear": (lambda: linear_net(nn.Linear(8, 4)), TOKENS),
    "linear without bias": (lambda: linear_net(nn.Linear(8, 4, bias=False)), TOKENS),
    "matrix product": (lambda: linear_net(Matrix(8, 4)), TOKENS),
    "addmm": (lambda: linear_net(Addmm(8, 4)), TOKENS),
}


@pytest.mark.parametrize("name", CONSUMERS)
def test_what_the_kept_channels_can_express_comes_back(name):
    make, shape = CONSUMERS[name]
    model, data = make(), data_of(shape)
    copy_channels(model[0].weight, model[0].bias)
    plan = removal(model, data[0], "0")
    slim = plan.apply(model)
    recovered = structprune.recover(slim, model, data)
    assert error(slim, model, data) > 1e-2
    # The error is of the size of the ridge. Of the two smallest, 1e-12 and 1e-8, the larger one may be chosen: both
    # leave squared errors that are rounding, and which one that favours differs between processors.
    assert error(recovered, model, data) < 10 * RIDGES[1]
    assert error(recovered, model, data_of((7, *shape[1:]), 1)) < 10 * RIDGES[1]


def test_a_depthwise_convolution_between():
    depthwise = nn.Conv2d(8, 8, 3, groups=8)
    model = conv_net(nn.Conv2d(8, 4, 1), depthwise, nn.ReLU())
    copy_channels(model[0].weight, model[0].bias)
    with torch.no_grad():
        depthwise.weight[GONE] = depthwise.weight[COPIED_FROM]
        depthwise.bias[GONE] = 2 * depthwise.bias[COPIED_FROM]
    data = data_of(IMAGES)
    plan = removal(model, data[0], "0")
    recovered = structprune.recover(plan.apply(model), model, data)
    assert recovered[2].weight.shape == (5, 1, 3, 3)
    assert error(recovered, model, data) < 1e-8


def test_a_norm_between():
    model = jittered(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)))
    copy_channels(model[0].weight, model[0].bias, factor=1.0)
    copy_norm(model[1])
    data = data_of(IMAGES)
    plan = removal(model, data[0], "0")
    recovered = structprune.recover(plan.apply(model), model, data)
    assert error(recovered, model, data) < 1e-8


class Attention(nn.Module):
    """Causal attention over 4 heads of size 2."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(6, 24)
        self.proj = nn.Linear(8, 6)

    def forward(self, x):
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 4, 2).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.proj(y.transpose(1, 2).flatten(2))


def test_heads_of_attention():
    model, data = jittered(Attention()), data_of(TOKENS)
    with torch.no_grad():  # head 2 is head 0, with twice its values
        weight, bias = model.qkv.weight.view(3, 4, 2, 6), model.qkv.bias.view(3, 4, 2)
        for tensor in (weight, bias):
            tensor[:, 2] = tensor[:, 0] * torch.tensor([1.0, 1.0, 2.0]).view(3, *[1] * (tensor.dim() - 2))
    graph = structprune.DependencyGraph(model, data[0])
    (heads,) = [g for g in graph.groups() if g.channels == 4]
    plan = plan_removal(graph, graph.chosen(heads, [2]))
    slim = plan.apply(model)
    recovered = structprune.recover(slim, model, data)
    assert error(slim, model, data) > 1e-2
    assert error(recovered, model, data) < 1e-8


class Residual(nn.Module):
    """Two branches on one stream; the second sees all that the first one saw."""

    def __init__(self):
        super().__init__()
        self.up1, self.down1 = nn.Linear(6, 8), nn.Linear(8, 6)
        self.up2, self.down2 = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x):
        y = x + self.down1(F.relu(self.up1(x)))
        return y + self.down2(F.relu(self.up2(x)))


def test_a_sum_makes_up_for_what_was_lost_before_it():
    model, data = jittered(Residual()), data_of(TOKENS)
    model.up2.load_state_dict(model.up1.state_dict())  # what the first branch loses, the second one still has
    plan = removal(model, data[0], "up1")
    # With its producer the first branch would get closer by itself, and leave what the second cannot express.
    recovered = structprune.recover(plan.apply(model), model, data, rounds=0)
    report = structprune.recovery_report(recovered)
    assert [(row.layer, row.target) for row in report.layers] == [("down1", "add"), ("down2", "add")]
    assert report.layers[0].after > 1e-3
    assert error(recovered, model, data) < 1e-8


class Stream(nn.Module):
    """A residual stream with a norm, as in a transformer."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm, self.head = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 4)
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x):
        x = self.embed(x)
        x = x + self.down(F.gelu(self.up(self.norm(x))))
        return self.head(x)


def test_the_width_of_a_residual_stream():
    model, data = jittered(Stream()), data_of(TOKENS)
    plan = removal(model, data[0], "embed", [1, 4])
    slim = plan.apply(model)
    recovered = structprune.recover(slim, model, data)
    rows = {row.layer: row for row in structprune.recovery_report(recovered).layers}
    assert {"norm", "up", "down", "head"} <= set(rows)
    assert all(row.after <= row.before for row in rows.values())
    # Six inputs span six of eight dimensions: what the stream carries of them is not lost.
    assert error(recovered, model, data) < 0.5 * error(slim, model, data)


# -- what stays as it was --------------------------------------------------------------------------------------------


def test_nothing_else_is_touched():
    model = conv_net(nn.Conv2d(8, 4, 3))
    model[1].train()
    model[0].weight.requires_grad_(False)
    data = data_of(IMAGES)
    plan = removal(model, data[0], "0")
    slim = plan.apply(model)
    before = [copy.deepcopy(m.state_dict()) for m in (model, slim)]
    modes = [[module.training for module in m.modules()] for m in (model, slim)]
    state, threads = torch.get_rng_state(), threading.active_count()
    recovered = structprune.recover(slim, model, data)
    for m, old, flags in zip((model, slim), before, modes, strict=True):
        assert all(torch.equal(tensor, old[name]) for name, tensor in m.state_dict().items())
        assert [module.training for module in m.modules()] == flags
    assert [module.training for module in recovered.modules()] == modes[1]
    assert [p.requires_grad for p in recovered.parameters()] == [p.requires_grad for p in slim.parameters()]
    assert torch.equal(torch.get_rng_state(), state)
    assert threading.active_count() == threads


def test_a_layer_that_cannot_get_better_is_left():
    model, data = linear_net(nn.Linear(8, 4)), data_of(TOKENS)
    with torch.no_grad():
        model[0].weight[GONE], model[0].bias[GONE] = 0.0, 0.0  # nothing is lost
    plan = removal(model, data[0], "0")
    slim = plan.apply(model)
    recovered = structprune.recover(slim, model, data)
    assert [row.changed for row in structprune.recovery_report(recovered).layers] == [False]
    assert torch.equal(recovered[2].weight, slim[2].weight)


def test_a_tied_weight_is_left():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.twice, self.down = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, x):
            return self.down(self.twice(self.twice(F.relu(self.up(x)))))

    model, data = jittered(Tied()), data_of(TOKENS)
    plan = removal(model, data[0], "up")
    recovered = structprune.recover(plan.apply(model), model, data)
    assert [row.layer for row in structprune.recovery_report(recovered).layers] == ["down"]


def test_the_same_seed_gives_the_same_model():
    model, data = conv_net(nn.Conv2d(8, 4, 3)), data_of(IMAGES)
    plan = removal(model, data[0], "0")
    slim = plan.apply(model)
    first, second, other = (structprune.recover(slim, model, data, rows=200, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first[2].weight, second[2].weight)
    assert not torch.equal(first[2].weight, other[2].weight)


# -- data ------------------------------------------------------------------------------------------------------------


def test_labels_are_ignored_and_keywords_understood():
    model, data = linear_net(nn.Linear(8, 4)), data_of(TOKENS)
    plan = removal(model, data[0], "0")
    slim = plan.apply(model)
    plain = structprune.recover(slim, model, data)
    labelled = structprune.recover(slim, model, [(x, torch.zeros(8)) for x in data])
    named = structprune.recover(slim, model, ({"input": x} for x in data))
    assert torch.equal(plain[2].weight, labelled[2].weight)
    assert torch.equal(plain[2].weight, named[2].weight)


@pytest.mark.parametrize(
    ("data", "message"),
    [([], "data holds no batch"), (["x"], "A batch of data is a str"), ([[3]], "A batch of data is a int")],
)
def test_data_that_is_none_is_refused(data, message):
    model = linear_net(nn.Linear(8, 4))
    plan = removal(model, data_of(TOKENS)[0], "0")
    with pytest.raises(RecoveryError, match=message):
        structprune.recover(plan.apply(model), model, data)


def test_another_model_is_refused():
    model, data = linear_net(nn.Linear(8, 4)), data_of(TOKENS)
    plan = removal(model, data[0], "0")
    other = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 4))
    with pytest.raises(RecoveryError, match=r"'0.weight' has shape \[9, 6\] in the original, but .* of shape \[8, 6\]"):
        structprune.recover(plan.apply(model), other, data)


def test_several_rounds_of_pruning():
    model, data = conv_net(nn.Conv2d(8, 4, 3, padding=1)), data_of(IMAGES)
    copy_channels(model[0].weight, model[0].bias)
    slim = copy.deepcopy(model)
    graph = structprune.DependencyGraph(slim, data[0])
    graph.prune_group("0", [4])
    graph.prune_group("0", [1, 5])  # the first model's 1 and 6
    assert structprune.kept(slim)["2.weight"] == {1: tuple(KEPT)}
    assert error(structprune.recover(slim, model, data), model, data) < 1e-8


def test_a_whole_model_stays_what_it_is():
    model, data = linear_net(nn.Linear(8, 4)), data_of(TOKENS)
    recovered = structprune.recover(model, model, data)
    assert structprune.recovery_report(recovered).layers == ()
    assert all(torch.equal(a, b) for a, b in zip(recovered.parameters(), model.parameters(), strict=True))


def test_an_error_of_the_forward_comes_through_and_no_thread_stays():
    model, data = linear_net(nn.Linear(8, 4)), data_of(TOKENS)
    plan = removal(model, data[0], "0")
    threads = threading.active_count()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        structprune.recover(plan.apply(model), model, [data[0], torch.zeros(3, 5, dtype=torch.float64)])
    assert threading.active_count() == threads


def test_only_what_recover_made_has_a_report():
    with pytest.raises(RecoveryError, match=r"does not come from structprune\.recover"):
        structprune.recovery_report(nn.Linear(2, 2))


def test_batches_that_take_another_branch_are_refused():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 4)

        def forward(self, x):
            y = self.up(x)
            return self.down(F.relu(y) if len(x) > 2 else F.gelu(y))

    model, data = Branch().double(), data_of(TOKENS)
    plan = removal(model, data[0], "up")
    with pytest.raises(RecoveryError, match="A batch runs gelu where the trace of the original has relu"):
        structprune.recover(plan.apply(model), model, [data[0], data[1][:2]])


# -- several processes -----------------------------------------------------------------------------------------------


def recovered_weight(data):
    model = conv_net(nn.Conv2d(8, 4, 3))
    plan = removal(model, data[0], "0")
    return structprune.recover(plan.apply(model), model, data)[2].weight.detach()


def weight_of(rank):
    return recovered_weight(data_of(IMAGES, 4)[2 * rank : 2 * rank + 2])


@needs_distributed
def test_every_rank_gives_its_share(tmp_path):
    found = on_two_ranks(weight_of, tmp_path)
    together = recovered_weight(data_of(IMAGES, 4))
    for weight in found:
        torch.testing.assert_close(weight, together, rtol=1e-9, atol=1e-12)
