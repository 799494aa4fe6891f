"""What every criterion must do, whatever it measures."""

from __future__ import annotations

import copy

import pytest
import torch
from support.importance_nets import NETS, build, cross_entropy, graph_of, group_of, images, pairs, scores_of
from support.snapshot import assert_untouched, snapshot
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from structprune.coupling.graph import ChannelGraph
from structprune.coupling.groups import Group
from structprune.errors import PlanError
from structprune.importance.base import CRITERIA, fitted
from structprune.importance.compose import CostPenalty, PerLayer, Product, Sum
from structprune.importance.data import Batches
from structprune.planning.build import tensors_of

COMPOSED = {
    "sum": lambda: Sum([PerLayer("taylor", "l2"), PerLayer("l1", "mean")], [1.0, 0.5]),
    "product": lambda: Product(["activation_l2", "l2"], [1.0, 2.0]),
    "rank": lambda: PerLayer("wanda", "rank"),
    "penalty": lambda: CostPenalty(PerLayer("l2", "max"), 0.1),
}
ALL = {**CRITERIA, **COMPOSED}
WITHOUT_DATA = {
    "l1", "l2", "linf", "random", "lamp", "bn_scale", "fpgm", "geometric_median", "cosine", "penalty", "folding",
}  # fmt: skip
WITHOUT_LOSS = WITHOUT_DATA | {
    "activation_mean", "activation_l2", "apoz", "hrank", "wanda", "wanda_square", "flap", "tvs", "obs", "product",
    "rank", "thinet", "folding_activations",
}  # fmt: skip
# Random signs meet other weights when channels change places; test_importance_curvature.py shows what they converge to.
BY_CHANCE = {"random", "obd_hutchinson", "obd_gates"}
# A distance to other channels, a rank, and a score with a price on it are not zero for a channel that is.
NOT_ZERO = {"random", "fpgm", "geometric_median", "rank", "penalty"}


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("name", ALL)
def test_one_score_a_channel(name: str, net: str) -> None:
    graph = graph_of(build(net))
    scores = scores_of(graph, ALL[name]())
    sizes = {f"{number} {group.name}": group.channels for number, group in enumerate(graph.groups())}
    assert scores or (name, net) == ("bn_scale", "attention")
    assert all(tuple(found.shape) == (sizes[key],) for key, found in scores.items())
    whole = not name.startswith(("bn_scale", "obs", "kfac", "wanda", "flap", "rank", "thinet"))
    assert not whole or scores.keys() == sizes.keys()


def rearranged(net: nn.Module, group: Group, order: torch.Tensor) -> nn.Module:
    """A copy in which channel i of the group is what channel ``order[i]`` was."""
    result = copy.deepcopy(net)
    tensors = {**dict(result.named_parameters()), **dict(result.named_buffers())}
    for member in group.members:
        tensor = tensors[member.tensor].data
        source = torch.arange(tensor.shape[member.dim])
        channels, positions = torch.from_numpy(member.channels), torch.from_numpy(member.positions)
        for channel in range(group.channels):
            source[positions[channels == channel]] = positions[channels == order[channel]]
        tensor.copy_(tensor.index_select(member.dim, source))
    return result


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("name", sorted(ALL.keys() - BY_CHANCE))
def test_the_order_of_channels_does_not_matter(name: str, net: str) -> None:
    model = build(net)
    graph = graph_of(model)
    before = scores_of(graph, ALL[name]())
    for number, group in enumerate(graph.groups()):
        key = f"{number} {group.name}"
        order = torch.randperm(group.channels, generator=torch.Generator().manual_seed(number))
        after = scores_of(graph_of(rearranged(model, group, order)), ALL[name]())
        assert after.keys() == before.keys()
        for other, scores in before.items():
            expected = scores[order] if other == key else scores
            torch.testing.assert_close(after[other], expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", sorted(ALL.keys() - NOT_ZERO))
def test_a_channel_that_is_all_zero_scores_zero(name: str) -> None:
    model = build("chain")
    group = group_of(graph_of(model), "first")
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for member in group.members:
        positions = torch.from_numpy(member.positions[member.channels == 1])
        tensors[member.tensor].data.index_fill_(member.dim, positions, 0)
    scores = scores_of(graph_of(model), ALL[name]())["0 first"]
    assert scores[1] == 0
    assert (scores[[0, 2, 3]] != 0).any()


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("name", ALL)
def test_float32_and_float64_agree(name: str, net: str) -> None:
    model = build(net)
    wide = scores_of(graph_of(model), ALL[name]())
    narrow = scores_of(graph_of(copy.deepcopy(model).float()), ALL[name](), pairs(8, dtype=torch.float32))
    assert narrow.keys() == wide.keys()
    for key, scores in wide.items():
        scale = float(scores.abs().max())
        torch.testing.assert_close(narrow[key].double(), scores.double(), rtol=2e-3, atol=2e-4 * scale + 1e-12)


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("name", ALL)
def test_streamed_equals_one_batch(name: str, net: str) -> None:
    graph = graph_of(build(net))
    whole = scores_of(graph, ALL[name](), pairs(8))
    for sizes in ((3, 1, 4), (1,) * 8):
        pieces = scores_of(graph, ALL[name](), pairs(*sizes))
        assert pieces.keys() == whole.keys()
        for key, scores in whole.items():
            torch.testing.assert_close(pieces[key], scores, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("name", ALL)
def test_the_model_is_left_as_it_was(name: str, net: str) -> None:
    model = build(net).train()
    calls: list[str] = []
    model.register_forward_hook(lambda *_: calls.append("hook") or None)
    first, *others = model.parameters()
    first.requires_grad_(False)
    for parameter in others:
        parameter.grad = torch.randn_like(parameter)
    graph = graph_of(model)
    loader = DataLoader(TensorDataset(*pairs(8)[0]), batch_size=3, shuffle=True)
    criterion = ALL[name]()
    before, hooks = snapshot(model), len(model._forward_hooks)
    shown = repr(criterion)
    scores_of(graph, criterion, loader)
    assert_untouched(model, before)
    assert len(model._forward_hooks) == hooks
    assert repr(criterion) == shown
    assert calls or name in WITHOUT_DATA


@pytest.mark.parametrize("name", sorted(ALL.keys() - WITHOUT_DATA))
def test_the_model_is_left_as_it_was_when_the_run_fails(name: str) -> None:
    model = build("chain").train()
    graph = graph_of(model)
    before = snapshot(model)
    with pytest.raises(PlanError, match=r"on a batch of (the )?data"):
        scores_of(graph, ALL[name](), [*pairs(2), (torch.zeros(2, 5, 6, 6), torch.zeros(2))])
    assert_untouched(model, before)
    assert not torch.overrides._get_current_function_mode_stack()


@pytest.mark.parametrize("name", sorted(ALL.keys() - WITHOUT_DATA))
def test_without_data(name: str) -> None:
    with pytest.raises(PlanError, match="pass data="):
        fitted(ALL[name](), graph_of(build("chain")))


@pytest.mark.parametrize("name", sorted(ALL.keys() - WITHOUT_LOSS))
def test_without_a_loss(name: str) -> None:
    with pytest.raises(PlanError, match="pass loss="):
        fitted(ALL[name](), graph_of(build("chain")), pairs(4))


@pytest.mark.parametrize("name", sorted(ALL.keys() - WITHOUT_DATA))
def test_an_empty_loader(name: str) -> None:
    with pytest.raises(PlanError, match="no batch"):
        fitted(ALL[name](), graph_of(build("chain")), [], cross_entropy)


@pytest.mark.parametrize("name", sorted(WITHOUT_DATA))
def test_no_data_is_needed(name: str) -> None:
    graph = graph_of(build("chain"))
    ready = fitted(ALL[name](), graph)
    assert ready(graph.groups()[0], tensors_of(graph)).shape == (4,)


@pytest.mark.parametrize("name", sorted(ALL.keys() - WITHOUT_DATA))
def test_weights_on_the_meta_device(name: str) -> None:
    graph = ChannelGraph(build("chain").to("meta"), images(2))
    with pytest.raises(PlanError, match="meta device"):
        fitted(ALL[name](), graph, pairs(4), cross_entropy)


@pytest.mark.parametrize("name", sorted(ALL.keys() - WITHOUT_DATA - {"sum", "product", "rank", "penalty"}))
def test_scores_before_the_data_was_seen(name: str) -> None:
    graph = graph_of(build("chain"))
    with pytest.raises(PlanError, match="before it can score"):
        ALL[name]()(graph.groups()[0], tensors_of(graph))


@pytest.mark.parametrize("name", ALL)
def test_frozen_and_inference_tensors(name: str) -> None:
    """A model that was loaded under inference mode, and whose parameters are frozen, can be measured all the same."""
    with torch.inference_mode():
        model = build("chain")
    scores = scores_of(graph_of(model), ALL[name]())
    plain = scores_of(graph_of(build("chain").requires_grad_(False)), ALL[name]())
    torch.testing.assert_close(scores, plain)


def test_a_plain_function_is_a_criterion() -> None:
    graph = graph_of(build("chain"))
    ready = fitted(lambda group, _: torch.arange(group.channels), graph)
    assert ready(graph.groups()[0], {}).tolist() == [0, 1, 2, 3]


def test_batches_go_with_their_own_loss() -> None:
    with pytest.raises(PlanError, match="give them there"):
        fitted("taylor", graph_of(build("chain")), Batches(pairs(2)), cross_entropy)
