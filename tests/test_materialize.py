"""Weights that a forward computes by normalising a parameter become plain parameters, and their inputs may go."""

from __future__ import annotations

import pickle

import pytest
import torch
import torch.nn.functional as F
from support import oracle
from support.computed_weights import COMPUTED
from torch import Tensor, nn
from torch.nn.utils import parametrizations as P
from torch.nn.utils import parametrize

import structprune

torch.set_num_threads(1)

# A softmax is no norm, and `afterwards` divides the result by the lengths of the weights.
WEIGHTS = [name for name in COMPUTED if name not in ("afterwards", "softmax")]


def network(name: str) -> tuple[nn.Sequential, Tensor]:
    kind, sizes = COMPUTED[name]
    if len(sizes) > 2:
        layers, x = (
            (nn.Conv2d(3, 8, 1), nn.ReLU(), kind(*sizes), nn.ReLU(), nn.Conv2d(8, 2, 1)),
            torch.randn(2, 3, 4, 4),
        )
    else:
        layers, x = (nn.Linear(6, 8), nn.ReLU(), kind(*sizes), nn.ReLU(), nn.Linear(8, 3)), torch.randn(2, 6)
    return oracle.jitter(nn.Sequential(*layers), 0), x.double()


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("name", WEIGHTS)
def test_a_normalised_weight_becomes_the_parameter_and_its_inputs_go(name: str, inplace: bool) -> None:
    model, x = network(name)
    expected, before = model(x), {key: value.clone() for key, value in model.state_dict().items()}
    plain = structprune.materialize_weights(model, x, inplace=inplace)
    assert (plain is model) == inplace
    torch.testing.assert_close(plain(x), expected, rtol=1e-12, atol=1e-12)
    if not inplace:
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    plan = structprune.plan(plain, x, ratio=0.5, round_to=1)
    assert len(plan.removed["0.weight"][0]) == len(plan.removed["2.weight"][1]) == 4
    slim = plan.apply(plain)
    oracle.check(plain, slim, plan, x)
    slim.train()(x).sum().backward()


@pytest.mark.parametrize("name", ["afterwards", "softmax"])
def test_what_is_no_weight_of_one_parameter_stays(name: str) -> None:
    model, x = network(name)
    plain = structprune.materialize_weights(model, x)
    assert type(plain[2]) is type(model[2])
    torch.testing.assert_close(plain(x), model(x))


class Scaled(nn.Conv2d):
    """Standardised weights with a gain, as networks without norms have them."""

    def __init__(self, size: int, out: int) -> None:
        super().__init__(size, out, 1)
        self.gain = nn.Parameter(torch.rand(out, 1, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(flat, None, None, weight=self.gain.view(-1) * 0.5, training=True, momentum=0.0)
        return F.conv2d(x, weight.reshape_as(self.weight), self.bias)


def test_a_gain_goes_into_the_weight() -> None:
    model = oracle.jitter(nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), Scaled(8, 6), nn.ReLU(), nn.Conv2d(6, 2, 1)), 0)
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    plain = structprune.materialize_weights(model, x)
    assert "2.gain" not in plain.state_dict()
    assert "2.gain" in model.state_dict()
    torch.testing.assert_close(plain(x), model(x), rtol=1e-12, atol=1e-12)
    assert torch.equal(pickle.loads(pickle.dumps(plain))(x), plain(x))
    assert isinstance(plain[2], Scaled)


class TwoWeights(nn.Module):
    """A module that computes both of its weights itself, each with a gain."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(6, 8)), nn.Parameter(torch.randn(5, 6))
        self.up_gain, self.down_gain = nn.Parameter(torch.rand(6, 1) + 1), nn.Parameter(torch.rand(5, 1) + 1)

    def forward(self, x: Tensor) -> Tensor:
        up = self.up_gain * (self.up - self.up.mean(1, keepdim=True)) / self.up.std(1, keepdim=True)
        down = self.down_gain * (self.down - self.down.mean(1, keepdim=True)) / self.down.std(1, keepdim=True)
        return F.linear(F.relu(F.linear(x, up)), down)


@pytest.mark.parametrize("inplace", [False, True])
def test_both_weights_of_one_module_become_parameters(inplace: bool) -> None:
    model = oracle.jitter(nn.Sequential(nn.Linear(3, 8), nn.ReLU(), TwoWeights(), nn.Linear(5, 2)), 0)
    x = torch.randn(4, 3).double()
    expected = model(x)
    plain = structprune.materialize_weights(model, x, inplace=inplace)
    torch.testing.assert_close(plain(x), expected, rtol=1e-12, atol=1e-12)
    assert set(dict(plain[2].named_parameters())) == {"up", "down"}
    plan = structprune.plan(plain, x, ratio=0.5, round_to=1)
    assert len(plan.removed["2.up"][0]) == 3
    oracle.check(plain, plan.apply(plain), plan, x)


class Centred(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight - weight.mean(1, keepdim=True)


def test_parametrized_weights_are_held_as_they_are() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    parametrize.register_parametrization(model[2], "weight", Centred())
    model, x = oracle.jitter(model, 0), torch.randn(2, 6).double()
    plain = structprune.materialize_weights(model, x)
    torch.testing.assert_close(plain(x), model(x), rtol=1e-12, atol=1e-12)
    plan = structprune.plan(plain, x, ratio=0.5, round_to=1)
    assert len(plan.removed["0.weight"][0]) == 4
    oracle.check(plain, plan.apply(plain), plan, x)


def test_weights_for_which_a_gain_makes_up_stay() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), P.weight_norm(nn.Linear(8, 8)), nn.ReLU(), nn.Linear(8, 3))
    plain = structprune.materialize_weights(model, torch.randn(2, 6))
    assert list(plain.state_dict()) == list(model.state_dict())


class Twice(nn.Module):
    """One layer that runs twice."""

    def __init__(self, name: str) -> None:
        super().__init__()
        kind, sizes = COMPUTED[name]
        self.first, self.layer, self.last = nn.Linear(6, 8), kind(*sizes), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.layer(F.relu(self.layer(F.relu(self.first(x))))))


def test_a_layer_that_runs_twice_stays() -> None:
    model, x = oracle.jitter(Twice("normalize"), 0), torch.randn(2, 6).double()
    plain = structprune.materialize_weights(model, x)
    assert type(plain.layer) is type(model.layer)
    assert "materialize_weights" in structprune.DependencyGraph(model, x).explain("first")


def test_a_saved_network_is_loaded_into_one_with_plain_weights(tmp_path: object) -> None:
    model, x = network("standardised")
    plain = structprune.materialize_weights(model, x)
    slim = structprune.prune(plain, x, ratio=0.5)
    structprune.save(slim, f"{tmp_path}/slim")
    loaded = structprune.load(
        lambda: structprune.materialize_weights(network("standardised")[0], x), f"{tmp_path}/slim"
    )
    torch.testing.assert_close(loaded(x), slim(x))
    assert slim[2].weight.shape[1] == 4
