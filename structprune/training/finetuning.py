"""`finetune`: a pruned model trained further, with one call."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from structprune.checking import (
    DATA,
    FLAG,
    MODEL,
    ON_BATCH,
    OPTIMIZER,
    PATH,
    Check,
    function,
    instance,
    real,
    require,
)
from structprune.distributed import all_reduced, gathered, nobody_failed_yet, rank_and_count
from structprune.errors import LoadError, PlanError
from structprune.importance.data import size_of
from structprune.inputs import modes_kept
from structprune.training.average import WeightAverage, fill, held_by, tensors_of
from structprune.training.checkpoint import State, restore, store
from structprune.training.evaluation import default_loss, score_of
from structprune.training.ranks import (
    inside,
    is_sharded,
    mean_over_ranks,
    part_of,
    require_equal_lengths,
    sharded_like,
    training_together,
    whole_of,
)
from structprune.training.stepping import (
    Imitation,
    Loss,
    Settings,
    Step,
    bar,
    begin_epoch,
    precision_of,
    preserved,
    sgd,
)

_OF_MODEL = function("model")
Validation = Iterable[Any] | Callable[[nn.Module], float]


@dataclass(frozen=True, slots=True)
class Epoch:
    """One epoch of `finetune`.

    Attributes:
        number: counted from 1.
        loss: mean over the training samples, with all that was added to it.
        score: on the validation data, the higher the better.
        rate: learning rate of the first parameter group at its end.
        seconds: that it took, validation included.
    """

    number: int
    loss: float
    score: float
    rate: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Finetuned:
    """What came of `finetune`.

    Attributes:
        score: the best on the validation data; the model has the weights of that epoch.
        epoch: which one that was, counted from 1.
        history: all epochs, also those before a resumption.
    """

    score: float
    epoch: int
    history: tuple[Epoch, ...]


def finetune(
    model: nn.Module,
    train: Iterable[Any],
    validate: Validation,
    *,
    epochs: int,
    loss: Loss | None = None,
    teacher: nn.Module | None = None,
    temperature: float = 4.0,
    soft: float = 0.7,
    penalty: Callable[[nn.Module], Tensor] | None = None,
    optimizer: Optimizer | None = None,
    lr: float = 0.01,
    weight_decay: float = 5e-4,
    warmup: float = 0.05,
    clip: float | None = None,
    amp: bool | torch.dtype = False,
    ema: float | None = None,
    on_epoch: Callable[[int], None] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> Finetuned:
    """Train a model further, in place, and leave it with the weights of its best epoch.

    SGD with Nesterov's momentum, a linear warm-up, then a cosine down to zero. The best epoch is chosen by `validate`:
    give a part of the training data that is not trained on (see `split`), never the test set. Mode, flags of gradients,
    and random generators are afterwards as they were; of a teacher everything is.

    Several ranks of ``torch.distributed`` train one model that is wrapped in ``DistributedDataParallel``, or sharded by
    ``torch.distributed.fsdp.fully_shard``: each calls this with its share of the data, in equally many batches, and
    with the same checkpoint. Losses and scores are those of all shares, statistics of norms are averaged before each
    validation, and all ranks keep the same epoch. The first rank writes the checkpoint, which holds whole tensors. A
    model that is neither wrapped nor sharded is trained by each rank for itself, as in a single process.

    Args:
        model: on the device to train on; its parameters that require gradients are trained.
        train: batches, run through once an epoch: pairs of inputs and class numbers, or dicts from which the model
            makes a loss of its own; anything with `loss`. A ``DataLoader``, a list.
        validate: batches of the same kind, scored by accuracy in percent where they are pairs with class numbers and by
            minus the mean loss otherwise; or a function of the model that returns a score, the higher the better. The
            model is in eval mode, and not in its ``DistributedDataParallel``.
        epochs: how often to go through `train`, from 1.
        loss: called with the model and a batch, returns a scalar, the mean over the batch.
        teacher: a model of the same classes, mostly the dense one: its soft labels are learned along.
        temperature: see `distillation_loss`.
        soft: share of the teacher's loss, from 0 to 1; the rest is `loss`. With 1 no labels are needed: batches are
            what the model takes, and validation without labels tells minus the distance to the teacher.
        penalty: called with the model, returns a scalar to add to the loss (see `GroupLasso`). What it holds in
            ``state_dict`` goes into the checkpoint.
        optimizer: over the model's parameters, in place of SGD; its rates are the peaks of the schedule.
        lr: peak learning rate of SGD. Soft labels pull on every sample, also on those that are classified rightly
            already, so with a teacher a lower rate (a half, say) does what this one does without.
        weight_decay: of SGD, for parameters with two dimensions or more.
        warmup: share of all steps before the peak.
        clip: largest norm of the gradient.
        amp: whether to compute in bfloat16 by autocast, or the type. With float16 the loss is scaled.
        ema: decay of a moving average of the weights (0.999, say), which is then validated and kept; None for none.
        on_epoch: called with the number of the epoch at its end, before validation: ``SoftPruner.step``, say.
        checkpoint: a folder. After each epoch all that is needed to go on is written there; a run that finds such a
            state goes on from it, and on a CPU ends, bit for bit, as if it had not been interrupted. (Workers that a
            ``DataLoader`` keeps over epochs have random generators of their own: do not keep them then.)
        seed: of shuffling, augmentation and dropout in each epoch.
        progress: whether to draw a progress bar; by default only if standard error is a terminal.

    Returns:
        The best score, its epoch and the history.

    Raises:
        PlanError: a setting is out of its range, there is nothing to train or no data, the loss is not finite, or
            another rank has failed or has other numbers of batches. The model then has the weights of its best epoch so
            far, or those that it had.
        LoadError: the checkpoint is damaged, or of another run.

    Example:
        >>> import torch, structprune
        >>> model = torch.nn.Linear(4, 2)
        >>> data = [(torch.randn(8, 4), torch.randint(2, (8,))) for _ in range(4)]
        >>> result = finetune(model, data[:3], data[3:], epochs=2, progress=False)
        >>> len(result.history), result.epoch in (1, 2)
        (2, True)
    """
    _require(locals())
    settings = Settings(epochs, soft, temperature, warmup, clip, seed)
    if optimizer is None:
        optimizer = sgd(model, lr, weight_decay)
    if loss is None and teacher is not None and soft == 1:
        step = Step(model, Imitation(teacher, temperature), None, penalty, optimizer, settings, precision_of(amp))
    else:
        step = Step(model, loss or default_loss, teacher, penalty, optimizer, settings, precision_of(amp))
    average = None if ema is None else WeightAverage(model, ema)
    folder = None if checkpoint is None else Path(checkpoint)
    run = _Run(model, train, validate, step, average, folder, settings)
    with ExitStack() as stack:
        stack.enter_context(preserved(train, validate))
        stack.enter_context(modes_kept(model, *([] if teacher is None else [teacher])))
        if teacher is not None:
            teacher.eval()
        stack.enter_context(training_together(model))
        shown = stack.enter_context(bar(progress if rank_and_count()[0] == 0 else False, epochs))
        run.go(on_epoch, shown)
    return Finetuned(run.best, run.best_epoch, tuple(run.history))


def _require(given: Mapping[str, Any]) -> None:
    """Check what `finetune` was given; `Settings` checks what is written into a checkpoint."""
    validation = Check(
        lambda value: DATA.fits(value) or function("model").fits(value), "give batches, or a function of the model"
    )
    types = instance((bool, torch.dtype), "give True, False or a type of floating point")
    require(given, model=MODEL, train=DATA, validate=validation, teacher=MODEL.or_none, penalty=_OF_MODEL.or_none)
    require(given, loss=ON_BATCH.or_none, optimizer=OPTIMIZER.or_none, on_epoch=function("epoch").or_none)
    require(given, lr=real(least=0), weight_decay=real(least=0), ema=real(least=0, below=1).or_none)
    require(given, amp=types, checkpoint=PATH.or_none, progress=FLAG.or_none)
    if given["checkpoint"] is not None:
        Path(given["checkpoint"]).mkdir(parents=True, exist_ok=True)  # what cannot be made fails before hours of work
    if isinstance(given["amp"], torch.dtype) and not given["amp"].is_floating_point:
        raise PlanError(f"amp is {given['amp']}; {types.allowed}.")


@dataclass
class _Run:
    """Epochs, validation, the best weights, and the state on disk."""

    model: nn.Module
    train: Iterable[Any]
    validate: Validation
    step: Step
    average: WeightAverage | None
    folder: Path | None
    settings: Settings

    def __post_init__(self) -> None:
        self.history: list[Epoch] = []
        self.best, self.best_epoch = -math.inf, 0
        self.best_tensors = {name: value.clone() for name, value in tensors_of(self.model).items()}

    def go(self, on_epoch: Callable[[int], None] | None, shown: Callable[..., None]) -> None:
        require_equal_lengths(train=self.train, **({"validate": self.validate} if is_sharded(self.model) else {}))
        self._resume()
        try:
            for epoch in range(len(self.history), self.settings.epochs):
                self._go_through(epoch, on_epoch, shown)
        finally:  # after an error too: the last weights may be NaN
            fill(self.model, self.best_tensors)
            self.step.optimizer.zero_grad(set_to_none=True)
            for group, peak in zip(self.step.optimizer.param_groups, self.step.peaks, strict=True):
                group["lr"] = peak

    def _go_through(self, epoch: int, on_epoch: Callable[[int], None] | None, shown: Callable[..., None]) -> None:
        begin = time.perf_counter()
        shown(epoch, None)
        loss = self._epoch(epoch, shown)
        if on_epoch is not None:
            on_epoch(epoch + 1)
        score = self._score()
        rate = float(self.step.optimizer.param_groups[0]["lr"])
        self.history.append(Epoch(epoch + 1, loss, score, rate, time.perf_counter() - begin))
        shown(epoch + 1, score)
        self._save()

    def _epoch(self, epoch: int, shown: Callable[..., None]) -> float:
        begin_epoch(self.train, self.validate, self.settings.seed, epoch)
        self.model.train()
        length = getattr(self.train, "__len__", None)
        # Without a length the rate changes from epoch to epoch only.
        steps = length() if length is not None else math.inf
        losses: list[Tensor] = []
        count = 0
        for number, batch in enumerate(self.train):
            nobody_failed_yet(f"step {number + 1} of epoch {epoch + 1}")
            done = (epoch + min(1.0, (number + 0.5) / steps)) / self.settings.epochs
            size = size_of(batch, "train")
            losses.append(self.step(batch, done) * size)
            if self.average is not None:
                self.average.update(self.model)
            count += size
            shown(epoch, None, (number + 1) / steps)
        if not count:
            raise PlanError("train holds no batch. If it is a generator, give something that can be started again.")
        # Read once an epoch: each reading would wait for the device.
        sums = torch.stack([torch.stack(losses).cpu().double().sum(), torch.tensor(float(count), dtype=torch.float64)])
        total, samples = all_reduced(sums).tolist()
        mean = total / samples
        if not math.isfinite(mean):
            raise PlanError(
                f"The loss of epoch {epoch + 1} is {mean}. Look at the data of train, lower lr, or clip=1.0."
            )
        return mean

    def _score(self) -> float:
        """Validate, and keep the weights if they are the best so far."""
        self.model.eval()
        self._share_statistics()
        with self.average.lent(self.model) if self.average is not None else nullcontext():
            score = score_of(inside(self.model), self.validate, self.step.loss, self.step.moved, self.step.autocast)
            if not math.isfinite(score):
                raise PlanError(f"The score of validate is {score}. Check its data, lower lr, or give clip=1.0.")
            if score > self.best:
                self.best, self.best_epoch = score, len(self.history) + 1
                self.best_tensors = {name: value.clone() for name, value in tensors_of(self.model).items()}
        return score

    def _share_statistics(self) -> None:
        """Each rank has seen its own samples: the statistics of norms, and averages of them, become the mean of all."""
        model = inside(self.model)
        mean_over_ranks(model.buffers())
        if self.average is not None:
            parameters = {name for name, _ in model.named_parameters()}
            mean_over_ranks(value for name, value in self.average.values.items() if name not in parameters)

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def _asked(self) -> dict[str, Any]:
        """What must be the same for a run to go on."""
        shapes = {name: list(value.shape) for name, value in held_by(self.model).items()}
        decay = None if self.average is None else self.average.decay
        penalty, precision = self.step.penalty, self.step.precision
        return {
            **asdict(self.settings),
            "ema": decay,
            "amp": None if precision is None else str(precision),
            "teacher": self.step.teacher is not None or isinstance(self.step.loss, Imitation),
            "optimizer": type(self.step.optimizer).__name__,
            "penalty": type(penalty).__name__ if hasattr(penalty, "state_dict") else None,
            "peaks": self.step.peaks,
            "shapes": shapes,
        }

    def _save(self) -> None:
        if self.folder is None:
            return
        parts = {"model": tensors_of(self.model), "best": self.best_tensors}
        record: dict[str, Any] = {
            "asked": self._asked(),
            "best": [self.best, self.best_epoch],
            "history": [asdict(epoch) for epoch in self.history],
        }
        if self.average is not None:
            parts["average"] = self.average.values
            record["updates"] = self.average.updates
        held = held_by(self.model)
        tensors = {
            part: {name: whole_of(value, held[name]) if is_sharded(self.model) else value for name, value in of.items()}
            for part, of in parts.items()
        }
        state = State(len(self.history), tensors, self.step.state(), record)
        if rank_and_count()[0] == 0:
            store(self.folder, state)

    def _resume(self) -> None:
        state = None if self.folder is None else restore(self.folder)
        epochs = gathered(None if state is None else state.epoch)
        if len(set(epochs)) > 1:
            raise LoadError(
                f"The ranks find checkpoints after {epochs} epochs in {self.folder}. Give one that all of them see."
            )
        if state is None:
            return
        asked, before = self._asked(), state.record["asked"]
        other = [name for name in asked if asked[name] != before.get(name)]
        if other:
            what = ", ".join(name if name == "shapes" else f"{name} {before.get(name)}" for name in other)
            raise LoadError(
                f"The checkpoint in {self.folder} is of a run with other settings: {what}. Give the same ones to go "
                "on, or another folder to begin anew."
            )
        fill(self.model, self._parts(state.tensors["model"]))
        self.best_tensors = self._parts(state.tensors["best"])
        self.best, self.best_epoch = state.record["best"]
        self.history = [Epoch(**epoch) for epoch in state.record["history"]]
        if self.average is not None:
            self.average.values = self._parts(state.tensors["average"])
            self.average.updates = state.record["updates"]
        self.step.load(state.optimizer)

    def _parts(self, wholes: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of whole tensors what this rank holds of them, on the model's device."""
        held, sharded = held_by(self.model), is_sharded(self.model)
        return {
            name: (part_of(sharded_like(value, held[name])) if sharded else value).to(self.step.device)
            for name, value in wholes.items()
        }
