"""A callback for Lightning: it prunes the network in steps while the Trainer trains it."""

from __future__ import annotations

import gc
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Unpack, cast

from torch import nn

from structprune.errors import PlanError, UnsupportedModelError
from structprune.extras import missing_extra
from structprune.integrations.course import Course, costs
from structprune.masks.engine import PruningEngine
from structprune.planning.options import PlanKeywords
from structprune.planning.plan import Plan, plans_of, replay
from structprune.pruner import Schedule
from structprune.tracing.trace import ExampleInputs
from structprune.wrapping import class_names

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer, callbacks
    from lightning.pytorch.strategies import DDPStrategy, Strategy
else:
    try:
        from lightning.pytorch import Callback, LightningModule, Trainer, callbacks
        from lightning.pytorch.strategies import DDPStrategy, Strategy
    except ModuleNotFoundError as error:
        if error.name != "lightning":
            raise
        try:  # the same under its older name
            from pytorch_lightning import Callback, LightningModule, Trainer, callbacks
            from pytorch_lightning.strategies import DDPStrategy, Strategy
        except ModuleNotFoundError as other:
            if other.name != "pytorch_lightning":
                raise
            raise missing_extra("This integration", "lightning", "lightning") from error

# Under this name a checkpoint holds what was removed.
KEY = "structprune"
Hook = Callable[[dict[str, Any]], None]
_HOOKS = ("on_save_checkpoint", "on_load_checkpoint")


class PruningCallback(Callback):
    """Prunes a LightningModule's network in place before the epochs that you name, as `structprune.Pruner` does.

    The states of all optimizers go on with what is left. ``macs`` (of the example inputs) and ``params`` are logged
    when training starts and after each step. Checkpoints carry what was removed: a run that goes on from one
    (``ckpt_path=``), or is tested on one, gets the pruned shapes before the weights are loaded. For
    ``load_from_checkpoint``, which knows no callbacks, see `restore`.

    Under DistributedDataParallel the process of rank 0 decides, and the network is wrapped anew. Strategies that shard
    the model are refused; so are callbacks that average its weights.

    Args:
        epochs: after how many epochs of training to prune, once for each number; 0 is before the first.
        example_inputs: a tensor, a tuple (positional) or a dict (keyword) that the network accepts; by default the
            module's ``example_input_array``.
        network: dotted name of the part to prune, such as ``"model"``; by default the LightningModule's own forward.
        schedule: how much is gone after each step; see `structprune.Pruner`.
        options: those of `structprune.plan`: ``ratio``, ``target``, ``importance``, ``data``, ``scope`` and the others.

    Raises:
        PlanError: what is asked for cannot be planned; when the fit starts.
        UnsupportedModelError: the strategy or another callback does not go with it; when the fit starts.
        MissingExtraError: Lightning is not installed.

    Example:
        >>> from structprune.integrations.lightning import PruningCallback
        >>> callback = PruningCallback(epochs=[2, 4, 6], network="model", target={"macs": 0.5})
        >>> # lightning.Trainer(max_epochs=10, callbacks=[callback]).fit(module, loader)
    """

    def __init__(
        self,
        *,
        epochs: Iterable[int],
        example_inputs: ExampleInputs | None = None,
        network: str = "",
        schedule: Schedule = "cubic",
        **options: Unpack[PlanKeywords],
    ) -> None:
        self._inputs = example_inputs
        self._network = network
        self._course = Course(epochs, schedule, options)
        self._fits = False
        self._own: dict[str, Any] = {}

    # -- the hooks of Lightning ----------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Have the module write down what was removed, and read it before weights are loaded."""
        if trainer.strategy.restore_checkpoint_after_setup:
            raise UnsupportedModelError(
                f"{type(trainer.strategy).__name__} spreads the parameters over processes, so they cannot be pruned "
                "while it trains. Prune before the fit, or use another strategy."
            )
        if any(name.endswith("._MultiProcessingLauncher") for name in class_names(trainer.strategy.launcher)):
            raise UnsupportedModelError(
                "This strategy trains in processes that end with the fit, and brings the weights back into a module "
                "that has its first shapes. Use strategy='ddp'."
            )
        averaging = (callbacks.WeightAveraging, callbacks.StochasticWeightAveraging)
        for other in cast("Any", trainer).callbacks:
            if isinstance(other, averaging):
                raise UnsupportedModelError(
                    f"{type(other).__name__} holds an average of the weights in their first shapes. Use it in a fit "
                    "after the one that prunes."
                )
        self._fits = stage == "fit"
        # Lightning calls callbacks only once weights are loaded, and not at all where weights alone are saved; these
        # hooks of the module it calls in time.
        self._own = {name: vars(pl_module)[name] for name in _HOOKS if name in vars(pl_module)}
        for name, ours in zip(_HOOKS, (self._save, self._load), strict=True):
            setattr(pl_module, name, partial(ours, pl_module, getattr(pl_module, name)))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the module its own hooks back."""
        for name in _HOOKS:
            vars(pl_module).pop(name, None)
        vars(pl_module).update(self._own)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Decide how much goes in the end, and log what there is."""
        wrapped = trainer.strategy.model
        if wrapped is not pl_module and not isinstance(trainer.strategy, DDPStrategy):
            raise UnsupportedModelError(
                f"{type(trainer.strategy).__name__} wraps the module in a {type(wrapped).__name__}, which structprune "
                "does not know. Prune before the fit, or use another strategy."
            )
        network, inputs = self._network_of(pl_module), self._inputs_of(pl_module)
        with _detached(pl_module, trainer):
            self._course.begin(network, inputs)
        self._log(trainer, pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Write down what was removed; also after the fit, for ``trainer.save_checkpoint``."""
        self._write(pl_module, checkpoint)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prune if it is time."""

        def agreed(plan: Plan) -> Plan:
            return Plan.from_json(trainer.strategy.broadcast(plan.to_json())) if trainer.world_size > 1 else plan

        with _detached(pl_module, trainer):
            pruned = self._course.take(trainer.current_epoch, trainer.optimizers, agreed=agreed)
        if pruned:
            _wrap_anew(trainer.strategy, pl_module)
            self._log(trainer, pl_module)

    # -- its parts -----------------------------------------------------------------------------------------------

    def _save(self, module: LightningModule, own: Hook, checkpoint: dict[str, Any]) -> None:
        own(checkpoint)
        self._write(module, checkpoint)

    def _write(self, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._fits:
            checkpoint[KEY] = {"network": self._network, **self._course.state_dict()}
        elif plans := plans_of(self._network_of(module)):
            checkpoint[KEY] = {"network": self._network, "plans": [plan.to_json() for plan in plans]}

    def _load(self, module: LightningModule, own: Hook, checkpoint: dict[str, Any]) -> None:
        if self._fits and KEY in checkpoint:
            self._course.begin(self._network_of(module), self._inputs_of(module), checkpoint[KEY])
        else:
            restore(module, checkpoint)
        own(checkpoint)

    def _network_of(self, pl_module: LightningModule) -> nn.Module:
        return pl_module.get_submodule(self._network)

    def _inputs_of(self, pl_module: LightningModule) -> ExampleInputs:
        inputs = pl_module.example_input_array if self._inputs is None else self._inputs
        if inputs is None:
            raise PlanError(
                "There are no example inputs. Give example_inputs, or set the module's example_input_array."
            )
        return inputs

    def _log(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with _detached(pl_module, trainer):
            amounts = costs(self._network_of(pl_module), self._inputs_of(pl_module))
        for logger in trainer.loggers:
            logger.log_metrics(amounts, step=trainer.global_step)


class MaskingCallback(Callback):
    """Takes the steps of a `structprune.masks.PruningEngine` at the ends of epochs.

    Checkpoints carry the engine's state: a run that goes on from one (``ckpt_path=``) has its masks and goes on with
    its steps. The engine's model is the LightningModule or a part of it.

    Args:
        engine: what masks the model.
        every: a step after every so many epochs.

    Raises:
        PlanError: `every` is below 1.

    Example:
        >>> from structprune.masks import PruningEngine, Saliency, gradual
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> callback = MaskingCallback(PruningEngine(model, Saliency.magnitude, gradual(0.75, 5)), every=2)
        >>> # lightning.Trainer(max_epochs=12, callbacks=[callback]).fit(module, loader)
    """

    def __init__(self, engine: PruningEngine, *, every: int = 1) -> None:
        if every < 1:
            raise PlanError(f"every is {every}; it is a number of epochs, from 1.")
        self.engine = engine
        self._every = every

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Put the masks on, before the weights of a checkpoint are loaded into them."""
        if stage == "fit":
            self.engine.start()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take a step if it is time."""
        if (trainer.current_epoch + 1) % self._every == 0 and not self.engine.done:
            self.engine.step()

    def state_dict(self) -> dict[str, Any]:
        """The engine's state, for a checkpoint."""
        return self.engine.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.engine.load_state_dict(state_dict)


def restore(module: LightningModule, checkpoint: Mapping[str, Any]) -> None:
    """Take a new module to the pruned shapes of a checkpoint, before its weights are loaded.

    Call it where Lightning asks for that, and ``load_from_checkpoint`` works::

        def on_load_checkpoint(self, checkpoint):
            restore(self, checkpoint)

    Args:
        module: a module as its class builds it.
        checkpoint: the contents of the checkpoint; nothing is done if it was taken without a `PruningCallback`.

    Raises:
        PlanError: the module was pruned otherwise, or further.
    """
    record: Mapping[str, Any] | None = checkpoint.get(KEY)
    if record is not None:
        replay(module.get_submodule(record["network"]), map(Plan.from_json, record["plans"]))


@contextmanager
def _detached(module: LightningModule, trainer: Trainer) -> Generator[None]:
    """The module without its Trainer: a trace looks into what a module holds, and that holds everything."""
    module.trainer = None
    try:
        yield
    finally:
        module.trainer = trainer


def _wrap_anew(strategy: Strategy, module: LightningModule) -> None:
    """A new DistributedDataParallel around the pruned module, if there is one around it."""
    if isinstance(strategy, DDPStrategy) and strategy.model is not module:
        strategy.model = module
        # The old one holds nodes of autograd that know the old shapes, and the new one would take them over.
        gc.collect()
        strategy.configure_ddp()
