"""`Compressor`: a scheme, an objective, how much accuracy may go, and a way to keep it, put together."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

from torch import Tensor, nn

from structprune.checking import DATA, MODEL, SEED, Check, function, instance, one_of, real, require, whole
from structprune.errors import PlanError
from structprune.importance.data import call_on_batch, size_of
from structprune.inputs import device_of, evaluating, resize_batch
from structprune.masks.compacting import compact, permanent
from structprune.search.direct import inputs_of
from structprune.search.objectives import Measure, Objective
from structprune.search.projections import Projection, fill, values_of
from structprune.search.scheme import Scheme
from structprune.search.task import AccuracyOptimizer, Compressed, Task
from structprune.search.trials import ENDED_EARLY, TRAINED, DensitySearch, Settings, Trial
from structprune.tracing.trace import map_tensors
from structprune.training.evaluation import default_loss, labels_of, logits_of, score_of
from structprune.training.stepping import preserved
from structprune.wrapping import prunable, rewrapped, unwrapped

Data = Iterable[Any] | Callable[[nn.Module], float]
# A result is compared with what its zeros compute on so many samples.
_SAMPLES = 8

_VALIDATION = Check(
    lambda value: DATA.fits(value) or function("model").fits(value), "give batches, or a function of the model"
)
_OPTIMIZER = Check(
    lambda value: not isinstance(value, type) and callable(getattr(value, "compress", None)),
    "give LC(...), Direct(...) or Recover(...), or an object with their method compress",
)
_CRITERION = Check(lambda value: callable(value) and not isinstance(value, type), "give a function of outputs, targets")
_OBJECTIVE = instance(Objective, "give Maximize(...) or Minimize(...)")


def _bounds(value: Any) -> bool:
    share = real(above=0, most=1)
    return isinstance(value, (tuple, list)) and len(value) == 2 and all(map(share.fits, value)) and value[0] < value[1]


class Compressor:
    """Compresses a network as far as its accuracy allows.

    With an objective, the densities that the scheme leaves open are found by Bayesian optimisation: the best value of
    the objective among networks whose score on the validation data is at most `eps` below the dense one. Without an
    objective, the scheme's densities are used as they are.

    The result is a new model: structured schemes give smaller dense layers, by `structprune.masks.compact`; quantized
    layers are held in their type; what `Prune` and `BlockPrune` set to zero stays as zeros. The model itself, modes,
    gradients, and random generators are as they were.

    Joseph et al., A Programmable Approach to Neural Network Compression, 2020, whose interface this follows.

    Args:
        model: the trained network, on the device to train on.
        scheme: what is compressed: see `structprune.search.Scheme`.
        optimizer: how accuracy is kept: `LC`, `Direct` or `Recover`.
        trainloader: batches to train on: pairs of inputs and targets, or dicts from which the model makes a loss.
        valloader: batches of the same kind to choose by, scored by accuracy in percent where targets are class numbers
            and by minus the mean loss otherwise; or a function of the model that gives a score, the higher the better.
        testloader: the same again, for two figures in `statistics`; run through once, when all is decided.
        criterion: the loss, called with the model's outputs and the targets; None for cross entropy, or for the loss
            that the model itself returns.
        objective: `Maximize` or `Minimize`; None to use the scheme's densities as they are.
        eps: how much may be lost: of accuracy as a share (0.02: two points of a hundred), of a loss relative to the
            dense one's, of your own score in its unit.
        trials: at most so many densities are trained.
        sampler: ``"gp"``, a Gaussian process, or ``"tpe"``.
        densities: lowest and highest density that are tried.
        seed: of training and search.

    Attributes:
        statistics: what was done, as plain data: the scores and values of the dense and the compressed network, all
            steps and all trials; empty before `run`.

    Raises:
        PlanError: an argument is none that can be; the message names it.

    Example:
        >>> import torch
        >>> from structprune.search import Direct, NeuronPrune
        >>> model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> x = torch.randn(64, 4)
        >>> data = [(x, (x.sum(1) > 0).long())]
        >>> compressor = Compressor(
        ...     model, scheme=NeuronPrune(0.25), optimizer=Direct(epochs=5), trainloader=data, valloader=data
        ... )
        >>> compressor.run()[0].out_features, sorted(compressor.statistics)[:3]
        (4, ['densities', 'ended_early', 'eps'])
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        scheme: Scheme,
        optimizer: AccuracyOptimizer,
        trainloader: Iterable[Any],
        valloader: Data,
        testloader: Data | None = None,
        criterion: Callable[[Any, Any], Tensor] | None = None,
        objective: Objective | None = None,
        eps: float = 0.02,
        trials: int = 10,
        sampler: str = "gp",
        densities: tuple[float, float] = (0.02, 1.0),
        seed: int = 0,
    ) -> None:
        scheme_check = instance(Scheme, "give a scheme of structprune.search, such as FilterPrune(0.5)")
        require(locals(), model=MODEL, scheme=scheme_check, optimizer=_OPTIMIZER, objective=_OBJECTIVE.or_none)
        require(locals(), trainloader=DATA, valloader=_VALIDATION, testloader=_VALIDATION.or_none)
        limits = Check(_bounds, "give the lowest and the highest density, such as (0.05, 0.9)")
        require(locals(), criterion=_CRITERION.or_none, eps=real(least=0), trials=whole(1), densities=limits, seed=SEED)
        require(locals(), sampler=one_of(("gp", "tpe")))
        if objective is None and scheme.open_densities:
            raise PlanError("scheme leaves a density open. Give one, or an objective to find it by.")
        if objective is not None and not scheme.open_densities:
            raise PlanError("objective is given, and scheme leaves no density open to find. Leave one of the two out.")
        self.statistics: dict[str, Any] = {}
        self._model, self._scheme, self._optimizer = model, scheme, optimizer
        self._train, self._validate, self._test = trainloader, valloader, testloader
        self._criterion, self._objective, self._eps, self._seed = criterion, objective, eps, seed
        self._settings = Settings(trials=trials, sampler=sampler, bounds=(densities[0], densities[1]), seed=seed)

    def run(self) -> nn.Module:
        """Compress the model.

        Returns:
            A new model, in eval or training mode as the one that was given.

        Raises:
            PlanError: the scheme finds nothing to compress, data or loss do not fit the model, or no density that was
                tried keeps the accuracy within `eps`; `statistics` then tells of the trials.
            TraceError: the scheme needs the model's coupled channels, and its forward cannot be recorded.
        """
        begin = time.perf_counter()
        inner = prunable(self._model)
        self._device = device_of(inner)
        self.statistics = {}
        with preserved(self._train, self._validate, self._test):
            run = _Run(self, permanent(unwrapped(self._model)))
            compressed, scheme, slim = run.decided()
            statistics = run.statistics(compressed, scheme, slim)
        for name, module in inner.named_modules():
            slim.get_submodule(name).training = module.training
        self.statistics = {**statistics, "seconds": time.perf_counter() - begin}
        return rewrapped(self._model, slim)

    # -- what a run asks -----------------------------------------------------------------------------------------

    def _moved(self, batch: Any) -> Any:
        return map_tensors(lambda tensor: tensor.to(self._device, non_blocking=True), batch)

    def _loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The loss of a batch."""
        batch = self._moved(batch)
        if self._criterion is None:
            return default_loss(model, batch)
        targets = labels_of(batch)
        if targets is None:
            raise PlanError(
                "criterion is called with outputs and targets, and a batch of trainloader is no pair of inputs and "
                "targets. Leave criterion out if the model returns its loss."
            )
        loss = self._criterion(logits_of(call_on_batch(model, batch)), targets)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise PlanError("criterion returned no scalar tensor; it returns the mean over the batch.")
        return loss

    def _score(self, model: nn.Module, data: Data | None = None) -> float:
        """The score of a model on validation data."""
        with evaluating(model):
            data = self._validate if data is None else data
            score = score_of(model, data, self._loss, self._moved, nullcontext)
        if not math.isfinite(score):
            raise PlanError(f"A score on validation data is {score}. Check the data, or lower lr.")
        return score


class _Run:
    """One run of a `Compressor` on a copy of its model.

    Args:
        asked: what is to be done.
        dense: a copy of the model, without masks.
    """

    def __init__(self, asked: Compressor, dense: nn.Module) -> None:
        self._asked, self._dense = asked, dense
        self._batch = asked._moved(inputs_of(self._first_batch()))
        self._inputs = resize_batch(self._batch, _SAMPLES)
        self._before = asked._score(dense)
        lost = self._loss_allowed()
        self._allowed = self._before - lost
        self._unit = lost or max(1e-3 * abs(self._before), 1e-12)
        self._measure = None if asked._objective is None else Measure(asked._objective, dense, self._batch)
        self._search: DensitySearch | None = None
        self._kept: tuple[Compressed, Scheme, nn.Module] | None = None

    def _first_batch(self) -> Any:
        for batch in self._asked._train:
            return batch
        raise PlanError("trainloader holds no batch.")

    def _loss_allowed(self) -> float:
        """How much the score may fall, in its own unit."""
        eps, validate = self._asked._eps, self._asked._validate
        if not isinstance(validate, Iterable):
            return eps
        labels = next((labels_of(batch) for batch in validate), None)
        if labels is not None and labels.dim() == 1 and not labels.is_floating_point():
            return 100 * eps
        return eps * abs(self._before)

    def decided(self) -> tuple[Compressed, Scheme, nn.Module]:
        """What was found, by which scheme, and the network in its final form."""
        asked = self._asked
        if asked._objective is None or self._measure is None:
            return self._compressed(asked._scheme, lambda _done, _best: False)
        self._search = DensitySearch(
            asked._objective,
            asked._settings,
            asked._scheme.open_densities,
            lambda score: (self._allowed - score) / self._unit,
        )
        best = self._search.run(self._value_untrained, self._trained)
        if best is None or self._kept is None:
            asked.statistics = self._of_trials()
            scores = [trial.score for trial in self._search.trials if trial.score is not None]
            raise PlanError(
                f"No density that was tried keeps the score of {self._before:.4g} above {self._allowed:.4g}: the best "
                f"is {max(scores):.4g}. Raise eps, trials or the highest density, or train for longer."
            )
        return self._kept

    # -- trials --------------------------------------------------------------------------------------------------

    def _value_untrained(self, densities: tuple[float, ...]) -> float:
        """The objective's value of the network that is compressed and not trained."""
        assert self._measure is not None
        scheme = self._asked._scheme.with_densities(densities)
        projection = scheme.on(self._dense, self._inputs)
        model = copy.deepcopy(self._dense)
        fill(model, projection.compressed(values_of(model)))
        return self._measure(self._final(scheme, projection, model))

    def _trained(self, densities: tuple[float, ...]) -> Trial:
        """A trial of these densities; its network is kept if it is the best so far."""
        assert self._measure is not None
        assert self._search is not None
        begin = time.perf_counter()
        compressed, scheme, slim = self._compressed(self._asked._scheme.with_densities(densities), self._hopeless)
        value, score = self._measure(slim), self._asked._score(slim)
        feasible = not compressed.ended_early and score >= self._allowed
        best = self._search.best
        if feasible and (best is None or self._measure.objective.better(value, best.value)):
            self._kept = compressed, scheme, slim
        outcome = ENDED_EARLY if compressed.ended_early else TRAINED
        return Trial(densities, value, score, outcome, feasible, time.perf_counter() - begin)

    def _hopeless(self, done: float, best: list[float]) -> bool:
        """Whether the score is still too low, and would be if it rose to the end as fast as lately.

        Asked from half of the training on; scores rise more slowly towards its end.
        """
        if done < 0.5 or len(best) < 4 or best[-1] >= self._allowed:
            return False
        earlier = best[len(best) // 2]
        steps = len(best) - 1 - len(best) // 2
        left = (len(best) - 1) * (1 - done) / done
        return best[-1] + (best[-1] - earlier) / steps * left < self._allowed

    def _compressed(
        self, scheme: Scheme, hopeless: Callable[[float, list[float]], bool]
    ) -> tuple[Compressed, Scheme, nn.Module]:
        """A network compressed by a scheme, trained, and in its final form."""
        asked = self._asked
        projection = scheme.on(self._dense, self._inputs)
        task = Task(asked._train, asked._loss, asked._score, asked._seed, hopeless)
        compressed = asked._optimizer.compress(self._dense, projection, task)
        return compressed, scheme, self._final(scheme, projection, compressed.model)

    def _final(self, scheme: Scheme, projection: Projection, model: nn.Module) -> nn.Module:
        """The form in which a compressed network is handed over: smaller, and in its types."""
        slim = compact(model.eval(), self._inputs) if scheme.structured else model
        return projection.realised(slim)

    # -- statistics ----------------------------------------------------------------------------------------------

    def statistics(self, compressed: Compressed, scheme: Scheme, slim: nn.Module) -> dict[str, Any]:
        """What was done, as plain data."""
        after = self._asked._score(slim)
        held: dict[str, Any] = {
            **self._of_trials(),
            "scheme": repr(scheme),
            "densities": [getattr(part, "density", None) for part in scheme.parts()],
            "score": {"dense": self._before, "compressed": after, "allowed": self._allowed},
            "within_eps": after >= self._allowed,
            "weights": {"dense": _stored(self._dense), "compressed": _stored(slim)},
            "steps": [asdict(step) for step in compressed.history],
            "ended_early": compressed.ended_early,
        }
        if self._measure is not None:
            held["objective"] = {
                "of": self._measure.objective.name,
                "direction": self._measure.objective.direction,
                "dense": self._measure.before,
                "compressed": self._measure(slim),
            }
        if self._asked._test is not None:
            held["test"] = self._tested(self._asked._test, slim)
        return held

    def _of_trials(self) -> dict[str, Any]:
        trials = [] if self._search is None else [asdict(trial) for trial in self._search.trials]
        return {"eps": self._asked._eps, "optimizer": repr(self._asked._optimizer), "trials": trials}

    def _tested(self, data: Data, slim: nn.Module) -> dict[str, float]:
        """The scores of both networks on the test data, which are run through once."""
        asked, models = self._asked, {"dense": self._dense, "compressed": slim}
        if not isinstance(data, Iterable):
            return {name: asked._score(model, data) for name, model in models.items()}
        total, count = dict.fromkeys(models, 0.0), 0
        for batch in data:
            count += size_of(batch)
            for name, model in models.items():
                total[name] += asked._score(model, [batch]) * size_of(batch)
        if not count:
            raise PlanError("testloader holds no batch.")
        return {name: score / count for name, score in total.items()}


def _stored(model: nn.Module) -> dict[str, int]:
    """How many entries the parameters have, how many of them are not zero, and the bytes of all."""
    tensors = list(model.parameters())
    return {
        "entries": sum(tensor.numel() for tensor in tensors),
        "nonzero": sum(int(tensor.count_nonzero()) for tensor in tensors),
        "bytes": sum(tensor.numel() * tensor.element_size() for tensor in tensors),
    }
