"""The callback for transformers' Trainer, in real runs of it on a small model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import Dataset

import structprune
from structprune.errors import LoadError, PlanError, UnsupportedModelError
from structprune.masks import PruningEngine, Saliency
from structprune.planning.plan import plans_of

transformers = pytest.importorskip("transformers", reason="needs the extra models: transformers")
pytest.importorskip("accelerate", reason="needs the extra models: accelerate, which the Trainer runs on")

from structprune.integrations.transformers import (  # noqa: E402, what it needs may be missing
    MaskingCallback,
    PruningCallback,
    restore,
    save_pruned,
)

IDS = {"input_ids": torch.arange(8).reshape(1, 8)}
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


class Sentences(Dataset[dict[str, Tensor]]):
    """Which of two tokens is the first."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = torch.arange(8) + 10 * (index % 2)
        return {"input_ids": ids, "labels": torch.tensor(index % 2)}


def network() -> Any:
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=50, hidden_dropout_prob=0.0, **SIZES)
    return transformers.BertForSequenceClassification(config)


def trainer(model: nn.Module, callback: PruningCallback, folder: Path, **options: Any) -> Any:
    settings = {"num_train_epochs": 4, "per_device_train_batch_size": 4, "save_strategy": "epoch", "report_to": "none"}
    settings |= {"disable_tqdm": True, "use_cpu": True, "logging_strategy": "no", "seed": 1}
    arguments = transformers.TrainingArguments(str(folder), **settings | options)
    return transformers.Trainer(
        model, arguments, train_dataset=Sentences(), eval_dataset=Sentences(), callbacks=[callback]
    )


def width(model: Any) -> int:
    return model.bert.encoder.layer[0].intermediate.dense.out_features


def outputs(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(**IDS).logits


class Widths(transformers.TrainerCallback):
    """What the model's width and the optimizer's state were at each step."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen.append(width(kwargs["model"]))
        optimizer = kwargs["optimizer"]
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                assert optimizer.state[parameter]["exp_avg"].shape == parameter.shape


@pytest.mark.parametrize(
    ("times", "options", "widths"),
    [
        ({"epochs": [1, 3]}, {}, [64] * 4 + [48] * 8 + [32] * 4),
        ({"epochs": [0, 1]}, {"gradient_accumulation_steps": 2}, [48] * 2 + [32] * 6),
        ({"steps": [1, 6]}, {"gradient_accumulation_steps": 2}, [64] + [48] * 5 + [32] * 2),
    ],
    ids=["epochs", "accumulated", "steps"],
)
def test_pruned_while_it_trains(tmp_path, times, options, widths) -> None:
    model, seen = network(), Widths()
    run = trainer(model, PruningCallback(IDS, ratio=0.5, schedule="linear", **times), tmp_path, **options)
    run.add_callback(seen)
    run.train()
    assert seen.seen == widths
    assert model.config.intermediate_size == 32
    logged = [entry for entry in run.state.log_history if "macs" in entry]
    assert [entry["params"] for entry in logged] == sorted((e["params"] for e in logged), reverse=True)
    assert logged[-1]["params"] == model.num_parameters()
    assert len(logged) == 3
    assert save_pruned(model, tmp_path / "slim")
    again = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "slim")
    assert torch.allclose(outputs(again), outputs(model), atol=1e-6)


class StopAfterTwo(transformers.TrainerCallback):
    """As if the run had been cut off there."""

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.epoch >= 2


def started(folder: Path) -> tuple[Any, PruningCallback]:
    callback = PruningCallback(IDS, epochs=[1, 3], ratio=0.5, scope="global", schedule="linear")
    return trainer(network(), callback, folder), callback


def test_a_run_goes_on_from_a_checkpoint(tmp_path) -> None:
    """Cut off after two epochs and gone on: the same channels and weights as in one run."""
    whole, _ = started(tmp_path / "whole")
    whole.train()
    first, _ = started(tmp_path / "cut")
    first.add_callback(StopAfterTwo())
    first.train()
    checkpoint = tmp_path / "cut" / "checkpoint-8"
    torch.manual_seed(5)
    second, callback = started(tmp_path / "cut")
    callback.resume(second.model, checkpoint)
    assert width(second.model) == width(first.model) < 64
    second.train(resume_from_checkpoint=str(checkpoint))
    assert structprune.kept(second.model) == structprune.kept(whole.model)
    for name, tensor in whole.model.state_dict().items():
        assert torch.allclose(second.model.state_dict()[name], tensor, atol=1e-5), name

    bare = network()
    restore(bare, checkpoint)
    bare.load_state_dict(load_file(checkpoint / "model.safetensors"))
    assert torch.allclose(outputs(bare), outputs(first.model), atol=1e-6)
    with pytest.raises(PlanError, match="has been pruned 2 times, which are not the first of the 1"):
        restore(second.model, checkpoint)


def test_the_best_checkpoint_is_one_of_the_last_width(tmp_path) -> None:
    """The first epochs' checkpoints are wider: loading one of those into the pruned model would fail."""

    class Worse(transformers.TrainerCallback):
        def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            kwargs["metrics"]["eval_loss"] = state.global_step  # the first one would be the best

    callback = PruningCallback(IDS, epochs=[2], ratio=0.5)
    run = trainer(network(), callback, tmp_path, eval_strategy="epoch", load_best_model_at_end=True)
    run.add_callback(Worse())
    run.train()
    assert run.state.best_model_checkpoint.endswith("checkpoint-12")
    assert width(run.model) == 32


def test_what_a_configuration_cannot_say_is_saved_by_structprune(tmp_path) -> None:
    model = network()
    plan = structprune.plan(model, IDS, ratio={"bert.encoder.layer.0.intermediate.dense": 0.5})
    slim = plan.apply(model)
    assert not save_pruned(slim, tmp_path)
    again = structprune.load(network, tmp_path)
    assert torch.equal(outputs(again), outputs(slim))
    assert save_pruned(model, tmp_path / "whole")


@pytest.mark.parametrize("times", [{}, {"epochs": [1], "steps": [1]}])
def test_one_kind_of_times(times) -> None:
    with pytest.raises(PlanError, match="one of the two"):
        PruningCallback(IDS, **times)


@pytest.mark.parametrize("times", [[], [1, 1], [2, 1], [-1], [0.5], [True]])
def test_times_that_are_none_are_refused(times) -> None:
    with pytest.raises(PlanError, match="in increasing order"):
        PruningCallback(IDS, steps=times)


def test_checkpoints_without_a_whole_record_are_refused(tmp_path) -> None:
    with pytest.raises(LoadError, match="does not exist"):
        restore(network(), tmp_path)
    for text in ("{", "[]", '{"plans": 3}'):
        (tmp_path / "structprune.json").write_text(text)
        with pytest.raises(LoadError, match="is damaged"):
            restore(network(), tmp_path)


def test_training_in_several_processes_is_refused(tmp_path, monkeypatch) -> None:
    run = trainer(network(), PruningCallback(IDS, epochs=[1]), tmp_path)
    monkeypatch.setattr(transformers.TrainingArguments, "world_size", 2)
    with pytest.raises(UnsupportedModelError, match="over processes"):
        run.callback_handler.on_train_begin(run.args, run.state, run.control)
    assert not plans_of(run.model)


def engine_of(model: nn.Module) -> PruningEngine:
    names = ["bert.encoder.layer.0.intermediate.dense.weight", "bert.encoder.layer.1.intermediate.dense.weight"]
    return PruningEngine(model, lambda m: Saliency.magnitude(m, names), [0.2, 0.4, 0.6], names=names)


def test_masks_grow_while_it_trains_and_go_on_from_a_checkpoint(tmp_path):
    whole = network()
    engine = engine_of(whole)
    trainer(whole, MaskingCallback(engine), tmp_path / "whole").train()
    assert engine.taken == 3
    assert engine.mask.kept == round(0.4 * engine.mask.entries)
    resumed = network()
    other = engine_of(resumed)
    callback = MaskingCallback(other)
    checkpoint = tmp_path / "whole" / "checkpoint-8"  # after two of four epochs
    callback.resume(checkpoint)
    assert other.taken == 2
    trainer(resumed, callback, tmp_path / "resumed").train(resume_from_checkpoint=str(checkpoint))
    assert other.taken == 3
    assert other.mask.hamming(engine.mask) == 0
    assert torch.allclose(outputs(whole), outputs(resumed), atol=1e-6)


def test_a_checkpoint_without_masks_is_refused(tmp_path):
    callback = MaskingCallback(engine_of(network()))
    with pytest.raises(LoadError, match="does not exist"):
        callback.resume(tmp_path)
    (tmp_path / "structprune_masks.pt").write_bytes(b"no state")
    with pytest.raises(LoadError, match="damaged"):
        callback.resume(tmp_path)
