"""The examples run, as a user would start them, and print what they promise."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

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
    rows = {name: next(line for line in text.splitlines() if f" {name} " in line) for name in ("dense", "pruned")}
    macs = {name: float(re.findall(r"([\d.]+) M", row)[0]) for name, row in rows.items()}
    assert 0.4 * macs["dense"] < macs["pruned"] <= 0.5 * macs["dense"]
    assert "fine-tuned" in text
    assert "times as fast" in text
