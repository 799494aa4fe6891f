"""Criteria made of criteria, and the data that all of them see."""

from __future__ import annotations

import copy

import pytest
import torch
from support.importance_nets import NETS, build, cross_entropy, graph_of, group_of, images, labels, pairs, scores_of
from support.snapshot import assert_untouched, snapshot
from torch import Tensor, nn

import structprune
from structprune.coupling.graph import ChannelGraph
from structprune.coupling.groups import Group
from structprune.errors import PlanError
from structprune.importance.activations import Sums
from structprune.importance.base import fitted
from structprune.importance.compose import CostPenalty, PerLayer, Product, Sum, macs_of_channels
from structprune.importance.data import Batches, call_on_batch, samples_of
from structprune.importance.sites import Sites
from structprune.planning.build import tensors_of


def given(*values: float):
    return lambda group, tensors: torch.tensor(values)


def scored(importance: object) -> list[float]:
    graph = graph_of(build("chain"))
    return fitted(importance, graph)(group_of(graph, "first"), tensors_of(graph)).tolist()


def test_sum_and_product() -> None:
    one, two = given(1, 2, 3, 4), given(0, 1, 0, -2)
    assert scored(Sum([one, two])) == [1, 3, 3, 2]
    assert scored(Sum([one, two], [2, 10])) == [2, 14, 6, -12]
    assert scored(Product([one, two])) == [0, 2, 0, -8]
    assert scored(Product([one, two], [1, 2])) == [0, 2, 0, 16]


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("none", [3, 0, 4, 0]),
        ("l2", [0.6, 0, 0.8, 0]),
        ("mean", [3 / 1.75, 0, 4 / 1.75, 0]),
        ("max", [0.75, 0, 1, 0]),
        ("rank", [0.625, 0.25, 0.875, 0.25]),
        ("standard", [1.25 / 1.7853571, -1.75 / 1.7853571, 2.25 / 1.7853571, -1.75 / 1.7853571]),
    ],
)
def test_normalisation_in_each_layer(how: str, expected: list[float]) -> None:
    assert scored(PerLayer(given(3, 0, 4, 0), how)) == pytest.approx(expected)
    assert all(value == value for value in scored(PerLayer(given(0, 0, 0, 0), how)))


def test_a_part_of_the_scale_may_stay() -> None:
    assert scored(PerLayer(given(3, 0, 4, 9), "mean", 0.5)) == pytest.approx([1.5, 0, 2, 4.5])
    assert scored(PerLayer(given(3, 0, 4, 9), "max", 0)) == pytest.approx([3, 0, 4, 9])


def test_parts_that_see_data_are_fitted() -> None:
    graph = graph_of(build("chain"))
    parts = [scores_of(graph, name)["0 first"] for name in ("taylor", "wanda")]
    mixed = scores_of(graph, Sum([PerLayer("taylor", "max"), "wanda"], [0.5, 2]))["0 first"]
    torch.testing.assert_close(mixed, 0.5 * parts[0] / parts[0].max() + 2 * parts[1])


def test_a_part_by_name_is_made_once() -> None:
    """Random scores of two groups come from one generator."""
    graph = graph_of(build("attention"))
    ready = fitted(Sum(["random"]), graph)
    group = graph.groups()[0]
    assert ready(group, {}).tolist() != ready(group, {}).tolist()


@pytest.mark.parametrize("net", NETS)
def test_what_a_channel_costs_is_what_removing_it_saves(net: str) -> None:
    model = build(net)
    graph = graph_of(model)
    x = images(2)
    whole = structprune.cost(model, x).macs
    saved = macs_of_channels(graph) * whole
    for number, group in enumerate(graph.groups()):
        for channel in {0, group.channels - 1}:
            other = copy.deepcopy(model)
            dependencies = structprune.DependencyGraph(other, x)
            dependencies.prune_group(dependencies.groups()[number], [channel])
            left = structprune.cost(other, x).macs
            assert float(saved[group.components[channel]]) == pytest.approx(whole - left)


def test_cost_penalty() -> None:
    graph = graph_of(build("residual"))
    prices, plain = macs_of_channels(graph), scores_of(graph, "l2")
    priced = scores_of(graph, CostPenalty("l2", 3.0))
    for number, group in enumerate(graph.groups()):
        key = f"{number} {group.name}"
        torch.testing.assert_close(priced[key], plain[key].double() - 3 * prices[torch.from_numpy(group.components)])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Sum([]), "one or more"),
        (lambda: Sum("l2"), "list of criteria"),
        (lambda: Sum(["l1", "l2"], [1.0]), "2 criteria to add and 1 weights"),
        (lambda: Product(["l1"], [1.0, 2.0]), "1 criteria and 2 powers"),
        (lambda: Sum(["l3"]), "no criterion 'l3'"),
        (lambda: PerLayer("l2", "median"), "how is 'median'"),
        (lambda: PerLayer("l2", "rank", 0.5), "divides by nothing that it could apply to"),
    ],
)
def test_bad_compositions(make: object, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        make()


# -------------------------------------------------------------------------------------------------------------- data


class Keyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(108, 4), nn.Linear(4, 3)

    def forward(self, pixels: Tensor, scale: Tensor | None = None, targets: Tensor | None = None) -> Tensor:
        hidden = torch.relu(self.layer(pixels.flatten(1)))
        out = self.head(hidden if scale is None else hidden * scale)
        return out if targets is None else nn.functional.cross_entropy(out, targets)


def test_batches_of_every_form() -> None:
    torch.manual_seed(0)
    net = Keyword().double()
    graph = ChannelGraph(net, {"pixels": images(2)})
    plain = scores_of(graph, "wanda", [images()])
    for data in ([(images(), labels())], [[images()]], [{"pixels": images()}], [({"pixels": images()}, labels())]):
        torch.testing.assert_close(scores_of(graph, "wanda", data), plain)
    ready = fitted("wanda", graph, [images().tolist()], forward=lambda model, b: model(torch.tensor(b).double()))
    group = graph.groups()[0]
    torch.testing.assert_close(ready(group, tensors_of(graph)), plain["0 layer"])


def test_the_run_may_take_more_than_the_trace() -> None:
    """Labels that the model takes itself, and the loss that it computes with them, are no part of the trace."""
    net = Keyword().double()
    graph = ChannelGraph(net, {"pixels": images(2)})
    data = [{"pixels": images(), "targets": labels()}]
    ready = fitted("taylor", graph, data, lambda model, batch: model(**batch))
    outside = fitted("taylor", graph, pairs(8), cross_entropy)
    group = graph.groups()[0]
    torch.testing.assert_close(ready(group, {}), outside(group, {}))


def test_a_model_that_is_called_twice_in_a_loss() -> None:
    net = Keyword().double()
    graph = ChannelGraph(net, {"pixels": images(2)})
    group = graph.groups()[0]

    def twice(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return (cross_entropy(model, batch) + cross_entropy(model, batch)) / 2

    torch.testing.assert_close(
        fitted("taylor", graph, pairs(8), twice)(group, {}), fitted("taylor", graph, pairs(8), cross_entropy)(group, {})
    )


def test_a_batch_that_cannot_be_called_on() -> None:
    with pytest.raises(PlanError, match="cannot tell how to call the model"):
        call_on_batch(nn.Identity(), 3)


def test_data_that_is_no_iterable_of_batches() -> None:
    for data in (images(), {"x": images()}, 3, "train"):
        with pytest.raises(PlanError, match="give an iterable of batches"):
            Batches(data)
    with pytest.raises(PlanError, match="reduction is 'none'"):
        Batches([], reduction="none")


def test_data_that_runs_out() -> None:
    graph = graph_of(build("chain"))
    fitted("wanda", graph, iter(pairs(4)))
    once = Batches(iter(pairs(4)))
    fitted("wanda", graph, once)
    with pytest.raises(PlanError, match="run through only once, and it was"):
        fitted("flap", graph, once)
    with pytest.raises(PlanError, match="run through only once"):
        fitted(Sum(["wanda", "flap"]), graph, (batch for batch in pairs(4)))
    again = Batches(pairs(4))
    fitted("flap", graph, again)
    fitted("flap", graph, again)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda model, batch: model(batch[0]), r"it returned \[4, 3\]"),
        (lambda model, batch: float(cross_entropy(model, batch).detach()), "it returned float"),
        (lambda model, batch: cross_entropy(model, batch).detach(), "does not depend on the model"),
        (lambda model, batch: cross_entropy(model, batch) * float("nan"), "is nan"),
        (lambda model, batch: torch.ones(1, requires_grad=True).sum(), "did not call the model"),
    ],
)
@pytest.mark.parametrize("name", ["taylor", "kfac", "snip", "obd_fisher", "obd_hutchinson"])
def test_losses_that_cannot_be_used(name: str, loss: object, message: str) -> None:
    message = message.replace("4, ", "1, ") if name == "obd_fisher" else message
    with pytest.raises(PlanError, match=message):
        fitted(name, graph_of(build("chain")), pairs(4), loss)


def test_a_forward_that_takes_another_way() -> None:
    class Early(Keyword):
        def forward(self, pixels: Tensor) -> Tensor:
            if pixels.shape[0] > 4:
                return torch.relu(self.layer(pixels.flatten(1)))
            return super().forward(pixels)

    graph = ChannelGraph(Early().double(), {"pixels": images(2)})
    with pytest.raises(PlanError, match=r"did not come to linear in head .*same form"):
        fitted("wanda", graph, [images()])
    with pytest.raises(PlanError, match="did not call the model"):
        fitted("wanda", graph, [images()], forward=lambda model, batch: None)


def test_single_samples_of_a_batch() -> None:
    found = list(samples_of({"a": images(3), "b": [labels(3)]}))
    assert [(tuple(s["a"].shape), s["b"][0].tolist()) for s in found] == [((1, 3, 6, 6), [i]) for i in range(3)]
    with pytest.raises(PlanError, match="differ in dimension 0"):
        list(samples_of((images(3), labels(4))))
    with pytest.raises(PlanError, match="no tensor"):
        list(samples_of(([], 3)))


def test_progress_is_drawn_only_if_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    graph = graph_of(build("chain"))
    fitted("wanda", graph, Batches(pairs(2, 2)))
    assert capsys.readouterr().err == ""
    fitted("wanda", graph, Batches(pairs(2, 2), progress=True))
    fitted("wanda", graph, Batches(iter(pairs(2, 2)), progress=True))
    assert "looking at activations" in capsys.readouterr().err


def test_sums_of_several_ranks() -> None:
    """What two halves of the data give, merged, is what the whole gives."""
    halves = [Sums(), Sums()]
    for sums, (x, _) in zip(halves, pairs(5, 3), strict=True):
        sums.add(("square", 0), x.square().sum(0))
    halves[1].add("only here", torch.ones(2))
    merged = halves[0].merge(halves[1])
    torch.testing.assert_close(merged[("square", 0)], images().square().sum(0))
    assert "only here" in merged
    assert "nowhere" not in merged


# ----------------------------------------------------------------------------------------------- through the front door


@pytest.mark.parametrize("importance", ["taylor", "wanda", "kfac", Sum([PerLayer("taylor"), "cosine"])], ids=str)
def test_plans_by_criteria_that_look_at_data(importance: object) -> None:
    model = build("residual").train()
    before = snapshot(model)
    plan = structprune.plan(
        model, images(2), target={"macs": 0.6}, scope="global", round_to=1, importance=importance, data=pairs(5, 3),
        loss=cross_entropy,
    )  # fmt: skip
    assert_untouched(model, before)
    slim = plan.apply(model)
    assert structprune.verify(model, slim, plan, images(2)).ok
    assert structprune.cost(slim, images(2)).macs < 0.65 * structprune.cost(model, images(2)).macs


def test_the_channels_of_the_lowest_score_go() -> None:
    model = build("chain")
    graph = graph_of(model)
    scores = scores_of(graph, "taylor")["0 first"]
    slim = structprune.prune(
        model, images(2), ratio={"first": 0.5}, round_to=1, importance="taylor", data=pairs(8), loss=cross_entropy
    )
    kept = scores.argsort()[2:].sort().values
    torch.testing.assert_close(slim.first.weight, model.first.weight[kept])


# ------------------------------------------------------------------------------------------------------------- sites


def ends(net: nn.Module, name: str, inputs: Tensor) -> list[str]:
    graph = ChannelGraph(net, inputs)
    sites = Sites(graph, each_edge=True)
    return [sites.all[part.site].where.split(" (")[0] for part in sites.of(group_of(graph, name))]


def test_a_depthwise_convolution_is_no_end() -> None:
    assert ends(build("residual"), "expand", images(2)) == ["conv2d in project"]


def test_a_projection_of_a_query_ends_at_attention() -> None:
    graph = graph_of(build("attention"))
    sites = Sites(graph)
    found = {
        tuple(sites.all[r.site].where.split(" (")[0] for r in sites.of(group)): group.channels
        for group in graph.groups()
    }
    assert ("linear in out",) in found
    assert found[("matmul in the model",)] == 10


def test_a_channel_that_no_weight_sums_away_is_seen_at_the_last_tensor() -> None:
    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.rest = nn.Linear(4, 6), nn.LSTM(6, 3, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.rest(torch.tanh(self.layer(x)))[0]

    torch.manual_seed(0)
    net, x = Mean(), torch.randn(2, 5, 4)
    assert ends(net, "layer", x) == ["tanh in the model"]
    graph = ChannelGraph(net, x)
    ready = fitted("activation_mean", graph, [x])
    group: Group = group_of(graph, "layer")
    expected = torch.tanh(net.layer(x)).detach().abs().mean((0, 1))
    torch.testing.assert_close(ready(group, {}).float(), expected)
    with pytest.raises(PlanError, match="show in no tensor"):
        fitted("wanda", graph, [x])(group, {})


def test_weights_that_are_computed_are_weights() -> None:
    net = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.utils.parametrizations.weight_norm(nn.Linear(5, 2)))
    x = torch.randn(7, 3)
    graph = ChannelGraph(net, x)
    found = fitted("wanda", graph, [x])(group_of(graph, "0"), {})
    norms = torch.relu(net[0](x)).square().mean(0).sqrt()
    torch.testing.assert_close(found.float(), (norms * net[2].weight.abs().sum(0)).detach())
