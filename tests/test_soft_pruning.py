"""Soft pruning: what is switched off, that it comes back, and that what is cut is what was off."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from support.networks import IMAGE, Residual
from torch import nn

import structprune
from structprune.errors import PlanError
from structprune.training import SoftPruner, finetune

X = torch.zeros(1, 1, 8, 8)


def network(norm: bool = True) -> nn.Module:
    torch.manual_seed(0)
    norms = [nn.BatchNorm2d(8) if norm else nn.Identity(), nn.BatchNorm2d(6) if norm else nn.Identity()]
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), norms[0], nn.ReLU(), nn.Conv2d(8, 6, 3), norms[1], nn.ReLU(), nn.Flatten(),
        nn.Linear(96, 3),
    )  # fmt: skip


def literal_sfp(model: nn.Module, ratio: float) -> dict[str, list[int]]:
    """He et al. 2018, algorithm 1: of each convolution, the filters with the smallest L2 norm."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            norms = [float(w.detach().norm()) for w in module.weight]
            found[name] = sorted(sorted(range(len(norms)), key=norms.__getitem__)[: round(ratio * len(norms))])
    return found


def filter_norms(group: structprune.Group, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    (maker,) = [m for m in group.members if m.dim == 0 and tensors[m.tensor].dim() == 4]
    return tensors[maker.tensor].detach().flatten(1).norm(dim=1)


def test_filters_are_those_of_algorithm_1_and_nothing_else_changes() -> None:
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    wanted = literal_sfp(model, 0.5)
    plan = SoftPruner(model, X, ratio=0.5, importance=filter_norms, round_to=1).step()
    for name, tensor in model.state_dict().items():
        expected = before[name].clone()
        layer, _, key = name.rpartition(".")
        if layer in wanted and key == "weight":
            expected[wanted[layer]] = 0
            assert plan.removed[name][0] == tuple(wanted[layer])
        assert torch.equal(tensor, expected), name


@pytest.mark.parametrize("places", ["filters", "consumers"])
def test_channels_come_back(places: str) -> None:
    model = network()
    with torch.no_grad():  # with a shift of zero or less, a filter of zeros is held at zero by the ReLU
        model[1].bias.fill_(0.1)
        model[4].bias.fill_(0.1)
    pruner = SoftPruner(model, X, places=places, ratio=0.5, importance=structprune.LnNorm(2))
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(32, 1, 8, 8, generator=generator), torch.randint(3, (32,), generator=generator)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    for _ in range(4):
        for _ in range(5):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        alive = model[0].weight.flatten(1).norm(dim=1) if places == "filters" else model[3].weight.abs().sum((0, 2, 3))
        assert (alive > 0).all()
        removed = pruner.step().removed["0.weight"][0]
        places_of = model[0].weight.flatten(1) if places == "filters" else model[3].weight.transpose(0, 1).flatten(1)
        assert not places_of[list(removed)].any()


def test_the_choice_is_made_anew() -> None:
    model = network()
    pruner = SoftPruner(model, X, ratio=0.5)
    first = pruner.step().removed["0.weight"][0]
    with torch.no_grad():  # they come back, and stronger than the rest
        model[0].weight[list(first)] += 10
    second = pruner.step().removed["0.weight"][0]
    assert sorted(first + second) == list(range(8))
    assert pruner.cut()[0].weight.shape[0] == 4
    assert (pruner.cut()[0].weight > 5).all()


@pytest.mark.parametrize("norm", [True, False])
def test_with_consumers_off_the_cut_model_computes_the_same(norm: bool) -> None:
    model = network(norm)
    model(torch.randn(16, 1, 8, 8))  # norms with statistics
    model.eval()
    pruner = SoftPruner(model, X, places="consumers", ratio=0.5)
    x = torch.randn(4, 1, 8, 8)
    whole = model(x)
    pruner.step()
    off = model(x)
    slim = pruner.cut()
    assert slim[0].out_channels < 8
    assert not torch.allclose(whole, off, atol=1e-3)
    torch.testing.assert_close(slim(x), off)


@pytest.mark.parametrize("importance", ["fpgm", "l2"])
def test_residual_sums(importance: str) -> None:
    torch.manual_seed(0)
    model = Residual().eval()
    pruner = SoftPruner(model, IMAGE, places="consumers", ratio=0.5, importance=importance)
    pruner.step()
    x = torch.randn_like(IMAGE)
    torch.testing.assert_close(pruner.cut()(x), model(x))


def test_transposed_convolutions_and_embeddings_keep_to_their_sides() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(5, 8)
            self.up = nn.ConvTranspose1d(8, 6, 3)
            self.out = nn.Parameter(torch.randn(6, 2))

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.up(self.embed(ids).transpose(1, 2)).mean(2) @ self.out

    torch.manual_seed(0)
    for places, zeros in (("filters", ("embed", 1, "up", 1)), ("consumers", ("up", 0, "out", 0))):
        model = Mixed()
        before = {name: value.clone() for name, value in model.named_parameters()}
        removed = SoftPruner(model, torch.arange(4)[None], places=places, ratio=0.5).step().removed
        changed = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
        names = [next(n for n in before if n.startswith(layer)) for layer in zeros[::2]]
        assert changed == set(names)
        for name, dim in zip(names, zeros[1::2], strict=True):
            before[name] = before[name].detach().index_fill(dim, torch.tensor(removed[name][dim]), 0)
            assert torch.equal(model.get_parameter(name).detach(), before[name])


def test_a_killed_run_with_soft_pruning_ends_as_a_whole_one(tmp_path: Path) -> None:
    """What is switched off is decided from the weights, so there is no state to lose."""
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(64, 1, 8, 8, generator=generator), torch.arange(64) % 3
    batches = list(zip((x + y.view(-1, 1, 1, 1)).split(8), y.split(8), strict=True))

    def trained(stop: int | None, folder: Path | None) -> tuple[SoftPruner, dict[str, torch.Tensor]]:
        pruner = SoftPruner(network(), X, ratio=0.5)

        def end_of(epoch: int) -> None:
            if epoch == stop:
                raise InterruptedError
            pruner.step(epoch)

        finetune(pruner.model, batches, batches, epochs=3, checkpoint=folder, on_epoch=end_of)
        return pruner, pruner.model.state_dict()

    pruner, whole = trained(None, None)
    with pytest.raises(InterruptedError):
        trained(3, tmp_path)
    again, resumed = trained(None, tmp_path)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert again.plan == pruner.plan
    assert pruner.cut()[0].out_channels == 4


def test_refusals() -> None:
    with pytest.raises(PlanError, match="places is 'nowhere'"):
        SoftPruner(network(), X, places="nowhere")
    with pytest.raises(PlanError, match="Nothing is switched off"):
        SoftPruner(network(), X).cut()
    weighted = network()
    nn.utils.parametrizations.weight_norm(weighted[3])
    with pytest.raises(PlanError, match="A weight is computed from"):
        SoftPruner(weighted, X, ratio=0.5).step()


def test_channels_without_a_consumer_of_their_own_are_refused() -> None:
    class Scores(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(4, 8), nn.Linear(4, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.q(x) @ self.k(x).transpose(1, 2)

    x = torch.randn(1, 3, 4)
    with pytest.raises(PlanError, match="No weight among the consumers of 'q'"):
        SoftPruner(Scores(), x, places="consumers", ratio=0.5).step()
    model = Scores()
    SoftPruner(model, x, ratio=0.5).step()
    assert int((model.q.weight == 0).all(1).sum()) == 4
