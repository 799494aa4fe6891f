"""The slices that one channel takes along, worked out by hand."""

from __future__ import annotations

import copy

import pytest
from support import oracle
from support.cases import CASES, all_cases

import structprune

all_cases()
BN = ("weight", "bias", "running_mean", "running_var")
Slices = dict[str, dict[int, tuple[int, ...]]]


def at(gone: tuple[int, ...], **dims: int | tuple[int, ...]) -> Slices:
    """`gone` along the given dimension(s) of each tensor; ``__`` stands for a dot."""
    return {
        name.replace("__", "."): dict.fromkeys((dim,) if isinstance(dim, int) else dim, gone)
        for name, dim in dims.items()
    }


def bn(name: str, gone: tuple[int, ...]) -> Slices:
    return {f"{name}.{part}": {0: gone} for part in BN}


def merged(*parts: Slices) -> Slices:
    result: Slices = {}
    for part in parts:
        for name, dims in part.items():
            result.setdefault(name, {}).update(dims)
    return result


IN_BOTH_HEADS = (1, 3, 9, 11)
IN_ALL_THREE = tuple(index + 16 * part for part in range(3) for index in IN_BOTH_HEADS)
LSTM_GATES = tuple(unit + 16 * gate for gate in range(4) for unit in (2, 5))

EXPECTED: list[tuple[str, str, tuple[int, ...], Slices]] = [
    (
        "ConvBnRelu",
        "conv1",
        (1, 3),
        merged(at((1, 3), conv1__weight=0, conv1__bias=0, conv2__weight=1), bn("bn", (1, 3))),
    ),
    (
        "Residual",
        "stem",
        (1, 6),
        merged(
            at((1, 6), stem__weight=0, stem__bias=0, a__weight=1, b__weight=0, b__bias=0, head__weight=1),
            bn("norm", (1, 6)),
        ),
    ),
    ("Residual", "a", (0, 11), at((0, 11), a__weight=0, a__bias=0, b__weight=1)),
    (
        "DenseBlock",
        "l0",
        (2, 5),
        merged(at((2, 5), l0__weight=0, l0__bias=0, l1__weight=1, l2__weight=1, head__weight=1), bn("n2", (2, 5))),
    ),
    (
        "DenseBlock",
        "l1",
        (1, 4),
        merged(at((1, 4), l1__weight=0, l1__bias=0), at((9, 12), l2__weight=1, head__weight=1), bn("n2", (9, 12))),
    ),
    ("DenseBlock", "l2", (7,), merged(at((7,), l2__weight=0, l2__bias=0), at((21,), head__weight=1))),
    (
        "Inception",
        "b3",
        (0, 7),
        merged(at((0, 7), b3__weight=0, b3__bias=0), bn("norm", (6, 13)), at((6, 13), head__weight=1)),
    ),
    (
        "InvertedResidual",
        "expand",
        (0, 23),
        merged(
            at((0, 23), expand__weight=0, expand__bias=0, depth__weight=0, depth__bias=0, project__weight=1),
            bn("norm", (0, 23)),
        ),
    ),
    (
        "DepthMultiplier",
        "conv1",
        (2,),
        merged(
            at((2,), conv1__weight=0, conv1__bias=0), at((6, 7, 8), depth__weight=0, depth__bias=0, conv2__weight=1)
        ),
    ),
    (
        "GroupedConv",
        "conv1",
        (1, 5, 9, 13),
        merged(at((1, 5, 9, 13), conv1__weight=0, conv1__bias=0), at((1,), grouped__weight=1)),
    ),
    (
        "GroupedConv",
        "grouped",
        (2, 8, 14, 20),
        merged(at((2, 8, 14, 20), grouped__weight=0, grouped__bias=0, conv2__weight=1), bn("norm", (2, 8, 14, 20))),
    ),
    (
        "Transposed",
        "up",
        (1, 3),
        merged(at((1, 3), up__weight=1, up__bias=0, conv2__weight=1), bn("norm", (1, 3))),
    ),
    ("Transposed", "conv1", (4,), at((4,), conv1__weight=0, conv1__bias=0, up__weight=0)),
    (
        "SqueezeExcite",
        "conv1",
        (1, 3),
        at((1, 3), conv1__weight=0, conv1__bias=0, down__weight=1, up__weight=0, up__bias=0, conv2__weight=1),
    ),
    (
        "SharedConv",
        "stem",
        (1, 3),
        merged(
            at((1, 3), stem__weight=0, stem__bias=0, shared__weight=(0, 1), shared__bias=0, head__weight=1),
            *(bn(f"norms.{i}", (1, 3)) for i in range(3)),
        ),
    ),
    (
        "Flatten",
        "conv1",
        (1,),
        merged(at((1,), conv1__weight=0, conv1__bias=0), at(tuple(range(25, 50)), fc__weight=1)),
    ),
    (
        "FlattenChannelsLast",
        "conv1",
        (3,),
        merged(at((3,), conv1__weight=0, conv1__bias=0), at(tuple(range(3, 200, 8)), fc__weight=1)),
    ),
    ("HandGlu", "up", (1,), merged(at((1, 17), up__weight=0), at((1,), down__weight=1))),
    ("GluFunction", "up", (18,), merged(at((2, 18), up__weight=0, up__bias=0), at((2,), down__weight=1))),
    ("PixelShuffle", "up", (4, 5, 6, 7), merged(at((4, 5, 6, 7), up__weight=0, up__bias=0), at((1,), conv2__weight=1))),
    (
        "TiedEmbedding",
        "fc2",
        (0, 9),
        at((0, 9), embed__weight=1, fc1__weight=1, fc2__weight=0, fc2__bias=0),
    ),
    (
        "LayerNormMlp",
        "up",
        (0, 15),
        at((0, 15), up__weight=0, up__bias=0, norm__weight=0, norm__bias=0, down__weight=1),
    ),
    (
        "Lstm",
        "rnn",
        (2, 5),
        merged(
            at(LSTM_GATES, rnn__weight_ih_l0=0, rnn__weight_hh_l0=0, rnn__bias_ih_l0=0, rnn__bias_hh_l0=0),
            at((2, 5), rnn__weight_hh_l0=1, head__weight=1),
        ),
    ),
    ("Lstm", "embed", (0, 11), at((0, 11), embed__weight=0, embed__bias=0, rnn__weight_ih_l0=1)),
    (
        "ClassToken",  # nn.MultiheadAttention holds one width for its input and its heads, so they go together
        "patch",
        (1, 3),
        merged(
            at(
                IN_BOTH_HEADS,
                patch__weight=0,
                patch__bias=0,
                cls=2,
                pos=2,
                norm__weight=0,
                norm__bias=0,
                head__weight=1,
            ),
            at(IN_BOTH_HEADS, mix__in_proj_weight=1, mix__out_proj__weight=(0, 1), mix__out_proj__bias=0),
            at(IN_ALL_THREE, mix__in_proj_weight=0, mix__in_proj_bias=0),
        ),
    ),
    (
        "TimmAttention",
        "embed",
        (1, 3),
        at(
            (1, 3),
            embed__weight=0,
            embed__bias=0,
            norm__weight=0,
            norm__bias=0,
            attn__qkv__weight=1,
            attn__proj__weight=0,
            attn__proj__bias=0,
            head__weight=1,
        ),
    ),
    ("BareWeights", "w2", (0, 5), at((0, 5), w2=1, w3=1)),
    ("BareBuffers", "conv1", (6,), at((6,), conv1__weight=0, conv1__bias=0, mean=0, scale=1, table=0, conv2__weight=1)),
]


@pytest.mark.parametrize(("name", "layer", "gone", "expected"), EXPECTED)
def test_slices_of_a_channel(name: str, layer: str, gone: tuple[int, ...], expected: Slices) -> None:
    case = CASES[name]
    model, inputs = oracle.jitter(case.build(), seed=4), oracle.double(case.inputs())
    slim = copy.deepcopy(model)
    plan = structprune.DependencyGraph(slim, inputs).prune_group(layer, list(gone))
    found = {tensor: {dim: tuple(i) for dim, i in dims.items()} for tensor, dims in plan.removed.items()}
    aliases = {tensor for tensor, _ in model.named_parameters(remove_duplicate=False)}
    aliases -= {tensor for tensor, _ in model.named_parameters()}  # a tied tensor may be listed under each name
    found = {tensor: dims for tensor, dims in found.items() if tensor not in aliases}
    assert found == expected
    oracle.check(model, slim, plan, inputs)


def test_a_module_names_its_layer_as_well_as_its_path() -> None:
    case = CASES["ConvBnRelu"]
    model = case.build()
    graph = structprune.DependencyGraph(model, case.inputs())
    by_module, by_name = graph.group(model.conv1), graph.group("conv1")
    assert str(by_module) == str(by_name)
    plan = graph.prune_group(by_module, [0, 7])
    assert plan.removed["conv1.weight"] == {0: (0, 7)}
    assert (model.conv1.out_channels, model.bn.num_features, model.conv2.in_channels) == (6, 6, 6)


def test_groups_are_all_there_once() -> None:
    case = CASES["InvertedResidual"]
    groups = structprune.DependencyGraph(case.build(), case.inputs()).groups()
    assert sorted(group.channels for group in groups) == [8, 24]


def test_networkx_view_shows_who_feeds_whom() -> None:
    case = CASES["Residual"]
    view = structprune.DependencyGraph(case.build(), case.inputs()).to_networkx()
    assert {("stem", "a"), ("a", "b"), ("b", "norm"), ("norm", "head"), ("stem", "head")} <= set(view.edges)
    assert ("head", "stem") not in view.edges
