"""Saving and loading without pickle: bit-exact, and atomic."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import shutil
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
from structprune.planning.plan import plans_of
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


class Kill(BaseException):
    """The end of a process, which then does nothing more."""


STEPS = [(io, "save_file"), *((os, name) for name in ("mkdir", "fsync", "replace", "unlink", "rmdir"))]


def saved_until(step: int, model: nn.Module, folder: Path, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Save, but be killed before this step: no step after it is made, not even to clean up. Whether it was reached."""
    calls = 0

    def mortal(real: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls >= step:
                raise Kill
            return real(*args, **kwargs)

        return called

    with monkeypatch.context() as patch, contextlib.suppress(Kill):
        for owner, name in STEPS:
            patch.setattr(owner, name, mortal(getattr(owner, name)))
        structprune.save(model, folder)
    return calls >= step


def value(folder: Path) -> float:
    return structprune.load(lambda: nn.Linear(1, 1), folder).bias.item()


def numbered(number: float) -> nn.Module:
    model = nn.Linear(1, 1)
    nn.init.constant_(model.bias, number)
    return model


def test_kills_in_a_row_leave_the_old_save_or_the_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever steps of two saves in a row are their last ones; what they leave behind, the third removes."""
    monkeypatch.setattr(os, "fsync", lambda _: None)  # no power is cut here
    structprune.save(numbered(0), tmp_path / "old")
    switched = set()
    for first in itertools.count(1):
        killed = shutil.copytree(tmp_path / "old", tmp_path / f"{first}")
        if not saved_until(first, numbered(1), killed, monkeypatch):
            break
        before = value(killed)
        for second in itertools.count(1):
            folder = shutil.copytree(killed, tmp_path / f"{first}-{second}")
            if not saved_until(second, numbered(2), folder, monkeypatch):
                break
            switched.add((before, value(folder)))
            structprune.save(numbered(3), folder)
            assert value(folder) == 3
            assert sorted(p.name for p in folder.iterdir()) == ["model.safetensors", "plan.json"]
    assert switched == {(0, 0), (0, 2), (1, 1), (1, 2)}, "kills came before and after the switch, and lost nothing"


def test_a_save_that_an_older_version_did_not_end_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It called new tensors ``model.incoming.safetensors``, and was killed before they got their name."""
    structprune.save(numbered(1), tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "model.incoming.safetensors")
    (tmp_path / "model.safetensors").write_bytes(b"the tensors before")
    assert value(tmp_path) == 1
    saved_until(1, numbered(2), tmp_path, monkeypatch)
    assert value(tmp_path) == 1
    structprune.save(numbered(2), tmp_path)
    assert value(tmp_path) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.safetensors", "plan.json"]


def test_a_full_disk_leaves_the_old_save_and_no_drafts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    structprune.save(numbered(1), tmp_path)
    real, calls = os.fsync, []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 3:  # tensors, folder, plan.json
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        structprune.save(numbered(2), tmp_path)
    assert value(tmp_path) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.safetensors", "plan.json"]


def test_the_files_are_readable_by_whom_other_files_are(slim: nn.Module, tmp_path: Path) -> None:
    structprune.save(slim, tmp_path)
    (tmp_path / "other").touch()
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1


def test_a_part_of_a_pruned_model_is_refused(slim: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(
        PlanError, match=r"'0.0.weight' was pruned as part of another model, .* Save the model that was"
    ):
        structprune.save(nn.Sequential(slim, nn.Linear(3, 2)), tmp_path / "other")


def test_one_saved_tensor_for_two_that_are_not_tied(tmp_path: Path) -> None:
    def net(tied: bool) -> nn.Sequential:
        model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
        if tied:
            model[1].weight = model[0].weight
        return model

    model = net(True)
    again = structprune.load(lambda: net(False), structprune.save(model, tmp_path))
    assert_same(model, again)
    with torch.no_grad():
        again[0].weight.add_(1)
    assert torch.equal(again[1].weight, model[1].weight), "they share no memory"
    with pytest.raises(
        LoadError, match=r"'0.weight' and '1.weight' are one tensor in the model that build_model makes"
    ):
        structprune.load(lambda: net(True), structprune.save(net(False), tmp_path))


class WithTable(nn.Module):
    """A weight under two names, and a table that is saved or not."""

    def __init__(self, saved: bool) -> None:
        super().__init__()
        self.first, self.up, self.down = nn.Linear(4, 4), nn.Linear(4, 8), nn.Linear(8, 4)
        self.last = nn.Linear(4, 4)
        self.last.weight = self.first.weight
        self.register_buffer("table", torch.ones(4), persistent=saved)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.down(torch.relu(self.up(self.first(x)))) + self.table)


def test_a_model_built_on_the_meta_device(tmp_path: Path) -> None:
    def on_meta(saved: bool) -> nn.Module:
        with torch.device("meta"):
            model = WithTable(saved)
        model.first.bias.requires_grad_(False)
        return model

    slim = structprune.prune(WithTable(True), X, ratio=0.5)
    again = structprune.load(lambda: on_meta(True), structprune.save(slim, tmp_path / "one"))
    assert_same(slim, again)
    assert torch.equal(slim(X), again(X))
    assert again.last.weight is again.first.weight
    assert isinstance(again.first.weight, nn.Parameter)
    assert not again.first.bias.requires_grad
    slim = structprune.prune(WithTable(False), X, ratio=0.5)
    with pytest.raises(LoadError, match="leaves 'table' on the meta device, and it is not saved with the model"):
        structprune.load(lambda: on_meta(False), structprune.save(slim, tmp_path / "two"))


def test_what_cannot_be_saved_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="on the meta device"):
        structprune.save(nn.Linear(2, 2, device="meta"), tmp_path)
