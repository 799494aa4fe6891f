"""What the operations of a network are, and the table of their times: between its nodes, below its steps, on disk."""

from __future__ import annotations

import json
from itertools import product

import numpy as np
import pytest
import torch
from support.latency import NETWORKS, NONE, Machine, macs_of, seeded, spec_of
from torch import nn

import structprune
from structprune.coupling.graph import ChannelGraph
from structprune.errors import PlanError
from structprune.latency import cache
from structprune.latency.eager import call_of, shapes
from structprune.latency.specs import uses
from structprune.latency.table import Grid, LatencyTable

# -- what the operations are -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_operations_at_full_size_are_those_of_the_network(name):
    build, x = NETWORKS[name]
    graph = ChannelGraph(seeded(build), x)
    found = uses(graph.trace, graph.channels)
    full = graph.counter(graph.components.removed(NONE))
    assert all(use.point(full) == (use.spec.widths, 1.0) for use in found)
    assert {use.spec.kind for use in found} == (
        {"conv2d", "conv_transpose2d", "matmul"} if name == "convolutions" else {"matmul", "attention"}
    )
    for use in found:  # what would be timed computes what the node computes
        operands = [torch.randn(shape) for shape in shapes(use.spec, use.spec.widths)]
        result = call_of(use.spec, use.spec.widths, operands)()
        assert result.numel() == int(np.prod(use.node.meta["shape"]))


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("axis", ["channels", "mlp", "hidden", "heads", "head_size"])
def test_sizes_follow_the_channels_of_a_pruned_network(name, axis):
    build, x = NETWORKS[name]
    graph = structprune.DependencyGraph(seeded(build), x)
    for group in graph.groups():
        if group.axis != axis:
            continue
        dead = graph.components.removed(group.components[: group.channels // 2])
        before = uses(graph.trace, graph.channels)
        slim = seeded(build)
        other = structprune.DependencyGraph(slim, x)
        (same,) = [g for g in other.groups() if (g.name, g.axis, g.channels) == (group.name, axis, group.channels)]
        other.prune_group(same, range(group.channels // 2))
        after = uses(other.trace, other.channels)
        for old, new in zip(before, after, strict=True):
            widths, scale = old.point(graph.counter(dead))
            # Fewer groups of the same width are so many times less; all else stands in the table.
            assert scale * macs_of(old.spec, widths) == pytest.approx(macs_of(new.spec, new.spec.widths))


def test_operations_that_are_alike_are_one():
    model = nn.Sequential(*[nn.Conv2d(8, 8, 3, padding=1) for _ in range(5)], nn.Conv2d(8, 8, 1))
    graph = ChannelGraph(model, torch.randn(1, 8, 4, 4))
    specs = [use.spec for use in uses(graph.trace, graph.channels)]
    assert len(specs) == 6
    # The first has fixed inputs, the last fixed outputs.
    assert len({spec.key for spec in specs}) == 3 == len(set(specs))


# -- the table ---------------------------------------------------------------------------------------------------


def test_between_nodes_times_are_bilinear():
    grid = Grid((1, 1), ((2, 4), (10, 20)), (1.0, 2.0, 3.0, 4.0), ((), ()))
    assert [grid(w) for w in ((2, 10), (2, 20), (4, 10), (4, 20))] == [1.0, 2.0, 3.0, 4.0]
    assert grid((3, 10)) == 2.0
    assert grid((3, 15)) == 2.5
    assert grid((4, 12)) == pytest.approx(3.2)


def test_below_the_first_node_half_of_it_stays():
    grid = Grid((1,), ((8, 16),), (1.0, 2.0), ((),))
    assert grid((4,)) == 0.75
    assert grid((16,)) == 2.0
    assert grid((32,)) == 4.0


def test_on_steps_lengths_cost_as_much_as_the_next_step():
    grid = Grid((16,), ((16, 32),), (1.0, 2.0), ((),))
    assert [grid((w,)) for w in (1, 16, 17, 32)] == [1.0, 1.0, 2.0, 2.0]


@pytest.mark.parametrize("step", [4, 8, 16, 32])
@pytest.mark.parametrize("full", [64, 96, 128, 200, 256])
def test_steps_are_read_off_the_times(full, step):
    spec = spec_of(out=full)
    table = LatencyTable({})
    table.measure([spec], Machine(step).operations)
    finest = max(1, 2 ** int(np.log2(full / 16)) // 2)
    coarsest = 2 ** int(np.log2(full / 4))
    assert table.grid(spec).steps[0] in {min(coarsest, max(step, finest)), min(coarsest, max(step, 2 * finest))}
    for width in range(table.grid(spec).steps[0], full + 1, 3):
        padded = min(full, -(-width // table.grid(spec).steps[0]) * table.grid(spec).steps[0])
        (true,) = Machine(step).operations([(spec, (padded,))])
        if padded >= table.grid(spec).nodes[0][0]:
            assert table.seconds(spec, (width,)) == pytest.approx(true, rel=0.2)


def test_a_time_that_does_not_depend_on_a_length_has_the_coarsest_step():
    spec = spec_of(out=64, **{"in": 32})
    table = LatencyTable({})
    table.measure([spec], lambda points: [1e-6 * widths[1] for _, widths in points])
    assert table.grid(spec).steps == (16, 2)
    assert table.seconds(spec, (1, 16)) == pytest.approx(16e-6)


@pytest.mark.parametrize("full", [16, 64, 256])
def test_lengths_below_one_step_are_measured(full):
    """A device that pads one axis to 16 and reads the other channel by channel: only the other saves below 16."""

    def padded(points):
        return [1e-6 * max(16, -(-out // 16) * 16) * inside for _, (out, inside) in points]

    spec = spec_of(out=full, **{"in": full})
    table = LatencyTable({})
    table.measure([spec], padded)
    step = table.grid(spec).steps[0]
    assert step == min(16, full // 4)
    assert table.grid(spec).nodes[0][0] == max(1, step // 4)
    half = table.seconds(spec, (full, step // 2))
    assert half == pytest.approx(1e-6 * full * (step // 2), rel=0.01)
    assert table.seconds(spec, (step // 2, full)) == table.seconds(spec, (step, full))


@pytest.mark.parametrize(("full", "step"), list(product([1, 2, 3, 5, 10, 16, 24, 100, 768], [1, 2, 4])))
def test_every_length_has_a_time(full, step):
    spec = spec_of(out=full)
    table = LatencyTable({})
    table.measure([spec], Machine(step).operations)
    grid = table.grid(spec)
    assert len(grid.nodes[0]) <= 8
    assert grid.nodes[0][-1] == full
    assert all(table.seconds(spec, (width,)) > 0 for width in range(1, full + 1))
    assert table.seconds(spec, (0,)) == 0


def test_what_other_work_held_up_is_measured_again():
    """Every seventh time is five times too long, another one each time; the full size is among them."""
    spec, asked = spec_of(out=64, **{"in": 64}), []

    def disturbed(points):
        found = Machine(16).operations(points)
        asked.append(len(points))
        return [5 * t if (i + 3 * len(asked)) % 7 == 0 or (len(asked) == 3 and i == len(points) - 1) else t
                for i, t in enumerate(found)]  # fmt: skip

    table, quiet = LatencyTable({}), LatencyTable({})
    table.measure([spec], disturbed)
    quiet.measure([spec], Machine(16).operations)
    assert len(asked) > 3
    assert asked[3] < asked[2] / 4
    assert table.grid(spec).nodes == quiet.grid(spec).nodes
    assert table.grid(spec).seconds == pytest.approx(quiet.grid(spec).seconds)


def test_what_is_known_is_not_measured_again():
    table, machine = LatencyTable({}), Machine()
    assert table.measure([spec_of(out=32), spec_of(out=32), spec_of(out=64)], machine.operations) == 2
    calls = list(machine.calls)
    assert table.measure([spec_of(out=64)], machine.operations) == 0
    assert machine.calls == calls


def test_an_operation_that_was_not_measured_is_refused():
    with pytest.raises(PlanError, match="does not hold"):
        LatencyTable({}).seconds(spec_of(out=8), (4,))


# -- on disk -----------------------------------------------------------------------------------------------------


HELD = {"backend": "eager", "device": "cpu", "name": "some CPU", "threads": 1, "versions": {"torch": "2"}}


def measured(*specs):
    table = LatencyTable(HELD)
    table.measure(specs, Machine(4).operations)
    return table


def test_a_table_comes_back_from_disk(tmp_path):
    table = measured(spec_of(out=32, **{"in": 16}))
    path = cache.save(tmp_path / "new", table)
    assert cache.load(tmp_path / "new", HELD) == table
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_what_others_measured_meanwhile_is_kept(tmp_path):
    cache.save(tmp_path, measured(spec_of(out=8)))
    cache.save(tmp_path, measured(spec_of(out=16)))
    assert len(cache.load(tmp_path, HELD).grids) == 2


@pytest.mark.parametrize("change", [{"threads": 2}, {"backend": "onnxruntime"}, {"versions": {"torch": "3"}}])
def test_other_conditions_are_another_table(tmp_path, change):
    cache.save(tmp_path, measured(spec_of(out=8)))
    assert cache.load(tmp_path, HELD | change).grids == {}


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[]",
        lambda text: json.dumps({"schema": 99, "conditions": {}, "grids": {}}),
        lambda text: text.replace('"grids": {', '"grids": {"x": [[1], [[1, 2]], [1.0], [[]]], '),
        lambda text: text.replace('"grids": {', '"grids": {"x": [[1], [[1]], [-1.0], [[]]], '),
        lambda text: text.replace("some CPU", "other CPU"),
    ],
    ids=["cut", "empty", "a list", "of a later schema", "times are missing", "negative", "of another machine"],
)
def test_a_damaged_file_is_told_of_and_measured_anew(tmp_path, damage):
    path = cache.save(tmp_path, measured(spec_of(out=8)))
    path.write_text(damage(path.read_text()))
    with pytest.warns(RuntimeWarning, match="measured anew"):
        assert cache.load(tmp_path, HELD).grids == {}


def test_the_cache_folder_is_the_platforms(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.cache_folder() == tmp_path / "structprune" / "latency"


def test_compiled_models_share_the_table_of_eager_mode():
    found = [cache.conditions(name, torch.device("cpu"), 1) for name in ("eager", "compile", "aotinductor")]
    assert found[0] == found[1] == found[2]
