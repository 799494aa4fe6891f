"""Criteria that look at data, in several processes: each rank sees its share, and all of them decide alike."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from support.importance_nets import Chain
from support.ranks import needs_distributed, on_two_ranks

import structprune
from structprune.distributed import all_summed
from structprune.importance.base import fitted
from structprune.planning.build import tensors_of

# One of each way of gathering: activations, classes, gates, weights, single samples, second moments.
NAMES = ("flap", "thinet", "tvs", "taylor", "weight_taylor", "obd_fisher", "obd_gates", "obs", "kfac")


def network():
    torch.manual_seed(0)
    return Chain().eval()


def data():
    """Two batches for each rank, of unlike size; only the second rank sees class 2."""
    generator = torch.Generator().manual_seed(1)
    sizes, classes = (5, 3, 4, 6), (2, 2, 3, 3)
    return [
        (torch.randn(size, 3, 6, 6, generator=generator), torch.arange(size) % number)
        for size, number in zip(sizes, classes, strict=True)
    ]


def loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def decided(batches):
    """Scores and the channels that go, by name of criterion."""
    model, found = network(), {}
    graph = structprune.DependencyGraph(model, batches[0][0][:2])
    for name in NAMES:
        score = fitted(name, graph, batches, loss)
        scores = [score(group, tensors_of(graph)).detach() for group in graph.groups()]
        plan = structprune.plan(
            model, batches[0][0][:2], importance=name, data=batches, loss=loss, scope="global", ratio=0.4, round_to=1
        )
        found[name] = scores, plan.removed
    return found


def decided_by(rank):
    return decided(data()[2 * rank : 2 * rank + 2])


@needs_distributed
def test_every_rank_decides_as_one_process_with_all_the_data(tmp_path):
    first, second = on_two_ranks(decided_by, tmp_path)
    together, share = decided(data()), decided(data()[:2])
    for name in NAMES:
        assert first[name][1] == second[name][1] == together[name][1], name
        for mine, theirs, one in zip(first[name][0], second[name][0], together[name][0], strict=True):
            assert torch.equal(mine, theirs)
            torch.testing.assert_close(mine, one, rtol=1e-5, atol=1e-9)
        # The share of one rank alone gives other scores, so that the test can fail.
        assert not all(torch.allclose(a, b, rtol=1e-3) for a, b in zip(first[name][0], share[name][0], strict=True))


def test_a_single_process_keeps_its_sums():
    sums = {"a": torch.ones(2)}
    assert all_summed(sums) is sums
