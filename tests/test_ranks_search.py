"""`library` and `optimize` by two ranks, each with its share of the data."""

from __future__ import annotations

import pytest
import torch
from support.ranks import needs_distributed, on_two_ranks
from torch import nn

import structprune
from structprune.distributed import rank_and_count
from structprune.errors import PlanError


def model():
    torch.manual_seed(0)
    layers = [nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 4)]
    return nn.Sequential(*layers).double().eval()


def batches(*sizes):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, 6, generator=generator).double() for size in sizes]


def share(batches):
    rank, count = rank_and_count()
    return batches[rank::count]


CASES = {
    "all positions": ((16, 16, 16, 16), {}),
    "some positions": ((16, 12, 16, 12, 9), {"rows": 30}),
    "few samples to measure on": ((16, 16, 16, 16), {"probes": 20}),
    "one rank measures and the other solves": ((16, 16), {"probes": 16}),
}


def made(rank, folder=None):
    """What is lost in each library, and the weights of a network of it."""
    found = {}
    for name, (sizes, options) in CASES.items():
        data = share(batches(*sizes))
        library = structprune.library(model(), data[0][:2], data, levels=(0.25, 0.5), round_to=1, **options)
        slim = library.assemble(library.plan(target={"macs": 0.6}))
        losses = [torch.from_numpy(entry.loss) for entry in library.entries]
        found[name] = torch.cat([*losses, *(tensor.flatten() for tensor in slim.state_dict().values())])
    if folder is not None:
        data = share(batches(16, 16, 16, 16))
        for _ in range(2):  # the second one is read
            structprune.library(model(), data[0][:2], data, levels=(0.25, 0.5), round_to=1, folder=folder / "library")
    return found


@needs_distributed
def test_two_ranks_make_the_library_of_one_process(tmp_path):
    alone = made(0)
    for found in on_two_ranks(made, tmp_path, tmp_path):
        for name, expected in alone.items():
            torch.testing.assert_close(found[name], expected, rtol=1e-8, atol=1e-10)
    # One process finds it in the folder, as that of all the data.
    data = batches(16, 16, 16, 16)
    library = structprune.library(
        model(), data[0][:2], data, levels=(0.25, 0.5), round_to=1, folder=tmp_path / "library"
    )
    losses = torch.cat([torch.from_numpy(entry.loss) for entry in library.entries])
    torch.testing.assert_close(losses, alone["all positions"][: len(losses)], rtol=1e-8, atol=1e-10)


TRIALS = 7


def optimized(rank, folder):
    """The best network and what was tried; then what is said without a storage, and of a rank that fails."""
    data = share(batches(16, 16, 16, 16))
    goal = model()(torch.cat(batches(16, 16, 16, 16))).argmax(1)

    def evaluate(network):
        return float((network(torch.cat(batches(16, 16, 16, 16))).argmax(1) == goal).float().mean())

    given = {"eps": 0.1, "minimize": "macs", "trials": TRIALS, "round_to": 1}
    found = structprune.optimize(model(), data[0][:2], data, evaluate, storage=folder / "study.db", **given)
    with pytest.raises(PlanError, match="storage is None, and there are several ranks"):
        structprune.optimize(model(), data[0][:2], data, evaluate, **given)

    def broken(network):
        raise OSError(f"no data on rank {rank}")

    said = ""
    try:
        evaluating = broken if rank else evaluate
        structprune.optimize(model(), data[0][:2], data, evaluating, storage=folder / "another.db", **given)
    except (PlanError, OSError) as error:
        said = str(error)
    weights = {name: tensor.clone() for name, tensor in found.model.state_dict().items()}
    return weights, found.gain, [trial.number for trial in found.trials], said


@needs_distributed
def test_two_ranks_share_the_trials(tmp_path):
    pytest.importorskip("optuna")
    first, second = on_two_ranks(optimized, tmp_path, tmp_path)
    torch.testing.assert_close(first[0], second[0], rtol=1e-9, atol=1e-12)
    assert first[1] == second[1] > 1.2
    assert first[2] == second[2]
    assert len(first[2]) == TRIALS
    assert "Rank 1 of 2 failed in optimize" in first[3]
    assert "no data on rank 1" in second[3]
