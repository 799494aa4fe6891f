"""Networks of operations drawn at random: right, or kept whole; never another number, a broken forward or an error."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
import torch
from support.random_chains import HELD, PLAIN, Chain, draw, judge

import structprune
from structprune.ops import OPS

PARTS, EACH = 6, 20


@pytest.mark.parametrize("part", range(PARTS))
def test_chains_are_right_or_whole(part: int) -> None:
    found = [judge(draw(seed), seed) for seed in range(part * EACH, (part + 1) * EACH)]
    assert [judgement for judgement in found if judgement.fault] == []
    assert Counter(judgement.verdict for judgement in found)["right"] >= EACH // 3


@pytest.mark.parametrize("name", [*PLAIN, *HELD])
def test_an_operation_alone_is_right_or_whole(name: str) -> None:
    assert not (judgement := judge((name,), 0)).fault, judgement


def test_a_broken_rule_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reversal that is overlooked gives a network that runs and computes something else."""
    broken = dataclasses.replace(OPS["flip"], coupling=lambda c, x, dims: x.axes)
    monkeypatch.setitem(OPS, "flip", broken)
    torch.manual_seed(0)
    assert judge(("gain", "flip", "gain"), 0).verdict == "wrong numbers"


@pytest.mark.parametrize(
    "names",
    [
        ("first to all", "gram"),
        ("first like all", "sum"),
        ("first as long", "norm"),
        ("add one", "products of pairs"),
        ("sums of pairs", "two halves"),
        ("sums of pairs", "einsum sum"),
    ],
    ids=" then ".join,
)
def test_a_sum_over_what_is_not_zero_pins_it(names: tuple[str, ...]) -> None:
    """Repeats of one channel, and pairs of channels, are not zero where one of them is off."""
    for seed in range(3):
        assert not (judgement := judge(names, seed)).fault, judgement


@pytest.mark.parametrize(
    "names",
    [
        ("packed GRU", "as often"),  # a loop behind packed sequences runs as often as there are channels
        ("weights of heads", "log of size"),  # a pin that joins components
        ("two halves", "rest of size"),  # a factor that becomes 0
        ("linear", "rest of size"),  # and one that is 0
        ("repeated by buffer", "softmax", "lstm"),  # the state and the cell have the same channels
        ("size as bound", "matrix of all"),  # a repeat that is removed is not zero
        ("projected", "flip"),  # torch takes a state as wide as the cell for one that is not projected
        ("sigmoid", "some products"),  # all cells of one row are all that a layer reads
    ],
    ids=" then ".join,
)
def test_kinds_that_were_wrong_by_several_operations(names: tuple[str, ...]) -> None:
    for seed in range(3):
        assert not (judgement := judge(names, seed)).fault, judgement


def test_numbers_behind_packed_sequences_are_rehearsed() -> None:
    model = Chain(("packed GRU", "relu"))
    plan = structprune.plan(model.double(), torch.randn(3, 4, 5, dtype=torch.float64), ratio=0.5)
    assert "rehearsal" not in plan.settings.left
