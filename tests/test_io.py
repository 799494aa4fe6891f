"""Saving and loading without pickle: bit-exact, atomic, and closed to damaged or hostile files."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.cases import Case, all_cases
from torch import nn

import structprune
from structprune import io
from structprune.errors import LoadError, PlanError
from structprune.plan import plans_of
from structprune.surgery.verify import relative_errors
from structprune.tracing.trace import run_once

CASES = [case for case in all_cases() if case.thins]
X = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))


def build() -> nn.Sequential:
    torch.manual_seed(7)  # other weights than the saved ones
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


@pytest.fixture
def slim() -> nn.Module:
    model = build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5)
    return structprune.prune(model, X, ratio=0.5)


def assert_same(a: nn.Module, b: nn.Module) -> None:
    left, right = a.state_dict(), b.state_dict()
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype
        assert torch.equal(tensor, right[name]), name


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_round_trip_is_exact_to_the_bit(case: Case, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, inputs = case.build(), case.inputs()
    for parameter in model.parameters():
        nn.init.normal_(parameter.data, std=0.2)
    slim = structprune.prune(model, inputs, ratio=0.5)
    again = structprune.load(case.build, structprune.save(slim, tmp_path / "slim"))
    assert_same(slim, again)
    assert not any(relative_errors(run_once(slim, inputs), run_once(again, inputs)))


def test_several_rounds_are_replayed_in_order(tmp_path: Path) -> None:
    model = build()
    for _ in range(2):
        structprune.prune(model, X, ratio=0.25, inplace=True, round_to=1)
    assert len(plans_of(model)) == 2
    again = structprune.load(build, structprune.save(model, tmp_path))
    assert_same(model, again)
    assert again[0].out_features == 5  # 8, 6, 4.5
    assert [plan.digest for plan in plans_of(again)] == [plan.digest for plan in plans_of(model)]


def test_a_model_that_was_never_pruned_can_be_saved_too(tmp_path: Path) -> None:
    model = build().half()
    again = structprune.load(lambda: build().float(), structprune.save(model, tmp_path))
    assert_same(model, again)


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    def tied() -> nn.Module:
        model = nn.ModuleDict({"embed": nn.Embedding(11, 8), "out": nn.Linear(8, 11, bias=False)})
        model["out"].weight = model["embed"].weight
        return model

    model = tied()
    again = structprune.load(tied, structprune.save(model, tmp_path))
    assert_same(model, again)
    assert again["out"].weight is again["embed"].weight
    assert (tmp_path / "model.safetensors").stat().st_size < 2 * 4 * 8 * 11


@pytest.mark.parametrize("dies_at", ["save_file", "fsync 2", "replace 1", "replace 2", "replace 3"])
def test_a_kill_leaves_the_old_save_or_the_new_one(
    slim: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dies_at: str
) -> None:
    """Whatever step of a save is the last one, what is loaded is one of the two, whole."""
    old = build()
    structprune.save(old, tmp_path)
    name, _, number = dies_at.partition(" ")
    calls = 0
    owner: Any = io if name == "save_file" else os
    real: Callable[..., Any] = getattr(owner, name)

    def killed(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == int(number or 1):
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, killed)
        with pytest.raises(KeyboardInterrupt):
            structprune.save(slim, tmp_path)
    expected = slim if dies_at == "replace 3" else old
    assert_same(structprune.load(build, tmp_path), expected)
    structprune.save(slim, tmp_path)
    assert_same(structprune.load(build, tmp_path), slim)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.safetensors", "plan.json"]


def damaged(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    record = json.loads((folder / "plan.json").read_text())
    change(record)
    (folder / "plan.json").write_text(json.dumps(record))


DAMAGE: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a later schema": (lambda r: r.update(schema=99), "schema 99; this version reads up to 1"),
    "no schema": (lambda r: r.pop("schema"), "no schema version"),
    "no plans": (lambda r: r.pop("plans"), "is not whole"),
    "plans that are no list": (lambda r: r.update(plans="x"), "is not whole"),
    "another digest": (lambda r: r["weights"].update(sha256="0" * 64), "missing, truncated or was changed"),
    "an alias of nothing": (lambda r: r["weights"]["aliases"].update({"a": "b"}), "not among the tensors"),
    "a channel that is not there": (lambda r: r["plans"][0]["thinnings"][0].update(removed=[99]), "does not fit"),
    "channels that are no numbers": (lambda r: r["plans"][0]["thinnings"][0].update(removed=["x"]), "does not fit"),
    "another tensor": (lambda r: r["plans"][0]["thinnings"][0].update(tensor="9.weight"), "does not fit"),
    "one thinning less": (lambda r: r["plans"][0]["thinnings"].pop(), r"does not fit|has the shape"),
    "an attribute that calls": (
        lambda r: r["plans"][0]["repairs"].append({"module": "0", "chain": ["forward"], "old": 1, "new": 2}),
        "does not fit",
    ),
    "an attribute that is a path": (
        lambda r: r["plans"][0]["repairs"].append({"module": "0", "chain": ["__class__", "x"], "old": 1, "new": 2}),
        "does not fit",
    ),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_an_edited_plan_is_refused(slim: nn.Module, tmp_path: Path, what: str) -> None:
    change, message = DAMAGE[what]
    structprune.save(slim, tmp_path)
    damaged(tmp_path, change)
    with pytest.raises(LoadError, match=message):
        structprune.load(build, tmp_path)


@pytest.mark.parametrize("file", ["plan.json", "model.safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_truncated_file_is_refused(slim: nn.Module, tmp_path: Path, file: str, share: float) -> None:
    structprune.save(slim, tmp_path)
    data = (tmp_path / file).read_bytes()
    (tmp_path / file).write_bytes(data[: int(len(data) * share)])
    with pytest.raises(LoadError):
        structprune.load(build, tmp_path)


def test_a_pickle_in_place_of_the_tensors_is_not_run(slim: nn.Module, tmp_path: Path) -> None:
    structprune.save(slim, tmp_path)
    torch.save({"0.weight": torch.zeros(4, 4)}, tmp_path / "model.safetensors")
    digest = io._digest(tmp_path / "model.safetensors")
    damaged(tmp_path, lambda r: r["weights"].update(sha256=digest))
    with pytest.raises(LoadError, match="no safetensors file"):
        structprune.load(build, tmp_path)


def test_deeply_nested_json_is_refused(slim: nn.Module, tmp_path: Path) -> None:
    structprune.save(slim, tmp_path)
    (tmp_path / "plan.json").write_text("[" * 100_000)
    with pytest.raises(LoadError, match="damaged"):
        structprune.load(build, tmp_path)


def test_another_model_is_refused(slim: nn.Module, tmp_path: Path) -> None:
    structprune.save(slim, tmp_path)
    with pytest.raises(LoadError, match="does not fit the model"):
        structprune.load(lambda: nn.Sequential(nn.Linear(4, 9), nn.Linear(9, 2)), tmp_path)
    structprune.save(build(), tmp_path)
    with pytest.raises(LoadError, match=r"unknown \['1.bias'"):
        structprune.load(lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.ReLU(), nn.Linear(8, 3)), tmp_path)
    with pytest.raises(LoadError, match="does not exist"):
        structprune.load(build, tmp_path / "nowhere")


def test_what_cannot_be_saved_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="on the meta device"):
        structprune.save(nn.Linear(2, 2, device="meta"), tmp_path)
