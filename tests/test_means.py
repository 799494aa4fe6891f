"""Means over channels, and norms of weights, are what they were: weights take up the change, or the channels stay."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import oracle
from support.computed_weights import COMPUTED
from torch import Tensor, nn
from torch.nn.utils import parametrizations as P
from torch.nn.utils import weight_norm as old_weight_norm

import structprune

torch.set_num_threads(1)

Between = Callable[[Tensor], Tensor]


class Averaged(nn.Module):
    """A convolution, something over its channels, a linear layer."""

    def __init__(self, between: Between) -> None:
        super().__init__()
        self.conv, self.head, self.between = nn.Conv2d(3, 8, 1), nn.Linear(16, 4), between

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.between(self.conv(x)).flatten(1))


def pruned(model: nn.Module, x: Tensor) -> tuple[structprune.Plan, nn.Module]:
    """A plan of half the channels and its network, which computes what the original does with plain zeros."""
    plan = structprune.plan(model, x, ratio=0.5, round_to=1)
    slim = plan.apply(model)
    if plan.slices:
        oracle.check(model, slim, plan, x)
    assert structprune.verify(model, slim, plan, x).ok
    return plan, slim


def image() -> Tensor:
    return torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


# One and the same mean, as people write it.
SPELLINGS: dict[str, Between] = {
    "mean": lambda y: y.mean(1),
    "keepdim": lambda y: y.mean(dim=1, keepdim=True),
    "function": lambda y: torch.mean(y, dim=(1,)),
    "axis": lambda y: y.mean(axis=-3),
    "sum over shape": lambda y: y.sum(1) / y.shape[1],
    "sum over size": lambda y: y.sum(1).div(y.size(1)),
    "sum times inverse": lambda y: y.sum(1) * (1 / y.shape[1]),
    "sum over root twice": lambda y: y.sum(1) / math.sqrt(y.shape[1]) / y.shape[1] ** 0.5,
    "divided first": lambda y: (y / y.shape[1]).sum(1),
    "einsum": lambda y: torch.einsum("bchw->bhw", y) / y.shape[1],
    "after a ReLU": lambda y: F.relu(y).mean(1),
    "two dimensions": lambda y: y.mean((1, 2)).repeat(1, 4),
    "moved": lambda y: y.permute(0, 2, 3, 1).mean(-1),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_mean_over_channels_is_what_it_was(spelling: str) -> None:
    model, x = oracle.jitter(Averaged(SPELLINGS[spelling]), 0), image()
    plan, slim = pruned(model, x)
    assert len(plan.removed["conv.weight"][0]) == 4
    assert "over_survivors" not in plan.settings
    assert torch.allclose(oracle.switch_off(model, plan.removed)(x), slim(x), rtol=1e-9)


@pytest.mark.parametrize(
    "between",
    [
        lambda y: y.mean(1) + y.sum(1),  # the same weights make both
        lambda y: torch.sigmoid(y).mean(1),
        lambda y: (y * torch.sigmoid(y.mean(1, keepdim=True))).sum(1),
        lambda y: (y - y.mean(1, keepdim=True)).square().sum(1),  # centred only: no norm
        lambda y: (y * y.square().mean(1, keepdim=True) ** 0.5).sum(1) + y.sum(1),  # multiplied: no norm
    ],
)
def test_where_nothing_takes_up_the_factor_the_channels_stay(between: Between) -> None:
    model, x = oracle.jitter(Averaged(between), 0), image()
    plan, _ = pruned(model, x)
    assert "conv.weight" not in plan.removed


NORMS: dict[str, Between] = {
    "layer norm": lambda y: F.layer_norm(y.mT, y.shape[1:2]).mT,
    "group norm": lambda y: F.group_norm(y, 2),
    "rms norm": lambda y: F.rms_norm(y.mT, y.shape[1:2]).mT,
}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    ("before", "goes"),
    [
        (lambda y: F.relu(y), True),
        (lambda y: torch.sigmoid(y), True),  # one half where it is off: the norm does without it
        (lambda y: torch.sigmoid(y).mT.mT.flip(-1), True),
        (lambda y: y + y.sum(1, keepdim=True), False),
        (lambda y: y * y + F.relu(y).sum(1, keepdim=True), False),
        (lambda y: y.cumsum(1), False),
        (lambda y: (lambda z: (z.add_(z.sum(1, keepdim=True)), z)[1])(y.clone()), False),
        (lambda y: (lambda z: (z.relu_(), z)[1])(y.clone()), True),
        (lambda y: torch.maximum(y, y.square().sum(1, keepdim=True)).flip(-1), False),
    ],
)  # fmt: skip
def test_a_norm_does_not_do_without_what_others_leave_in_a_channel(norm: str, before: Between, goes: bool) -> None:
    model = oracle.jitter(Averaged(lambda y: NORMS[norm](before(y.flatten(2)))[..., :2]), 0)
    plan, _ = pruned(model, image())
    assert ("conv.weight" in plan.removed) == goes
    if not goes:
        assert "holds more than its own" in structprune.DependencyGraph(model, image()).explain("conv")


class Gated(nn.Module):
    """A spatial gate from the mean of the channels, which go on to be used: the gate's weights take up the factor."""

    def __init__(self, gate: int = 1) -> None:
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 1)
        self.other, self.gate = nn.Conv2d(3, gate, 1), nn.Conv2d(1 + gate, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu_(self.norm(self.conv(x)))
        both = torch.cat([self.other(x), y.mean(1, keepdim=True)], 1)
        return self.last(y * torch.sigmoid(self.gate(both)))


def test_what_reads_a_mean_takes_up_the_factor() -> None:
    model, x = oracle.jitter(Gated(), 0), image()
    plan, _ = pruned(model, x)
    (rescale,) = plan.rescales
    assert (rescale.tensor, rescale.dim, rescale.positions, rescale.factor) == ("gate.weight", 1, (1,), 0.5)


class Reused(Gated):
    """The weights that read the mean read another tensor too."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        mean = self.gate(torch.cat([y.mean(1, keepdim=True), self.other(x)], 1))
        return self.last(y * mean) + self.gate(x[:, :2])


def test_weights_that_read_something_else_take_up_nothing() -> None:
    plan, _ = pruned(oracle.jitter(Reused(), 0), image())
    assert "conv.weight" not in plan.removed


class TwiceReturned(Gated):
    """The mean is an output."""

    def forward(self, x: Tensor) -> Any:
        y = self.conv(x)
        mean = y.mean(1, keepdim=True)
        return self.last(y), mean


def test_a_mean_that_is_returned_keeps_the_channels() -> None:
    plan, _ = pruned(oracle.jitter(TwiceReturned(), 0), image())
    assert not plan.removed


# -- norms that a forward writes out -----------------------------------------------------------------------------------


def _layer_norm(y: Tensor) -> Tensor:
    centred = y - y.mean(1, keepdim=True)
    return centred / torch.sqrt(centred.pow(2).mean(1, keepdim=True) + 1e-6)


def _by_both(y: Tensor, var: Tensor, mean: Tensor) -> Tensor:
    return (y - mean) * torch.rsqrt(var + 1e-6)


def _response(length: Tensor) -> Tensor:
    return length / (length.mean(1, keepdim=True) + 1e-6)


HAND_WRITTEN: dict[str, Between] = {
    "RMS": lambda y: y * torch.rsqrt(y.square().mean(1, keepdim=True) + 1e-6),
    "RMS by a root": lambda y: y / (y * y).mean(1, keepdim=True).add(1e-6).sqrt(),
    "RMS by a reciprocal": lambda y: y * (1 / (y.pow(2).mean(1, keepdim=True) + 1e-6) ** 0.5),
    "layer norm": _layer_norm,
    "layer norm by var": lambda y: (y - y.mean(1, keepdim=True)) / (y.var(1, keepdim=True) + 1e-6).sqrt(),
    "layer norm by var_mean": lambda y: _by_both(y, *torch.var_mean(y, 1, keepdim=True)),
    "response": lambda y: y * _response(y.norm(dim=(2, 3), keepdim=True)),
}


class Normed(nn.Module):
    def __init__(self, norm: Between) -> None:
        super().__init__()
        self.conv, self.last, self.norm = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1), norm

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.conv(x)))


@pytest.mark.parametrize("norm", HAND_WRITTEN)
def test_norms_written_by_hand_run_over_what_is_left_and_are_named(norm: str) -> None:
    model, x = oracle.jitter(Normed(HAND_WRITTEN[norm]), 0), image()
    plan, _ = pruned(model, x)
    assert len(plan.removed["conv.weight"][0]) == 4
    assert all(name.startswith("the model (") for name in plan.settings["over_survivors"])


# -- weights that are computed from others -----------------------------------------------------------------------------


def _linear(change: Callable[[nn.Module], nn.Module]) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), change(nn.Linear(8, 8)), nn.ReLU(), nn.Linear(8, 3))


def _convolution(change: Callable[[nn.Module], nn.Module], kind: type[nn.Module] = nn.Conv2d) -> nn.Sequential:
    middle = change(kind(8, 8, 3, padding=1))
    return nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), middle, nn.ReLU(), nn.Conv2d(8, 2, 1))


NORMALISED: dict[str, Callable[[], nn.Module]] = {
    "weight norm, old": lambda: _linear(old_weight_norm),
    "weight norm": lambda: _linear(P.weight_norm),
    "weight norm of inputs": lambda: _linear(lambda layer: P.weight_norm(layer, dim=1)),
    "weight norm of a convolution": lambda: _convolution(P.weight_norm),
    "weight norm of a transposed one": lambda: _convolution(P.weight_norm, nn.ConvTranspose2d),
    "spectral norm, old": lambda: _linear(nn.utils.spectral_norm),
    "spectral norm": lambda: _linear(P.spectral_norm),
    "spectral norm of a convolution": lambda: _convolution(P.spectral_norm),
    "spectral norm of a transposed one": lambda: _convolution(P.spectral_norm, nn.ConvTranspose2d),
}


def effective_weights_off(model: nn.Module, plan: structprune.Plan, x: Tensor) -> Tensor:
    """What `model` computes with the activations of removed channels zero: its weights stay what they are."""
    gone = {
        path: next(d[0] for name, d in plan.removed.items() if name.startswith(f"{path}.") and name.endswith("bias"))
        for path in ("0", "2")
    }
    twin = copy.deepcopy(model)
    for path, indices in gone.items():

        def off(_: nn.Module, __: Any, y: Tensor, indices: Any = tuple(indices)) -> Tensor:
            return y.index_fill(1, torch.tensor(indices), 0)

        twin.get_submodule(path).register_forward_hook(off)
    return twin(x)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("name", NORMALISED)
@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
def test_normalised_weights_are_what_they_were(name: str, inplace: bool) -> None:
    torch.manual_seed(0)
    model = NORMALISED[name]().double()
    x = torch.randn(2, 6).double() if "of a" not in name else image()
    with torch.no_grad():  # what a hook leaves on a layer can be copied
        for _ in range(3):
            model.train()(x)  # a spectral norm steps
        model.eval()(x)
    plan = structprune.plan(model, x, ratio=0.5, round_to=1)
    assert len(plan.removed["0.weight"][0]) == 4
    assert "over_survivors" not in plan.settings
    plan = structprune.Plan.from_json(plan.to_json())
    expected = effective_weights_off(model, plan, x)
    if inplace:
        slim = plan.apply(model, inplace=True)
    else:
        slim = plan.apply(model)
        oracle.check(model, slim, plan, x)
        assert structprune.verify(model, slim, plan, x).max_relative_error < 1e-12
    torch.testing.assert_close(slim(x), expected, rtol=1e-10, atol=1e-12)
    slim.train()(x).sum().backward()


@pytest.mark.parametrize("name", COMPUTED)
def test_inputs_of_other_normalised_weights_stay(name: str) -> None:
    kind, sizes = COMPUTED[name]
    first, last, x = nn.Linear(6, 8), nn.Linear(8, 3), torch.randn(2, 6).double()
    if len(sizes) > 2:
        first, last, x = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1), image()
    model = oracle.jitter(nn.Sequential(first, nn.ReLU(), kind(*sizes), nn.ReLU(), last), 0)
    plan, _ = pruned(model, x)
    assert "0.weight" not in plan.removed
    reason = structprune.DependencyGraph(model, x).explain("0")
    assert any(why in reason for why in ("normalised together", "averaged over", "compete", "number of its channels"))


class LowRank(nn.Linear):
    """A weight plus the product of two thin ones: what they sum over are channels of their own."""

    def __init__(self, size: int, out: int) -> None:
        super().__init__(size, out)
        self.down, self.up = nn.Parameter(torch.randn(4, size)), nn.Parameter(torch.randn(out, 4))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight + self.up @ self.down, self.bias)


class Queries(nn.Module):
    """Learnt queries pass a norm: they are activations, though no input has a part in them."""

    def __init__(self) -> None:
        super().__init__()
        self.queries, self.norm = nn.Parameter(torch.randn(5, 8)), nn.LayerNorm(8)
        self.q, self.k, self.out = nn.Linear(8, 6), nn.Linear(4, 6), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(self.queries)
        weights = (self.q(tokens) @ self.k(x).transpose(-1, -2)).sum(-1, keepdim=True)
        return self.out(tokens * weights)


def test_products_of_parameters_and_learnt_tokens_are_pruned_as_before() -> None:
    model = oracle.jitter(nn.Sequential(nn.Linear(6, 8), LowRank(8, 8), nn.Linear(8, 3)), 0)
    plan, _ = pruned(model, torch.randn(2, 6).double())
    assert {1} <= plan.removed["1.weight"].keys()
    assert len(plan.removed["1.down"][0]) == 2
    plan, _ = pruned(oracle.jitter(Queries(), 0), torch.randn(2, 7, 4).double())
    assert len(plan.removed["queries"][1]) == 4
    assert plan.settings["over_survivors"] == ["norm (layer_norm)"]


@pytest.mark.parametrize(
    "reduced",
    [
        lambda y: y.sum(1),
        lambda y: y.norm(dim=1),
        lambda y: torch.linalg.matrix_norm(y, "nuc", dim=(1, 2)).unsqueeze(1).expand(-1, 4, 4),
        lambda y: (y != 0).any(1).double() + y.count_nonzero(1),
    ],
)
def test_what_zeros_do_not_change_is_not_named(reduced: Between) -> None:
    model, x = oracle.jitter(Averaged(lambda y: reduced(y)), 0), image()
    plan, _ = pruned(model, x)
    assert "over_survivors" not in plan.settings
