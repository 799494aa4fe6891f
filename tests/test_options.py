"""One front door of all options: each is one entry, and what is wrong is refused with the option's name."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable
from typing import Any, get_type_hints

import pytest
import torch
from support.command_line import as_json
from torch import nn

import structprune
from structprune.errors import PlanError
from structprune.planning.options import OPTIONS, PlanKeywords, PlanOptions
from structprune.training import SoftPruner

X = torch.randn(2, 4)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))


# -- one entry each ---------------------------------------------------------------------------------------------------


def test_the_keywords_for_type_checkers_are_the_fields() -> None:
    assert get_type_hints(PlanKeywords) == get_type_hints(PlanOptions)
    assert list(OPTIONS) == [field.name for field in dataclasses.fields(PlanOptions)]


@pytest.mark.parametrize("function", [structprune.plan, structprune.prune, structprune.Pruner, SoftPruner])
def test_functions_show_and_describe_all_options(function: Callable[..., Any]) -> None:
    parameters = inspect.signature(function).parameters
    for field in dataclasses.fields(PlanOptions):
        assert parameters[field.name].default == field.default
        assert parameters[field.name].kind is inspect.Parameter.KEYWORD_ONLY
        assert re.search(rf"^ +{field.name}: \S", function.__doc__ or "", re.MULTILINE)


def test_options_are_frozen_and_kept_in_one_form() -> None:
    model = net()
    options = PlanOptions(ignore=iter(["0", "2"]), axes="mlp", outputs=0, scope=(layers for layers in ["0", ["2"]]))
    assert (options.ignore, options.axes, options.outputs) == (("0", "2"), ("mlp",), (0,))
    assert options.scope == [["0"], ["2"]]
    assert PlanOptions(ignore=model).ignore == (model,)  # a module alone, and not its children
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.ratio = 0.5  # type: ignore[misc]  # frozen: that is tested


def test_a_layer_alone_is_left_whole() -> None:
    model = net()
    for ignore in ("0", model[0], ["0"]):
        plan = structprune.plan(model, X, ratio=0.5, ignore=ignore)
        assert [layer.layer for layer in plan.layers] == ["2"]
        assert plan.settings.asked["ignore"] == ["0"]
    assert [group.name for group in structprune.DependencyGraph(model, X, ignore="0").groups()] == ["2"]


def test_what_is_asked_and_reached_is_recorded() -> None:
    plan = structprune.plan(net(), X, target={"macs": 0.5}, scope="global", round_to=1, max_ratio=0.75)
    asked = {"target": {"macs": 0.5}, "scope": "global", "axes": None, "branch_score": None, "round_to": 1}
    asked |= {"allocation": "greedy"}
    asked |= {
        "uniform": None,
        "min_channels": 1,
        "max_ratio": 0.75,
        "tensor_parallel": None,
        "importance": "l2",
        "ignore": None,
        "ignore_outputs": None,
        "outputs": None,
    }
    assert plan.settings.asked == asked
    assert plan.settings.reached == {"macs": plan.after.macs / plan.before.macs}
    assert (plan.settings.measured, plan.settings.left, plan.settings.over_survivors) == ({}, {}, ())
    assert dict(plan.settings) == asked | {"reached": plan.settings.reached}
    assert structprune.Plan.from_json(plan.to_json()).settings == plan.settings


# -- what is wrong ----------------------------------------------------------------------------------------------------

NAN, INF = float("nan"), float("inf")
BAD: list[tuple[str, Any, str]] = [
    ("ratio", 1.0, "ratio is 1.0; it is the share"),
    ("ratio", "half", "ratio is 'half'; it is the share"),
    ("ratio", True, "ratio is True; it is the share"),
    ("ratio", NAN, "ratio is nan; it is the share"),
    ("ratio", [0.5], r"ratio is \[0.5\]; it is the share"),
    ("ratio", nn.ReLU(), r"ratio is ReLU\(\); it is the share"),
    ("ratio", {"0": "x"}, r"ratio\['0'\] is 'x'; it is the share"),
    ("ratio", {0: 0.5}, "a key of ratio is 0; a layer is a module of the model or its dotted name"),
    ("ratio", {"": 0.5}, "a key of ratio is ''; a layer is"),
    ("target", 0.5, "target is 0.5; give what is to remain by name, such as {'macs': 0.5}"),
    ("target", "macs", "target is 'macs'; give what is to remain by name"),
    ("target", {}, "target is empty"),
    ("target", {"flops": 0.5}, "target names 'flops'; known are channels"),
    ("target", {"macs": INF}, r"target\['macs'\] is inf; give what is to remain"),
    ("target", {"macs": NAN}, r"target\['macs'\] is nan"),
    ("target", {"macs": 0}, r"target\['macs'\] is 0"),
    ("target", {"macs": "0.5"}, r"target\['macs'\] is '0.5'"),
    ("target", {"macs": True}, r"target\['macs'\] is True"),
    ("allocation", "best", "allocation is 'best'; it is one of 'exact', 'greedy', 'auto'"),
    ("allocation", None, "allocation is None; it is one of"),
    ("scope", 3, "scope is 3; it is one of 'local'"),
    ("scope", "world", "scope is 'world'; it is one of 'local'"),
    ("scope", [], r"scope is \[\]; it is one of"),
    ("scope", [[]], r"scope is \[\[\]\]; it is one of"),
    ("scope", [3], r"scope is \[3\]; it is one of"),
    ("scope", [["nope"]], "scope names 'nope', which matches no layer"),
    ("axes", [3], r"axes is \[3\]; give any of 'hidden'"),
    ("axes", 3, "axes is 3; give any of"),
    ("axes", [], r"axes is \[\]; give any of"),
    ("axes", ["width"], "axes names width; known are hidden"),
    ("round_to", 0, "round_to is 0; give a whole number from 1, or 'auto'"),
    ("round_to", 1.5, "round_to is 1.5"),
    ("round_to", None, "round_to is None"),
    ("min_channels", 0, "min_channels is 0; a group keeps at least 1 channel"),
    ("min_channels", NAN, "min_channels is nan"),
    ("min_channels", 1.5, "min_channels is 1.5"),
    ("min_channels", "4", "min_channels is '4'"),
    ("max_ratio", None, "max_ratio is None; it is a share of the channels"),
    ("max_ratio", 1.5, "max_ratio is 1.5"),
    ("max_ratio", NAN, "max_ratio is nan"),
    ("importance", 3, "importance is a int; give a name or a callable"),
    ("importance", "l9", "There is no criterion 'l9'"),
    ("data", 3, "data is 3; give an iterable of batches"),
    ("data", "folder", "data is 'folder'; give an iterable of batches"),
    ("loss", 3, "loss is 3; give a function of model and batch"),
    ("forward", 3, "forward is 3; give a function of model and batch"),
    ("ignore", 3, "ignore is 3; a layer is a module of the model or its dotted name"),
    ("ignore", [""], r"ignore\[0\] is ''; a layer is"),
    ("ignore", [3], r"ignore\[0\] is 3; a layer is"),
    ("ignore", "layer1", "no layer 'layer1'"),
    ("outputs", [None], r"outputs is \[None\]; give names or positions"),
    ("outputs", 1.5, "outputs is 1.5; give names or positions"),
    ("latency", 3, "latency is 3; give a structprune.Latency"),
]


@pytest.mark.parametrize(("name", "given", "message"), BAD, ids=[f"{name}={given!r}" for name, given, _ in BAD])
def test_a_bad_value_is_refused_by_name(name: str, given: Any, message: str) -> None:
    model = net()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(PlanError, match=message):
        structprune.prune(model, X, inplace=True, **{name: given})
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_pruner_refuses_at_once() -> None:
    with pytest.raises(PlanError, match=r"ratio is \[\]"):
        structprune.Pruner(net(), X, steps=2, ratio=[])  # type: ignore[arg-type]  # what is refused
    with pytest.raises(PlanError, match=r"state is \{\}, without ends, plans, steps, taken"):
        structprune.Pruner(net(), X, steps=2, state={})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 0.5, "target": {"macs": 0.5}}, "Both ratio and target are given"),
        ({"scope": "per_cost"}, "give a target, not a ratio"),
        ({"scope": structprune.Sensitivity(1.0, ())}, "give a target as well"),
        ({"latency": structprune.Latency()}, "no target asks for it"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        PlanOptions(**options)


# -- the command line -------------------------------------------------------------------------------------------------

OWN = """
import torch
def pair():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
def batches():
    return [(torch.ones(2, 8), 0)]
def second(model, batch):
    seen.append(batch)
    return model(batch[0])
seen = []
"""


def test_forward_and_latency_can_be_said_on_the_command_line(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = ("mine.py:pair", "--input", "2x8")
    plan = as_json(
        "plan", *source, "--importance", "activation_mean", "--data", "mine.py:batches", "--forward", "mine.py:second"
    )
    assert plan["settings"]["asked"]["importance"] == "activation_mean"
    timed = as_json("plan", *source, "--target", "latency=1000", "--latency", "backend=eager,threads=1,runs=3")
    assert (timed["settings"]["measured"]["backend"], timed["settings"]["measured"]["threads"]) == ("eager", 1)
