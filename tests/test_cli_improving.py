"""From a folder of images to a file: compress, recover, finetune on the command line; and the version."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.command_line import as_json, run, working_folder

import structprune
from structprune.cli import improving
from structprune.cli.images import images_in


@pytest.fixture
def folder(tmp_path, monkeypatch):
    yield from working_folder(tmp_path, monkeypatch)


@pytest.fixture
def images(folder):
    generator = np.random.default_rng(0)
    for number in range(20):
        file = folder / "images" / f"class{number % 2}" / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 255, (12, 16, 3), dtype=np.uint8)).save(file)
    return folder / "images"


COMPRESS = (
    "compress",
    "own:pair",
    "--data",
    "images",
    "--ratio",
    "0.5",
    "--out",
    "out",
    "--samples",
    "20",
    "--batch",
    "4",
)


def test_one_command_makes_everything(images):
    found = as_json(*COMPRESS, "--epochs", "1")
    assert {"pruned", "recovered", "trained", "speedup", "onnx_error"} <= found.keys()
    slim = structprune.load(improving_net, "out")
    assert slim[0].out_channels == 8
    for name in ("model.onnx", "report.html", "benchmark.json", "compress.json"):
        assert (Path("out") / name).stat().st_size
    assert "agreement with the dense model" in Path("out/report.html").read_text()


def improving_net():
    sys.path.insert(0, ".")
    import own

    return own.Net()


def test_a_run_that_was_cut_short_goes_on(images, monkeypatch):
    def killed(*_, **__):
        raise RuntimeError("killed")

    monkeypatch.setattr(improving, "export_onnx", killed)
    with pytest.raises(RuntimeError, match="killed"):
        run(*COMPRESS)
    state = json.loads(Path("out/compress.json").read_text())
    assert {"plan", "recovered"} <= state.keys()
    monkeypatch.undo()
    monkeypatch.chdir(images.parent)
    monkeypatch.setattr(improving, "recover", killed)  # not a second time
    assert as_json(*COMPRESS)["recovered"] == state["recovered"]
    assert "holds a run with other settings" in " ".join(run(*COMPRESS, "--seed", "3", code=2).stderr.split())


def test_recover_and_finetune_a_saved_model(images):
    run("prune", "own:pair", "--ratio", "0.5", "--out", "slim")
    data = ("--data", "images", "--samples", "20", "--batch", "5")
    recovered = as_json("recover", "own:pair", "--saved", "slim", *data, "--out", "recovered")
    assert [row["layer"] for row in recovered["layers"]] == ["2", "5"]
    trained = as_json("finetune", "own:pair", "--saved", "recovered", *data, "--epochs", "1", "--out", "trained")
    assert 0 <= trained["after"] <= 100
    assert (Path("trained") / "model.safetensors").exists()


def test_images_are_scaled_and_cut(images):
    found = images_in(images, torch.nn.Identity(), torch.zeros(1, 3, 8, 8), 6, 4, seed=1)
    assert len(found) == 2
    assert [tuple(batch.shape) for batch in found] == [(4, 3, 8, 8), (2, 3, 8, 8)]
    again = images_in(images, torch.nn.Identity(), torch.zeros(1, 3, 8, 8), 6, 4, seed=1)
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))
    assert abs(float(torch.cat(list(found)).mean())) < 0.5


def test_the_version_and_the_module():
    command = [sys.executable, "-m", "structprune", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"structprune {structprune.__version__}\n"


def test_a_search_saves_the_best_network_and_goes_on_in_its_study(images):
    asked = ("optimize", "own:pair", "--data", "images", "--out", "out", "--samples", "20", "--batch", "4")
    asked += ("--minimize", "macs", "--eps", "100", "--trials", "2", "--storage", "study.db")
    found = as_json(*asked)
    assert found["folder"] == "out"
    assert found["gain"] > 1
    assert [trial["state"] for trial in found["trials"]] == ["feasible", "feasible"]
    assert structprune.load(improving_net, "out")[0].out_channels < 16
    assert "Optimized(macs" in Path("out/search.html").read_text()
    again = as_json(*asked)
    assert again["trials"] == found["trials"]
