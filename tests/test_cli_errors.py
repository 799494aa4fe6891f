"""The command line when things go wrong, as a program, and as its documentation says."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from support.command_line import program, run, working_folder
from torch import _inductor
from typer.main import get_command
from typer.testing import CliRunner

from structprune.cli import main
from structprune.cli.app import app
from structprune.cli.output import Exit
from structprune.planning.plan import Plan


@pytest.fixture
def folder(tmp_path, monkeypatch):
    yield from working_folder(tmp_path, monkeypatch)


# -- what goes wrong --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["plan", "resnet"], "names no model"),
        (["plan", "nowhere:net"], "no module 'nowhere'"),
        (["plan", "nowhere.py:net"], "There is no file nowhere.py"),
        (["plan", "own:nothing"], "has no 'nothing'"),
        (["plan", "own:number"], "gives a int"),
        (["plan", "own:Net"], "does not say what it takes"),
        (["plan", "own:Net", "-i", "3xx8"], "is no shape"),
        (["plan", "own:Net", "-i", "0x3"], "is no shape"),
        (["plan", "own:Net", "-i", "x=1x3", "-i", "1x3"], "by name, or none"),
        (["plan", "own:pair", "--target", "macs"], "not of the form NAME=NUMBER"),
        (["plan", "own:pair", "--ratio", "half"], "is no number"),
        (["plan", "own:pair", "--round-to", "-8"], "give a whole number, or auto"),
        (["plan", "own:pair", "--scope", "everything"], "--scope is 'everything'"),
        (["plan", "own:pair", "--device", "abacus"], "There is no device"),
        (["plan", "own:pair", "--device", "cuda:77"], "There is no device 'cuda:77'"),
        (["plan", "own:pair", "--out", "nowhere/plan.json"], "nowhere/plan.json cannot be written"),
        (["prune", "own:pair", "--ratio", "0.5", "--out", "own.py"], "the folder own.py cannot be made"),
        (["compress", "own:pair", "--data", "own:batches", "--out", "c"], "Say how much goes"),
        (["compress", "own:pair", "--ratio", "0.5", "--out", "c"], "Give --data"),
        (["compress", "own:pair", "--ratio", "0.5", "--data", "nowhere", "--out", "c"], "give a folder of images"),
        (["compress", "own:pair", "--ratio", "0.5", "--data", ".", "--out", "c"], "There is no image in"),
        (["export", "own:pair", "x.onnx"], "Say which smaller model is meant"),
        (["export", "own:pair", "x.onnx", "--dense", "--dynamic", "input-2"], "write INPUT:DIM=NAME"),
        (["benchmark", "own:pair", "-r", "0.5", "-b", "abacus"], "no backend 'abacus'"),
        (["benchmark", "own:pair", "-r", "0.5", "--saved", "."], "not both"),
        (["report", "own:pair", "r.html", "--points", "own.py"], "is no JSON"),
        (["report", "own:pair", "r.html", "--chain", "own.py"], "is no list of objects with name, accuracy"),
    ],
)
def test_wrong_usage_exits_with_2(folder, args, message):
    shown = run(*args, code=2)
    assert message in " ".join(shown.stderr.replace("│", " ").split())
    assert not Path("x.onnx").exists()


@pytest.mark.parametrize(
    ("package", "model", "message"),
    [
        ("timm", "timm:resnet5000", "timm has no model"),
        ("transformers", "hf:.", "has no config.json"),
        ("transformers", "hf:nobody/nothing", "nor in the cache"),
    ],
)
def test_a_model_that_a_package_does_not_have(folder, package, model, message):
    pytest.importorskip(package)
    shown = run("plan", model, code=2)
    assert message in " ".join(shown.stderr.replace("│", " ").split())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["plan", "own:pair", "--ratio", "2"], "PlanError: ratio is 2.0"),
        (["plan", "own:pair", "--target", "speed=0.5"], "target names 'speed'"),
        (["plan", "own:pair", "--ignore", "layer9"], "has no layer 'layer9'"),
        (["plan", "own:pair", "--importance", "best"], "no criterion 'best'"),
        (["plan", "own:pair", "--plan", "own.py"], "not the JSON of a plan"),
        (["export", "own:pair", "x.onnx", "--saved", "."], "plan.json does not exist"),
        (["info", "own.onnx"], "cannot be read as an ONNX file"),
        (["plan", "own:pair", "-i", "1x4x8x8"], "TraceError: Net cannot run on the inputs given"),
    ],
)
def test_refusals_exit_with_4(folder, args, message):
    shown = run(*args, code=4)
    assert message in " ".join(shown.stderr.split())
    assert shown.stdout == ""


@pytest.mark.parametrize(
    ("args", "package", "code", "message"),
    [
        (["export", "own:pair", "x.xml", "--to", "openvino"], "openvino", 3, "structprune[openvino]"),
        (["export", "own:pair", "x.pte", "--to", "executorch"], "executorch", 3, "structprune[executorch]"),
        (["export", "own:pair", "x.tflite", "--to", "litert"], "ai_edge_litert", 3, "structprune[litert]"),
        (["benchmark", "own:pair", "-b", "openvino"], "openvino", 3, "structprune[openvino]"),
        (["benchmark", "own:pair", "-b", "executorch"], "executorch", 3, "structprune[executorch]"),
        (["benchmark", "own:pair", "-b", "litert"], "ai_edge_litert", 3, "structprune[litert]"),
        (["benchmark", "own:pair", "-b", "tensorrt"], "", 4, "TensorRT runs on a CUDA device"),
        (["benchmark", "own:pair", "-b", "compile"], "", 4, "torch.compile needs a C++ compiler, and torch finds none"),
        (["benchmark", "own:pair", "-b", "aotinductor"], "", 4, "AOTInductor needs a C++ compiler"),
        (["export", "own:pair", "x.pt2", "--to", "aotinductor"], "", 5, "compiles with a C++ compiler"),
        (["export", "own:pair", "x.onnx", "--to", "openvino"], "", 5, "OpenVINO reads files that end in .xml"),
        (["export", "own:pair", "x.onnx", "--to", "tensorrt"], "", 5, "files that end in .engine"),
        (["export", "own:pair", "x.so", "--to", "aotinductor"], "", 5, "files that end in .pt2"),
    ],
)
def test_what_a_runtime_lacks_is_told(folder, monkeypatch, args, package, code, message):
    if package:
        monkeypatch.setitem(sys.modules, package, None)
    with _inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}):
        shown = run(*args, *(["--ratio", 0.5, "--runs", 2] if args[0] == "benchmark" else ["--dense"]), code=code)
    assert message in " ".join(shown.stderr.split())
    assert not Path(args[2]).exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="tells what is said where there is no GPU")
def test_an_engine_of_tensorrt_is_refused_without_a_gpu(folder):
    shown = run("export", "own:pair", "x.engine", "--dense", "--to", "tensorrt", code=5)
    said = " ".join(shown.stderr.split())
    assert "no engine of TensorRT can be built here: TensorRT runs on NVIDIA GPUs" in said
    assert "trtexec --onnx=model.onnx" in said
    assert not Path("x.engine").exists()


def test_a_result_that_is_not_exact_exits_with_5_and_saves_nothing(folder, monkeypatch):
    def thinned_and_spoilt(plan, model, inplace=False):
        slim = applied(plan, model, inplace)
        with torch.no_grad():
            slim[5].bias.add_(1)
        return slim

    applied = Plan.apply
    monkeypatch.setattr(Plan, "apply", thinned_and_spoilt)
    shown = run("prune", "own:pair", "--out", "slim", code=5)
    assert "VerificationError" in shown.stderr
    assert not Path("slim").exists()


@pytest.mark.parametrize(
    ("package", "args", "extra"),
    [
        ("timm", ["plan", "timm:resnet18"], "models"),
        ("transformers", ["plan", "hf:bert"], "models"),
        ("onnxruntime", ["export", "own:pair", "x.onnx", "--dense"], "onnx"),
        (
            "matplotlib.figure",
            ["sensitivity", "own:pair", "--metric", "own:metric", "-o", "s", "--plot", "p.png"],
            "plot",
        ),
    ],
)
def test_a_missing_extra_is_named(folder, monkeypatch, package, args, extra):
    monkeypatch.setitem(sys.modules, package, None)
    shown = run(*args, code=3)
    assert f"structprune[{extra}]" in shown.stderr


# Run on an install without any extra but that of the command line: what needs one says which, and all else works.
BARE = """
import importlib, json, sys
ABSENT = {absent!r}

class Absent:
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent)
from typer.testing import CliRunner
from structprune.cli.app import app

found = []
for line in {lines!r}:
    done = CliRunner().invoke(app, line.split())
    found.append([done.exit_code, done.stderr, repr(done.exception)])
print(json.dumps(found))
"""
FOR_EXTRAS = (
    "accelerate", "ignite", "lightning", "matplotlib", "onnx", "onnxruntime", "onnxscript", "openvino", "optuna",
    "peft", "pytorch_lightning", "sklearn", "timm", "torchvision", "transformers",
)  # fmt: skip
NEEDED = {
    "info": None,
    "info own:pair": None,
    "plan own:pair --importance taylor --data own:batches --loss own:loss": None,
    "prune own:pair -o slim": None,
    "sensitivity own:pair --metric own:metric -o s.json -r 0.5": None,
    "sensitivity own:pair --metric own:metric -o t.json -r 0.5 --plot p.png": "plot",
    "benchmark own:pair -r 0.5 --runs 2": None,
    "benchmark own:pair -r 0.5 --runs 2 -b onnxruntime": "onnx",
    "export own:pair x.onnx --saved slim": "onnx",
    "report own:pair r.html -r 0.5 --sensitivity s.json": None,
    "plan timm:resnet18": "models",
    "plan torchvision:resnet18": "models",
    "plan hf:bert": "models",
}


def test_each_command_on_an_install_without_extras(folder):
    code = BARE.format(absent=FOR_EXTRAS, lines=list(NEEDED))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for (line, extra), (status, shown, exception) in zip(NEEDED.items(), json.loads(done.stdout), strict=True):
        assert status == (0 if extra is None else 3), (line, shown, exception)
        assert extra is None or f"pip install 'structprune[{extra}]'" in shown, line
    assert Path("r.html").is_file()
    assert not Path("t.json").exists()  # it was said before anything was measured


def test_errors_of_the_users_own_code_keep_their_traceback(folder):
    with pytest.raises(RuntimeError, match="my own mistake"):
        run("plan", "own:broken")


# -- as a program -----------------------------------------------------------------------------------------------------


def test_as_a_program(folder):
    done = program("prune", "own:pair", "--ratio", "0.5", "--out", "slim", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["folder"] == "slim"
    assert "a line that is no result" in done.stderr
    assert program("plan", "own:pair", "--ratio", "7").returncode == 4
    shown = program("--help")
    for name in ("plan", "prune", "sensitivity", "benchmark", "export", "report", "info"):
        assert f"│ {name} " in shown.stdout


def test_without_typer_the_extra_is_named():
    done = program("info", before="import sys\nsys.modules['typer'] = None")
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr == "The command line needs typer: pip install 'structprune[cli]'\n"


def test_the_console_script_is_declared():
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"structprune": f"{main.__module__}:{main.__name__}"}


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("structprune plan x --scope ", ["local", "global", "isomorphic"]),
        ("structprune plan x --scope gl", ["global"]),
        ("structprune benchmark x --backend on", ["onnxruntime"]),
        ("structprune plan x --importance l", ["l2", "l1", "linf"]),
        ("structprune plan tim", ["timm:"]),
        ("structprune sens", ["sensitivity"]),
    ],
)
def test_completion_for_a_shell(words, found):
    done = CliRunner().invoke(app, [], prog_name="structprune", env=completing(words))
    assert set(found) <= set(done.stdout.split())
    assert all(word.startswith(words.rpartition(" ")[2]) for word in done.stdout.split())


def completing(words):
    """What bash sets in the environment of a program that it asks for the last word."""
    return {
        "_STRUCTPRUNE_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split(" ")) - 1)
    }  # fmt: skip


def test_the_program_completes_as_well():
    done = program(before=f"import os\nos.environ.update({completing('structprune sens')!r})")
    assert done.stdout.split() == ["sensitivity"], done.stderr


def test_the_completion_is_shown():
    done = program(
        "--show-completion", "zsh", before="import os\nos.environ['_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION'] = '1'"
    )
    assert done.returncode == 0, done.stderr
    assert "_STRUCTPRUNE_COMPLETE" in done.stdout


# -- the documentation ------------------------------------------------------------------------------------------------

DOCUMENT = (Path(__file__).parent.parent / "docs" / "cli.md").read_text()
EXAMPLES = [line for line in DOCUMENT.splitlines() if line.startswith("structprune ")]


@pytest.mark.parametrize("line", EXAMPLES)
def test_examples_of_the_documentation_are_understood(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("plan.json", "sensitivity.json", "points.json", "times.json", "net.safetensors"):
        Path(name).touch()
    Path("slim").mkdir()
    name, *args = shlex.split(line)[1:]
    command = get_command(app).commands[name]
    context = command.make_context(name, args)  # parsed and checked, not run
    assert context.params["model"] is None or ":" in context.params["model"]


def test_the_documentation_has_an_example_of_every_command():
    assert {shlex.split(line)[1] for line in EXAMPLES} == set(get_command(app).commands)


@pytest.mark.parametrize("code", list(Exit))
def test_the_documentation_explains_every_exit_code(code):
    assert f"| {code.value} |" in DOCUMENT
