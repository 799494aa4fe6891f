"""A callback for transformers' Trainer: it prunes the model in steps while it is trained."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import nn

from structprune.errors import LoadError, PlanError, UnsupportedModelError
from structprune.extras import missing_extra
from structprune.files import write_text, write_whole
from structprune.integrations.course import Course, costs
from structprune.io import save
from structprune.masks.engine import PruningEngine
from structprune.planning.options import PlanKeywords
from structprune.planning.plan import Plan, plans_of, replay
from structprune.pruner import Schedule
from structprune.tracing.trace import ExampleInputs

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ModuleNotFoundError as error:
    if error.name != "transformers":
        raise
    raise missing_extra("This integration", "transformers", "models") from error

# In each checkpoint of the Trainer: what was removed and how much is to go.
RECORD = "structprune.json"
# The same of a `MaskingCallback`: the state of its engine.
MASKS = "structprune_masks.pt"


class PruningCallback(TrainerCallback):
    """Prunes the Trainer's model in place at the times that you name, in the steps of `structprune.Pruner`.

    The optimizer's state goes on with what is left. Gradients are accumulated as before: a step counts once the
    optimizer has taken it. ``macs`` (of the example inputs) and ``params`` go into ``trainer.state.log_history`` when
    training starts and after each step. Which checkpoint is the best is judged anew after each step, since an earlier
    one holds a wider model.

    Checkpoints get a file that says what was removed. To go on from one, build the model as it was before the first
    step and call `resume` before ``trainer.train(resume_from_checkpoint=...)``.

    Args:
        example_inputs: what the model accepts; as a rule a dict of keyword arguments.
        epochs: after how many epochs of training to prune, once for each number; 0 is before the first.
        steps: the same, counted in steps of the optimizer; give one of the two.
        schedule: how much is gone after each step; see `structprune.Pruner`.
        options: those of `structprune.plan`: ``ratio``, ``target``, ``importance``, ``data``, ``outputs`` and others.

    Raises:
        PlanError: what is asked for cannot be planned; when training starts.
        UnsupportedModelError: training is spread over processes; when it starts.
        MissingExtraError: transformers is not installed.

    Example:
        >>> import torch
        >>> from structprune.integrations.transformers import PruningCallback
        >>> callback = PruningCallback({"input_ids": torch.ones(1, 8, dtype=torch.long)}, steps=[100, 200], ratio=0.3)
        >>> # transformers.Trainer(model, arguments, train_dataset=data, callbacks=[callback]).train()
    """

    def __init__(
        self,
        example_inputs: ExampleInputs,
        *,
        epochs: Iterable[int] | None = None,
        steps: Iterable[int] | None = None,
        schedule: Schedule = "cubic",
        **options: Unpack[PlanKeywords],
    ) -> None:
        if (epochs is None) == (steps is None):
            raise PlanError("Say when to prune: after how many epochs, or after how many steps; one of the two.")
        self._inputs = example_inputs
        self._by_epoch = epochs is not None
        times, unit = (epochs, "epochs") if epochs is not None else (steps or (), "steps")
        self._course = Course(times, schedule, options, unit)

    def resume(self, model: nn.Module, checkpoint: str | os.PathLike[str]) -> None:
        """Take a model to the shapes that it had at a checkpoint, and go on from there.

        Args:
            model: the Trainer's model, as it was before the first step; its weights do not matter.
            checkpoint: the folder, such as ``"out/checkpoint-500"``.

        Raises:
            LoadError: the folder holds no record of this callback.
            PlanError: the record belongs to other times, or the model was pruned otherwise.
        """
        self._course.begin(model, self._inputs, _record(checkpoint))

    # -- the events of the Trainer -------------------------------------------------------------------------------

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Decide how much goes in the end, and log what there is."""
        if args.world_size > 1 or args.deepspeed is not None or args.fsdp:
            raise UnsupportedModelError(
                "The Trainer spreads the model over processes and gives callbacks no way to wrap it anew. Prune in one "
                "process, or before training."
            )
        self._course.begin(kwargs["model"], self._inputs)
        self._log(state, kwargs["model"])

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Prune if it is time."""
        if self._by_epoch:
            # The Trainer counts in fractions, and a run that goes on within an epoch begins with it once more.
            self._take(int((state.epoch or 0.0) + 1e-6), state, kwargs)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Prune if it is time."""
        if not self._by_epoch:
            self._take(state.global_step, state, kwargs)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add the record to the checkpoint."""
        folder = Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            write_text(folder / RECORD, json.dumps(self._course.state_dict()))

    # -- its parts -----------------------------------------------------------------------------------------------

    def _take(self, now: int, state: TrainerState, given: Mapping[str, Any]) -> None:
        optimizer = given["optimizer"]
        if self._course.take(now, () if optimizer is None else (optimizer,)):
            state.best_metric = state.best_global_step = state.best_model_checkpoint = None
            self._log(state, given["model"])

    def _log(self, state: TrainerState, model: nn.Module) -> None:
        state.log_history.append({**costs(model, self._inputs), "step": state.global_step})


class MaskingCallback(TrainerCallback):
    """Takes the steps of a `structprune.masks.PruningEngine` at the ends of epochs.

    Checkpoints get a file with the engine's state. To go on from one, call `resume` before
    ``trainer.train(resume_from_checkpoint=...)``.

    Args:
        engine: what masks the Trainer's model.
        every: a step after every so many epochs.

    Raises:
        PlanError: `every` is below 1.

    Example:
        >>> from structprune.masks import PruningEngine, Saliency, gradual
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> callback = MaskingCallback(PruningEngine(model, Saliency.magnitude, gradual(0.75, 5)), every=2)
        >>> # transformers.Trainer(model, arguments, train_dataset=data, callbacks=[callback]).train()
    """

    def __init__(self, engine: PruningEngine, *, every: int = 1) -> None:
        if every < 1:
            raise PlanError(f"every is {every}; it is a number of epochs, from 1.")
        self.engine = engine
        self._every = every

    def resume(self, checkpoint: str | os.PathLike[str]) -> None:
        """Put the masks of a checkpoint on, and go on with the steps after it.

        Args:
            checkpoint: the folder, such as ``"out/checkpoint-500"``.

        Raises:
            LoadError: the folder holds no state of this callback.
            PlanError: the state belongs to another schedule or to other tensors.
        """
        file = Path(checkpoint) / MASKS
        try:
            state = torch.load(file, weights_only=True)
        except FileNotFoundError as error:
            raise LoadError(
                f"{file} does not exist. Give a checkpoint of a Trainer that ran with a MaskingCallback."
            ) from error
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise LoadError(f"{file} is damaged: {error!r}. Give another checkpoint.") from error
        self.engine.load_state_dict(state)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Put the masks on."""
        self.engine.start()

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take a step if it is time."""
        if round(state.epoch or 0.0) % self._every == 0 and not self.engine.done:
            self.engine.step()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add the engine's state to the checkpoint."""
        folder = Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            write_whole(folder / MASKS, lambda draft: torch.save(self.engine.state_dict(), draft))


def restore(model: nn.Module, checkpoint: str | os.PathLike[str]) -> None:
    """Take a model, as it was built, to the shapes that it has in a checkpoint of the Trainer; weights are not loaded.

    Raises:
        LoadError: the folder holds no record of a `PruningCallback`.
        PlanError: the model was pruned otherwise, or further.
    """
    replay(model, map(Plan.from_json, _record(checkpoint)["plans"]))


def save_pruned(model: Any, folder: str | os.PathLike[str]) -> bool:
    """Save a pruned model of transformers through its configuration if that can describe the shapes, else by `save`.

    Args:
        model: a ``PreTrainedModel``, pruned or not.
        folder: where it goes.

    Returns:
        Whether ``from_pretrained`` reads the folder; if not, ``structprune.load`` does, with the function that built
        the model.

    Raises:
        PlanError: the model holds something that cannot be saved.

    Example:
        >>> import tempfile, torch, transformers, structprune
        >>> sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "num_hidden_layers": 1}
        >>> model = transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=50, **sizes))
        >>> ids = {"input_ids": torch.ones(1, 4, dtype=torch.long)}
        >>> slim = structprune.prune(model, ids, axes=["mlp"], ignore=["bert.pooler"])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_pruned(slim, folder)
        True
    """
    plans = plans_of(model)
    if callable(getattr(model, "save_pretrained", None)) and not (plans and "config" in plans[-1].settings.left):
        model.save_pretrained(folder)
        return True
    save(model, folder)
    return False


def _record(checkpoint: str | os.PathLike[str]) -> dict[str, Any]:
    file = Path(checkpoint) / RECORD
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(record["plans"], list):
            raise TypeError("its plans are no list")
    except FileNotFoundError as error:
        raise LoadError(
            f"{file} does not exist. Give a checkpoint of a Trainer that ran with a PruningCallback."
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise LoadError(f"{file} is damaged: {error!r}. Give another checkpoint.") from error
    return record
