"""`finetune`: what it computes, what it leaves as it was, and that a killed run ends as an uninterrupted one does."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.finetuning import KilledError, loaders, network, run, same, state
from torch import Tensor, nn

from structprune.errors import PlanError
from structprune.training import distillation_loss, finetune

# -- what it computes --------------------------------------------------------------------------------------------------


def test_it_learns() -> None:
    model = network()
    result = run(model, epochs=6)
    assert result.score > 80
    assert result.history[-1].loss < result.history[0].loss
    assert result.score == max(epoch.score for epoch in result.history) == result.history[result.epoch - 1].score


def test_steps_are_those_of_a_loop_written_out() -> None:
    """Plain SGD with momentum, the schedule by its formula, no decay on vectors."""
    torch.manual_seed(3)
    batches = [(torch.randn(5, 4), torch.randint(2, (5,))) for _ in range(3)]
    model, other = nn.Linear(4, 2), nn.Linear(4, 2)
    other.load_state_dict(model.state_dict())
    finetune(model, batches, lambda _: 0.0, epochs=1, lr=0.1, weight_decay=0.01, warmup=0.25)
    optimizer = torch.optim.SGD(
        [{"params": [other.weight], "weight_decay": 0.01}, {"params": [other.bias]}], 0.1, 0.9, nesterov=True
    )
    for number, (x, y) in enumerate(batches):
        done = (number + 0.5) / 3
        rate = done / 0.25 if done < 0.25 else (1 + np.cos(np.pi * (done - 0.25) / 0.75)) / 2
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * rate
        optimizer.zero_grad()
        F.cross_entropy(other(x), y).backward()
        optimizer.step()
    torch.testing.assert_close(dict(model.named_parameters()), dict(other.named_parameters()))


def test_the_best_epoch_is_kept() -> None:
    model, scores, seen = network(), iter([1.0, 5.0, 2.0]), []

    def validate(candidate: nn.Module) -> float:
        assert not candidate.training
        seen.append(state(candidate))
        return next(scores)

    result = finetune(model, loaders()[0], validate, epochs=3)
    assert (result.score, result.epoch) == (5.0, 2)
    assert same(state(model), seen[1])
    assert not same(seen[1], seen[2])


def test_scores_of_batches_are_accuracy_or_minus_the_loss() -> None:
    model = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.eye(2))
    x = torch.eye(2).repeat(2, 1)
    right = torch.tensor([0, 1, 0, 0])  # of batches of unlike size: three of four
    result = finetune(model, [(x, right)], [(x[:3], right[:3]), (x[3:], right[3:])], epochs=1, lr=0.0)
    assert result.score == 75
    squares = finetune(
        model, [(x, x)], [(x, 2 * x)], epochs=1, lr=0.0, loss=lambda m, batch: F.mse_loss(m(batch[0]), batch[1])
    )
    assert squares.score == -0.5


def test_a_teacher_alone_decides_when_soft_is_one() -> None:
    torch.manual_seed(0)
    teacher, one, other = nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(4, 3)
    other.load_state_dict(one.state_dict())
    x = torch.randn(32, 4)
    for model, labels in ((one, torch.zeros(32)), (other, torch.ones(32))):
        finetune(model, [(x, labels.long())] * 40, lambda _: 0.0, epochs=4, lr=0.5, teacher=teacher, soft=1.0)
    assert torch.equal(one.weight, other.weight)
    torch.testing.assert_close(one(x).softmax(1), teacher(x).softmax(1), atol=2e-2, rtol=0)


def test_a_teacher_alone_needs_no_labels() -> None:
    """The same steps as with labels that nobody looks at; validation tells how far the teacher is."""
    torch.manual_seed(0)
    teacher, one, other = nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(4, 3)
    other.load_state_dict(one.state_dict())
    x = torch.randn(32, 4)
    taught = {"epochs": 1, "lr": 0.5, "teacher": teacher, "soft": 1.0}
    finetune(one, [(x, torch.zeros(32).long())] * 10, lambda _: 0.0, **taught)
    result = finetune(other, [x] * 10, [x[:24], x[24:]], **taught)
    torch.testing.assert_close(one.weight, other.weight)
    far = distillation_loss(other(x), teacher(x))
    assert result.score == pytest.approx(-float(far.detach()), rel=1e-5)


def test_dicts_take_the_models_own_loss() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            logits = self.linear(x)
            return {"loss": F.cross_entropy(logits, labels), "logits": logits}

    model = Own()
    batch = {"x": torch.randn(8, 3), "labels": torch.arange(8) % 2}
    result = finetune(model, [batch] * 20, [batch], epochs=3, lr=0.1, teacher=Own(), soft=0.1)
    assert -0.7 < result.score < 0
    assert result.history[-1].loss < result.history[0].loss


def test_penalty_clip_and_own_optimizer() -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    batch = (torch.randn(8, 3), torch.zeros(8, dtype=torch.long))
    finetune(
        model,
        [batch] * 100,
        lambda _: 0.0,
        epochs=3,
        optimizer=optimizer,
        clip=1.0,
        loss=lambda m, _: m.weight.sum() * 0,
        penalty=lambda m: m.weight.square().sum(),
    )
    assert float(model.weight.detach().abs().max()) < 1e-2
    assert optimizer.param_groups[0]["lr"] == 0.05


def test_bfloat16_runs_the_model_in_bfloat16() -> None:
    kinds = set()
    model = network()
    model[5].register_forward_hook(lambda _m, _a, out: kinds.add(out.dtype))
    run(model, epochs=1, amp=True)
    assert kinds == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_an_average_is_what_is_validated_and_kept() -> None:
    model = network()
    seen: list[dict[str, Tensor]] = []

    def validate(candidate: nn.Module) -> float:
        seen.append(state(candidate))
        return float(len(seen))

    plain = network()
    finetune(plain, loaders()[0], lambda _: 0.0, epochs=1)
    finetune(model, loaders()[0], validate, epochs=1, ema=0.9)
    assert same(state(model), seen[0])
    assert not same(state(model), state(plain))


# -- what stays as it was ----------------------------------------------------------------------------------------------


def test_modes_flags_and_generators_stay() -> None:
    model, teacher = network(), network()
    model[1].eval()
    model[0].weight.requires_grad_(False)
    frozen, taught = model[0].weight.clone(), state(teacher)
    torch.manual_seed(11), random.seed(11), np.random.seed(11)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    train, validate = loaders(own_generator=True)
    shuffling, drawing = train.generator.get_state(), validate.generator.get_state()
    finetune(model, train, validate, epochs=2, teacher=teacher)
    assert [m.training for m in model] == [True, False, True, True, True, True]
    assert all(m.training for m in teacher.modules())
    assert torch.equal(model[0].weight, frozen)
    assert [p.requires_grad for p in model.parameters()] == [False] + [True] * 5
    assert same(state(teacher), taught)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert (np.random.get_state()[1] == before[2]).all()
    assert torch.equal(train.generator.get_state(), shuffling)
    assert torch.equal(validate.generator.get_state(), drawing)
    assert validate.sampler.generator is validate.generator


def test_modes_come_back_after_an_error() -> None:
    model = network().eval()
    with pytest.raises(KilledError):
        run(model, stop=1)
    assert not any(m.training for m in model.modules())


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"epochs": 0}, "epochs is 0"),
        ({"soft": 2.0}, "soft is 2.0"),
        ({"warmup": -1.0}, "warmup is -1.0"),
        ({"ema": 1.0}, "ema is 1.0"),
        ({"loss": lambda model, _: model[0].weight.sum() * torch.nan}, "The loss of epoch 1 is nan"),
        ({"teacher": nn.Identity(), "loss": lambda model, _: model[0].weight.sum()}, "did not call the model"),
    ],
)
def test_refusals(options: dict[str, Any], text: str) -> None:
    with pytest.raises(PlanError, match=text):
        run(network(), **options)


def test_no_data_and_nothing_to_train() -> None:
    with pytest.raises(PlanError, match="train holds no batch"):
        finetune(network(), [], lambda _: 0.0, epochs=1)
    with pytest.raises(PlanError, match="validate holds no batch"):
        finetune(network(), loaders()[0], [], epochs=1)
    with pytest.raises(PlanError, match="nothing to train"):
        finetune(network().requires_grad_(False), loaders()[0], [], epochs=1)
    with pytest.raises(PlanError, match="no loss to train on"):
        finetune(nn.Identity(), [torch.randn(2, 2)], [], epochs=1, optimizer=torch.optim.SGD([torch.ones(1)], 0.1))


def test_a_progress_bar_is_drawn_when_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    run(network(), epochs=2, progress=True)
    drawn = capsys.readouterr().err
    assert "epoch 2/2" in drawn
    run(network(), epochs=1, progress=False)
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU on this machine")
@pytest.mark.parametrize("amp", [False, torch.bfloat16, torch.float16])
def test_on_a_gpu(tmp_path: Path, amp: Any) -> None:
    model = network().cuda()
    options = {"amp": amp, "ema": 0.5, "teacher": network().cuda(), "checkpoint": tmp_path, "clip": 1.0}
    result = run(model, epochs=6, **options)
    assert result.score > 70
    assert run(network().cuda(), epochs=6, **options) == result
    assert {p.device.type for p in model.parameters()} == {"cuda"}
