"""Fine-tuning that was stopped goes on as if it had not been."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.finetuning import KilledError, loaders, network, run, same, state
from torch import nn

from structprune.errors import LoadError
from structprune.training import finetune


@pytest.mark.parametrize("own_generator", [False, True])
@pytest.mark.parametrize("options", [{}, {"ema": 0.9, "amp": True}, {"teacher": True}], ids=["plain", "ema", "teacher"])
def test_a_killed_run_ends_as_an_uninterrupted_one(
    tmp_path: Path, own_generator: bool, options: dict[str, Any]
) -> None:
    given = {**options, "own_generator": own_generator}
    if "teacher" in given:
        given["teacher"] = network()
    whole = network()
    wanted = run(whole, **given)
    with pytest.raises(KilledError):
        run(network(), stop=3, checkpoint=tmp_path, **given)
    torch.manual_seed(99)
    stranger = network()
    torch.manual_seed(98)
    for parameter in stranger.parameters():
        nn.init.normal_(parameter)
    found = run(stranger, checkpoint=tmp_path, **given)
    assert same(state(stranger), state(whole))
    for one, other in zip(found.history, wanted.history, strict=True):
        assert (one.loss, one.score, one.rate) == (other.loss, other.score, other.rate)
    assert (found.score, found.epoch) == (wanted.score, wanted.epoch)
    # A run that is done gives its result again, without training.
    again = network()
    assert run(again, checkpoint=tmp_path, stop=1, **given) == found
    assert same(state(again), state(whole))


def test_another_seed_is_another_run() -> None:
    one, other = network(), network()
    run(one)
    run(other, seed=1)
    assert not same(state(one), state(other))


def test_a_process_that_is_killed_goes_on(tmp_path: Path) -> None:
    code = f"""
import os, sys
sys.path[:0] = [{str(Path(__file__).parent)!r}]
import torch
import test_finetune as t
torch.set_num_threads({torch.get_num_threads()})  # sums in the same order as here
t.finetune(t.network(), t.loaders()[0], t.loaders()[1], epochs=4, lr=0.05, progress=False, checkpoint={str(tmp_path)!r},
           on_epoch=lambda epoch: os.kill(os.getpid(), 9) if epoch == 3 else None)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == -9, done.stderr
    assert json.loads((tmp_path / "progress.json").read_text())["epoch"] == 2
    whole, resumed = network(), network()
    run(whole)
    run(resumed, checkpoint=tmp_path)
    assert same(state(resumed), state(whole))


def test_only_one_state_stays_in_the_folder(tmp_path: Path) -> None:
    run(network(), checkpoint=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "optimizer-4.pt",
        "progress.json",
        "weights-4.safetensors",
    ]


class Remembering:
    """A penalty that has a state."""

    def __call__(self, model: nn.Module) -> torch.Tensor:
        return next(model.parameters()).sum() * 0

    def state_dict(self) -> dict[str, float]:
        return {}

    def load_state_dict(self, state: dict[str, float]) -> None:
        assert state == {}


def test_other_settings_and_damage_are_refused(tmp_path: Path) -> None:
    run(network(), checkpoint=tmp_path)
    with pytest.raises(LoadError, match="other settings: seed 0"):
        run(network(), checkpoint=tmp_path, seed=3)
    with pytest.raises(LoadError, match="other settings: shapes"):
        finetune(nn.Linear(2, 2), loaders()[0], lambda _: 0.0, epochs=4, lr=0.05, checkpoint=tmp_path)
    model = network()
    adam = torch.optim.Adam(model.parameters(), lr=0.05)
    with pytest.raises(LoadError, match="other settings: optimizer SGD"):
        run(model, checkpoint=tmp_path, optimizer=adam)
    with pytest.raises(LoadError, match="penalty None"):
        run(network(), checkpoint=tmp_path, penalty=Remembering())
    with pytest.raises(LoadError, match="amp None"):
        run(network(), checkpoint=tmp_path, amp=True)
    (tmp_path / "weights-4.safetensors").write_bytes(b"no tensors")
    with pytest.raises(LoadError, match="damaged"):
        run(network(), checkpoint=tmp_path)
    (tmp_path / "progress.json").write_text('{"schema": 99}')
    with pytest.raises(LoadError, match="Upgrade"):
        run(network(), checkpoint=tmp_path)
