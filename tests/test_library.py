"""The library of groups at several widths: solved, measured, kept, planned from; and evolution over it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from support.recovery_nets import GONE, IMAGES, TOKENS, conv_net, copy_channels, data_of, error, jittered, linear_net
from support.snapshot import assert_untouched, snapshot
from torch import nn

import structprune
from structprune.errors import LoadError, PlanError, RecoveryError
from structprune.recovery.selection import squared_error
from structprune.search.evolution import Evolution

LEVELS = (0.25, 0.375, 0.5, 0.75)


def made(model, data, **given):
    given = {"levels": LEVELS, "distance": "squared_error", "probes": 8, "round_to": 1, **given}
    return structprune.library(model, next(iter(data)), data, **given)


def two_groups():
    """Two groups, each the input of the next layer."""
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    return jittered(model), data_of(TOKENS)


class Once:
    """Data that count the passes over them, and end in an error where they are told to."""

    def __init__(self, data, passes=None):
        self.data, self.left, self.passes = data, passes, 0

    def __iter__(self):
        self.passes += 1
        if self.left is not None and self.passes > self.left:
            raise RuntimeError("the process is killed")
        return iter(self.data)


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: conv_net(nn.Conv2d(8, 4, 3)), IMAGES),
        (lambda: conv_net(nn.Sequential(nn.Conv2d(8, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU())), IMAGES),
        (lambda: conv_net(nn.ConvTranspose2d(8, 4, 3, stride=2)), IMAGES),
        (lambda: conv_net(nn.Conv2d(8, 4, 3, bias=False)), IMAGES),
        (lambda: linear_net(nn.Linear(8, 4)), TOKENS),
    ],
)
def test_a_library_knows_what_others_can_replace_and_has_the_layers_for_it(make, shape):
    model, data = make(), data_of(shape)
    copy_channels(model[0].weight, model[0].bias)
    before = snapshot(model)
    library = made(model, data, probes=1)
    assert_untouched(model, before)
    entry = library.entries[0]
    assert entry.loss[1] < 1e-3 * entry.loss[2]  # 3 of 8 are copies; what is left is the ridge
    plan = structprune.plan(model, data[0], importance=library, ratio=3 / 8, round_to=1, scope="local", axes=entry.axis)
    assert set(plan.removed["0.weight"][0]) in [
        set(pairs) for pairs in itertools.product(*zip(GONE, [0, 2, 7], strict=True))
    ]
    assert error(library.assemble(plan), model, data) < 1e-2 * error(plan.apply(model), model, data)


def test_a_constant_that_is_lost_goes_into_the_bias_of_the_norm_behind():
    """A channel that is 1 everywhere can be replaced by a bias alone."""
    consumer = nn.Sequential(nn.Conv2d(8, 4, 3, bias=False), nn.BatchNorm2d(4))
    model, data = conv_net(consumer), data_of(IMAGES)
    with torch.no_grad():
        model[0].weight[GONE], model[0].bias[GONE] = 0.0, 1.0
    library = made(model, data, probes=1)
    assert library.entries[0].loss[1] < 1e-5 * library.entries[0].loss[2]
    assert set(library.entries[0].order[:3].tolist()) == set(GONE)


def test_losses_are_those_of_the_network_that_is_really_cut():
    model, data = two_groups()
    library = made(model, data)
    first = library.entries[0]
    plan = structprune.plan(model, data[0], importance=library, ratio={"0": 0.5, "2": 0.0}, round_to=1)
    slim = library.assemble(plan)
    with torch.no_grad():
        moved = float(squared_error(model(data[0]), slim(data[0]))) / len(data[0])
    assert first.group == "0"
    assert first.loss[2] == pytest.approx(moved, rel=1e-6)
    assert (np.diff(first.loss) > 0).all()


def test_the_plan_loses_least_of_all_that_the_levels_allow():
    model, data = two_groups()
    library = made(model, data)
    plan = library.plan(target={"macs": 0.4})
    losses = [dict(zip([8, *e.kept.tolist()], [0.0, *e.loss.tolist()], strict=True)) for e in library.entries]
    macs = 6 * 8 + 8 * 8 + 8 * 4
    within = [losses[0][a] + losses[1][b] for a, b in itertools.product(*losses) if 6 * a + a * b + b * 4 <= 0.4 * macs]
    kept = {layer.layer: layer.after for layer in plan.layers}
    assert losses[0][kept["0"]] + losses[1][kept["2"]] == pytest.approx(min(within))


def test_another_target_needs_no_data(tmp_path):
    model, data = two_groups()
    library = made(model, data, folder=tmp_path / "library")
    again = structprune.library(
        model, data[0], levels=LEVELS, distance="squared_error", round_to=1, folder=tmp_path / "library"
    )
    for share in (0.7, 0.3):
        ours, theirs = library.plan(target={"macs": share}), again.plan(target={"macs": share})
        assert ours.digest == theirs.digest
        assert ours.after.macs <= share * ours.before.macs
        x = data[0]
        assert torch.equal(library.assemble(ours)(x), again.assemble(theirs)(x))


def test_a_library_that_was_cut_short_goes_on(tmp_path):
    """With memory for one group a pass, the second pass is cut short; what the first one gave is not made again."""
    model, data = two_groups()
    whole = made(model, data)
    with pytest.raises(RuntimeError, match="killed"):
        made(model, Once(data, passes=6), folder=tmp_path, memory=1)
    (first,) = tmp_path.glob("*.safetensors")
    stamp = first.stat().st_mtime_ns
    library = made(model, Once(data), folder=tmp_path, memory=1)
    assert first.stat().st_mtime_ns == stamp
    assert len(library.entries) == 2
    for one in whole.entries:
        (other,) = (e for e in library.entries if e.group == one.group)
        assert np.array_equal(one.order, other.order)
        np.testing.assert_allclose(one.loss, other.loss, rtol=1e-9)


def test_memory_bounds_how_many_groups_share_a_pass():
    model, data = two_groups()
    roomy, tight = Once(data), Once(data)
    made(model, roomy)
    made(model, tight, memory=1)
    assert tight.passes == roomy.passes + 1


def test_groups_that_go_together_share_what_they_lose():
    class Halves(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.a, self.b = nn.Linear(6, 16), nn.Linear(8, 3), nn.Linear(8, 3)

        def forward(self, x):
            a, b = self.up(x).chunk(2, -1)
            return self.a(a.relu()) + self.b(b.tanh())

    model, data = jittered(Halves()), data_of(TOKENS)
    library = made(model, data)
    plan = library.plan(target={"macs": 0.6})
    assert plan.after.macs <= 0.6 * plan.before.macs
    one, other = library.entries
    assert one.kept.tolist() == other.kept.tolist()
    assert np.array_equal(one.loss, other.loss)
    assert error(library.assemble(plan), model, data) < error(plan.apply(model), model, data)


def test_evolution_loses_no_more_within_the_limit_and_is_the_same_each_time():
    model, data = two_groups()
    library = made(model, data, levels=tuple(n / 8 for n in range(1, 8)))
    how = Evolution(generations=4, offspring=4, seed=1)
    before = snapshot(model)
    found, again = (library.evolve(data, how=how, target={"macs": 0.5}, probes=16) for _ in range(2))
    assert_untouched(model, before)
    assert found.plan.digest == again.plan.digest
    assert found.plan.after.macs <= 0.5 * found.plan.before.macs
    assert found.history == tuple(sorted(found.history, reverse=True))
    assert found.loss == found.history[-1] <= found.start
    with torch.no_grad():  # layers were solved on the first three quarters of each batch
        slim = library.assemble(found.plan)
        moved = sum(float(squared_error(model(x[6:]), slim(x[6:]))) for x in data[:2]) / 4
    assert found.loss == pytest.approx(moved, rel=1e-9)


def test_evolution_finds_what_sums_of_losses_hide():
    """Where the parent is the worst of all, any offspring within the limit is better."""
    model, data = two_groups()
    library = made(model, data, levels=(0.25, 0.5, 0.75))
    for entry in library.entries:
        entry.loss[:] = entry.loss[::-1].copy() if entry.group == "2" else entry.loss
    found = library.evolve(data, how=Evolution(generations=6, offspring=6), target={"macs": 0.45}, probes=16)
    assert found.loss < found.start


def test_what_cannot_be_is_refused(tmp_path):
    model, data = two_groups()
    library = made(model, data, folder=tmp_path)
    with pytest.raises(PlanError, match="above 0 and below 1"):
        made(model, data, levels=(0.5, 1.0))
    with pytest.raises(PlanError, match="target is no option of a library"):
        made(model, data, target={"macs": 0.5})
    with pytest.raises(PlanError, match="holds a library of other levels"):
        made(model, data, folder=tmp_path, levels=(0.5,))
    with pytest.raises(PlanError, match="lacks 2 groups"):
        structprune.library(model, data[0])
    with pytest.raises(RecoveryError, match="holds no batch"):
        structprune.library(model, data[0], [])
    with pytest.raises(PlanError, match="give a target as well"):
        library.evolve(data)
    with pytest.raises(PlanError, match="Give a plan that this library made"):
        library.assemble(structprune.plan(model, data[0], ratio=1 / 8, round_to=1))
    with torch.no_grad():
        model[0].bias += 1
    with pytest.raises(PlanError, match="holds a library of other weights"):
        made(model, data, folder=tmp_path)


def test_a_damaged_entry_is_named(tmp_path):
    model, data = two_groups()
    made(model, data, folder=tmp_path)
    file = sorted(tmp_path.glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(LoadError, match=file.name):
        made(model, data, folder=tmp_path)


def test_norms_that_take_their_statistics_from_the_batch_get_no_constant():
    consumer = nn.Sequential(nn.Conv2d(8, 4, 3, bias=False), nn.BatchNorm2d(4, track_running_stats=False))
    model, data = conv_net(consumer), data_of(IMAGES)
    copy_channels(model[0].weight, model[0].bias)
    library = made(model, data, probes=1)
    assert library.entries[0].loss[1] < 1e-3 * library.entries[0].loss[2]
    assert not any("1.bias" in name for name in library._shelf.changes(next(iter(library._shelf)), 5))


def test_notebooks_and_people_see_what_was_measured():
    model, data = two_groups()
    library = made(model, data)
    assert repr(library) == "Library(Sequential: 2 groups, 8 widths)"
    assert "level 4" in library._repr_html_()
    assert repr(library.entries[0]) == "Entry('0', mlp, 8 channels at [6, 5, 4, 2])"
