"""Schemes: projections, their inverses, what they leave whole, and plain JSON."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from torch import nn

from structprune import cost, masks
from structprune.errors import LoadError, PlanError, UnknownLayerError
from structprune.search import (
    BlockPrune,
    Compose,
    FilterPrune,
    NeuronPrune,
    Prune,
    Quantize,
    Scheme,
    StructurePrune,
)
from structprune.search.projections import values_of


class Residual(nn.Module):
    """A stem, a residual block whose sum couples two convolutions, and two linear layers."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6))
        self.conv1, self.norm = nn.Conv2d(6, 10, 3, padding=1, bias=False), nn.BatchNorm2d(10)
        self.conv2 = nn.Conv2d(10, 6, 3, padding=1)
        self.mlp = nn.Sequential(nn.Linear(24, 12), nn.Sigmoid(), nn.Linear(12, 3))

    def forward(self, x):
        x = self.stem(x).relu()
        x = x + self.conv2(self.norm(self.conv1(x)).relu())
        return self.mlp(nn.functional.adaptive_avg_pool2d(x, 2).flatten(1))


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = Residual()
    with torch.no_grad():
        for part in (model.stem[1], model.norm):
            for tensor in (part.weight, part.bias, part.running_mean):
                tensor.uniform_(0.2, 1)
    return model.eval()


X = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("criterion", ["l2", "l1", "lamp"])
@pytest.mark.parametrize("kind", [FilterPrune, NeuronPrune, StructurePrune])
def test_whole_coupled_channels_are_zero_and_compact_removes_them(model, kind, criterion, bias):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sparse = kind(0.5, criterion=criterion, bias=bias).compressed(model, X)
    slim = masks.compact(sparse, X)
    torch.testing.assert_close(slim(X), sparse(X))
    assert cost(slim, X).params < cost(sparse, X).params
    filters = slim.stem[0].out_channels + slim.conv1.out_channels
    # 16 channels of convolutions (two layers make the six of the sum), 12 neurons. Constants in front of a padded
    # convolution cannot be folded: without the biases, some channels may stay.
    wanted = {"FilterPrune": (8, 12), "NeuronPrune": (16, 6)}.get(kind.__name__)
    if wanted and bias:
        assert (filters, slim.mlp[0].out_features) == wanted
    elif bias:
        assert filters + slim.mlp[0].out_features == 14
    assert slim.conv2.out_channels == slim.stem[0].out_channels == slim.conv1.in_channels
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_a_channel_that_is_off_has_no_entry_left(model):
    sparse = FilterPrune(0.5).compressed(model, X)
    off = (sparse.conv1.weight.flatten(1) == 0).all(1)
    assert 0 < off.sum() < 10
    for tensor in (sparse.norm.weight, sparse.norm.bias, sparse.conv2.weight.transpose(0, 1)):
        assert (tensor[off] == 0).all()
        assert (tensor[~off] != 0).any()


def test_without_biases_only_filters_are_zero(model):
    sparse = FilterPrune(0.5, bias=False, layers="conv1").compressed(model, X)
    assert int((sparse.conv1.weight.flatten(1) == 0).all(1).sum()) == 5
    assert torch.equal(sparse.norm.bias, model.norm.bias)
    assert torch.equal(sparse.conv2.weight, model.conv2.weight)


class Parallel(nn.Module):
    """Two hidden layers side by side, which share no weight."""

    def __init__(self):
        super().__init__()
        self.a, self.b = (nn.Sequential(nn.Linear(2, n), nn.ReLU(), nn.Linear(n, 2)) for n in (3, 4))

    def forward(self, x):
        return self.a(x) + self.b(x)


def test_the_filters_that_go_are_the_nearest_of_all_choices():
    """Of two layers of 3 and 4 channels, 3 go: every choice that leaves each layer a channel is tried."""
    torch.manual_seed(3)
    model = Parallel()
    with torch.no_grad():
        sizes = torch.cat([part[0].weight.square().sum(1) for part in (model.a, model.b)])
        choices = [off for off in itertools.combinations(range(7), 3) if off != (0, 1, 2)]
        nearest = min(float(sizes[list(off)].sum()) for off in choices)
        sparse = NeuronPrune(4 / 7, relative=False, bias=False).compressed(model, torch.randn(1, 2))
        pairs = zip(model.parameters(), sparse.parameters(), strict=True)
        assert sum(float((a - b).square().sum()) for a, b in pairs) == pytest.approx(nearest)


@pytest.mark.parametrize(
    "scheme",
    [
        Prune(0.1),
        FilterPrune(0.4, align=2),
        StructurePrune(0.3),
        BlockPrune(0.25, block_size=(3, 4)),
        Quantize("bfloat16"),
        Compose([FilterPrune(0.5), Prune(0.2), Quantize()]),
    ],
    ids=lambda scheme: type(scheme).__name__,
)
def test_what_is_projected_stays(model, scheme):
    projection = scheme.on(model, X)
    values = values_of(model)
    once = projection.compressed(values)
    again = projection.compressed({**values, **once})
    assert once.keys() == again.keys() == {*projection.names}
    for name, value in once.items():
        assert torch.equal(value, again[name])
        assert value.dtype == values[name].dtype
    for name, kept in projection.support(values).items():
        assert (once[name][~kept] == 0).all()
    assert any(not torch.equal(once[name], values[name]) for name in once)


def test_one_threshold_over_all_weights(model):
    sparse = Prune(0.1).compressed(model)
    names = ["stem.0.weight", "conv1.weight", "conv2.weight", "mlp.0.weight", "mlp.2.weight"]
    dense = torch.cat([model.get_parameter(name).flatten() for name in names])
    kept = torch.cat([sparse.get_parameter(name).flatten() for name in names]) != 0
    assert int(kept.sum()) == round(0.1 * len(dense))
    assert dense[kept].abs().min() > dense[~kept].abs().max()


def test_layers_are_named_by_pattern_and_opted_out(model):
    sparse = Prune(0.1, layers=("conv*", "mlp"), ignore="mlp.2").compressed(model)
    assert torch.equal(sparse.stem[0].weight, model.stem[0].weight)
    assert torch.equal(sparse.mlp[2].weight, model.mlp[2].weight)
    assert all((layer.weight == 0).any() for layer in (sparse.conv1, sparse.conv2, sparse.mlp[0]))
    # The stem and the second convolution make the same channels: they go only if both are named.
    names = FilterPrune(0.5, layers=("conv*",)).on(model, X).names
    assert "conv1.weight" in names
    assert "stem.0.weight" not in names


def test_aligned_widths(model):
    slim = masks.compact(FilterPrune(0.5, align=4).compressed(model, X), X)
    assert slim.conv1.out_channels % 4 == 0
    assert slim.stem[0].out_channels in (4, 6)


def test_channels_that_a_norm_runs_over_stay():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.enter, self.norm = nn.Linear(4, 8), nn.LayerNorm(8)
            self.up, self.down, self.leave = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 2)

        def forward(self, x):
            x = self.enter(x)
            return self.leave(x + self.down(self.up(self.norm(x)).relu()))

    torch.manual_seed(0)
    model, x = Block(), torch.randn(3, 4)
    projection = NeuronPrune(0.5).on(model, x)
    assert projection.left == {"enter": "a norm or a mean runs over its channels"}
    sparse = NeuronPrune(0.5).compressed(model, x)
    slim = masks.compact(sparse, x)
    assert (slim.enter.out_features, slim.up.out_features) == (8, 8)
    torch.testing.assert_close(slim(x), sparse(x))
    with pytest.raises(PlanError, match=r"no neurons that may go\. enter: a norm or a mean runs over"):
        NeuronPrune(0.5, ignore="up").on(model, x)


@pytest.mark.parametrize("criterion", ["l1", "l2", "linf"])
def test_blocks_against_a_literal_choice(criterion):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4))
    sparse = BlockPrune(0.3, block_size=(2, 3), ignore="0", criterion=criterion).compressed(model)
    assert torch.equal(sparse[0].weight, model[0].weight)
    blocks = {(i, j): model[1].weight[i : i + 2, j : j + 3] for i in (0, 2) for j in (0, 3)}
    order = {"l1": 1, "l2": 2, "linf": float("inf")}[criterion]
    best = max(blocks, key=lambda at: float(torch.linalg.vector_norm(blocks[at].detach(), order)))
    assert (sparse[1].weight != 0).nonzero().tolist() == [
        [best[0] + i, best[1] + j] for i in range(2) for j in range(3)
    ]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_layers_in_half_precision_and_back(model, dtype):
    half = Quantize(dtype, ignore=("mlp",)).compressed(model)
    kind = getattr(torch, dtype)
    assert half.conv1.weight.dtype == half.stem[0].bias.dtype == kind
    assert half.norm.weight.dtype == half.mlp[0].weight.dtype == half(X).dtype == torch.float32
    torch.testing.assert_close(half(X), model(X), atol=0.05, rtol=0.05)
    x = torch.randn(2, 6, 4, 4)
    wanted = nn.functional.conv2d(x.to(kind), model.conv1.weight.to(kind), padding=1).float()
    assert torch.equal(half.conv1(x), wanted)
    assert cost(half, X).weight_bytes < cost(model, X).weight_bytes
    dense = Quantize(dtype).restored(half)
    assert {tensor.dtype for tensor in dense.parameters()} == {torch.float32}
    assert torch.equal(dense.conv1.weight, model.conv1.weight.to(kind).float())
    assert not dense.conv1._forward_hooks
    assert not dense.conv1._forward_pre_hooks
    assert half.conv1.weight.dtype == kind


def test_what_a_narrow_type_cannot_say_becomes_its_largest():
    model = nn.Linear(1, 1)
    nn.init.constant_(model.weight, 1e6)
    assert Quantize("float16").on(model).compressed(values_of(model))["weight"].item() == 65504


def test_tied_weights_are_projected_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    projection = Prune(0.5).on(model)
    assert projection.names == ("0.weight",)
    sparse = Prune(0.5).compressed(model)
    assert sparse[2].weight is sparse[0].weight
    assert int((sparse[0].weight != 0).sum()) == 8


SCHEMES = [
    Prune(0.05, layers="a.*", ignore=["b", "c"]),
    FilterPrune(0.5, align=8, criterion="l1", bias=False),
    NeuronPrune(),
    BlockPrune(0.5, block_size=[4, 1]),
    Quantize(torch.bfloat16),
    Compose([StructurePrune(0.4), Compose([Quantize(), Prune(0.1)])]),
]


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: type(scheme).__name__)
def test_plain_json_and_back(scheme):
    held = json.loads(scheme.to_json())
    assert Scheme.from_json(scheme.to_json()) == Scheme.from_json(held) == scheme
    assert held["scheme"] == type(scheme).__name__


@pytest.mark.parametrize(
    ("text", "error", "said"),
    [
        ("{", LoadError, "no JSON"),
        ("[1]", LoadError, "A scheme is"),
        ('{"scheme": "Magic"}', LoadError, "one of Prune"),
        ('{"scheme": "Prune", "sparsity": 1}', LoadError, "no setting 'sparsity'"),
        ('{"scheme": "Prune", "density": 2}', PlanError, "density is 2"),
        ('{"scheme": "Compose", "schemes": {}}', LoadError, "a list of schemes"),
        ('{"scheme": "Compose", "schemes": [3]}', LoadError, "A scheme is 3"),
    ],
)
def test_json_that_is_no_scheme(text, error, said):
    with pytest.raises(error, match=said):
        Scheme.from_json(text)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda m: Prune(0), "density is 0"),
        (lambda m: Prune(float("nan")), "density is nan"),
        (lambda m: Prune(True), "density is True"),
        (lambda m: Prune(0.5, layers=3), "layers is 3"),
        (lambda m: Prune(0.5, ignore=("",)), "ignore is"),
        (lambda m: FilterPrune(0.5, align=0), "align is 0"),
        (lambda m: FilterPrune(0.5, bias=1), "bias is 1"),
        (lambda m: FilterPrune(0.5, relative=None), "relative is None"),
        (lambda m: FilterPrune(0.5, criterion="best"), "criterion"),
        (lambda m: BlockPrune(0.5, block_size=(0, 2)), "block_size"),
        (lambda m: BlockPrune(0.5, criterion="l7"), "criterion is 'l7'"),
        (lambda m: Quantize("int3"), "dtype is 'int3'"),
        (lambda m: Compose([]), "schemes is"),
        (lambda m: Compose(Prune(0.5)), "schemes is a Prune"),
        (lambda m: Prune().on(m), "Prune has no density"),
        (lambda m: FilterPrune(0.5).on(m), "example_inputs"),
        (lambda m: FilterPrune(0.5, criterion="taylor").on(m, X), "pass data="),
        (lambda m: BlockPrune(0.5, block_size=(5, 5)).on(m), "no whole number of blocks"),
        (lambda m: BlockPrune(0.5, block_size=(1, 1, 1)).on(m), "no layer has a weight of 3 dimensions"),
        (lambda m: Prune(0.5, ignore="*").on(m), "no linear layer and no convolution"),
        (lambda m: Prune(0.5).compressed("net"), "model is 'net'"),
        (lambda m: FilterPrune(0.5, criterion=lambda g, t: torch.ones(g.channels)).to_json(), "criterion is an object"),
    ],
)
def test_bad_settings_are_named(model, make, said):
    with pytest.raises(PlanError, match=said):
        make(model)


@pytest.mark.parametrize("argument", ["layers", "ignore"])
@pytest.mark.parametrize("kind", [Prune, FilterPrune, Quantize])
def test_a_name_that_matches_nothing(model, kind, argument):
    with pytest.raises(UnknownLayerError, match=f"{argument} names 'stage9'"):
        kind(**{argument: "stage9"}, **({} if kind is Quantize else {"density": 0.5})).on(model, X)


def test_a_masked_model_is_compressed_with_its_zeros(model):
    masks.Saliency.magnitude(model, ["conv1.weight"]).mask(0.99).attach(model)
    sparse = Prune(0.9).compressed(model)
    assert not [name for name, _ in sparse.named_buffers() if name.endswith("_mask")]
    assert int((sparse.conv1.weight != 0).sum()) <= 6
    assert hasattr(model.conv1, "weight_orig")
