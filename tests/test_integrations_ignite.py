"""The handler for Ignite, in real runs of an engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import structprune
from structprune.errors import PlanError, UnsupportedModelError

ignite = pytest.importorskip("ignite", reason="needs the extra ignite: pytorch-ignite")

from ignite.engine import Engine, Events  # noqa: E402, what it needs may be missing
from ignite.handlers import Checkpoint, DiskSaver, EMAHandler  # noqa: E402, what it needs may be missing

from structprune.integrations.ignite import PruningHandler  # noqa: E402, what it needs may be missing

X = torch.randn(1, 4)


class Run:
    """A model, what trains it, and what prunes it."""

    def __init__(self, seed: int = 0, average: bool = False) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-2)
        self.trainer = Engine(self.update)
        self.ema = EMAHandler(self.model, momentum=0.1) if average else None
        self.handler = PruningHandler(
            self.model,
            X,
            epochs=[1, 3],
            optimizers=self.optimizer,
            averages=[] if self.ema is None else [self.ema.ema_model],
            schedule="linear",
            scope="global",
            target={"params": 0.4},
        ).attach(self.trainer)
        if self.ema is not None:
            self.ema.attach(self.trainer)
        self.widths: list[int] = []
        self.trainer.add_event_handler(Events.EPOCH_COMPLETED, self.look)

    def update(self, engine: Any, batch: Any) -> float:
        self.optimizer.zero_grad()
        loss = (self.model(batch) - batch.sum(1, keepdim=True)).square().mean()
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def look(self) -> None:
        self.widths.append(self.model[0].out_features)
        for parameter in self.model.parameters():
            assert self.optimizer.state[parameter]["exp_avg"].shape == parameter.shape
        found = structprune.cost(self.model, X)
        assert self.trainer.state.metrics == {"macs": found.macs, "params": found.params}

    @property
    def states(self) -> dict[str, Any]:
        return {"pruning": self.handler, "model": self.model, "optimizer": self.optimizer, "trainer": self.trainer}


def batches() -> list[Any]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 4, generator=generator) for _ in range(4)]


def saved(folder: Path) -> Path:
    """The checkpoint of a run that was cut off after two epochs."""
    run = Run()
    keep = Checkpoint(run.states, DiskSaver(folder, create_dir=True, require_empty=False))
    run.trainer.add_event_handler(Events.EPOCH_COMPLETED, keep)
    run.trainer.run(batches(), max_epochs=2)
    return folder / str(keep.last_checkpoint)


def test_pruned_while_it_trains() -> None:
    run = Run(average=True)
    run.trainer.run(batches(), max_epochs=5)
    assert run.widths[0] == 32
    assert run.widths[1] == run.widths[2] > run.widths[3] == run.widths[4]
    assert run.trainer.state.metrics["params"] <= 0.4 * 1249
    shapes = [parameter.shape for parameter in run.model.parameters()]
    assert [parameter.shape for parameter in run.ema.ema_model.parameters()] == shapes
    assert structprune.kept(run.ema.ema_model) == structprune.kept(run.model)


def test_a_run_goes_on_from_a_checkpoint(tmp_path) -> None:
    """Cut off after two epochs and gone on: the same channels and weights as in one run."""
    whole = Run()
    whole.trainer.run(batches(), max_epochs=5)
    second = Run(seed=7, average=True)  # other weights would decide otherwise how much goes where
    Checkpoint.load_objects(second.states, saved(tmp_path))
    assert structprune.kept(second.ema.ema_model) == structprune.kept(second.model) != {}
    second.trainer.run(batches(), max_epochs=5)
    assert len(second.widths) == 3
    assert structprune.kept(second.model) == structprune.kept(whole.model)
    for name, tensor in whole.model.state_dict().items():
        assert torch.allclose(second.model.state_dict()[name], tensor, atol=1e-5), name


def test_a_checkpoint_of_a_wider_model_is_refused(tmp_path) -> None:
    run = Run()
    run.trainer.run(batches(), max_epochs=4)
    with pytest.raises(PlanError, match="has been pruned 2 times, which are not the first of the 1"):
        Checkpoint.load_objects(run.states, saved(tmp_path))


def test_an_optimizer_of_another_model_is_left_alone() -> None:
    model, other = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), nn.Linear(3, 3)
    optimizers = [torch.optim.SGD(model.parameters(), momentum=0.9), torch.optim.SGD(other.parameters())]
    trainer = Engine(lambda engine, batch: None)
    PruningHandler(model, X, epochs=[0], optimizers=optimizers, ratio=0.5).attach(trainer)
    trainer.run([0], max_epochs=1)
    assert model[0].out_features == 4


def test_what_cannot_be_pruned_in_place_is_refused_at_the_start() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    parallel = type("DistributedDataParallel", (nn.Module,), {"__module__": "torch.nn.parallel.distributed"})()
    parallel.module = model
    with pytest.raises(UnsupportedModelError, match="prune without inplace"):
        PruningHandler(parallel, X, epochs=[1], ratio=0.5)
    with pytest.raises(PlanError, match="epochs is"):
        PruningHandler(model, X, epochs=[3, 1], ratio=0.5)
