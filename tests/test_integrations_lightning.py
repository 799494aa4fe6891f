"""The callback for Lightning, in real fits of a small module."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import structprune
from structprune.errors import PlanError, UnsupportedModelError
from structprune.masks import PruningEngine, Saliency
from structprune.planning.plan import plans_of

lightning = pytest.importorskip("lightning.pytorch", reason="needs the extra lightning")

from lightning.pytorch.callbacks import (  # noqa: E402, what it needs may be missing
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger  # noqa: E402, what it needs may be missing

from structprune.integrations.lightning import MaskingCallback, PruningCallback, restore  # noqa: E402, what it needs may be missing

pytestmark = [
    # Sixteen rows need no processes to load them.
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    # A run that goes on from a checkpoint need not save any itself.
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]

X = torch.randn(1, 4)
WIDTHS = {"epochs": [1, 3], "ratio": 0.5, "schedule": "linear"}


def body(width: int = 32) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 2))


class Module(lightning.LightningModule):
    """A small regression."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = body()
        self.head = nn.Linear(2, 1)
        self.example_input_array = X
        self.widths: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.model(x))

    def training_step(self, batch: Any, index: int) -> Tensor:
        return (self(batch[0]) - batch[1]).square().mean()

    def test_step(self, batch: Any, index: int) -> None:
        self.log("loss", (self(batch[0]) - batch[1]).square().mean())

    def on_train_epoch_end(self) -> None:
        self.widths.append(self.model[0].out_features)
        for optimizer in self.trainer.optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    for value in optimizer.state[parameter].values():
                        assert value.numel() == 1 or value.shape == parameter.shape

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class Restoring(Module):
    """The same, for ``load_from_checkpoint``."""

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        restore(self, checkpoint)


def loader() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(16, 4, generator=generator)
    return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=4)


def trainer(folder: Path, epochs: int, *callbacks: Any, **options: Any) -> Any:
    settings = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    settings |= {"default_root_dir": folder, "enable_checkpointing": False, "log_every_n_steps": 1}
    return lightning.Trainer(max_epochs=epochs, callbacks=list(callbacks), **settings | options)


@pytest.mark.parametrize("network", ["", "model"], ids=["module", "part"])
def test_pruned_while_it_trains(tmp_path, network) -> None:
    module = Module()
    callback = PruningCallback(network=network, **WIDTHS)
    logger = CSVLogger(tmp_path)
    # The batches of the last round of accumulation are fewer.
    run = trainer(tmp_path, 5, callback, logger=logger, accumulate_grad_batches=3)
    run.fit(module, loader())
    assert module.widths == [32, 24, 24, 16, 16]
    metrics = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    assert sorted(metrics[0].split(",")) == ["macs", "params", "step"]
    assert len(metrics) == 4
    wanted = structprune.cost(module.model if network else module, X)
    assert {str(wanted.macs), str(wanted.params)} < set(metrics[-1].split(","))
    assert "on_load_checkpoint" not in vars(module)
    assert module.trainer is run


@pytest.mark.parametrize("weights_only", [False, True], ids=["whole", "weights"])
def test_checkpoints_of_every_kind_are_loaded(tmp_path, weights_only) -> None:
    module = Restoring()
    keep = ModelCheckpoint(tmp_path, save_weights_only=weights_only)
    run = trainer(tmp_path, 4, PruningCallback(network="model", **WIDTHS), keep, enable_checkpointing=True)
    run.fit(module, loader())
    again = Restoring.load_from_checkpoint(keep.best_model_path)
    assert again.model[0].out_features == 16
    assert torch.equal(again.cpu()(X), module(X))
    assert structprune.kept(again.model) == structprune.kept(module.model)
    # Without a fit: the callback alone is enough.
    fresh = Module()
    tested = trainer(tmp_path, 4, PruningCallback(network="model", **WIDTHS))
    tested.test(fresh, loader(), ckpt_path=keep.best_model_path, verbose=False)
    assert torch.equal(fresh(X), module(X))


def test_a_checkpoint_saved_after_the_fit(tmp_path) -> None:
    module = Restoring()
    run = trainer(tmp_path, 2, PruningCallback(network="model", **WIDTHS))
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "late.ckpt")
    assert torch.equal(Restoring.load_from_checkpoint(tmp_path / "late.ckpt").cpu()(X), module(X))


def test_a_run_goes_on_from_a_checkpoint(tmp_path) -> None:
    """Cut off after two epochs and gone on: the same channels and weights as in one run."""

    def callback() -> PruningCallback:
        return PruningCallback(network="model", scope="global", **WIDTHS)

    whole = Module()
    trainer(tmp_path, 5, callback()).fit(whole, loader())
    keep = ModelCheckpoint(tmp_path)
    trainer(tmp_path, 2, callback(), keep, enable_checkpointing=True).fit(Module(), loader())
    second = Module()
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.normal_()  # what was decided at the start cannot be decided again from these
    trainer(tmp_path, 5, callback()).fit(second, loader(), ckpt_path=keep.best_model_path)
    assert len(second.widths) == 3
    assert structprune.kept(second.model) == structprune.kept(whole.model)
    for name, tensor in whole.state_dict().items():
        assert torch.allclose(second.state_dict()[name], tensor, atol=1e-5), name


def test_a_checkpoint_of_a_wider_module_is_refused(tmp_path) -> None:
    module = Module()
    keep = ModelCheckpoint(tmp_path, save_top_k=-1)
    run = trainer(tmp_path, 4, PruningCallback(network="model", **WIDTHS), keep, enable_checkpointing=True)
    run.fit(module, loader())
    early = next(str(path) for path in tmp_path.glob("epoch=1*.ckpt"))
    with pytest.raises(PlanError, match="has been pruned 2 times, which are not the first of the 1"):
        run.test(module, loader(), ckpt_path=early, verbose=False)


def test_several_optimizers_of_which_one_trains_the_network(tmp_path) -> None:
    class Manual(Module):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, index: int) -> None:
            loss = (self(batch[0]) - batch[1]).square().mean()
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.model.parameters()), torch.optim.SGD(self.head.parameters(), momentum=0.9)

    module = Manual()
    trainer(tmp_path, 4, PruningCallback(network="model", **WIDTHS)).fit(module, loader())
    assert module.widths == [32, 24, 24, 16]


def test_a_module_with_hooks_of_its_own_keeps_them(tmp_path) -> None:
    class Own(Module):
        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["mine"] = self.model[0].out_features

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            self.found = checkpoint["mine"]
            assert self.model[0].out_features == self.found  # the shapes are there first

    keep = ModelCheckpoint(tmp_path)
    callback = PruningCallback(network="model", **WIDTHS)
    trainer(tmp_path, 2, callback, keep, enable_checkpointing=True).fit(Own(), loader())
    second = Own()
    trainer(tmp_path, 3, PruningCallback(network="model", **WIDTHS)).fit(
        second, loader(), ckpt_path=keep.best_model_path
    )
    assert second.found == 24


@pytest.mark.parametrize(
    "other", [lambda: StochasticWeightAveraging(1e-3), WeightAveraging], ids=["stochastic", "average"]
)
def test_averages_of_weights_are_refused(tmp_path, other) -> None:
    with pytest.raises(UnsupportedModelError, match="WeightAveraging holds an average"):
        trainer(tmp_path, 2, PruningCallback(**WIDTHS), other()).fit(Module(), loader())


def test_strategies_that_shard_are_refused(tmp_path) -> None:
    run = trainer(tmp_path, 2)
    callback, module = PruningCallback(**WIDTHS), Module()
    sharded = type("Sharded", (), {"restore_checkpoint_after_setup": True})()
    run = type("Run", (), {"strategy": sharded, "callbacks": [callback]})()
    with pytest.raises(UnsupportedModelError, match="Sharded spreads the parameters"):
        callback.setup(run, module, "fit")
    assert not plans_of(module)


def test_processes_that_end_with_the_fit_are_refused(tmp_path) -> None:
    """Their weights are brought back into a module that nobody has pruned."""
    run = trainer(tmp_path, 2, PruningCallback(**WIDTHS), strategy="ddp_fork", devices=1)
    with pytest.raises(UnsupportedModelError, match="strategy='ddp'"):
        run.callbacks[0].setup(run, Module(), "fit")


def test_without_example_inputs(tmp_path) -> None:
    module = Module()
    module.example_input_array = None
    with pytest.raises(PlanError, match="example_input_array"):
        trainer(tmp_path, 2, PruningCallback(**WIDTHS)).fit(module, loader())


TWO = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from support.torchvision_shim import make_torchvision_importable
make_torchvision_importable()
import torch
from structprune.integrations.lightning import PruningCallback
from test_integrations_lightning import Module, body, loader, trainer, WIDTHS

class Apart(Module):
    def on_fit_start(self):
        # Ranks that decided for themselves would decide unlike.
        torch.manual_seed(self.global_rank)

    def on_train_end(self):
        weights = torch.cat([p.detach().flatten() for p in self.parameters()])
        others = self.all_gather(weights)
        assert torch.equal(others[0], others[1]), "the processes differ"
        assert self.widths == [32, 24, 24, 16], self.widths
        # A file each: lines that two processes print at once run into each other.
        Path({folder!r}, f"rank {{self.global_rank}} done").touch()

callback = PruningCallback(importance="random", **WIDTHS)
trainer({folder!r}, 4, callback, strategy="ddp", devices=2).fit(Apart(), loader())
"""


def test_two_processes_carry_out_one_plan(tmp_path) -> None:
    script = tmp_path / "two.py"  # Lightning starts it once more
    script.write_text(TWO.format(tests=str(Path(__file__).parent), folder=str(tmp_path)))
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(file.name for file in tmp_path.glob("rank * done")) == ["rank 0 done", "rank 1 done"]


def test_the_older_package_will_do_too(tmp_path) -> None:
    older = pytest.importorskip("pytorch_lightning", reason="the older name of Lightning is not installed")

    class Older(older.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = body()

        def training_step(self, batch: Any, index: int) -> Tensor:
            return self.model(batch[0]).square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=1e-2)

    module = Older()
    run = older.Trainer(
        max_epochs=4, callbacks=[PruningCallback(example_inputs=X, network="model", **WIDTHS)], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
    )  # fmt: skip
    run.fit(module, loader())
    assert module.model[0].out_features == 16


def masked_fit(folder: Path, epochs: int, checkpoint: str | None = None) -> tuple[Module, PruningEngine]:
    module = Module()
    engine = PruningEngine(module.model, Saliency.magnitude, [0.2, 0.4, 0.6])
    callbacks = [
        MaskingCallback(engine, every=2),
        ModelCheckpoint(folder, filename="last", save_on_train_epoch_end=True),
    ]
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
    fit = lightning.Trainer(max_epochs=epochs, callbacks=callbacks, **quiet)
    fit.fit(module, loader(), ckpt_path=checkpoint)
    return module, engine


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_masks_grow_while_it_trains_and_go_on_from_a_checkpoint(tmp_path):
    whole, engine = masked_fit(tmp_path / "whole", 6)
    assert engine.taken == 3
    assert all(bool((whole.model.get_submodule(n[:1]).weight[~m] == 0).all()) for n, m in engine.mask.items())
    masked_fit(tmp_path / "killed", 3)
    resumed, other = masked_fit(tmp_path / "killed", 6, str(tmp_path / "killed" / "last.ckpt"))
    assert other.taken == 3
    assert other.mask.hamming(engine.mask) == 0
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    with pytest.raises(PlanError, match="every is 0"):
        MaskingCallback(engine, every=0)
