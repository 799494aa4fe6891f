"""Latency: tables, interpolation, steps, the cache, predictions, the choice by time saved, and one real run."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from support.latency import IMAGES, NETWORKS, NONE, Convolutions, Machine, seeded
from torch import nn

import structprune
from structprune.benchmarking.nodes import read_events
from structprune.coupling.graph import ChannelGraph
from structprune.coupling.groups import Group
from structprune.errors import PlanError
from structprune.latency.eager import time_eager
from structprune.latency.predict import Calibration, TimeModel, calibrated
from structprune.latency.runtimes import by_point, time_in_runtime
from structprune.latency.specs import OpSpec, uses
from structprune.latency.table import LatencyTable
from structprune.latency.widths import Widths
from structprune.planning.rounding import Rounding
from structprune.planning.scopes import CoupledGroups
from structprune.planning.time_saved import Knapsack, Piece, log_loss

# -- the network -------------------------------------------------------------------------------------------------


def time_model(model, x, machine):
    graph = ChannelGraph(model, x)
    found = uses(graph.trace, graph.channels)
    table = LatencyTable({})
    table.measure([use.spec for use in found], machine.operations)
    return graph, TimeModel(graph.trace, graph.channels, found, table)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_network_takes_the_sum_of_its_operations(name):
    build, x = NETWORKS[name]
    machine = Machine(rest=0)
    graph, time = time_model(seeded(build), x, machine)
    operations, bytes_ = time.features(graph.counter(graph.components.removed(NONE)))
    assert operations == pytest.approx(machine.networks([seeded(build)], x)[0])
    assert bytes_ > 0
    assert time.seconds(graph.counter(graph.components.removed(NONE))) == operations
    time.calibration = Calibration(2.0, 1e-9, 0.5)
    assert time.seconds(graph.counter(graph.components.removed(NONE))) == pytest.approx(
        2 * operations + 1e-9 * bytes_ + 0.5
    )


def test_bytes_moved_beside_the_operations():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    graph, time = time_model(model, torch.randn(3, 4), Machine())
    full = graph.counter(graph.components.removed(NONE))
    assert sum(each(full) for each in time.moved) == 2 * 3 * 8 * 4  # the ReLU reads and writes
    half = graph.counter(graph.components.removed(graph.groups()[0].components[:4]))
    assert sum(each(half) for each in time.moved) == 3 * 8 * 4


def test_calibration_finds_what_made_the_times():
    features = [(1.0, 10.0), (0.5, 7.0), (0.25, 5.5), (0.1, 1.0)]
    made = Calibration(1.5, 0.02, 0.3)
    found = calibrated(features, [made(*each) for each in features])
    assert found.operations == pytest.approx(1.5)
    assert found.byte == pytest.approx(0.02)
    assert found.constant == pytest.approx(0.3)


def test_calibration_has_no_negative_terms():
    found = calibrated([(1.0, 1.0), (0.5, 1.0)], [1.0, 0.1])
    assert min(found.operations, found.byte, found.constant) >= 0


@pytest.mark.parametrize("seconds", [[], [0.0], [float("nan")], [-1.0]])
def test_times_that_are_none_are_refused(seconds):
    with pytest.raises(PlanError, match="positive"):
        calibrated([(1.0, 1.0)] * len(seconds), seconds)


@pytest.mark.parametrize("name", NETWORKS)
def test_shares_count_as_the_channels_do(name):
    build, x = NETWORKS[name]
    graph = ChannelGraph(seeded(build), x)
    groups = graph.groups()
    widths = Widths(graph, groups)
    rows = [axis for axes in graph.channels.axes if isinstance(axes, tuple) for axis in axes]
    assert [widths.counter([1.0] * len(groups))(row) for row in rows] == [row.size for row in rows]
    for number, group in enumerate(groups):
        shares = [0.5 if i == number else 1.0 for i in range(len(groups))]
        exact = graph.counter(graph.components.removed(group.components[: group.channels // 2]))
        assert [widths.counter(shares)(row) for row in rows] == [exact(row) for row in rows]


# -- the choice --------------------------------------------------------------------------------------------------


def plain_group(name, channels):
    return Group(name, np.arange(channels), ())


def knapsack(times, losses, feasible):
    units = [CoupledGroups((plain_group(str(i), f[-1]),), np.array(f)[:, None]) for i, f in enumerate(feasible)]
    return Knapsack(units, [np.array(v) for v in losses], times).steps()


def test_the_least_loss_for_the_time_goes_first():
    pieces = [
        Piece(frozenset({0}), lambda share: 1.0 * share[0]),
        Piece(frozenset({1}), lambda share: 10.0 * share[1]),
    ]
    steps = knapsack(pieces, [[1.0, 2.0], [1.0, 2.0]], [[1, 2, 3]] * 2)
    assert steps.owner[np.argsort(steps.priority)].tolist() == [1, 1, 0, 0]


def test_steps_without_a_saving_go_together():
    """Time falls only at multiples of 4: nobody gains by 7, 6 or 5 channels."""
    pieces = [Piece(frozenset({0}), lambda share: float(-(-round(8 * share[0]) // 4)))]
    steps = knapsack(pieces, [np.arange(1.0, 8.0)], [[1, 2, 3, 4, 5, 6, 7, 8]])
    assert len(np.unique(steps.priority[:4])) == 1
    assert len(np.unique(steps.priority)) == 4  # one move saves, three steps save nothing
    assert (np.diff(steps.priority) >= 0).all()


def test_savings_depend_on_what_went_before():
    """A product of two widths: once one is thin, the other saves little, and a third is better."""
    pieces = [
        Piece(frozenset({0, 1}), lambda share: 10 * share[0] * share[1]),
        Piece(frozenset({2}), lambda share: 3 * share[2]),
    ]
    steps = knapsack(pieces, [[1.0], [1.1], [1.0]], [[1, 10]] * 3)
    assert steps.owner[np.argsort(steps.priority)].tolist() == [0, 2, 1]


def test_no_layer_is_left_with_next_to_nothing_for_its_cost():
    """One layer takes nearly all the time; by scores over their mean alone it would be the only one to go."""
    model = seeded(lambda: nn.Sequential(*[nn.Conv2d(a, 64, 3, padding=1) for a in (3, 64, 64, 64)]))

    class Costly(Machine):
        def operations(self, points):
            times = zip(Machine.operations(self, points), points, strict=True)
            return [t * (10 if spec.full["in"] == 3 else 1) for t, (spec, _) in times]

    latency = structprune.Latency(timer=Costly(rest=0))
    plan = structprune.plan(
        model, IMAGES, target={"latency": 0.4}, scope="global", latency=latency, importance=lambda g, t: torch.ones(64)
    )
    assert min(layer.after for layer in plan.layers) >= 16


def test_losses_count_more_the_less_is_left():
    losses = log_loss(np.array([0.0, 1.0, 8.0, 15.0, 16.0]), 16)
    assert losses[:2] == pytest.approx([0.0, 1.0], rel=0.05)
    assert losses[2] == pytest.approx(16 * np.log(2))
    assert np.isfinite(losses).all()
    assert (np.diff(losses, 2)[1:] > 0).all()


def test_what_saves_no_time_goes_last():
    pieces = [Piece(frozenset({1}), lambda share: share[1])]
    steps = knapsack(pieces, [[0.0, 0.0], [5.0, 9.0]], [[1, 2, 3]] * 2)
    assert steps.owner.tolist() == [1, 1, 0, 0]
    assert steps.kept(steps.priority < 0.5)[steps.all_coupled[0].groups[0]] == 3


# -- plans -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("scope", [None, "local", "global", "isomorphic", "per_cost"])
@pytest.mark.parametrize("asked", [0.8, 0.6])
def test_a_target_of_latency_is_met(name, scope, asked):
    build, x = NETWORKS[name]
    model, machine = seeded(build), Machine(rest=1e-5)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    plan = structprune.plan(
        model, x, target={"latency": asked}, scope=scope, latency=structprune.Latency(timer=machine), min_channels=1
    )
    told = plan.settings["latency"]
    whole, slim = machine.networks([model, plan.apply(model)], x)
    assert told["before_ms"] == pytest.approx(1e3 * whole)
    assert told["measured_ms"] == pytest.approx(1e3 * slim)
    assert told["met"]
    assert slim <= asked * whole * 1.05
    assert slim > asked * whole * 0.7  # layers as narrow as these have few steps
    assert plan.settings["reached"]["latency"] == pytest.approx(slim / whole)
    assert abs(told["predicted_ms"] / told["measured_ms"] - 1) <= 0.05
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    structprune.verify(model, plan.apply(model), plan, x).raise_for_error()


def test_widths_follow_the_steps_of_the_device():
    sizes = [(3, 64), (64, 128), (128, 128), (128, 10)]
    model = seeded(lambda: nn.Sequential(*[nn.Conv2d(a, b, 3, padding=1) for a, b in sizes]))
    for step in (16, 32):
        latency = structprune.Latency(timer=Machine(step, rest=0))
        plan = structprune.plan(model, IMAGES, target={"latency": 0.6}, latency=latency)
        widths = {layer.layer: layer.after for layer in plan.layers}
        assert all(width % step == 0 for width in widths.values())
        assert min(widths.get("1", 128), widths.get("2", 128)) < 128


def test_narrow_layers_lose_channels_that_their_reader_saves():
    """As in ONNX Runtime: outputs are padded to 16, inputs are read one by one. Only inner widths can save time."""

    class Padding(Machine):
        def operations(self, points):
            at = [(s, s.at(widths)) for s, widths in points]
            return [1e-9 * (-(-sizes["out"] // 16) * 16) * sizes.get("in", 1) for _, sizes in at]

    model = seeded(lambda: nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.Conv2d(16, 4, 3)))
    latency = structprune.Latency(timer=Padding(rest=0))
    plan = structprune.plan(model, IMAGES, target={"latency": 0.25}, latency=latency)
    assert plan.settings["latency"]["met"]
    assert sum(layer.after for layer in plan.layers if layer.after < 16) == 5


def test_parts_of_a_step_are_feasible_only_where_time_was_measured():
    graph = structprune.DependencyGraph(seeded(Convolutions), IMAGES)
    (group,) = [g for g in graph.groups() if g.channels == 64 and "stem" in g.name]
    rounding = Rounding()
    assert rounding.feasible(group, graph.roles, measured=16).tolist() == [4, 8, 12, 16, 32, 48, 64]
    assert rounding.feasible(group, graph.roles, (8, 8), measured=16).tolist() == [8, 16, 32, 48, 64]
    assert rounding.feasible(group, graph.roles).tolist() == [16, 32, 48, 64]
    assert Rounding(round_to=16).feasible(group, graph.roles, measured=4).tolist() == [16, 32, 48, 64]


def test_a_wrong_prediction_is_corrected():
    """The network takes a third more than its operations do, but only once it is thin."""

    class Surprising(Machine):
        def networks(self, models, example_inputs):
            found = Machine.networks(self, models, example_inputs)
            return [each if each > 0.62 * found[0] else 1.3 * each for each in found]

    model = seeded(Convolutions)
    plan = structprune.plan(
        model, IMAGES, target={"latency": 0.5}, latency=structprune.Latency(timer=Surprising(rest=0))
    )
    assert plan.settings["latency"]["met"]


def test_milliseconds_and_other_targets_at_once():
    model = seeded(lambda: Convolutions(128))
    machine = Machine(slower=100.0)
    (whole,) = machine.networks([model], IMAGES)
    limit = 0.7e3 * whole
    assert limit > 1
    plan = structprune.plan(
        model, IMAGES, target={"latency": limit, "params": 0.4}, latency=structprune.Latency(timer=machine)
    )
    assert plan.settings["latency"]["limit_ms"] == pytest.approx(limit)
    assert plan.settings["latency"]["measured_ms"] <= limit * 1.05
    assert plan.after.params <= 0.4 * plan.before.params
    assert structprune.Plan.from_json(plan.to_json()).settings == plan.settings
    assert "measured_ms" in str(plan)


def test_a_sensitivity_is_weighed_against_the_time():
    model, x = seeded(Convolutions), IMAGES
    found = structprune.sensitivity(model, x, x, lambda m, x: -float((m(x) - model(x)).abs().mean()))
    latency = structprune.Latency(timer=Machine())
    plan = structprune.plan(model, x, target={"latency": 0.7}, scope=found, latency=latency)
    assert plan.settings["latency"]["met"]
    assert plan.settings["scope"] == "sensitivity"


def test_a_target_that_is_met_already_removes_nothing():
    latency = structprune.Latency(timer=Machine())
    plan = structprune.plan(seeded(Convolutions), IMAGES, target={"latency": 1.0, "macs": 1.0}, latency=latency)
    assert plan.removed == {}
    assert plan.settings["latency"]["met"]


def test_a_target_that_cannot_be_met_is_refused():
    latency = structprune.Latency(timer=Machine(rest=1.0))
    with pytest.raises(PlanError, match="cannot be met"):
        structprune.plan(seeded(Convolutions), IMAGES, target={"latency": 0.5}, latency=latency)


@pytest.mark.parametrize("asked", [0, -1, "half"])
def test_a_target_that_is_no_positive_number_is_refused(asked):
    with pytest.raises(PlanError, match="what is to remain"):
        structprune.plan(
            seeded(Convolutions), IMAGES, target={"latency": asked}, latency=structprune.Latency(timer=Machine())
        )


def test_latency_without_a_target_of_latency_is_refused():
    with pytest.raises(PlanError, match="no target asks for it"):
        structprune.plan(seeded(Convolutions), IMAGES, ratio=0.5, latency=structprune.Latency())


def test_a_model_without_weights_is_refused():
    with torch.device("meta"):
        model = Convolutions()
    with pytest.raises(PlanError, match="meta"):
        structprune.plan(model, IMAGES, target={"latency": 0.5})


@pytest.mark.parametrize("settings", [{"backend": "tensorrt"}, {"runs": 1}, {"threads": 0}])
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(PlanError):
        structprune.Latency(**settings)


# -- real clocks: only that it runs, and what comes out ------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_real_operations_have_times(name):
    build, x = NETWORKS[name]
    graph = ChannelGraph(seeded(build), x)
    points = [(use.spec, use.spec.widths) for use in uses(graph.trace, graph.channels)]
    state = torch.get_rng_state()
    assert all(0 < t < 60 for t in time_eager(points, torch.device("cpu"), 3, 60.0))
    assert all(0 < t < 60 for t in time_in_runtime(points, "onnxruntime", 1, 3, 60.0))
    assert torch.equal(state, torch.get_rng_state())


def test_a_type_that_onnx_runtime_lacks_is_refused():
    spec = OpSpec("matmul", (("rows", 1), ("in", 4), ("out", 4)), ("out",), (("weight", True),), "bfloat16")
    with pytest.raises(PlanError, match="bfloat16"):
        time_in_runtime([(spec, (4,))], "onnxruntime", 1, 3, 1.0)


def test_equal_operations_are_timed_each_by_itself():
    """ONNX Runtime keeps one of nodes that compute the same."""
    weighted = OpSpec("matmul", (("rows", 1), ("in", 4), ("out", 4)), ("out",), (("weight", True),), "float32")
    assert all(t > 0 for t in time_in_runtime([(weighted, (4,))] * 3, "onnxruntime", 1, 3, 1.0))


def test_reorders_are_not_counted_in_a_profile():
    def event(name, op, dur):
        return {"cat": "Node", "name": name, "dur": dur, "args": {"op_name": op}}

    events = []
    for run in range(12):
        events += [event("p0_y_nchwc_kernel_time", "Conv", 100 + run), event("p0_y_kernel_time", "ReorderOutput", 999)]
        events += [event("p1_scores_kernel_time", "MatMul", 10), event("p1_y_kernel_time", "MatMul", 20)]
        events += [event("r1_kernel_time", "ReduceMax", 999), {"cat": "Session", "name": "model_run", "dur": 5000}]
    found = by_point(read_events(events), 2)
    assert 100e-6 <= found[0] < 112e-6
    assert found[1] == pytest.approx(30e-6)
    with pytest.raises(PlanError, match="operation 2"):
        by_point(read_events(events), 3)


@pytest.mark.parametrize("backend", ["eager", "onnxruntime"])
def test_a_real_plan_has_its_structure_and_leaves_the_model(backend, tmp_path):
    model = seeded(lambda: Convolutions(32)).train()
    modes = [module.training for module in model.modules()]
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    latency = structprune.Latency(backend=backend, threads=1, runs=3, cache=tmp_path)
    # A minute: what can be saved on so small a network is the machine's affair.
    target = {"latency": 60_000, "params": 0.5}
    plan = structprune.plan(model, IMAGES, target=target, round_to=4, latency=latency)
    assert plan.after.params <= 0.5 * plan.before.params
    told = plan.settings["latency"]
    assert told["backend"] == backend
    assert told["threads"] == 1
    assert min(told["before_ms"], told["limit_ms"], told["predicted_ms"], told["measured_ms"]) > 0
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(state, torch.get_rng_state())
    assert torch.get_num_threads() == threads
    (file,) = tmp_path.iterdir()
    before = os.stat(file).st_mtime_ns
    structprune.plan(model, IMAGES, target=target, round_to=4, latency=latency)
    assert os.stat(file).st_mtime_ns == before
