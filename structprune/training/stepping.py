"""One step of `finetune`: the loss of a batch, the gradient, the optimizer, the learning rate."""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from structprune.checking import SEED, real, require, shown, whole
from structprune.distributed import rank_and_count
from structprune.errors import PlanError
from structprune.importance.data import call_on_batch
from structprune.inputs import device_of
from structprune.tracing.trace import map_tensors, preserved_random_state
from structprune.training.distillation import distillation_loss
from structprune.training.evaluation import logits_of
from structprune.training.ranks import load_whole_optimizer_state, whole_optimizer_state

Loss = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True, slots=True)
class Settings:
    """What `finetune` was asked for."""

    epochs: int
    soft: float
    temperature: float
    warmup: float
    clip: float | None
    seed: int

    def __post_init__(self) -> None:
        share = real(least=0, most=1)
        limits = {"epochs": whole(1), "soft": share, "warmup": share, "seed": SEED}
        require(asdict(self), temperature=real(above=0), clip=real(above=0).or_none, **limits)

    def factor(self, done: float) -> float:
        """The share of the peak learning rate when this share of all steps is done."""
        if done < self.warmup:
            return done / self.warmup
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (done - self.warmup) / max(1e-12, 1 - self.warmup))))


def sgd(model: nn.Module, lr: float, weight_decay: float) -> Optimizer:
    """SGD that leaves biases, scales and shifts without decay."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise PlanError("No parameter of the model requires a gradient, so there is nothing to train.")
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.SGD([g for g in groups if g["params"]], lr=lr, momentum=0.9, nesterov=True)


def precision_of(amp: bool | torch.dtype) -> torch.dtype | None:
    """The type to compute in by autocast, or None."""
    if isinstance(amp, torch.dtype):
        return amp
    return torch.bfloat16 if amp else None


@dataclass(frozen=True, slots=True)
class Imitation:
    """The loss of a student that learns from its teacher alone: batches need no labels."""

    teacher: nn.Module
    temperature: float

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        """How far the model's logits on the batch are from the teacher's."""
        with torch.no_grad():
            wanted = logits_of(call_on_batch(self.teacher, batch))
        return distillation_loss(logits_of(call_on_batch(model, batch)), wanted, temperature=self.temperature)


def _scalar(name: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor) or value.numel() != 1:
        shape = f"a tensor of the shape {list(value.shape)}" if isinstance(value, Tensor) else shown(value)
        raise PlanError(f"{name} returned {shape}; it returns a scalar tensor, the mean over the batch.")
    return value


@dataclass
class Step:
    """One step of the optimizer on one batch."""

    model: nn.Module
    loss: Loss
    teacher: nn.Module | None
    penalty: Callable[[nn.Module], Tensor] | None
    optimizer: Optimizer
    settings: Settings
    precision: torch.dtype | None
    scaler: torch.amp.GradScaler = field(init=False)

    def __post_init__(self) -> None:
        self.device = device_of(self.model)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision is torch.float16)
        self.peaks = [float(group["lr"]) for group in self.optimizer.param_groups]
        self._output: Any = None

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision to compute in."""
        if self.precision is None:
            return nullcontext()
        return torch.autocast(self.device.type, self.precision)

    def moved(self, batch: Any) -> Any:
        """The batch on the model's device."""
        return map_tensors(lambda tensor: tensor.to(self.device, non_blocking=True), batch)

    def __call__(self, batch: Any, done: float) -> Tensor:
        """The loss of the batch; `done` is the share of all steps that came before."""
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * self.settings.factor(done)
        batch = self.moved(batch)
        value = self._total(batch)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(value).backward()
        if self.settings.clip is not None:
            self.scaler.unscale_(self.optimizer)
            trained = [p for group in self.optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(trained, self.settings.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return value.detach()

    def _total(self, batch: Any) -> Tensor:
        with self.autocast():
            value = self.loss(self.model, batch) if self.teacher is None else self._taught(self.teacher, batch)
            value = _scalar("loss", value)
            if self.penalty is not None:
                value = value + _scalar("penalty", self.penalty(self.model))
        return value

    def _taught(self, teacher: nn.Module, batch: Any) -> Tensor:
        with torch.no_grad():
            wanted = logits_of(call_on_batch(teacher, batch))
        handle = self.model.register_forward_hook(self._look)
        try:
            hard = self.loss(self.model, batch)
        finally:
            handle.remove()
        output, self._output = self._output, None
        if output is None:
            raise PlanError("loss= did not call the model that it was given, so there are no logits to teach.")
        taught = distillation_loss(logits_of(output), wanted, temperature=self.settings.temperature)
        return (1 - self.settings.soft) * hard + self.settings.soft * taught

    def _look(self, _module: nn.Module, _args: Any, output: Any) -> None:
        self._output = output

    # -- state ---------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """State dicts of the optimizer, of the loss scaling, and of a penalty that has one."""
        held = {"optimizer": whole_optimizer_state(self.optimizer), "scaler": self.scaler.state_dict()}
        state_dict = getattr(self.penalty, "state_dict", None)
        return held if state_dict is None else {**held, "penalty": state_dict()}

    def load(self, state: Any) -> None:
        """Go on from what `state` gave."""
        load_whole_optimizer_state(self.optimizer, state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        load = getattr(self.penalty, "load_state_dict", None)
        if load is not None:
            load(state["penalty"])


# -- randomness that begins anew with each epoch, so that a run that goes on after a kill is the run that was killed ---


def _owners(data: Any) -> Iterator[Any]:
    """What may shuffle: the loader itself, and its samplers."""
    yield data
    for name in ("sampler", "batch_sampler", "dataset"):
        part = getattr(data, name, None)
        if part is not None:
            yield part
            inner = getattr(part, "sampler", None)
            if inner is not None:
                yield inner


def _generators(loaders: Iterable[Any]) -> list[torch.Generator]:
    held = (getattr(owner, "generator", None) for data in loaders for owner in _owners(data))
    return list({id(each): each for each in held if isinstance(each, torch.Generator)}.values())


def _mixed(*numbers: int) -> int:
    """A seed of 63 bits, made of some numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def begin_epoch(train: Any, validate: Any, seed: int, epoch: int) -> None:
    """Set all random generators by seed and epoch: those of torch, numpy and Python, and those of the loaders.

    Samplers of `train` that have ``set_epoch`` (as ``DistributedSampler`` does) are told the epoch. Ranks that train
    together drop and augment each in its own way; the generators of loaders are the same on all of them, since they may
    shuffle what is shared out afterwards.
    """
    mixed = _mixed(seed, epoch)
    rank = rank_and_count()[0]
    own = _mixed(seed, epoch, rank) if rank else mixed
    torch.manual_seed(own)
    random.seed(own)
    np.random.seed(own % 2**32)
    for generator in _generators((train, validate)):
        generator.manual_seed(mixed)
    for owner in _owners(train):
        tell = getattr(owner, "set_epoch", None)
        if callable(tell):
            tell(epoch)


@contextmanager
def preserved(*loaders: Any) -> Generator[None]:
    """All of these generators are afterwards as they were."""
    python, legacy = random.getstate(), np.random.get_state()
    own = [(generator, generator.get_state()) for generator in _generators(loaders)]
    try:
        with preserved_random_state():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)
        for generator, state in own:
            generator.set_state(state)


# -- the progress bar of `finetune` ----------------------------------------------------------------------------------


@contextmanager
def bar(progress: bool | None, epochs: int) -> Generator[Callable[..., None]]:
    """A function of the epochs done, a score if there is a new one, and the share of the running epoch."""
    if not (sys.stderr.isatty() if progress is None else progress):
        yield lambda _done, _score, _share=0.0: None
        return
    # Here, since importing rich takes longer than most plans.
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=console.is_terminal) as drawn:
        task = drawn.add_task("fine-tuning", total=epochs)

        def show(done: int, score: float | None, share: float = 0.0) -> None:
            said = None if score is None else f"epoch {done}/{epochs}: {score:.2f}"
            drawn.update(task, completed=done + share, description=said)

        yield show
