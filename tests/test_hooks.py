"""Hooks, masks and parametrizations: kept, run, and up to date."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import oracle
from support.cases import normal
from support.networks import PIXELS, Named, named_network
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils import prune as masks
from torch.nn.utils import spectral_norm as spectral_norm_hook
from torch.nn.utils import weight_norm as weight_norm_hook

import structprune


def test_hooks_are_kept_and_run() -> None:
    model, seen = named_network(), []
    model.conv1.register_forward_pre_hook(lambda m, args: (args[0] * 2,))
    model.conv1.register_forward_hook(lambda m, args, out: torch.tanh(out[:, :, 1:-1]))
    model.conv2.register_forward_hook(lambda m, args, kwargs, out: seen.append(tuple(out.shape)), with_kwargs=True)
    model.norm.register_full_backward_hook(lambda m, before, after: seen.append("backward"))
    plan = structprune.plan(model, PIXELS, ratio=0.5)
    slim = plan.apply(model)
    oracle.check(model, slim, plan, PIXELS)
    seen.clear()
    slim(PIXELS).sum().backward()
    assert seen == [(4, 6, 3, 5), "backward"]


def test_a_hook_that_ties_channels_is_seen() -> None:
    """It adds what another layer gave: the two must lose the same channels."""
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    model[2].register_forward_hook(lambda m, args, out: out + args[0])
    model, inputs = oracle.jitter(model, seed=0), normal(4, 6).double()
    plan = structprune.plan(model, inputs, ratio=0.5)
    assert plan.removed["0.weight"][0] == plan.removed["2.weight"][0] == plan.removed["4.weight"][1]
    oracle.check(model, plan.apply(model), plan, inputs)


def masked(model: Named) -> nn.Module:
    masks.l1_unstructured(model.conv2, "weight", amount=0.5)
    masks.random_structured(model.conv2, "weight", amount=2, dim=0)
    masks.random_unstructured(model.conv1, "bias", amount=0.5)
    return model


COMPUTED: dict[str, Callable[[Any], Any]] = {
    "masks": masked,
    "weight norm hook": lambda m: (weight_norm_hook(m.conv2), weight_norm_hook(m.head, dim=1), m)[-1],
    "weight norm": lambda m: (parametrizations.weight_norm(m.conv2), parametrizations.weight_norm(m.head, dim=1), m)[
        -1
    ],
    "spectral norm hook": lambda m: (spectral_norm_hook(m.conv2), m)[-1],
    "spectral norm": lambda m: (parametrizations.spectral_norm(m.conv2), m)[-1],
    "scaled": lambda m: (parametrize.register_parametrization(m.conv2, "weight", Scaled(12)), m)[-1],
}


class Scaled(nn.Module):
    """A parametrization with a parameter of its own."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(channels))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.gain[:, None, None, None]


# The deprecated hook is what many models still have.
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "in place"])
@pytest.mark.parametrize("kind", COMPUTED)
def test_weights_that_are_computed(kind: str, inplace: bool) -> None:
    model = COMPUTED[kind](Named())
    with torch.no_grad():
        model(PIXELS.float())
    twin = oracle.jitter(model, seed=0)
    with torch.no_grad():
        twin(PIXELS)
    model = copy.deepcopy(twin).train()
    plan = structprune.plan(model, PIXELS, ratio=0.5)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    slim = plan.apply(model, inplace=inplace)
    assert (slim.conv2.in_channels, slim.conv2.out_channels, slim.head.in_features) == (4, 6, 6)
    assert slim.training
    gains = {gain.tensor for gain in plan.rescales}  # these make up for the norms of fewer inputs
    assert bool(gains) == ("norm" in kind)
    for name, tensor in slim.state_dict().items():  # reading the weight has moved no power iteration on
        for dim, indices in structprune.kept(slim).get(name, {}).items():
            state[name] = state[name].index_select(dim, torch.tensor(indices))
        assert tensor.shape == state[name].shape
        assert torch.equal(tensor, state[name]) == (name not in gains), name
    assert slim.eval().conv2.weight.shape == (6, 4, 3, 3), "up to date before the first forward"
    oracle.check(twin, slim, plan, PIXELS)
    slim.train()(PIXELS).sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in slim.parameters())


# The deprecated hook is what many models still have.
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", ["masks", "weight norm hook", "spectral norm hook"])
def test_computed_weights_with_a_graph_of_their_own(kind: str) -> None:
    """After a forward with gradients the weight on the module is no leaf, which ``copy.deepcopy`` refuses."""
    model = COMPUTED[kind](Named()).eval()
    model(PIXELS.float())
    slim = structprune.prune(model, PIXELS.float(), ratio=0.5)
    assert slim.conv2.weight.shape == (6, 4, 3, 3)
    assert model.conv2.weight.grad_fn is not None
    model(PIXELS.float()).sum().backward()


class HooksItself(nn.Module):
    """Its first forward registers hooks that collect, and notes so, as models of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.collected: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        if not getattr(self, "hooked", False):
            for layer in (self.first, self.second):
                layer.register_forward_hook(lambda module, args, out: self.collected.append(out))
            self.hooked = True
        self.collected = []
        self.second(torch.relu(self.first(x)))
        collected, self.collected = self.collected, []
        assert len(collected) == 2
        return self.head(torch.relu(collected[1]))


def test_hooks_that_a_forward_registers_go_with_the_trace() -> None:
    model, inputs = oracle.jitter(HooksItself(), seed=0), normal(4, 6).double()
    structprune.plan(model, inputs, ratio=0.5)
    assert not model.first._forward_hooks
    assert not hasattr(model, "hooked")
    model(inputs)
    assert len(model.first._forward_hooks) == 1
