"""Pruning in steps between which the model is trained."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
import transformers
from support.cases import Case, all_cases
from support.networks import IDS, IMAGE, Residual, Transformer
from torch import nn

import structprune
from structprune.errors import PlanError

SECTIONS = [case for case in all_cases() if "Unit" in str(case) and "huffle" in str(case) and case.thins]


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}


@pytest.mark.parametrize("schedule", ["cubic", "linear", "one-shot", lambda t: t**0.5])
@pytest.mark.parametrize(
    "options", [{"ratio": 0.6}, {"target": {"macs": 0.4}, "scope": "global"}], ids=["ratio", "target"]
)
def test_the_last_step_ends_where_one_shot_does(schedule: Any, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = Residual()
    wanted = shapes(structprune.prune(model, IMAGE, **options))
    pruner = structprune.Pruner(model, IMAGE, steps=3, schedule=schedule, **options)
    while not pruner.done:
        pruner.step()
    assert shapes(model) == wanted


def test_heads_stay_heads_in_every_step() -> None:
    model = Transformer()
    wanted = shapes(structprune.prune(model, IDS, ratio=0.5))
    pruner = structprune.Pruner(model, IDS, steps=4, ratio=0.5)
    while not pruner.done:
        pruner.step()
    assert shapes(model) == wanted


@pytest.mark.parametrize("steps", [2, 3, 5])
def test_few_heads_go_on_going(steps: int) -> None:
    """Of three heads that are left, one more goes, rather than nothing of their size."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    model = transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=50, **sizes))
    pruner = structprune.Pruner(model, IDS, steps=steps, schedule="linear", ratio=0.5)
    while not pruner.done:
        pruner.step()
    layer = model.bert.encoder.layer[0]
    assert (layer.attention.self.attention_head_size, layer.attention.self.query.out_features) == (8, 16)
    assert layer.intermediate.dense.out_features == 32


@pytest.mark.parametrize("case", SECTIONS, ids=str)
def test_groups_that_go_together(case: Case) -> None:
    torch.manual_seed(0)
    model = case.build()
    wanted = shapes(structprune.prune(model, case.inputs(), ratio=0.5))
    pruner = structprune.Pruner(model, case.inputs(), steps=2, schedule="linear", ratio=0.5)
    while not pruner.done:
        pruner.step()
    assert shapes(model) == wanted


def test_schedules_say_how_much_is_gone() -> None:
    widths: dict[str, list[int]] = {}
    for schedule in ("cubic", "linear", "one-shot"):
        model = nn.Sequential(nn.Linear(4, 64), nn.Linear(64, 2))
        pruner = structprune.Pruner(model, torch.randn(1, 4), steps=4, schedule=schedule, ratio=0.5, round_to=1)
        widths[schedule] = []
        for _ in range(4):
            plan = pruner.step()
            widths[schedule].append(model[0].out_features)
    assert widths == {"cubic": [46, 36, 33, 32], "linear": [56, 48, 40, 32], "one-shot": [32, 32, 32, 32]}
    assert plan.settings["step"] == 4


def test_the_optimizer_goes_on_and_the_record_is_kept() -> None:
    torch.manual_seed(0)
    model = Residual()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    pruner = structprune.Pruner(model, IMAGE, steps=2, ratio=0.5, optimizer=optimizer)
    for _ in range(2):
        model(IMAGE).square().mean().backward()
        optimizer.step()
        pruner.step()
        optimizer.zero_grad()
    for parameter in model.parameters():
        assert optimizer.state[parameter]["momentum_buffer"].shape == parameter.shape
    assert len(structprune.kept(model)["stem.weight"][0]) == 24


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "at least 1"),
        ({"steps": 2, "schedule": "slow"}, "schedule is 'slow'; give one of 'one-shot', 'linear', 'cubic'"),
        ({"steps": 2, "target": {"macs": 1e-9}}, "cannot be met"),
    ],
)
def test_what_cannot_be_done_is_refused_at_the_start(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        structprune.Pruner(Residual(), IMAGE, **options)


def test_steps_beyond_the_last_and_wrong_schedules_are_refused() -> None:
    pruner = structprune.Pruner(Residual(), IMAGE, steps=1, ratio=0.5)
    pruner.step()
    with pytest.raises(PlanError, match="All 1 steps were taken"):
        pruner.step()
    with pytest.raises(PlanError, match=r"gives 2\.0 at step 1"):
        structprune.Pruner(Residual(), IMAGE, steps=1, schedule=lambda t: 2.0).step()


OPTIONS: dict[str, Any] = {"schedule": "linear", "target": {"params": 0.4}, "scope": "global", "round_to": 1}


def interrupted(state_after: int) -> tuple[dict[str, Any], nn.Module]:
    torch.manual_seed(0)
    model = Residual()
    pruner = structprune.Pruner(model, IMAGE, steps=3, **OPTIONS)
    for _ in range(state_after):
        pruner.step()
    return json.loads(json.dumps(pruner.state_dict())), model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
def test_the_loss_of_the_last_step_may_be_alive(dtype: torch.dtype) -> None:
    """As in most loops, which hold it until the next one is computed; hooks on parameters stay."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 3)).to(dtype)
    x, gathered = torch.randn(2, 3, 8, 8, dtype=dtype), []
    model[0].weight.register_post_accumulate_grad_hook(lambda weight: gathered.append(tuple(weight.grad.shape)))
    pruner = structprune.Pruner(model, x, steps=2, ratio=0.5, schedule="linear", round_to=1)
    loss = model(x).sum()
    loss.backward()
    while not pruner.done:
        pruner.step()
        model.zero_grad()
        loss = model(x).sum()
        loss.backward()
    assert gathered == [(16, 3, 3, 3), (12, 3, 3, 3), (8, 3, 3, 3)]
    alone = copy.deepcopy(model)
    alone.zero_grad()
    alone(x).sum().backward()
    assert torch.equal(model[0].weight.grad, alone[0].weight.grad)


@pytest.mark.parametrize("taken", [0, 1, 2, 3])
def test_goes_on_from_its_state(taken: int) -> None:
    """The weights that decide where it ends are not there any more, so the state must tell."""
    state, first = interrupted(taken)
    whole = interrupted(3)[1]
    torch.manual_seed(7)
    model = Residual()
    options = {"steps": 3, **OPTIONS}
    pruner = structprune.Pruner(model, IMAGE, state=state, **options)
    assert (pruner.taken, pruner.done) == (taken, taken == 3)
    assert shapes(model) == shapes(first)
    model.load_state_dict(first.state_dict())
    while not pruner.done:
        pruner.step()
    assert structprune.kept(model) == structprune.kept(whole)
    assert structprune.Pruner(model, IMAGE, state=pruner.state_dict(), **options).done  # nothing is done twice


def test_a_state_that_does_not_belong_here_is_refused() -> None:
    state, model = interrupted(1)
    with pytest.raises(PlanError, match="of 3 steps, and this one has 2"):
        structprune.Pruner(Residual(), IMAGE, steps=2, state=state)
    further = interrupted(2)[1]
    before = shapes(further)
    with pytest.raises(PlanError, match="has been pruned 2 times, which are not the first of the 1"):
        structprune.Pruner(further, IMAGE, steps=3, state=state)
    assert shapes(further) == before
    assert shapes(model) != shapes(Residual())


def test_a_plan_from_another_process_is_carried_out() -> None:
    first, second = interrupted(0)[1], interrupted(0)[1]
    pruners = [structprune.Pruner(m, IMAGE, steps=2, ratio=0.5, importance="random") for m in (first, second)]
    plan = pruners[0].next_plan()
    assert shapes(first) == shapes(second)
    for pruner in pruners:
        assert pruner.step(structprune.Plan.from_json(plan.to_json())).digest == plan.digest
    assert structprune.kept(first) == structprune.kept(second)
