"""A rank that fails in what several processes do together: the others raise too, and none waits."""

from __future__ import annotations

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from support.ranks import needs_distributed, on_two_ranks
from torch import nn

import structprune
from structprune.distributed import all_reduced, failing_together, several
from structprune.errors import PlanError, RecoveryError
from structprune.importance.base import fitted


class Network(nn.Module):
    """A batch of one sample takes another branch in front of the norm."""

    def __init__(self):
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)

    def forward(self, x):
        y = self.up(x)
        return self.down(torch.tanh(self.norm(F.relu(y) if len(x) > 1 else F.gelu(y))))


def batches(*sizes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, 6, generator=generator) for size in sizes]


def unreadable():
    yield from batches(8)
    raise OSError("the disk is gone")


# What the second rank has, and what it says of that; the first rank has data.
BAD = {
    "no batch": (lambda: [], "data holds no batch|give an iterable with at least one batch"),
    "unreadable": (unreadable, "OSError: the disk is gone"),
    "another branch": (lambda: batches(8, 1), "A batch runs gelu where the trace"),
    "another type": (lambda: ["text"], "A batch of data is a str|must be Tensor, not str"),
    "another shape": (lambda: [torch.randn(8, 7)], "8x7|size 7"),
}


def model():
    torch.manual_seed(0)
    return Network().eval()


def slim():
    return structprune.prune(model(), batches(2)[0], ratio=0.5, round_to=1)


def graph():
    return structprune.DependencyGraph(model(), batches(2)[0])


DOING = {
    "recover": (lambda data: structprune.recover(slim(), model(), data), RecoveryError),
    "recalibrate": (lambda data: structprune.recalibrate(model(), data), RecoveryError),
    "Reconstruction.fit": (lambda data: structprune.Reconstruction(rows=32).fit(graph(), data), PlanError),
    "library": (lambda data: structprune.library(model(), batches(2)[0], data, levels=(0.5,)), RecoveryError),
    "fitting ThiNet": (lambda data: fitted("thinet", graph(), data), PlanError),
    "fitting Taylor": (lambda data: fitted("taylor", graph(), data, lambda m, x: m(x).square().mean()), PlanError),
}
# Criteria look at the operations that sum a channel away, in whichever branch.
CASES = [
    (doing, bad) for doing in DOING for bad in BAD if not (bad == "another branch" and doing.startswith("fitting"))
]


def outcomes(rank):
    """What each rank raises, by what is done and what is wrong, and the sums that it takes afterwards."""
    found = {}
    for doing, bad in CASES:
        try:
            DOING[doing][0](batches(8, 8) if rank == 0 else BAD[bad][0]())
        except Exception as error:  # what it raises is the outcome that is compared
            found[doing, bad] = type(error).__name__, str(error)
        found[doing, bad, "sum"] = int(all_reduced(torch.tensor(rank + 1)))
    return found


@needs_distributed
def test_all_ranks_raise_where_one_fails(tmp_path):
    first, second = on_two_ranks(outcomes, tmp_path)
    for doing, bad in CASES:
        kind, message = first[doing, bad]
        assert kind == DOING[doing][1].__name__
        own, why = second[doing, bad]
        assert message.startswith(f"Rank 1 of 2 failed in {doing}, so this one stops too")
        assert message.endswith(f"What rank 1 says: {own}: {why}")
        assert re.search(BAD[bad][1], f"{own}: {why}")
        # None is left behind in a sum of before.
        assert first[doing, bad, "sum"] == second[doing, bad, "sum"] == 3


def sums_and_failures(rank):
    """Blocks that are left at different sums; a block within another; both failing."""
    found = []
    for failing in (0, 2, 3, None):
        try:
            with failing_together(PlanError, "outer"), failing_together(RecoveryError, "inner"):
                for number in range(4):
                    if rank == 1 and number == failing:
                        raise KeyError(number)
                    if number < 3:  # behind the last sum a rank can still fail
                        all_reduced(torch.ones(number + 1))
        except (PlanError, KeyError) as error:
            found.append(type(error).__name__)
        else:
            found.append("nothing")
    with pytest.raises(ValueError, match=f"mine is {rank}"), failing_together(PlanError, "both"):
        raise ValueError(f"mine is {rank}")
    return found


@needs_distributed
def test_a_block_ends_at_the_sum_at_which_a_rank_fails(tmp_path):
    first, second = on_two_ranks(sums_and_failures, tmp_path)
    assert first == ["PlanError"] * 3 + ["nothing"]
    assert second == ["KeyError"] * 3 + ["nothing"]


def test_a_single_process_raises_its_own_error():
    assert not several()
    network = model()
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(RecoveryError, match="data holds no batch"):
        structprune.recalibrate(network, [])
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
