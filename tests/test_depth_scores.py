"""Every score of a branch keeps the same promises: one suite over all of them."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from support.depth_nets import GAINS, convolutional, cross_entropy, residuals, transformer
from torch import nn

import structprune
from structprune.depth.finding import find
from structprune.depth.gates import gated
from structprune.depth.ordering import candidates_of, choices
from structprune.depth.records import PlacedBranch
from structprune.depth.scoring import SCORES, Scorer
from structprune.errors import PlanError
from structprune.importance.data import Batches
from structprune.ops import op_of
from structprune.tracing.trace import trace

NETWORKS = {"residuals": residuals, "transformer": transformer, "convolutional": convolutional}
all_scores = pytest.mark.parametrize("score", SCORES)
all_networks = pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)


def labelled(model: nn.Module, x: torch.Tensor, parts: int = 2) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Batches with the labels that the model gives itself, so that every change is for the worse."""
    with torch.no_grad():
        labels = model(x).argmax(-1)
    return list(zip(x.chunk(parts), labels.chunk(parts), strict=True))


def scorer_of(model: nn.Module, x: torch.Tensor, parts: int = 2) -> tuple[Scorer, list[PlacedBranch]]:
    recorded = trace(model, x, operations=op_of)
    batches = Batches(labelled(model, x, parts), loss=cross_entropy)
    return Scorer(model, recorded, batches), list(find(model, recorded))


@all_networks
@all_scores
def test_one_finite_number_a_branch_and_the_model_as_it_was(score, network):
    model, x = network()
    model.train()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    scorer, found = scorer_of(model.eval(), x)
    model.train()
    values = SCORES[score](scorer, found, ())
    assert len(values) == len(found) > 2
    assert all(isinstance(value, float) and math.isfinite(value) for value in values)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(bool((parameter.grad == 1).all()) for parameter in model.parameters())
    assert model.training
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert SCORES[score](scorer, found, ()) == values


@all_scores
def test_what_does_nearly_nothing_is_worth_least(score):
    model, x = residuals()
    scorer, found = scorer_of(model, x)
    values = dict(zip(GAINS, map(abs, SCORES[score](scorer, found, ())), strict=True))
    assert sorted(values, key=values.__getitem__)[:2] == [0.001, 0.01]


@all_networks
@all_scores
def test_how_the_data_is_cut_into_batches_does_not_matter(score, network):
    model, x = network()
    scorer, found = scorer_of(model.double(), x.double() if x.is_floating_point() else x, 1)
    one = SCORES[score](scorer, found, ())
    other, found = scorer_of(model, x.double() if x.is_floating_point() else x, 4)
    assert SCORES[score](other, found, ()) == pytest.approx(one, rel=1e-9, abs=1e-12)


@all_scores
def test_a_score_sees_the_branches_that_are_off(score):
    model, x = residuals((1.0, 1.0, 1.0))
    scorer, found = scorer_of(model, x)
    assert SCORES[score](scorer, found[1:], found[:1]) != pytest.approx(SCORES[score](scorer, found[1:], ()))


@all_scores
def test_choose_branches_takes_every_score(score):
    model, x = residuals()
    chosen = structprune.choose_branches(
        model, x, labelled(model, x), count=2, score=score, loss=cross_entropy, greedy=score == "kl"
    )
    if score == "angular":  # consecutive blocks go together
        assert int(chosen[1]) == int(chosen[0]) + 1
    else:
        scorer, found = scorer_of(model, x)
        values = SCORES[score](scorer, found, ())
        assert chosen == tuple(found[i].branch.name for i in sorted(range(len(found)), key=values.__getitem__)[:2])


@pytest.mark.parametrize("score", ["loss", "taylor", "fisher"])
def test_scores_of_the_loss_need_one(score):
    model, x = residuals()
    with pytest.raises(PlanError, match="loss="):
        structprune.choose_branches(model, x, [x], count=1, score=score)


@all_networks
def test_gates_of_one_change_nothing_and_their_gradient_is_the_slope_of_the_loss(network):
    model, x = network()
    model, x = model.double(), x.double() if x.is_floating_point() else x
    (batch,) = labelled(model, x, 1)
    recorded = trace(model, x, operations=op_of)
    found = find(model, recorded)

    def loss_at(gates: list[float]) -> float:
        def gate(which, result):
            return result.new_full((), gates[which])

        with torch.no_grad(), gated(model, recorded, found, gate):
            return float(cross_entropy(model, batch))

    ones = [1.0] * len(found)
    assert loss_at(ones) == pytest.approx(cross_entropy(model, batch).item(), rel=1e-12)
    scorer = Scorer(model, recorded, Batches([batch], loss=cross_entropy))
    (gradients,) = scorer.gradients(found, ())
    for which, gradient in enumerate(gradients):
        up, down = ([*ones[:which], 1 + step, *ones[which + 1 :]] for step in (1e-5, -1e-5))
        slope = (loss_at(up) - loss_at(down)) / 2e-5
        assert float(gradient.mean()) == pytest.approx(slope, rel=1e-4, abs=1e-9)


def test_consecutive_blocks_are_those_that_turn_the_stream_least_together():
    model, x = residuals((1.0, 1.0, -1.0, 1.0, 1.0))
    # The third block takes back what the second one does: together they do nothing.
    model[3].load_state_dict(model[2].state_dict())
    scorer, found = scorer_of(model, x)
    pairs = {}
    for start in range(4):
        with torch.no_grad():
            before = model[: start + 1](x)
            after = model[: start + 3](x)
        cosine = torch.nn.functional.cosine_similarity(before, after, dim=1).clamp(-1, 1)
        pairs[(str(start + 1), str(start + 2))] = float(cosine.arccos().mean())
    sets = list(choices(scorer, candidates_of(found, ("blocks",)), "angular", False, None))
    assert tuple(item.branch.name for item in sets[1]) == min(pairs, key=pairs.__getitem__)
    assert [len(chosen) for chosen in sets] == [1, 2, 3, 4, 5]


def test_greedy_choices_ask_again_only_for_those_that_come_near():
    model, x = residuals((1.0,) * 6)
    scorer, found = scorer_of(model, x)
    asked = []

    def measure(chosen):
        asked.append(len(chosen))
        return sum(float(item.branch.name) for item in chosen) ** 2

    scorer.loss = measure
    sets = list(choices(scorer, found, "loss", True, None))
    assert [item.branch.name for item in sets[-1]] == ["1", "2", "3", "4", "5", "6"]
    assert len(asked) < 6 * 7 / 2
