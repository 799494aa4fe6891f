"""How much is removed: ratios by name, rounding, scopes."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from support.networks import IDS, IMAGE, Residual, Transformer, exact, widths
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import structprune
from structprune.coupling.groups import Group
from structprune.errors import PinnedError, PlanError, UnknownLayerError
from structprune.importance import PerLayer
from structprune.planning.scopes import savings

# -- ratios by name ---------------------------------------------------------------------------------------------------


def test_a_mapping_by_name_block_and_pattern() -> None:
    model = Residual()
    slim = structprune.prune(
        model, IMAGE, ratio={"layer1.0": 0.25, "layer1": 0.5, "*.2": 0.75, "layer2.0": 0.5}, round_to=1
    )
    found = widths(slim)
    assert found["layer1.0.weight"] == 30  # the longer name
    assert found["layer1.2.weight"] == 20  # the block, before the pattern
    assert found["layer2.0.weight"] == 20
    assert found["layer2.2.weight"] == 10  # the pattern
    assert found["stem.weight"] == found["layer1.4.weight"] == 48  # the stem has no ratio


def test_a_group_takes_the_smallest_ratio_of_its_layers() -> None:
    slim = structprune.prune(Residual(), IMAGE, ratio={"*": 0.5, "layer2": 0.25}, round_to=1)
    assert widths(slim)["stem.weight"] == 36
    assert widths(slim)["layer1.0.weight"] == 20
    assert widths(slim)["layer2.0.weight"] == 30


def test_modules_are_keys_too() -> None:
    model = Residual()
    plan = structprune.plan(model, IMAGE, ratio={model.layer1: 0.5}, round_to=1)
    assert plan.settings["ratio"] == {"layer1": 0.5}
    assert {layer.layer for layer in plan.layers} == {"layer1.0", "layer1.2"}


def test_a_named_layer_that_cannot_lose_its_share_is_refused() -> None:
    with pytest.raises(PlanError, match=r"'stem', whose channels go together with those of layer1.4, layer2.4"):
        structprune.plan(Residual(), IMAGE, ratio={"stem": 0.5})
    with pytest.raises(PinnedError, match=r"ratio names 'head', but the channels of head may not be .*output"):
        structprune.plan(Residual(), IMAGE, ratio={"head": 0.5})
    structprune.plan(Residual(), IMAGE, ratio={"*": 0.5, "head": 0.0})  # asking for nothing is fine


class Wrapped(nn.Module):
    """A layer of any kind behind a linear layer, or a table at the start, before two linear layers."""

    def __init__(self, layer: nn.Module, table: bool = False) -> None:
        super().__init__()
        self.table = table
        self.first, self.a = nn.Linear(16, 16), layer
        self.b, self.c = nn.Linear(16, 8), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.table:
            return self.c(self.b(self.a(x)).relu())
        x = self.first(x)
        y = self.a(x, x, x) if isinstance(self.a, nn.MultiheadAttention) else self.a(x)
        return self.c(self.b(y[0] if isinstance(y, tuple) else y).relu())


NAMED: dict[str, Callable[[], nn.Module]] = {
    "rnn": lambda: nn.RNN(16, 16),
    "gru": lambda: nn.GRU(16, 16, num_layers=2),
    "lstm": lambda: nn.LSTM(16, 16),
    "attention": lambda: nn.MultiheadAttention(16, 4),
    "bag": lambda: nn.EmbeddingBag(9, 16),
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(16, 16, bias=False)),
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Linear(16, 16)),
}


@pytest.mark.parametrize("kind", NAMED)
def test_any_kind_of_layer_can_be_named(kind: str) -> None:
    """Half of what the layer makes goes; and a zero for the layer behind it does not keep that."""
    model = Wrapped(NAMED[kind](), table=kind == "bag").eval()
    x = torch.randint(9, (3, 4)) if kind == "bag" else torch.randn(2, 4, 16)
    named = {"a": 0.5} if kind != "attention" else {"a": 0.5, "first": 0.5}  # its heads read as wide an input
    for ratio in (named, {"*": 0.5, "b": 0.0}):
        slim = structprune.prune(model, x, ratio=ratio, round_to=1)
        assert slim.b.in_features == 8
        assert slim.b.out_features == 8


def test_a_pattern_or_block_where_nothing_can_follow_is_refused() -> None:
    for key in ("layer?.4", "stem*"):
        with pytest.raises(PlanError, match=r"go together with those of .*, for which it asks for none"):
            structprune.plan(Residual(), IMAGE, ratio={key: 0.5})
    with pytest.raises(PinnedError, match=r"'h\*d', but the channels of head may not be removed: .* output"):
        structprune.plan(Residual(), IMAGE, ratio={"h*d": 0.5})
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3))
    with pytest.raises(PinnedError, match=r"'1', which makes no channels of its own .* those of 0\. Name these"):
        structprune.plan(net, torch.randn(1, 3, 9, 9), ratio={"1": 0.5})


class Attention(nn.Module):
    """Two blocks of attention and a gated layer, each beside a residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 12), nn.Linear(12, 3)
        names = {"qkv": nn.Linear(12, 48), "proj": nn.Linear(16, 12)}
        gated = {"gate": nn.Linear(12, 24), "up": nn.Linear(12, 24), "down": nn.Linear(24, 12)}
        self.b = nn.ModuleList(
            nn.ModuleDict({"attn": nn.ModuleDict(copy.deepcopy(names)), "mlp": nn.ModuleDict(copy.deepcopy(gated))})
            for _ in range(2)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for block in self.b:
            attn, mlp = block["attn"], block["mlp"]
            q, k, v = attn["qkv"](x).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4).unbind(0)
            x = x + attn["proj"]((q @ k.mT / 2).softmax(-1).matmul(v).transpose(1, 2).flatten(2))
            x = x + mlp["down"](mlp["gate"](x).sigmoid() * mlp["up"](x))
        return self.last(x)


@pytest.mark.parametrize(
    ("key", "layers"),
    [
        ("b.*.qkv", {"b.#.attn.qkv"}),
        ("b.*.attn", {"b.#.attn.qkv"}),
        ("b.*.mlp", {"b.#.mlp.gate", "b.#.mlp.up"}),
        ("b.[01].mlp.*", {"b.#.mlp.gate", "b.#.mlp.up"}),
        ("b.*", {"b.#.attn.qkv", "b.#.mlp.gate", "b.#.mlp.up"}),
    ],
)
def test_a_pattern_acts_on_all_layers_and_blocks_that_it_matches(key: str, layers: set[str]) -> None:
    model, x = Attention().eval(), torch.randn(2, 6, 5)
    plan = structprune.plan(model, x, ratio={key: 0.5})
    assert {layer.layer for layer in plan.layers} == {name.replace("#", n) for name in layers for n in "01"}
    assert all(layer.after == layer.before // 2 for layer in plan.layers)
    exact(model, x, plan)


@pytest.mark.parametrize(
    ("key", "others"),
    [("b.*.gate", "b.0.mlp.up"), ("b.*.up", "b.0.mlp.gate"), ("b.*.proj", "b.0.mlp.down, b.1.mlp.down, first")],
)
def test_a_pattern_of_one_of_several_coupled_layers_names_the_others(key: str, others: str) -> None:
    message = rf"'{re.escape(key)}', whose channels go together with those of {others}, for which it asks for none"
    with pytest.raises(PlanError, match=message):
        structprune.plan(Attention().eval(), torch.randn(2, 6, 5), ratio={key: 0.5})


@pytest.mark.parametrize(("key", "message"), [("layer9", "no layer 'layer9'"), ("layer9.*", "'layer9.\\*' in ratio")])
def test_a_key_that_matches_nothing_is_refused(key: str, message: str) -> None:
    with pytest.raises(UnknownLayerError, match=message):
        structprune.plan(Residual(), IMAGE, ratio={key: 0.5})


@pytest.mark.parametrize("ratio", [1.0, -0.1, {"stem": 1.5}, float("nan"), "half"])
def test_a_ratio_out_of_range_is_refused(ratio: Any) -> None:
    with pytest.raises(PlanError, match="share of channels to remove"):
        structprune.plan(Residual(), IMAGE, ratio=ratio)


# -- rounding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("round_to", [1, 3, 4, 8, 16])
@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.9])
def test_changed_widths_are_multiples(round_to: int, ratio: float) -> None:
    model = Residual()
    plan = structprune.plan(model, IMAGE, ratio=ratio, round_to=round_to)
    before, after = widths(model), widths(exact(model, IMAGE, plan))
    changed = {name for name in before if before[name] != after[name]}
    assert changed
    for name in changed:
        assert after[name] % round_to == 0
        wanted = before[name] * (1 - ratio)
        others = range(round_to, before[name] + 1, round_to)
        assert abs(after[name] - wanted) == min(abs(k - wanted) for k in others)


def test_a_grouped_convolution_is_rounded_as_a_whole() -> None:
    model = Residual(inner=48, groups=4)  # groups of 12: two channels of each make eight
    plan = structprune.plan(model, IMAGE, ratio=0.3, round_to=8)
    slim = exact(model, IMAGE, plan)
    assert widths(slim)["layer1.0.weight"] == 32  # 4 x 8; 4 x 8.4 was wanted


def test_heads_are_feasible_whatever_their_number_and_head_sizes_are_multiples() -> None:
    heads = exact(Transformer(), IDS, structprune.plan(Transformer(), IDS, ratio=0.5, axes="heads", round_to=8))
    assert heads.q.out_features == 4 * 16
    assert heads.k.out_features == 2 * 16
    sizes = exact(Transformer(), IDS, structprune.plan(Transformer(), IDS, ratio=0.3, axes="head_size", round_to=8))
    assert sizes.q.out_features == 8 * 8  # 11.2 of 16 was wanted: 8 is nearer than 16
    whole = structprune.plan(Transformer(), IDS, ratio=0.3, axes="head_size", round_to=32)
    assert not whole.slices  # no multiple of 32 below 16, so it stays


def test_flattened_channels_are_rounded_before_they_are_flattened() -> None:
    model = nn.Sequential(nn.Conv2d(3, 40, 5), nn.Flatten(), nn.Linear(40 * 64, 4))
    slim = structprune.prune(model, IMAGE, ratio=0.3, round_to=16)
    assert slim[0].out_channels == 32


def test_auto_leaves_a_choice_where_each_channel_takes_an_odd_number_of_rows_along() -> None:
    """16 maps of 7 x 7 made by a linear layer: 784 is a multiple of 16, but 49 rows a map would need all 16 at once."""
    model = nn.Sequential(nn.Linear(8, 16 * 49), nn.Unflatten(1, (16, 7, 7)), nn.ConvTranspose2d(16, 1, 4))
    for options in ({"ratio": 0.5}, {"ratio": {"0": 0.5}}, {"target": {"macs": 0.5}}):
        slim = structprune.prune(model, torch.randn(2, 8), **options)
        assert (slim[0].out_features, slim[2].in_channels) == (8 * 49, 8)


def test_auto_takes_less_for_narrow_layers() -> None:
    model = nn.Sequential(nn.Linear(8, 512), nn.Linear(512, 40), nn.Linear(40, 6), nn.Linear(6, 2))
    slim = structprune.prune(model, torch.randn(1, 8), ratio=0.37)
    assert [layer.out_features for layer in slim] == [320, 24, 4, 2]  # 322.6, 25.2 and 3.8 were wanted


def test_min_channels_and_max_ratio_hold() -> None:
    found = widths(structprune.prune(Residual(), IMAGE, ratio=0.9, min_channels=10, round_to=1))
    assert found["stem.weight"] == 10
    found = widths(structprune.prune(Residual(), IMAGE, ratio=0.9, max_ratio=0.25, round_to=8))
    assert found["stem.weight"] == 40  # 36 is the least, and 40 the least multiple
    assert found["layer1.0.weight"] == 32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"round_to": 0}, "round_to is 0"),
        ({"round_to": "some"}, "round_to is 'some'"),
        ({"min_channels": 0}, "min_channels is 0"),
        ({"max_ratio": 1.5}, "max_ratio is 1.5"),
        ({"scope": "world"}, "scope is 'world'"),
        ({"axes": ["width"]}, "axes names width; known are hidden"),
        ({"outputs": ["loss"]}, "no output 'loss'. It returns 'logits', 'hidden.last'"),
    ],
)
def test_wrong_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        structprune.plan(Transformer(), IDS, **options)


# -- scopes -----------------------------------------------------------------------------------------------------------


def quiet(model: Residual) -> Residual:
    """Half of the channels inside the first block hardly matter."""
    with torch.no_grad():
        for i, scale in ((0, 0.01), (2, 0.01)):
            model.layer1[i].weight[:20] *= scale
            model.layer1[i].bias[:20] *= scale
        model.layer1[2].weight[:, :20] *= 0.01
        model.layer1[4].weight[:, :20] *= 0.01
    return model


@pytest.mark.parametrize("scope", ["global", "isomorphic"])
def test_wide_scopes_take_channels_where_they_matter_least(scope: str) -> None:
    torch.manual_seed(0)
    model = quiet(Residual())
    plan = structprune.plan(model, IMAGE, ratio=0.25, scope=scope, round_to=1)
    found = widths(exact(model, IMAGE, plan))
    if scope == "isomorphic":
        assert found["stem.weight"] == 36  # nothing else is built like it
    assert found["layer1.0.weight"] < 30 < found["layer2.0.weight"]
    total = sum(axis.before for axis in plan.axes)
    assert sum(axis.after for axis in plan.axes) == pytest.approx(0.75 * total, abs=1)


def test_global_scope_leaves_something_everywhere() -> None:
    torch.manual_seed(0)
    model = quiet(Residual())
    found = widths(structprune.prune(model, IMAGE, ratio=0.6, scope="global", min_channels=8, max_ratio=0.7))
    assert min(width for name, width in found.items() if name != "head.weight") >= 12


def chain(first: int = 8, second: int = 6) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, first), nn.ReLU(), nn.Linear(first, second), nn.ReLU(), nn.Linear(second, 20))


# By hand, for a channel of each hidden layer: multiply-accumulates, weights with their biases, and one.
SAVED = {"macs": (4 + 6, 8 + 20), "params": (4 + 1 + 6, 8 + 1 + 20), "channels": (1, 1)}
WHOLE = {"macs": 4 * 8 + 8 * 6 + 6 * 20, "params": 40 + 54 + 140, "channels": 14}


class Given:
    """Scores by the name of the group."""

    scores: ClassVar = {"0": torch.arange(8.0).add(1), "2": torch.arange(6.0).mul(3.3).add(2)}

    def __call__(self, group: Group, tensors: Any) -> Tensor:
        return self.scores[group.name]


def gone(plan: structprune.Plan) -> set[tuple[str, int]]:
    """The channels of the hidden layers that go."""
    found = ((tensor.split(".")[0], i) for tensor, dims in plan.removed.items() for i in dims.get(0, ()))
    return set(found)


@pytest.mark.parametrize("kind", SAVED)
def test_per_cost_takes_what_loses_least_for_what_it_saves(kind: str) -> None:
    model, x = chain(), torch.randn(1, 4)
    shares = savings(structprune.DependencyGraph(model, x), [kind], dict(model.named_parameters()))
    by_hand = dict(zip(("0", "2"), SAVED[kind], strict=True))
    assert {group.name: share * WHOLE[kind] for group, share in shares.items()} == pytest.approx(by_hand)
    order = sorted(
        (float(s) / by_hand[name], name, i) for name, all_ in Given.scores.items() for i, s in enumerate(all_)
    )
    first = {(name, i) for _, name, i in order[:7]}
    assert {name for name, _ in first} == {"0", "2"}
    left = {name: len(all_) - sum(name == other for other, _ in first) for name, all_ in Given.scores.items()}
    cost = structprune.cost(chain(left["0"], left["2"]), x)
    target = {"macs": cost.macs, "params": cost.params, "channels": 7}[kind]
    plan = structprune.plan(model, x, importance=Given(), scope="per_cost", target={kind: target}, round_to=1)
    assert gone(plan) == first
    with pytest.raises(PlanError, match="give a target, not a ratio"):
        structprune.plan(model, x, scope="per_cost")


def test_the_global_scope_takes_normalised_scores_as_they_are() -> None:
    """Divided by their mean, which is zero, scores of mean zero would be noise."""
    model, x = chain(), torch.randn(1, 4)
    importance = PerLayer(Given(), "standard")
    order = sorted(
        (float(score), name, i)
        for name, scores in Given.scores.items()
        for i, score in enumerate((scores - scores.mean()) / scores.std(correction=0))
    )
    plan = structprune.plan(model, x, importance=importance, scope="global", target={"channels": 9 / 14}, round_to=1)
    assert gone(plan) == {(name, i) for _, name, i in order[:5]}


def test_sets_of_layers_compete_among_themselves() -> None:
    torch.manual_seed(0)
    model = quiet(Residual())
    plan = structprune.plan(model, IMAGE, ratio=0.25, scope=[["stem"], ["layer1.*", "layer2"]], round_to=1)
    found = widths(exact(model, IMAGE, plan))
    assert found["stem.weight"] == 36
    assert found["layer1.0.weight"] < 30 < found["layer2.0.weight"]
