"""Averages of weights, the draw of validation data, and the page on fine-tuning."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from structprune.errors import PlanError
from structprune.training import WeightAverage, split

PAGE = Path(__file__).parent.parent / "docs" / "finetuning.md"


def test_the_average_is_the_recursion_of_its_definition() -> None:
    model = nn.BatchNorm1d(2)
    average = WeightAverage(model, 0.5)
    wanted = np.ones(2)
    for step in range(20):
        with torch.no_grad():
            model.weight.fill_(float(step))
            model.num_batches_tracked += 1
        average.update(model)
        decay = min(0.5, (1 + step) / (10 + step))
        wanted = decay * wanted + (1 - decay) * step
    np.testing.assert_allclose(average.values["weight"].numpy(), wanted, rtol=1e-5)
    assert int(average.values["num_batches_tracked"]) == 20
    with average.lent(model):
        np.testing.assert_allclose(model.weight.detach().numpy(), wanted, rtol=1e-5)
    assert float(model.weight.detach()[0]) == 19


def test_split_parts_everything_and_leaves_the_generator() -> None:
    before = torch.get_rng_state()
    train, held = split(100, 0.2, seed=4)
    assert sorted([*train.tolist(), *held.tolist()]) == list(range(100))
    assert len(held) == 20
    assert not torch.equal(held, split(100, 0.2, seed=5)[1])
    assert torch.equal(held, split(100, 0.2, seed=4)[1])
    assert torch.equal(torch.get_rng_state(), before)
    for count, share, message in ((100, 0.0, "share is 0.0"), (100, 1.0, "share is 1.0"), (1, 0.5, "count is 1")):
        with pytest.raises(PlanError, match=message):
            split(count, share)


def test_the_page_runs_as_it_stands() -> None:
    torch.manual_seed(0)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 7
    names: dict[str, Any] = {}
    for block in blocks:
        exec(block, names)
