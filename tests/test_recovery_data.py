"""The data of recovery: what is no data is refused by name, and the models are as they were."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.snapshot import assert_untouched, snapshot
from torch import Tensor, nn

import structprune
from structprune.errors import RecoveryError


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(16, 6, generator=generator) for _ in range(2)]


@pytest.fixture
def models() -> tuple[nn.Module, nn.Module]:
    """The original and a pruned one, with a batch norm that recovery leaves and calibration sets."""
    torch.manual_seed(0)
    original = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).train()
    return original, structprune.prune(original, batches()[0], ratio=0.5)


NAN, INFINITE = [torch.full((16, 6), float("nan"))], [*batches(), torch.full((16, 6), float("inf"))]
BAD_DATA: dict[str, tuple[Any, str]] = {
    "NaN": (NAN, "NaN or infinite"),
    "infinite in one batch": (INFINITE, "NaN or infinite"),
    "nothing": ([], "data holds no batch"),
    "None": (None, "data is None; give an iterable of batches"),
    "a single batch": (torch.zeros(16, 6), "data is a Tensor; give an iterable of batches"),
    "a batch without samples": ([*batches(), torch.zeros(0, 6)], r"holds no sample: .*\[\[0, 6\]\]"),
    "an empty dict": ([{}], "holds no sample"),
    "a shape": ([(16, 6)], "A batch of data is a int"),
    "an unknown keyword": ([{"x": torch.zeros(16, 6)}], "cannot be called on a batch of data: .*forward="),
}
CALLS: dict[str, Callable[..., Any]] = {
    "recover": lambda slim, original, data: structprune.recover(slim, original, data),
    "recalibrate": lambda slim, _, data: structprune.recalibrate(slim, data),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("what", BAD_DATA)
def test_bad_data_is_refused(models: tuple[nn.Module, nn.Module], call: str, what: str) -> None:
    original, slim = models
    before = snapshot(original), snapshot(slim)
    data, message = BAD_DATA[what]
    with pytest.raises(RecoveryError, match=message):
        CALLS[call](slim, original, data)
    for model, state in zip(models, before, strict=True):
        assert_untouched(model, state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": 0}, "rows is 0; give a whole number of at least 1"),
        ({"rows": 2.5}, "rows is 2.5"),
        ({"rounds": -1}, "rounds is -1; give a whole number of at least 0"),
        ({"rounds": True}, "rounds is True"),
        ({"seed": None}, "seed is None"),
    ],
)
def test_numbers_that_cannot_be_are_refused(
    models: tuple[nn.Module, nn.Module], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecoveryError, match=message):
        structprune.recover(models[1], models[0], batches(), **options)


def test_what_is_no_model_is_refused(models: tuple[nn.Module, nn.Module]) -> None:
    with pytest.raises(RecoveryError, match=r"original is .*; give the model"):
        structprune.recover(models[1], [models[0]], batches())


class Pair(nn.Module):
    """Two inputs, by position or by name."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU()), nn.Linear(8, 3)

    def forward(self, a: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
        return self.out((self.embed(a) - self.embed(b)) * scale)


PAIRS = list(zip(batches(), batches()[::-1], strict=True))
FORWARDS: dict[str, Callable[[nn.Module, Any], Any]] = {
    "by position": lambda model, pair: model(*pair),
    "by name": lambda model, pair: model(a=pair[0], b=pair[1]),
    "both": lambda model, pair: model(pair[0], b=pair[1]),
}


@pytest.mark.parametrize("how", FORWARDS)
def test_several_inputs_go_through_forward(how: str) -> None:
    torch.manual_seed(0)
    original = Pair()
    slim = structprune.prune(original, PAIRS[0], ratio=0.5)
    named = [{"a": a, "b": b} for a, b in PAIRS]
    before = snapshot(original)
    expected = structprune.recover(slim, original, named).state_dict()
    found = structprune.recover(slim, original, PAIRS, forward=FORWARDS[how]).state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert not torch.equal(expected["out.weight"], slim.out.weight), "something was recovered"
    assert_untouched(original, before)


def test_each_call_of_forward_is_a_batch() -> None:
    model = nn.Sequential(nn.BatchNorm1d(6))
    once = structprune.recalibrate(model, batches())
    both = structprune.recalibrate(model, [batches()], forward=lambda model, pair: [model(x) for x in pair])
    assert torch.equal(once[0].running_var, both[0].running_var)


@pytest.mark.parametrize("call", ["recover", "recalibrate"])
def test_several_inputs_without_forward_are_refused(call: str) -> None:
    original = Pair()
    slim = structprune.prune(original, PAIRS[0], ratio=0.5)
    with pytest.raises(RecoveryError, match=r"missing a required argument: 'b'.* pass forward="):
        CALLS[call](slim, original, PAIRS)


def test_a_forward_that_calls_another_model_is_refused(models: tuple[nn.Module, nn.Module]) -> None:
    original, slim = models
    with pytest.raises(RecoveryError, match="forward= does not call the model that it is given"):
        structprune.recover(slim, original, batches(), forward=lambda _, batch: original(batch))
