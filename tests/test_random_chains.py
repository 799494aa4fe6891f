"""Networks of operations drawn at random: right, or kept whole; never another number, a broken forward or an error."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
import torch
from support.random_chains import HELD, PLAIN, draw, judge

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
