"""Several ranks, each with a share of the data, do what a single process does with all of them."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.ranks import needs_distributed, on_ranks, on_two_ranks
from torch import nn

import structprune
from structprune.distributed import all_reduced, rank_and_count
from structprune.equations import fourier
from structprune.errors import PlanError, RecoveryError
from structprune.importance.base import CRITERIA, fitted
from structprune.planning.sensitivities import Sensitivity
from structprune.recovery import layer_solver, preconditioner


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.first, self.norm = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.second, self.last = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x):
        return F.relu(x + self.last(self.second(F.relu(self.norm(self.first(x))))))


def model():
    """Two residual blocks, in float64: single precision would hide whether the ranks solve the same equations."""
    torch.manual_seed(0)
    stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    whole = nn.Sequential(stem, Block(8), Block(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    for norm in (module for module in whole.modules() if isinstance(module, nn.BatchNorm2d)):
        norm.running_mean.normal_(0, 0.3)
        norm.running_var.uniform_(0.5, 2)
        nn.init.uniform_(norm.weight, 0.5, 1.5)
    return whole.double().eval()


def images(*sizes):
    generator = torch.Generator().manual_seed(1)
    mixed = torch.randn(3, 3, generator=generator)
    return [torch.einsum("ij,bjhw->bihw", mixed, torch.randn(n, 3, 8, 8, generator=generator)).double() for n in sizes]


def share(batches):
    """Every n-th batch: in turns these are all batches in their order."""
    rank, count = rank_and_count()
    return batches[rank::count]


def slim():
    return structprune.prune(model(), images(2)[0], ratio=0.5, round_to=1)


def graph():
    return structprune.DependencyGraph(model(), images(2)[0])


def labelled(*sizes):
    return [(batch, batch.mean((1, 2, 3)).mul(50).long().abs() % 5) for batch in images(*sizes)]


def cross_entropy(network, batch):
    return F.cross_entropy(network(batch[0]), batch[1])


def weights(network):
    return torch.cat([tensor.flatten() for tensor in network.state_dict().values() if tensor.is_floating_point()])


def recovered(*sizes, **options):
    return weights(structprune.recover(slim(), model(), share(images(*sizes)), **options))


def reconstruction(**options):
    chosen = structprune.Reconstruction(**options).fit(graph(), share(images(*[12] * 6)))
    groups = graph().groups()
    costs = [torch.from_numpy(chosen.total(group, np.arange(1, group.channels))) for group in groups]
    return torch.cat([chosen(group, {}) for group in groups] + costs)


def scores(name):
    criterion = fitted(name, graph(), share(labelled(*[12] * 4)), cross_entropy)
    tensors = {**dict(model().named_parameters()), **dict(model().named_buffers())}
    return torch.cat([criterion(group, tensors).double() for group in graph().groups()])


def imitation(network, data):
    return -float((network(data) - model()(data)).square().mean())


def sensitivities(**options):
    found = structprune.sensitivity(model(), images(2)[0], images(24)[0], imitation, **options)
    return torch.tensor([found.dense, *(value for curve in found.curves for value in curve.metric)])


def sensitivities_by_gradients():
    return sensitivities(importance="taylor", data=share(labelled(6, 6, 6, 6)), loss=cross_entropy)


def without_a_branch():
    """The branch that is chosen, as a number, and the weights once what is left is solved to meet the whole."""
    data = images(12, 12, 12, 12)
    chosen = structprune.choose_branches(model(), data[0], share(data), count=1, kind="branches", score="error")
    shorter = structprune.remove_branches(model(), data[0], chosen)
    after = weights(structprune.recover(shorter, model(), share(data), rows=300))
    return torch.cat([torch.tensor([float(len(chosen[0]))]).double(), after])


def recovered_long_kernels():
    """Layers that are solved by their spectra; a batch of one sample has none to solve on."""
    torch.manual_seed(0)
    layers = nn.Conv1d(2, 12, 5, padding=2), nn.ReLU(), nn.Conv1d(12, 3, 9, padding=4), nn.Flatten(), nn.Linear(72, 2)
    whole = nn.Sequential(*layers).double().eval()
    batches = [torch.randn(n, 2, 24).double().cumsum(2) / 3 for n in (12, 5, 9, 1, 12)]
    narrow = structprune.prune(whole, batches[0], ratio=0.5, round_to=1)
    with (
        mock.patch.object(layer_solver, "UNFOLDED", 20),
        mock.patch.object(preconditioner, "MAX_FEATURES", 20),
        mock.patch.object(fourier, "MARGIN", 0.0),
    ):
        return weights(structprune.recover(narrow, whole, share(batches)))


def recalibrated():
    return weights(structprune.recalibrate(slim(), share(images(12, 12, 7, 12))))


def folded():
    return weights(structprune.fold(slim(), model(), images(2)[0], data=share(images(12, 12, 7, 12))))


WORK = {
    "fold": folded,
    "recalibrate": recalibrated,
    "sensitivity": sensitivities,
    "sensitivity with a criterion of gradients": sensitivities_by_gradients,
    "Reconstruction": reconstruction,
    "Reconstruction on some positions": lambda: reconstruction(rows=300),
    "Reconstruction with few samples to measure on": lambda: reconstruction(probes=30),
    "recover": lambda: recovered(*[12] * 6),
    "recover, layers alone": lambda: recovered(*[12] * 6, rounds=0),
    "recover on some positions": lambda: recovered(*[12] * 6, rows=300),
    "recover without a branch": without_a_branch,
    "recover from small batches": lambda: recovered(*[3] * 12),
    "recover long kernels": recovered_long_kernels,
    "recover from batches of unlike size": lambda: recovered(12, 5, 9, 1, 12),
}
SCORES = {name: lambda name=name: scores(name) for name in CRITERIA}


def results(rank, names):
    return {name: (WORK | SCORES)[name]() for name in names}


@needs_distributed
@pytest.mark.parametrize(
    ("count", "names"),
    [
        (2, (*SCORES, *WORK)),
        (
            4,
            (
                "recalibrate",
                "sensitivity",
                "Reconstruction on some positions",
                "recover long kernels",
                "recover from batches of unlike size",
            ),
        ),
    ],
)
def test_ranks_do_what_a_single_process_does(count, names, tmp_path):
    alone = results(0, names)
    for of_rank in on_ranks(count, results, tmp_path, names):
        for name, expected in alone.items():
            size = float(expected.abs().max())
            assert float((of_rank[name] - expected).abs().max()) < 1e-8 * size, name


# -- sensitivity -----------------------------------------------------------------------------------------------------


def counted(rank, folder):
    """How often each rank measures: shared out; with a metric that talks; gone on from a checkpoint; of other data."""
    found = {}
    calls = []

    def quiet(network, data):
        calls.append(network)
        return imitation(network, data)

    def talking(network, data):
        calls.append(network)
        return float(all_reduced(torch.tensor(imitation(network, share(data.split(6))[0])))) / 2

    for name, metric, options in (
        ("shared", quiet, {"checkpoint": folder / "measured.json"}),
        ("talking", talking, {}),
        ("again", quiet, {"checkpoint": folder / "measured.json"}),
    ):
        calls.clear()
        measured = structprune.sensitivity(model(), images(2)[0], images(12)[0], metric, **options)
        found[name] = measured.to_json(), len(calls)
    with pytest.raises(PlanError, match=r"The ranks measure .* of the same model"):
        structprune.sensitivity(model(), images(2)[0], images(12, 12)[rank], lambda m, x: float(m(x).mean()))
    return found


@needs_distributed
def test_measurements_are_shared_out_unless_the_metric_talks(tmp_path):
    first, second = on_two_ranks(counted, tmp_path, tmp_path)
    assert {name: text for name, (text, _) in first.items()} == {name: text for name, (text, _) in second.items()}
    measurements = sum(len(curve.kept) for curve in Sensitivity.from_json(first["shared"][0]).curves)
    # Of the whole model too, on each rank.
    assert first["shared"][1] == 1 + -(-measurements // 2)
    assert second["shared"][1] == 1 + measurements // 2
    assert first["talking"][1] == second["talking"][1] == 1 + measurements
    assert first["again"] == (first["shared"][0], 1)
    both = (Sensitivity.from_json(first[name][0]) for name in ("shared", "talking"))
    for one, other in zip(*(curves.curves for curves in both), strict=True):
        assert one.metric == pytest.approx(other.metric, rel=1e-6)


# -- ranks that do not do the same -----------------------------------------------------------------------------------


def unlike(rank):
    """What ranks raise that were given other options or other models, or of which one fails at the end."""
    said = []
    for work, error in (
        (lambda: structprune.recover(slim(), model(), share(images(8, 8)), rounds=rank), RecoveryError),
        (lambda: fitted(("wanda", "flap")[rank], graph(), images(8)), PlanError),
        (lambda: structprune.sensitivity(model(), images(2)[0], images(2)[0], lambda *_: 1 / (1 - rank)), PlanError),
    ):
        try:
            work()
        except (error, ZeroDivisionError) as raised:
            said.append(str(raised))
        assert int(all_reduced(torch.tensor(rank + 1))) == 3  # none waits in a sum of before
    return said


@needs_distributed
def test_ranks_that_do_not_do_the_same_are_told(tmp_path):
    for rank, said in enumerate(on_two_ranks(unlike, tmp_path)):
        assert f"The ranks are not at the same place of recover: this one, {rank}, is at" in said[0]
        assert "The ranks are not at the same place of fitting" in said[1]
        assert ("division by zero" in said[2]) if rank else ("Rank 1 of 2 failed in sensitivity" in said[2])
