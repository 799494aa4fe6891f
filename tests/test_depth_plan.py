"""One plan of blocks and widths: decided, shown, saved, applied, verified, recovered."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from support.command_line import as_json
from support.depth import with_branches_off
from support.depth_nets import Residual, convolutional, cross_entropy, residuals, transformer
from torch import nn

import structprune
from structprune.depth.paths import PathsAfter
from structprune.depth.plan import DepthPlan
from structprune.errors import PlanError, SurgeryError
from structprune.planning.plan import plans_of
from structprune.reporting.layers import counts, layer_rows

WIDE = {"axes": ("blocks", "widths"), "round_to": 1}


def both(model, x, **options):
    return structprune.plan(model, x, **{"target": {"macs": 0.4}, "data": [x]} | WIDE | options)


# -- what is decided ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["macs", "params", "memory", "channels"])
def test_a_target_is_met_by_blocks_and_channels(kind):
    model, x = residuals()
    plan = both(model, x, target={kind: 0.55})
    assert isinstance(plan, DepthPlan)
    slim = plan.apply(model)
    before, after = (structprune.cost(each, x) for each in (model, slim))
    assert (before, after) == (plan.before, plan.after)
    assert plan.settings["reached"][kind] <= 0.55 * (1 + 1e-6)
    assert structprune.verify(model, slim, plan, x).ok


def test_blocks_that_do_nothing_go_before_channels_that_do():
    model, x = residuals()
    plan = both(model, x)
    assert set(plan.removal.branches) >= {"2", "4"}
    lost = {each.branches: each.lost for each in plan.tried}
    recovered = {each.branches: each.recovered for each in plan.tried if each.recovered is not None}
    assert min(recovered, key=recovered.__getitem__) == len(plan.removal.branches)
    assert lost[0] > 2 * lost[len(plan.removal.branches)]


def test_what_is_lost_is_that_of_the_networks_themselves():
    model, x = residuals()
    plan = both(model, x)
    with torch.no_grad():
        dense, slim = model(x), plan.apply(model)(x)
    lost = {each.branches: each.lost for each in plan.tried}[len(plan.removal.branches)]
    assert lost == pytest.approx(float((dense - slim).square().sum() / dense.square().sum()), rel=1e-3)


def test_blocks_stay_where_channels_lose_less():
    torch.manual_seed(0)
    model, x = residuals((1.0, 1.0, 1.0))
    for block in model[1:4]:  # half of the hidden channels do nothing
        with torch.no_grad():
            block.up.weight[::2], block.up.bias[::2], block.down.weight[:, ::2] = 0, 0, 0
    plan = both(model, x, target={"macs": 0.7}, axes=("blocks", "mlp"))
    assert not isinstance(plan, DepthPlan)
    assert plan.settings["axes"] == ["blocks", "mlp"]
    assert structprune.verify(model, plan.apply(model), plan, x).ok


def linear_blocks():
    """Blocks whose 16 hidden channels are linear in the 8 of the stream: 9 of them can do the work of all."""
    model, x = residuals((1.0, 0.3, 1.0, 1.0))
    with torch.no_grad():
        for block in model[1:5]:
            block.up.bias += 20
    return model, x


def test_networks_are_compared_once_they_are_recovered():
    model, x = linear_blocks()
    options = {"target": {"macs": 0.8}, "axes": ("blocks", "mlp")}
    shown = both(model, x, data=None, **options)
    assert isinstance(shown, DepthPlan)
    assert all(each.recovered is None for each in shown.tried)
    plan = both(model, x, data=list(x.chunk(2)), **options)
    assert all(each.recovered < 1e-10 < each.lost for each in plan.tried if each.recovered is not None)
    recovered = structprune.recover(plan.apply(model), model, list(x.chunk(2)), rounds=0)
    assert torch.allclose(recovered(x), model(x), atol=1e-2)


def test_neither_blocks_alone_nor_channels_alone_lose_less_when_recovered():
    model, x = residuals((1.0, 0.3, 0.5, 0.2, 2.0))
    data = list(x.chunk(2))
    plans = [both(model, x, target={"macs": 0.6}, data=data, axes=axes) for axes in ("widths", "blocks", WIDE["axes"])]
    lost = []
    for plan in plans:
        recovered = structprune.recover(plan.apply(model), model, data[:1], rounds=0)
        with torch.no_grad():
            lost.append(float((recovered(data[1]) - model(data[1])).square().sum() / model(data[1]).square().sum()))
    assert lost[2] <= min(lost) * (1 + 1e-4)
    told = {each.branches: each.recovered for each in plans[2].tried if each.recovered is not None}
    assert told[len(plans[2].removal.branches)] == min(told.values()) == pytest.approx(lost[2], rel=1e-3)
    assert "lost when recovered: " in str(plans[2])


def test_a_ratio_takes_that_share_of_both():
    model, x = residuals()
    plan = structprune.plan(model, x, ratio=0.4, axes=("blocks", "mlp", "channels"), round_to=1)
    assert set(plan.removal.branches) == {"2", "4"}
    assert {(layer.before, layer.after) for layer in plan.layers} == {(16, 10)}
    alone = structprune.plan(model, x, ratio=0.4, axes="blocks")
    assert alone.removal.branches == plan.removal.branches
    assert not alone.slices


def test_blocks_are_left_alone_unless_they_are_named():
    model, x = residuals()
    assert not isinstance(structprune.plan(model, x, ratio=0.5), DepthPlan)
    assert not isinstance(structprune.plan(model, x, target={"macs": 0.5}), DepthPlan)
    assert structprune.plan(model, x, ratio=0.5, axes="widths").slices == structprune.plan(model, x, ratio=0.5).slices


def test_a_ratio_by_name_takes_blocks_where_it_says():
    model, x = residuals((1.0,) * 6)
    plan = structprune.plan(model, x, ratio={"[123]": 0.7, "2": 0.0}, axes="blocks")
    assert plan.removal.branches in {("1",), ("3",)}
    stack = nn.Sequential(nn.Sequential(*(Residual(1.0) for _ in range(3))), nn.Sequential(Residual(0.1)))
    plan = structprune.plan(stack, torch.randn(4, 8), ratio={stack[0]: 0.7}, axes="blocks")
    assert {name.split(".")[0] for name in plan.removal.branches} == {"0"}
    assert len(plan.removal.branches) == 2


def test_branches_go_apart_from_each_other():
    model, x = transformer()
    plan = structprune.plan(model, x, target={"params": 0.6}, axes="branches", data=[x], branch_score="kl")
    assert all("norm ... out" in name or "norm2 ... down" in name for name in plan.removal.branches)
    slim = plan.apply(model)
    assert structprune.verify(model, slim, plan, x).ok
    reference = with_branches_off(model, x, plan.removal.branches)
    assert torch.allclose(slim(x), reference, atol=1e-5)


def test_keys_and_values_are_counted_and_go_with_attention():
    model, x = transformer()
    plan = structprune.plan(model, x, target={"kv_cache": 0.67}, axes="blocks", data=[x])
    assert len(plan.removal.branches) == 1
    assert plan.settings["reached"]["kv_cache"] == pytest.approx(2 / 3)
    heads = structprune.plan(model, x, target={"kv_cache": 0.5}, axes="heads", round_to=1)
    assert heads.settings["reached"] == {"kv_cache": 0.5}
    with pytest.raises(PlanError, match="no attention"):
        structprune.plan(*residuals(), target={"kv_cache": 0.5})


def test_the_bytes_of_keys_and_values_are_those_of_a_cache():
    model, x = transformer()
    graph = structprune.DependencyGraph(model, x)
    from structprune.coupling.costs import KeyValueCache

    # Three layers, keys and values, eight channels of four bytes.
    assert KeyValueCache(graph.trace, graph.channels).bytes(lambda axis: axis.size) == 3 * 2 * 8 * 4


def test_time_is_a_target():
    model, x = residuals((1.0, 0.01, 0.01, 0.01, 1.0))
    plan = structprune.plan(model, x, target={"latency": 0.6}, axes="blocks", data=[x])
    assert plan.removal.branches
    assert plan.settings["latency"]["before_ms"] > plan.settings["latency"]["measured_ms"]
    assert plan.settings["reached"]["latency"] == pytest.approx(
        plan.settings["latency"]["measured_ms"] / plan.settings["latency"]["before_ms"]
    )


def test_batch_norms_are_judged_with_statistics_of_their_own():
    model, x = convolutional()
    plan = both(model, x, target={"macs": 0.6}, axes=("blocks", "channels"))
    assert structprune.verify(model, plan.apply(model), plan, x).ok
    assert all(each.lost is None or each.lost >= 0 for each in plan.tried)


def test_layers_to_leave_whole_keep_their_blocks_and_their_widths():
    model, x = residuals()
    plan = both(model, x, ignore=["2", model[5].up], target={"macs": 0.6})
    assert "2" not in plan.removal.branches
    slim = plan.apply(model)
    names = plan.removal.names
    assert slim.get_submodule(names.get("2.up.weight", "2.up.weight").rpartition(".")[0]).out_features == 16
    assert slim.get_submodule(names.get("5.up.weight", "5.up.weight").rpartition(".")[0]).out_features == 16
    assert any(layer.after < layer.before for layer in plan.layers)


def test_a_generator_of_batches_is_run_through_once():
    model, x = residuals()
    plan = both(model, x, data=(part for part in x.chunk(2)), importance="activation_mean")
    assert plan.removal.branches == both(model, x, data=x.chunk(2), importance="activation_mean").removal.branches


def test_the_loss_is_what_counts_where_there_is_one():
    model, x = residuals()
    labels = model(x).argmax(1)
    plan = both(model, x, data=[(x, labels)], loss=cross_entropy, importance="taylor")
    slim = plan.apply(model)
    lost = {each.branches: each.lost for each in plan.tried}[len(plan.removal.branches)]
    rise = cross_entropy(slim, (x, labels)) - cross_entropy(model, (x, labels))
    assert lost == pytest.approx(rise.item(), abs=1e-5)


def test_reconstruction_is_fitted_and_judged_on_each_network():
    model, x = residuals((1.0, 0.01, 1.0))
    plan = both(model, x, importance=structprune.Reconstruction(rows=256), target={"macs": 0.6})
    slim = plan.apply(model)
    recovered = structprune.recover(slim, model, [x], rounds=0)
    before, after = ((each(x) - model(x)).norm() for each in (slim, recovered))
    assert after < before


# -- what a plan is ----------------------------------------------------------------------------------------------------


def test_deciding_changes_nothing():
    model, x = residuals()
    state, structure = copy.deepcopy(model.state_dict()), repr(model)
    plan = both(model, x)
    assert repr(model) == structure
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    slim = plan.apply(model)
    assert repr(model) == structure
    with torch.no_grad():
        for parameter in slim.parameters():
            parameter.zero_()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_it_is_shown_written_and_read():
    model, x = residuals()
    plan = both(model, x)
    text = str(plan)
    assert all(f"│ {name} " in text for name in plan.removal.branches)
    assert "lost by the number of branches removed: 0: " in text
    again = structprune.Plan.from_json(plan.to_json())
    assert again == plan
    assert again.digest == plan.digest != plan.widths.digest
    assert torch.equal(again.apply(model)(x), plan.apply(model)(x))


@pytest.mark.parametrize(
    "change",
    [
        {"removal": 3},
        {"removal": {}},
        {"tried": [{"branches": "x", "lost": 1}]},
        {"tried": [{"branches": 1, "lost": 1, "recovered": "x"}]},
        {"tried": 3},
        {"slices": 3},
    ],
    ids=str,
)
def test_a_damaged_plan_is_refused(change):
    model, x = residuals()
    data = json.loads(both(model, x).to_json()) | change
    with pytest.raises(PlanError, match="cannot be used"):
        structprune.Plan.from_json(json.dumps(data))


def test_a_model_in_place_is_the_same_and_knows_both_steps(tmp_path: Path):
    model, x = residuals()
    plan = both(model, x)
    slim = plan.apply(model)
    assert [type(each).__name__ for each in plans_of(slim)] == ["Removal", "Plan"]
    again = structprune.load(lambda: residuals()[0], structprune.save(slim, tmp_path / "slim"))
    assert torch.equal(again.eval()(x), slim(x))
    kept = model[1].down.bias
    assert plan.apply(model, inplace=True) is model
    assert torch.equal(model(x), slim(x))
    assert model[1].down.bias is kept
    assert structprune.kept(model) == structprune.kept(slim)


def test_a_plan_that_does_not_fit_leaves_the_model_as_it_was():
    model, x = residuals()
    plan = both(model, x)
    model[5].up, model[5].down = nn.Linear(8, 24), nn.Linear(24, 8)
    state, parts = copy.deepcopy(model.state_dict()), [*model]
    with pytest.raises((SurgeryError, PlanError)):
        plan.apply(model, inplace=True)
    assert [*model] == parts
    assert plans_of(model) == ()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_prune_verifies_and_works_in_place():
    model, x = residuals()
    slim = structprune.prune(model, x, ratio=0.4, **WIDE)
    assert len(slim) == len(model) - 2
    assert structprune.prune(model, x, ratio=0.4, inplace=True, **WIDE) is model
    assert torch.equal(model(x), slim(x))


def test_verify_sees_a_wrong_network():
    model, x = residuals()
    plan = both(model, x)
    slim = plan.apply(model)
    with torch.no_grad():
        slim[0].bias += 0.1
    assert not structprune.verify(model, slim, plan, x).ok
    cut = structprune.remove_branches(model, x, ["2"])
    removal = structprune.Removal.of(cut)
    assert structprune.verify(model, cut, removal, x).ok
    assert not structprune.verify(model, structprune.remove_branches(model, x, ["1"]), removal, x).ok


@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "in place"])
def test_an_optimizer_goes_on(inplace):
    model, x = residuals()
    optimizer = torch.optim.Adam(model.parameters())
    model(x).sum().backward()
    optimizer.step()
    plan = both(model, x)
    moments = {name: optimizer.state[p]["exp_avg"].clone() for name, p in model.named_parameters()}
    slim = plan.apply(model, inplace=inplace)
    structprune.remap_optimizer(optimizer, plan, model, None if inplace else slim)
    before = {now: name for name, now in plan.names.items()}
    assert plan.slices
    for name, parameter in slim.named_parameters():
        wanted = moments[before.get(name, name)]
        for sliced in plan.slices:
            if sliced.tensor == name:
                left = [i for i in range(sliced.size) if i not in sliced.removed]
                wanted = wanted.index_select(sliced.dim, torch.tensor(left))
        assert torch.equal(optimizer.state[parameter]["exp_avg"], wanted)
    optimizer.step()


def test_a_report_shows_what_went(tmp_path: Path):
    model, x = residuals()
    plan = both(model, x)
    text = structprune.report(model, x, tmp_path / "report.html", plan=plan).read_text()
    assert "Blocks and branches" in text
    rows = layer_rows(graph := structprune.DependencyGraph(model, x), *counts(graph, plan), plan=plan)
    by_path = {row.path: row for row in rows}
    for name in plan.removal.branches:
        assert by_path[f"{name}.up"].channels == (16, 0)
        assert by_path[f"{name}.up"].params[1] == by_path[f"{name}.up"].macs[1] == 0
    assert sum(row.params[1] for row in rows) == plan.after.params
    assert sum(row.macs[1] for row in rows) == plan.after.macs


def test_the_time_of_a_layer_is_found_under_its_new_name(tmp_path: Path):
    model, x = residuals()
    plan = both(model, x)
    slim = plan.apply(model)
    times = [structprune.layer_times(each, x) for each in (model, slim)]
    graph = structprune.DependencyGraph(model, x)
    rows = {row.path: row for row in layer_rows(graph, *counts(graph, plan), times, plan)}
    now = PathsAfter(model, plan)
    assert rows["6"].seconds == (times[0]["6"], times[1][now.of("6")])
    assert rows[f"{plan.removal.branches[0]}.up"].seconds[1] == 0


def test_the_command_line_plans_prunes_and_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(Path(__file__).parent)
    model = ("support.depth_nets:residuals", "--axes", "blocks,mlp", "--round-to", "1", "--branch-score", "error")
    data = as_json("plan", *model, "-t", "macs=0.4", "--out", "plan.json")
    assert data["kind"] == "depth"
    assert data["removal"]["branches"]
    done = as_json("prune", "support.depth_nets:residuals", "--plan", "plan.json", "--out", "slim")
    assert done["verification"]["ok"]
    assert len(structprune.load(lambda: residuals()[0], "slim")) == 7 - len(data["removal"]["branches"])
    assert as_json("report", "support.depth_nets:residuals", "page.html", "--plan", "plan.json")["verification"]["ok"]


def test_masks_cannot_say_that_a_block_is_gone():
    model, x = residuals()
    with pytest.raises(SurgeryError, match="blocks or branches"):
        structprune.masks.from_plan(both(model, x), model)
