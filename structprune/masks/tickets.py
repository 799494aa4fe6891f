"""`lottery`: iterative magnitude pruning with rewinding, and the controls that tell whether a ticket has won."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from structprune.api import plan
from structprune.errors import PlanError
from structprune.extras import matplotlib_figure, save_figure
from structprune.files import write_text
from structprune.importance.weight import Random
from structprune.masks.compacting import permanent
from structprune.masks.mask import Mask
from structprune.masks.named import read, write
from structprune.masks.saliency import Saliency
from structprune.masks.torch_masks import masks_of_plan, remove
from structprune.tracing.trace import ExampleInputs, preserved_random_state

TICKET, REINITIALISED, RANDOM = "ticket", "reinitialised", "random mask"
CONTROLS = (REINITIALISED, RANDOM)
State = dict[str, Tensor]
Train = Callable[[nn.Module, int], Iterable[Any] | None]


@dataclass(frozen=True, slots=True)
class Draw:
    """One training: which variant, after how many rounds of pruning, the share of weights left, what it came to."""

    variant: str
    round: int
    remaining: float
    score: float


@dataclass(frozen=True, slots=True)
class Lottery:
    """What `lottery` returns.

    Attributes:
        draws: one for each training; round 0 is the dense network.
        masks: of the tickets, by round, from 1.
    """

    draws: tuple[Draw, ...]
    masks: Mapping[int, Mask]

    def curve(self, variant: str) -> list[tuple[float, float]]:
        """Share of weights left and score of a variant, round by round, the dense network first."""
        return [(d.remaining, d.score) for d in self.draws if d.round == 0 or d.variant == variant]

    def __str__(self) -> str:
        """A line for each round, a column for each variant."""
        variants = list(dict.fromkeys(d.variant for d in self.draws))
        by_variant = {(d.round, d.variant): d for d in self.draws}
        table = Table("round", "weights left", *variants)
        for number in sorted({d.round for d in self.draws}):
            scores = [by_variant.get((number, variant)) for variant in variants]
            left = next(d.remaining for d in scores if d is not None)
            table.add_row(str(number), f"{left:.1%}", *("" if d is None else f"{d.score:.4g}" for d in scores))
        text = io.StringIO()
        Console(file=text, width=100).print(table)
        return text.getvalue().rstrip()

    def to_json(self) -> str:
        """The trainings as JSON text."""
        return json.dumps([asdict(d) for d in self.draws], indent=1)

    def plot(self, path: str | os.PathLike[str], label: str = "accuracy") -> Path:
        """Draw the scores over the share of weights left.

        Args:
            path: the file to write; its ending says which format (pdf, svg, png).
            label: what a score is.

        Raises:
            MissingExtraError: Matplotlib is not installed.
        """
        figure = matplotlib_figure((4.8, 3.2))
        panel = figure.subplots()
        for variant in dict.fromkeys(d.variant for d in self.draws):
            points = [(100 * left, score) for left, score in self.curve(variant)]
            panel.plot(*zip(*points, strict=True), "o-", markersize=4, label=variant)
        panel.axhline(self.draws[0].score, color="#8a93a6", linewidth=0.8, linestyle=":")
        panel.set_xscale("log")
        panel.invert_xaxis()
        panel.set_xlabel("weights left, %")
        panel.set_ylabel(label)
        panel.legend(fontsize=8, frameon=False)
        panel.spines[["top", "right"]].set_visible(False)
        return save_figure(figure, path, 200)


def lottery(
    build: Callable[[], nn.Module],
    train: Train,
    evaluate: Callable[[nn.Module], float],
    rounds: int,
    rewind: int | str = 0,
    *,
    amount: float = 0.2,
    scope: str = "model",
    names: Iterable[str] | None = None,
    example_inputs: ExampleInputs | None = None,
    controls: Iterable[str] = CONTROLS,
    folder: str | os.PathLike[str] | None = None,
    seed: int = 0,
) -> Lottery:
    """Look for lottery tickets: train, prune the smallest weights, rewind the others, train again.

    Frankle & Carbin, The Lottery Ticket Hypothesis, 2019 (rewinding to initialisation); Frankle et al., Linear Mode
    Connectivity and the Lottery Ticket Hypothesis, 2020 (to epoch k); Renda et al., Comparing Rewinding and
    Fine-tuning, 2020 (of the learning rate alone).

    Args:
        build: gives a new network; its random numbers come from torch's generator, which is seeded for it.
        train: called with the network and the number of epochs that count as done (of the learning rate's schedule,
            say), and trains it to the end in place. To rewind to an epoch it is a generator, or gives an iterator, that
            yields after each epoch.
        evaluate: gives a score, the higher the better.
        rounds: how often is pruned.
        rewind: ``0``: weights go back to what they were initially; ``k``: to what they were after k epochs, from where
            training goes on; ``"learning_rate"``: weights stay, and the schedule begins anew.
        amount: share of what is left that each round takes.
        scope: whether that is of the ``"model"``, of each ``"layer"`` or each ``"tensor"``.
        names: of the parameters that are pruned; None for all of two dimensions or more.
        example_inputs: given, whole coupled channels go: those that `structprune.plan` removes, by their L2 norm, over
            the whole model; `scope` and `names` do not matter then, `amount` is of channels, and the share of weights
            left is that of all parameters.
        controls: ``"reinitialised"``: the ticket's mask on a network built anew; ``"random mask"``: the first network
            with as many weights of each tensor left, drawn at random.
        folder: keep the results there, training by training. After a kill, the same call goes on where it was.
        seed: of all random numbers; the generators are afterwards as they were.

    Raises:
        PlanError: an argument is out of range, `train` does not yield at the epoch to rewind to, or the folder holds
            results of other arguments.

    Example:
        >>> x = torch.randn(64, 4)
        >>> def train(model, start):
        ...     optimizer = torch.optim.SGD(model.parameters(), 0.1)
        ...     for epoch in range(start, 3):
        ...         optimizer.zero_grad()
        ...         (model(x) - x.sum(1, keepdim=True)).square().mean().backward()
        ...         optimizer.step()
        ...         yield
        >>> def evaluate(model):
        ...     return -float((model(x) - x.sum(1, keepdim=True)).square().mean().detach())
        >>> build = lambda: nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 1))
        >>> result = lottery(build, train, evaluate, rounds=2, rewind=1, amount=0.5)
        >>> [round(left, 2) for left, score in result.curve("ticket")]
        [1.0, 0.5, 0.25]
    """
    wanted = tuple(controls)
    _check(rounds, rewind, amount, wanted)
    asked = {
        "rewind": rewind, "amount": amount, "scope": scope, "names": None if names is None else list(names),
        "channels": example_inputs is not None, "seed": seed,
    }  # fmt: skip
    with preserved_random_state():
        drawing = _Drawing(build, train, evaluate, asked, example_inputs, None if folder is None else Path(folder))
        return drawing.run(rounds, wanted)


def _check(rounds: int, rewind: int | str, amount: float, controls: tuple[str, ...]) -> None:
    if rounds < 1:
        raise PlanError(f"rounds is {rounds}; it takes at least 1.")
    if not 0 < amount < 1:
        raise PlanError(f"amount is {amount}; give a share above 0 and below 1.")
    if not (rewind == "learning_rate" or (isinstance(rewind, int) and rewind >= 0)):
        raise PlanError(f"rewind is {rewind!r}; give a number of epochs from 0, or 'learning_rate'.")
    for control in controls:
        if control not in CONTROLS:
            raise PlanError(f"There is no control {control!r}: give some of {', '.join(map(repr, CONTROLS))}.")


class _Drawing:
    """The state of a lottery: what was drawn, the weights to go back to, and the mask of the next round."""

    def __init__(
        self,
        build: Callable[[], nn.Module],
        train: Train,
        evaluate: Callable[[nn.Module], float],
        asked: Mapping[str, Any],
        example_inputs: ExampleInputs | None,
        folder: Path | None,
    ) -> None:
        self._build, self._train, self._evaluate = build, train, evaluate
        self._asked, self._inputs, self._folder = asked, example_inputs, folder
        self._rewind: int | str = asked["rewind"]
        self._start: State = {}
        self._masks: dict[int, Mask] = {}
        self._draws: list[Draw] = []
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            self._recall(folder)

    def run(self, rounds: int, controls: tuple[str, ...]) -> Lottery:
        """All trainings that were not done before."""
        for number in range(rounds + 1):
            if not self._done(number, TICKET):
                self._ticket(number)
            for control in controls if number else ():
                if not self._done(number, control):
                    self._control(number, control)
        order = {TICKET: 0, REINITIALISED: 1, RANDOM: 2}
        draws = [d for d in self._draws if d.round <= rounds and d.variant in (TICKET, *controls)]
        draws.sort(key=lambda d: (d.round, order[d.variant]))
        return Lottery(tuple(draws), {n: self._masks[n] for n in range(1, rounds + 1)})

    def _done(self, number: int, variant: str) -> bool:
        return any(d.round == number and d.variant == variant for d in self._draws)

    # -- trainings -----------------------------------------------------------------------------------------------

    def _ticket(self, number: int) -> None:
        mask = self._masks.get(number)
        if number == 0:
            model = self._built(self._asked["seed"])
            self._start = _state(model)
        else:
            model = self._built(self._asked["seed"], self._start)
        start = self._rewind if number and isinstance(self._rewind, int) else 0
        score = self._trained(model, mask, start, keep=number == 0)
        self._masks[number + 1] = self._pruned(model, mask, number + 1)
        if self._rewind == "learning_rate":
            self._start = _state(remove(model))
        self._note(Draw(TICKET, number, 1.0 if mask is None else mask.kept / mask.entries, score))

    def _control(self, number: int, control: str) -> None:
        mask, seed = self._masks[number], self._asked["seed"]
        if control == REINITIALISED:
            model = self._built(seed + number)
        else:
            mask, model = self._random(number), self._built(seed)
        score = self._trained(model, mask, 0, keep=False)
        self._note(Draw(control, number, mask.kept / mask.entries, score))

    def _built(self, seed: int, state: State | None = None) -> nn.Module:
        torch.manual_seed(seed)
        model = self._build()
        if state is not None:
            model.load_state_dict(state)
        return model

    def _trained(self, model: nn.Module, mask: Mask | None, start: int, *, keep: bool) -> float:
        """Train and evaluate a network; with `keep`, note the weights at the epoch to rewind to."""
        if mask is not None:
            mask.attach(model)
        torch.manual_seed(self._asked["seed"])
        at = self._rewind if keep and isinstance(self._rewind, int) else 0
        done = start
        running = self._train(model, start)
        if isinstance(running, Iterator):
            for _ in running:
                done += 1
                if done == at:
                    self._start = _state(model)
        if done < at:
            raise PlanError(f"train yielded {done} times, so there is no epoch {at} to rewind to.")
        return float(self._evaluate(model))

    # -- masks ---------------------------------------------------------------------------------------------------

    def _pruned(self, model: nn.Module, mask: Mask | None, number: int) -> Mask:
        amount = self._asked["amount"]
        if self._inputs is not None:
            return self._channels(permanent(model), number, "l2")
        scores = Saliency.magnitude(model, self._asked["names"])
        return scores.mask(float(amount), self._asked["scope"], default_mask=mask)

    def _channels(self, model: nn.Module, number: int, importance: Any) -> Mask:
        """The mask without the channels that go in all rounds up to this one; those that went have norm zero."""
        assert self._inputs is not None
        ratio = 1 - (1 - self._asked["amount"]) ** number
        decided = plan(model, self._inputs, ratio=ratio, scope="global", importance=importance, round_to=1)
        whole = {n: torch.ones_like(p, dtype=torch.bool) for n, p in model.named_parameters()}
        return Mask(whole | {name: mask.bool() for name, mask in masks_of_plan(decided, model).items()})

    def _random(self, number: int) -> Mask:
        seed = self._asked["seed"] + number
        if self._inputs is not None:
            return self._channels(self._built(self._asked["seed"]), number, Random(seed))
        generator = torch.Generator().manual_seed(seed)
        shuffled: dict[str, Tensor] = {}
        for name, mask in sorted(self._masks[number].items()):  # a mask that was loaded may have another order
            order = torch.randperm(mask.numel(), generator=generator)
            shuffled[name] = mask.reshape(-1)[order.to(mask.device)].view(mask.shape)
        return Mask(shuffled)

    # -- on disk -------------------------------------------------------------------------------------------------

    def _note(self, draw: Draw) -> None:
        self._draws.append(draw)
        if self._folder is None:
            return
        if draw.variant == TICKET:  # the list comes last: what it names is there
            self._masks[draw.round + 1].save(self._folder / f"mask-{draw.round + 1}.safetensors")
            write(self._folder / f"start-{draw.round}.safetensors", "weights", self._start)
        record = {"asked": dict(self._asked), "draws": [asdict(d) for d in self._draws]}
        write_text(self._folder / "lottery.json", json.dumps(record, indent=1))
        (self._folder / f"start-{draw.round - 1}.safetensors").unlink(missing_ok=True)

    def _recall(self, folder: Path) -> None:
        file = folder / "lottery.json"
        if not file.exists():
            return
        record = json.loads(file.read_text(encoding="utf-8"))
        if record["asked"] != self._asked:
            raise PlanError(f"{folder} holds the results of {record['asked']}, not of {dict(self._asked)}.")
        self._draws = [Draw(**d) for d in record["draws"]]
        last = max(d.round for d in self._draws)
        self._masks = {n: Mask.load(folder / f"mask-{n}.safetensors") for n in range(1, last + 2)}
        self._start = read(folder / f"start-{last}.safetensors", "weights")[0]


def _state(model: nn.Module) -> State:
    """A copy of all that a model holds; tensors that share memory get memory of their own."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
