"""Of what channels are removed: axes, chosen outputs, and targets of cost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.networks import IDS, IMAGE, Residual, Transformer, exact, widths
from torch import Tensor, nn

import structprune
from structprune.errors import PlanError

# -- axes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", ["mlp", "heads", "head_size", "hidden"])
def test_only_the_axes_asked_for_go(axis: str) -> None:
    model = Transformer()
    plan = structprune.plan(model, IDS, ratio=0.5, axes=[axis], outputs=["logits"])
    whole = {"hidden": 64, "mlp": 256, "heads": 6, "head_size": 16}  # heads: 4, and 2 queries for each
    found = {width.axis: (width.before, width.after) for width in plan.axes}
    half = {"hidden": 32, "mlp": 128, "heads": 4, "head_size": 8}
    assert found == {name: (before, half[name] if name == axis else before) for name, before in whole.items()}
    assert plan.apply(model).size == (8 if axis == "head_size" else 16)
    assert structprune.verify(model, plan.apply(model), plan, IDS).ok


def test_query_heads_go_with_their_keys_and_values() -> None:
    model = Transformer()
    plan = structprune.plan(model, IDS, ratio=0.5, axes="heads", importance="random")
    slim = exact(model, IDS, plan)
    assert (slim.heads, slim.kv_heads) == (4, 2)
    gone = plan.removed
    keys = {i // 16 for i in gone["k.weight"][0]}
    assert {i // 16 for i in gone["v.weight"][0]} == keys
    assert {i // 32 for i in gone["q.weight"][0]} == {i // 32 for i in gone["o.weight"][1]} == keys


def test_heads_and_head_sizes_both_go_if_both_are_named() -> None:
    plan = structprune.plan(Transformer(), IDS, ratio=0.5, axes=["heads", "head_size"])
    slim = exact(Transformer(), IDS, plan)
    assert (slim.heads, slim.kv_heads, slim.size) == (4, 2, 8)
    assert slim.fc1.out_features == 256


class Repeated(Transformer):
    """Keys and values repeated for each query head, unless there is one for each."""

    def __init__(self) -> None:
        super().__init__(heads=16)
        self.repeats = self.heads // self.kv_heads

    def _repeated(self, x: Tensor) -> Tensor:
        if self.repeats == 1:
            return x
        b, heads, n, size = x.shape
        return x[:, :, None].expand(b, heads, self.repeats, n, size).reshape(b, heads * self.repeats, n, size)

    def forward(self, ids: Tensor) -> dict[str, Any]:
        x = self.embed(ids)
        q, k, v = (f(self.norm(x)).view(*ids.shape, -1, self.size).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, self._repeated(k), self._repeated(v))
        return {"logits": self.out(x + self.o(y.transpose(1, 2).flatten(2)))}


@pytest.mark.parametrize("build", [lambda: Transformer(heads=16), Repeated], ids=["enable_gqa", "repeated"])
def test_query_heads_go_while_key_and_value_heads_stay(build: Callable[[], Transformer]) -> None:
    for options in ({"axes": ["heads"], "ignore": ["k", "v"], "ratio": 0.5}, {"ratio": {"q": 0.5}}):
        model = build()
        slim = exact(model, IDS, structprune.plan(model, IDS, outputs=["logits"], **options))
        assert (slim.q.out_features, slim.k.out_features, slim.v.out_features) == (128, 64, 64)
    plan = structprune.plan(model, IDS, outputs=["logits"], ratio={"q": 0.9})
    least = 2 if isinstance(model, Repeated) else 1  # with one, another branch of its forward would run
    assert exact(model, IDS, plan).q.out_features == 64 * least


class LiteralHeads(nn.Module):
    """Attention whose head size is a literal, so that the number of heads follows from the width."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.qkv = nn.Embedding(11, 24), nn.Linear(24, 3 * 128)
        self.proj, self.out = nn.Linear(128, 24), nn.Linear(24, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        b, n = ids.shape
        q, k, v = (t.reshape(b, n, t.shape[-1] // 32, 32).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, -1)
        return self.out(x + self.proj(y))


def test_whole_heads_of_a_literal_size_go() -> None:
    model = LiteralHeads()
    assert [(g.name, g.channels) for g in structprune.DependencyGraph(model, IDS).groups() if g.axis == "heads"] == [
        ("qkv", 4)
    ]
    slim = exact(model, IDS, structprune.plan(model, IDS, ratio=0.5))
    assert (slim.qkv.out_features, slim.proj.in_features) == (192, 64)


def _in_groups() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 32, 3, groups=8), nn.Conv2d(32, 4, 3))


def test_groups_of_a_convolution_and_channels_in_them_are_axes_of_their_own() -> None:
    model, x = _in_groups(), torch.randn(1, 3, 9, 9)
    found = {(g.axis, g.channels) for g in structprune.DependencyGraph(model, x).groups()}
    assert found == {("groups", 8), ("channels", 2), ("channels", 4)}
    for axis, groups, width in (("groups", 4, 16), ("channels", 8, 16)):
        slim = exact(_in_groups(), x, structprune.plan(model, x, ratio=0.5, axes=[axis], round_to=1))
        assert (slim[1].groups, slim[1].out_channels) == (groups, width)


def test_the_same_channels_of_each_group_can_be_chosen_by_their_numbers() -> None:
    x = torch.randn(1, 3, 9, 9)
    for layer, gone, left in (("0", range(0, 16, 2), (8, 32, 8)), ("1", range(1, 32, 4), (16, 24, 8)),
                              ("0", [0, 1, 6, 7], (12, 24, 6)), ("0", [0], (14, 28, 7))):  # fmt: skip
        plan = structprune.DependencyGraph(_in_groups(), x).prune_group(layer, list(gone))
        slim = exact(_in_groups(), x, plan)
        assert (slim[0].out_channels, slim[1].out_channels, slim[1].groups) == left
    of_four = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 32, 3, groups=4), nn.Conv2d(32, 4, 3))
    with pytest.raises(PlanError, match=r"All 16 channels of '0' would go with \[0, 4, .*: they form a grid"):
        structprune.DependencyGraph(of_four, x).prune_group("0", [0, 4, 5, 10, 15])


class StateSpace(nn.Module):
    """A selective scan between two projections, in a residual stream."""

    def __init__(self, width: int = 12, inner: int = 20, state: int = 6) -> None:
        super().__init__()
        self.state = state
        self.embed, self.out = nn.Embedding(11, width), nn.Linear(width, 3)
        self.into, self.back = nn.Linear(width, 2 * inner), nn.Linear(inner, width)
        self.conv = nn.Conv1d(inner, inner, 3, padding=1, groups=inner)
        self.select, self.step = nn.Linear(inner, 1 + 2 * state), nn.Linear(1, inner)
        self.decay, self.skip = nn.Parameter(torch.randn(inner, state)), nn.Parameter(torch.randn(inner))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        u, gate = self.into(x).chunk(2, -1)
        u = F.silu(self.conv(u.transpose(1, 2)).transpose(1, 2))
        step, b, c = self.select(u).split([1, self.state, self.state], -1)
        step = F.softplus(self.step(step))
        keep, add = torch.exp(-step[..., None] * self.decay.exp()), (step * u)[..., None] * b[:, :, None]
        h, outputs = torch.zeros_like(add[:, 0]), []
        for t in range(ids.shape[1]):
            h = keep[:, t] * h + add[:, t]
            outputs.append((h @ c[:, t, :, None]).squeeze(-1))
        y = (torch.stack(outputs, 1) + u * self.skip) * F.silu(gate)
        return self.out(x + self.back(y))


def test_the_inner_width_of_a_state_space_layer_is_no_residual_stream() -> None:
    model = StateSpace()
    found = {group.channels: group.axis for group in structprune.DependencyGraph(model, IDS).groups()}
    assert (found[12], found[20]) == ("hidden", "mlp")
    slim = exact(model, IDS, structprune.plan(model, IDS, ratio=0.5, axes=["mlp"], round_to=1))
    assert (slim.embed.embedding_dim, slim.conv.groups) == (12, 10)


def test_the_plan_prints_its_axes() -> None:
    plan = structprune.plan(Transformer(), IDS, ratio=0.5)
    text = str(plan)
    assert "mlp (1 group)" in text
    assert "heads (2 groups)" in text
    assert "asked for: ratio 0.5, scope local, allocation greedy, round_to auto, min_channels 1, max_ratio 1.0" in text
    assert structprune.Plan.from_json(plan.to_json()) == plan


# -- outputs ----------------------------------------------------------------------------------------------------------


def test_outputs_that_need_not_keep_their_shape_free_their_channels() -> None:
    model = Transformer()
    assert "output 'hidden.last'" in structprune.DependencyGraph(model, IDS).explain("fc2")
    plan = structprune.plan(model, IDS, ratio=0.5, outputs=["logits"])
    assert plan.outputs == ("logits",)
    assert structprune.Plan.from_json(plan.to_json()) == plan
    slim = structprune.prune(model, IDS, ratio=0.5, outputs=["logits"])
    assert slim(IDS)["logits"].shape == model(IDS)["logits"].shape
    assert slim(IDS)["hidden"]["last"].shape[-1] == 32
    whole = structprune.prune(model, IDS, ratio=0.5, outputs=["logits", "hidden"])
    assert whole(IDS)["hidden"]["last"].shape[-1] == 64


# -- targets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["local", "global", "isomorphic", "per_cost"])
@pytest.mark.parametrize(("name", "share"), [("macs", 0.5), ("params", 0.3), ("channels", 0.6), ("memory", 0.6)])
def test_a_target_is_met_closely(name: str, share: float, scope: Any) -> None:
    torch.manual_seed(0)
    model = Residual(width=96, inner=80)
    plan = structprune.plan(model, IMAGE, target={name: share}, scope=scope, round_to=1)
    found = {
        "macs": plan.after.macs / plan.before.macs,
        "params": plan.after.params / plan.before.params,
        "channels": sum(a.after for a in plan.axes) / sum(a.before for a in plan.axes),
        "memory": (plan.after.weight_bytes + plan.after.peak_activation_bytes)
        / (plan.before.weight_bytes + plan.before.peak_activation_bytes),
    }[name]
    assert share * 0.98 <= found <= share
    assert plan.settings["reached"][name] == pytest.approx(found)
    assert plan.after == structprune.cost(exact(model, IMAGE, plan).float(), IMAGE)


def test_several_targets_and_absolute_amounts() -> None:
    model = Residual(width=96, inner=80)
    before = structprune.cost(model, IMAGE)
    plan = structprune.plan(model, IMAGE, target={"macs": before.macs // 3, "params": 0.5})
    assert plan.after.macs <= before.macs // 3
    assert plan.after.params <= before.params / 2


def test_layers_alike_stay_alike_where_the_target_allows() -> None:
    model = Residual(width=96, inner=96)
    halved = structprune.plan(model, IMAGE, ratio=0.5).after.params
    found = widths(structprune.prune(model, IMAGE, target={"params": halved * 1.005}))
    assert found["layer1.0.weight"] == found["layer2.0.weight"] == found["layer2.2.weight"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": {"flops": 0.5}}, "target names 'flops'; known are channels, params, macs, memory"),
        ({"target": {"macs": -1}}, r"target\['macs'\] is -1"),
        ({"target": {}}, "target is empty"),
        ({"target": {"macs": 0.5}, "ratio": 0.5}, "Both ratio and target"),
        ({"target": {"macs": 0.01}, "max_ratio": 0.5}, "cannot be met: .* there remain macs"),
    ],
)
def test_a_target_that_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        structprune.plan(Residual(), IMAGE, **options)


def test_a_target_that_cannot_be_met_says_what_may_not_go_and_why() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 2))
    with pytest.raises(PlanError, match=r"Nothing may go: 0\.weight, dim 0 \(0 is ignored\)"):
        structprune.plan(model, torch.randn(2, 8), target={"macs": 0.5}, ignore=["0"])
    with pytest.raises(PlanError, match=r"Left whole are head.weight, dim 0 \(.*output.*\); hidden, as axes= asks"):
        structprune.plan(Residual(), IMAGE, target={"macs": 0.01}, axes=["channels"])
