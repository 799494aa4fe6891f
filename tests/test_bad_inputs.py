"""Every public function with bad values for each of its arguments: each is refused, by an error that says which.

The values, and what counts as a refusal, are those of ``benchmarks/bad_inputs.py``.
"""

from __future__ import annotations

import sys

import pytest
import torch
from support.zoo import BENCHMARKS

sys.path.insert(0, str(BENCHMARKS))
import bad_inputs

from structprune import checking
from structprune.errors import PlanError

NAMES = sorted({subject.name for subject in bad_inputs.subjects()})


@pytest.mark.parametrize("name", NAMES)
def test_what_is_wrong_is_refused_by_name_and_the_model_left_as_it_was(name: str) -> None:
    found = list(bad_inputs.attempts(name))
    assert found
    assert [attempt for attempt in found if attempt.outcome != "refused" or attempt.touched] == []


def test_the_oracle_sees_what_is_accepted_raw_unclear_or_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    def of(kind: str) -> object:
        def call(model: torch.nn.Module, folder: object, /, rows: object) -> None:
            model[0].weight.data.zero_()
            if kind == "raw":
                torch.zeros(2) @ torch.zeros(3)
            if kind == "unclear":
                checking.require({"other": 1}, PlanError, other=checking.whole(2))
            if kind == "refused":
                checking.require({"rows": rows}, PlanError, rows=checking.whole(2))

        return call

    kinds = ("accepted", "raw", "unclear", "refused")
    subjects = [bad_inputs.Subject(kind, of(kind), {"rows": (1,)}) for kind in kinds]
    monkeypatch.setattr(bad_inputs, "subjects", lambda: iter(subjects))
    found = list(bad_inputs.attempts())
    assert [attempt.outcome for attempt in found] == list(kinds)
    assert [attempt.touched for attempt in found] == [False, True, True, True]
    assert bad_inputs.count(found) == {"calls": 4, "raw": 1, "unclear": 1, "accepted": 1, "touched": 3}
