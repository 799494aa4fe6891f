"""The command line as tests use it: in this process or as a program, in a folder with a module of the user's."""

from __future__ import annotations

import json
import subprocess
import sys

from typer.testing import CliRunner

from structprune.cli.app import app

OWN = """
import torch
from torch import nn

print("a line that is no result")

class Net(nn.Sequential):
    def __init__(self):
        body = nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU()
        super().__init__(*body, nn.Flatten(), nn.Linear(512, 4))

def pair():
    return Net(), torch.randn(2, 3, 8, 8)

def broken():
    raise RuntimeError("my own mistake")

def number():
    return 3

calls = []

def metric(model, loader):
    calls.append(1)
    return -float(model(loader).abs().mean())

def images():
    return torch.ones(2, 3, 8, 8)

def batches():
    return [(torch.randn(4, 3, 8, 8), torch.zeros(4, dtype=torch.long))] * 2

def loss(model, batch):
    return torch.nn.functional.cross_entropy(model(batch[0]), batch[1])

def last_first(group, tensors):
    return -torch.arange(group.channels, dtype=torch.float64)
"""


def working_folder(tmp_path, monkeypatch):
    """A working directory with that module, until the test is over."""
    (tmp_path / "own.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("own", None)
    sys.path[:] = [entry for entry in sys.path if entry != str(tmp_path)]


def run(*args, code=0):
    done = CliRunner().invoke(app, [str(arg) for arg in args])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == code, done.output
    return done


def as_json(*args):
    return json.loads(run(*args, "--json").stdout)


def program(*args, before=""):
    code = f"{before}\nfrom structprune.cli import main\nmain()"
    return subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, check=False)
