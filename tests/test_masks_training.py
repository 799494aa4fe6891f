"""Lottery tickets and Han's loop, on a small problem."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch import nn

from structprune import masks
from structprune.errors import PlanError
from structprune.masks import Saliency, learn_connections, lottery, weight_penalty

X = torch.randn(128, 4, generator=torch.Generator().manual_seed(1))
Y = X.abs().sum(1, keepdim=True)
EPOCHS = 4


def build() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 24), nn.ReLU(), nn.Linear(24, 12), nn.ReLU(), nn.Linear(12, 1))


def error(model: nn.Module) -> torch.Tensor:
    return (model(X) - Y).square().mean()


def evaluate(model: nn.Module) -> float:
    return -float(error(model).detach())


def epoch(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for _ in range(10):
        optimizer.zero_grad()
        error(model).backward()
        optimizer.step()


class Training:
    """Trains, and notes where each training began and with what."""

    def __init__(self, dies_at: int | None = None) -> None:
        self.starts: list[int] = []
        self.first: list[dict[str, torch.Tensor]] = []
        self.last: list[dict[str, torch.Tensor]] = []
        self._dies_at = dies_at

    def __call__(self, model, start):
        if len(self.starts) == self._dies_at:
            raise KeyboardInterrupt
        self.starts.append(start)
        self.first.append(values(model))
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        for _ in range(start, EPOCHS):
            epoch(model, optimizer)
            self.last.append(values(model)) if len(self.starts) == 1 else None
            yield
        self.end = values(model)


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name.removesuffix("_orig"): p.detach().clone() for name, p in model.named_parameters()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


# -- lottery tickets -------------------------------------------------------------------------------------------------


def test_weights_go_back_to_initialisation_or_to_an_epoch():
    for rewind in (0, 2):
        training = Training()
        found = lottery(build, training, evaluate, 2, rewind, amount=0.5, controls=())
        assert training.starts == [0, rewind, rewind]
        wanted = training.last[rewind - 1] if rewind else training.first[0]
        assert equal(training.first[1], wanted)
        assert equal(training.first[2], wanted)
        assert [(round(left, 2)) for left, _ in found.curve("ticket")] == [1.0, 0.5, 0.25]


def test_learning_rate_rewinding_keeps_the_weights():
    training = Training()
    found = lottery(build, training, evaluate, 1, "learning_rate", amount=0.5, controls=())
    assert training.starts == [0, 0]
    dense, masked = training.last[EPOCHS - 1], training.first[1]
    assert all(torch.equal(masked[n][found.masks[1][n]], dense[n][found.masks[1][n]]) for n in found.masks[1])


def test_masks_are_of_the_smallest_trained_weights_and_grow():
    training = Training()
    found = lottery(build, training, evaluate, 2, amount=0.5, controls=())
    dense = Saliency({n: w.abs() for n, w in training.last[EPOCHS - 1].items() if w.dim() > 1})
    assert found.masks[1].hamming(dense.mask(0.5)) == 0
    assert (found.masks[2] & ~found.masks[1]).kept == 0


def test_controls_have_other_weights_or_other_masks():
    training = Training()
    found = lottery(build, training, evaluate, 1, amount=0.5)
    assert [d.variant for d in found.draws] == ["ticket", "ticket", "reinitialised", "random mask"]
    assert len({d.remaining for d in found.draws}) == 2
    first = training.first
    assert equal(first[0], first[1])
    assert not torch.equal(first[2]["0.weight"], first[0]["0.weight"])
    assert equal(first[3], first[0])


def test_whole_channels_go_where_inputs_are_given():
    found = lottery(build, Training(), evaluate, 2, amount=0.5, example_inputs=X[:1], controls=["random mask"])
    assert (found.masks[2] & ~found.masks[1]).kept == 0
    widths = []
    for number in (1, 2):
        model = build()
        found.masks[number].attach(model)
        slim = masks.compact(model.eval(), X[:1])
        assert torch.allclose(slim(X), model(X), atol=1e-5)
        widths.append(slim[0].out_features + slim[2].out_features)
    assert widths == [18, 9]
    assert all(sum(d.round == r for d in found.draws) == 2 for r in (1, 2))


def test_after_a_kill_it_goes_on_training_by_training(tmp_path):
    whole = lottery(build, Training(), evaluate, 2, 1, amount=0.5)
    for dies_at in (3, 2):  # of seven trainings: in round 1, then in round 2
        with pytest.raises(KeyboardInterrupt):
            lottery(build, Training(dies_at), evaluate, 2, 1, amount=0.5, folder=tmp_path)
    training = Training()
    resumed = lottery(build, training, evaluate, 2, 1, amount=0.5, folder=tmp_path)
    assert len(training.starts) == 2
    assert resumed.draws == whole.draws
    assert resumed.masks[2].hamming(whole.masks[2]) == 0
    training = Training()
    assert lottery(build, training, evaluate, 2, 1, amount=0.5, folder=tmp_path).draws == whole.draws
    assert training.starts == []
    with pytest.raises(PlanError, match="holds the results of"):
        lottery(build, training, evaluate, 2, 1, amount=0.3, folder=tmp_path)


def test_a_kill_while_it_writes_loses_no_more_than_that_training(tmp_path, monkeypatch):
    whole = lottery(build, Training(), evaluate, 2, "learning_rate", amount=0.5, controls=())
    written: list[str] = []

    def dies(path, text):
        if written:
            raise KeyboardInterrupt
        written.append(text)
        path.write_text(text)

    with monkeypatch.context() as patched:
        patched.setattr("structprune.masks.tickets.write_text", dies)
        with pytest.raises(KeyboardInterrupt):
            lottery(build, Training(), evaluate, 2, "learning_rate", amount=0.5, controls=(), folder=tmp_path)
    training = Training()
    resumed = lottery(build, training, evaluate, 2, "learning_rate", amount=0.5, controls=(), folder=tmp_path)
    assert len(training.starts) == 2
    assert resumed.draws == whole.draws


def test_the_random_state_is_as_it_was_and_the_table_and_plot_are_there(tmp_path):
    state = torch.get_rng_state()
    found = lottery(build, Training(), evaluate, 1)
    assert torch.equal(torch.get_rng_state(), state)
    assert "80.1%" in str(found)
    assert "random mask" in str(found)
    assert '"variant": "reinitialised"' in found.to_json()
    pytest.importorskip("matplotlib")
    assert found.plot(tmp_path / "curve.svg").stat().st_size > 1000


def run(**options):
    options = {"rounds": 1, "train": Training(), **options}
    return lottery(build, options.pop("train"), evaluate, options.pop("rounds"), **options)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda: run(rounds=0), "rounds is 0"),
        (lambda: run(amount=1.0), "amount is 1.0"),
        (lambda: run(rewind=-1), "rewind is -1"),
        (lambda: run(rewind="late"), "rewind is 'late'"),
        (lambda: run(controls=["none"]), "no control 'none'"),
        (lambda: run(scope="world"), "no scope 'world'"),
        (lambda: run(names=["9.weight"]), "no parameter '9.weight'"),
        (lambda: run(rewind=9), "train yielded 4 times, so there is no epoch 9"),
        (lambda: run(rewind=1, train=lambda model, start: None), "train yielded 0 times"),
    ],
)
def test_bad_lotteries_are_refused(bad, message):
    with pytest.raises(PlanError, match=re.escape(message)):
        bad()


# -- learning both weights and connections ---------------------------------------------------------------------------


class Dropped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.drop, self.second = nn.Linear(4, 24), nn.Dropout(0.4), nn.Linear(24, 1)

    def forward(self, x):
        return self.second(self.drop(torch.relu(self.first(x))))


def trained(model: nn.Module, epochs: int = 20, **penalty: float) -> nn.Module:
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    model.train()
    for _ in range(10 * epochs):
        optimizer.zero_grad()
        (error(model) + weight_penalty(model, **penalty)).backward()
        optimizer.step()
    return model.eval()


def test_the_loop_prunes_retrains_and_scales_dropout():
    torch.manual_seed(0)
    model = trained(Dropped())
    dropped: list[float] = []

    def retrain(model: nn.Module) -> None:
        left = model.second.weight_mask
        dropped.append(model.drop.p / (0.4 * math.sqrt(float(left.sum()) / left.numel())))
        trained(model, 5, l2=1e-4)

    found = learn_connections(model, retrain, evaluate, rounds=3, tolerance=0.1, drop=0.2)
    assert dropped == pytest.approx([1.0] * len(dropped))
    assert model.drop.p == 0.4
    assert len(found.rounds) >= 1
    assert evaluate(model) >= found.dense - 0.2
    assert found.rounds[-1].retrained == evaluate(model)
    assert found.times_fewer == pytest.approx(1 / found.rounds[-1].remaining)
    assert masks.sparsity(model).zeros >= found.mask.entries - found.mask.kept > 0
    assert f"{found.rounds[0].remaining:.1%}" in str(found)


def test_the_most_sensitive_layer_gets_the_smallest_threshold():
    torch.manual_seed(0)
    model = trained(nn.Sequential(nn.Linear(4, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 1)))
    with torch.no_grad():  # without its small weights the last layer is as good; each weight of the first counts
        model[4].weight[:, :12] *= 1e-6
    found = learn_connections(model, lambda m: None, evaluate, rounds=1, tolerance=1e-3, drop=10.0)
    qualities = found.rounds[0].qualities
    assert qualities["4.weight"] > qualities["0.weight"]


def test_a_round_that_loses_too_much_is_undone():
    torch.manual_seed(0)
    model = trained(build())
    before = values(model)

    def spoil(model: nn.Module) -> None:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()

    found = learn_connections(model, spoil, evaluate, tolerance=0.5)
    assert found.rounds == ()
    assert found.mask.kept == found.mask.entries
    assert equal(before, values(model))
    assert evaluate(model) == found.dense


def test_the_penalty_is_over_the_weights_that_are_left():
    model = build()
    mask = Saliency.magnitude(model).mask(0.5)
    mask.attach(model)
    kept = torch.cat([p.detach()[mask[n.removesuffix("_orig")]] for n, p in model.named_parameters() if p.dim() > 1])
    penalty = weight_penalty(model, l1=0.5, l2=2.0)
    assert float(penalty.detach()) == pytest.approx(float(0.5 * kept.abs().sum() + 2 * kept.square().sum()), rel=1e-5)
    penalty.backward()
    assert bool((model[0].weight_orig.grad[~mask["0.weight"]] == 0).all())
    assert float(weight_penalty(model, l2=1.0, names=["4.bias"]).detach()) == pytest.approx(
        float(model[4].bias.detach().square())
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounds": 0}, "rounds=0"),
        ({"tolerance": -1.0}, "tolerance=-1.0"),
        ({"drop": float("nan")}, "drop=nan"),
        ({"qualities": (1.0, 0.5)}, "qualities is [1.0, 0.5]"),
        ({"names": ["9.weight"]}, "no parameter '9.weight'"),
    ],
)
def test_bad_loops_are_refused_and_nothing_is_masked(options, message):
    model = build()
    with pytest.raises(PlanError, match=re.escape(message)):
        learn_connections(model, lambda m: None, evaluate, **options)
    assert not torch.nn.utils.prune.is_pruned(model)
