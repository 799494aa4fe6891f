"""The command line: every command, what it prints, what it writes, and the code with which it exits."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.command_line import as_json, run, working_folder

import structprune
from structprune.cli.models import parse_inputs
from structprune.planning.plan import Plan
from structprune.planning.sensitivities import Sensitivity

SHAPE = ["--input", "2x3x8x8"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    yield from working_folder(tmp_path, monkeypatch)


# -- plan -------------------------------------------------------------------------------------------------------------


def test_plan_prints_a_table_and_writes_json(folder):
    shown = run("plan", "own:pair", "--ratio", 0.5, "--out", "plan.json")
    assert "params" in shown.stdout
    assert "a line that is no result" not in shown.stdout
    plan = Plan.from_json(Path("plan.json").read_text())
    model, x = nn_of_own()
    assert plan.digest == structprune.plan(model, x, ratio=0.5).digest
    assert Plan.from_json(run("plan", "own:pair", "--ratio", 0.5, "--json").stdout) == plan
    assert "│ 0 " in run("plan", "own:pair").stdout


def nn_of_own():
    own = __import__("own")
    torch.manual_seed(0)
    return own.pair()


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        (["--ratio", 0.25], {"ratio": 0.25}),
        (["--ratio", "0=0.5", "--ratio", 0.25], {"ratio": {"0": 0.5, "*": 0.25}}),
        (["--target", "macs=0.5", "--target", "params=0.9"], {"target": {"macs": 0.5, "params": 0.9}}),
        (["--scope", "global"], {"scope": "global"}),
        (["--scope", "0,2"], {"scope": [["0", "2"]]}),
        (["--axes", "channels,mlp"], {"axes": ["channels", "mlp"]}),
        (
            ["--round-to", 8, "--min-channels", 2, "--max-ratio", 0.6],
            {"round_to": 8, "min_channels": 2, "max_ratio": 0.6},
        ),
        (["--importance", "l1"], {"importance": "l1"}),
    ],
)
def test_options_are_those_of_plan(folder, options, settings):
    found = as_json("plan", "own:pair", *options)["settings"]["asked"]
    assert {key: found[key] for key in settings} == settings


def test_layers_can_be_left_whole_and_criteria_be_ones_own(folder):
    layers = as_json("plan", "own:pair", "--ignore", "0", "--importance", "own:last_first", "--round-to", 1)["layers"]
    assert layers == [{"layer": "2", "before": 32, "after": 16}]
    removed = as_json("plan", "own:pair", "--importance", "own:last_first", "--round-to", 1)["slices"][0]["removed"]
    assert removed == list(range(8, 16))


# -- models and inputs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["own:Net", "own.py:Net"])
def test_a_class_of_the_users_own(folder, spec):
    assert as_json("info", spec, *SHAPE)["class"] == "Net"


def test_a_model_of_timm_knows_its_inputs():
    found = as_json("plan", "timm:resnet10t.c3_in1k", "--ratio", 0.1)
    assert "[1, 3, 176, 176]" in json.dumps(found["inputs"])


def test_a_model_of_transformers_from_its_config(tmp_path):
    from transformers import BertConfig

    config = BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    config.architectures = ["BertForSequenceClassification"]
    config.save_pretrained(tmp_path / "bert")
    found = as_json("info", f"hf:{tmp_path / 'bert'}")
    assert found["class"] == "BertForSequenceClassification"
    assert {group["axis"] for group in found["groups"]} >= {"hidden", "heads", "mlp"}
    slim = as_json("prune", f"hf:{tmp_path / 'bert'}", "--ratio", 0.5, "--out", tmp_path / "slim")
    assert slim["verification"]["ok"]


def test_weights_of_transformers_beside_the_config_are_loaded(tmp_path):
    from transformers import BertConfig, BertModel

    config = BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64)
    model = BertModel(config)
    model.save_pretrained(tmp_path / "bert")
    plan = as_json("plan", f"hf:{tmp_path / 'bert'}", "--ratio", 0.5)
    inputs = {"input_ids": torch.zeros(1, 16, dtype=torch.int64)}
    own = structprune.plan(model.eval(), inputs, ratio=0.5)
    assert [t["removed"] for t in plan["slices"]] == [list(t.removed) for t in own.slices]


def test_weights_from_a_file(folder):
    run("plan", "own:pair")
    model, _ = nn_of_own()
    with torch.no_grad():
        model[0].weight[torch.arange(16) % 2 == 0] = 0.0
    save_file(model.state_dict(), folder / "w.safetensors")
    torch.save(model.state_dict(), folder / "w.pt")
    for file in ("w.safetensors", "w.pt"):
        plan = as_json("plan", "own:pair", "--weights", file, "--round-to", 1)
        assert plan["slices"][0]["removed"] == list(range(0, 16, 2))


def test_inputs_by_shape():
    image, ids = parse_inputs(["1x3x8x8", "int64:2x16:1000"])
    assert (image.dtype, list(image.shape)) == (torch.float32, [1, 3, 8, 8])
    assert (ids.dtype, list(ids.shape)) == (torch.int64, [2, 16])
    assert 2 <= int(ids.max()) < 1000
    named = parse_inputs(["x=float16:4", "mask=bool:1x4"])
    assert {name: t.dtype for name, t in named.items()} == {"x": torch.float16, "mask": torch.bool}


# -- the other commands -----------------------------------------------------------------------------------------------


def test_prune_saves_what_load_reads(folder):
    found = as_json("prune", "own:pair", "--ratio", 0.5, "--out", "slim")
    assert found["verification"]["ok"]
    assert found["after"]["params"] < 0.4 * found["before"]["params"]
    model, x = nn_of_own()
    again = structprune.load(lambda: nn_of_own()[0], "slim")
    assert structprune.cost(again, x).params == found["after"]["params"]
    expected = structprune.prune(model, x, ratio=0.5)
    assert torch.equal(again(x), expected(x))


def test_prune_by_a_plan_that_was_made_before(folder):
    plan = as_json("plan", "own:pair", "--ratio", 0.25, "--out", "plan.json")
    shown = run("prune", "own:pair", "--plan", "plan.json", "--out", "slim", "--no-verify").stdout
    assert "not verified" in shown
    assert f"{plan['after']['params']:,}" in shown


def test_sensitivity_resumes(folder):
    args = ["sensitivity", "own:pair", "--metric", "own:metric", "--loader", "own:images", "--out", "s.json", "-r", 0.5]
    first = as_json(*args)
    assert [curve["kept"] for curve in first["curves"]] == [[8], [16]]
    own = sys.modules["own"]
    assert len(own.calls) == 3
    cut = dict(first, curves=first["curves"][:1])
    Path("s.json").write_text(json.dumps(cut))
    assert as_json(*args) == first
    assert len(own.calls) == 4  # the second group alone
    assert "channels" in run(*args, "--restart", "--plot", "s.png").stdout
    assert len(own.calls) == 7
    assert Path("s.png").stat().st_size > 1000
    assert Sensitivity.from_json(Path("s.json").read_text()).dense == first["dense"]
    plan = as_json("plan", "own:pair", "--scope", "s.json", "--target", "macs=0.6")
    assert plan["settings"]["reached"]["macs"] <= 0.6


def test_benchmark(folder):
    args = ["benchmark", "own:pair", "--ratio", 0.5, "--runs", 3, "--warmup", 1, "--batch-size", 4, "--out", "b.json"]
    found = as_json(*args, "-b", "eager", "-b", "onnxruntime")
    assert [(t["model"], t["backend"]) for t in found["timings"]] == [
        (name, backend) for backend in ("eager", "onnxruntime") for name in ("dense", "slim")
    ]
    assert found["batch_size"] == 4
    assert json.loads(Path("b.json").read_text()) == found
    more = ["--batch-size", 2, "--channels-last", "--threads", 1, "--clock", "process", "--plot", "b.png"]
    found = as_json(*args, *more)
    assert [(t["backend"], t["batch_size"]) for t in found["timings"][::2]] == [
        (backend, size) for backend in ("eager", "channels_last") for size in (4, 2)
    ]
    assert Path("b.png").stat().st_size > 1000
    assert "speed-up" in run(*args).stdout


def test_export_of_a_saved_and_of_a_pruned_model(folder):
    run("prune", "own:pair", "--ratio", 0.5, "--out", "slim")
    dense = as_json("export", "own:pair", "dense.onnx", "--dense")
    saved = as_json("export", "own:pair", "saved.onnx", "--saved", "slim")
    pruned = as_json("export", "own:pair", "pruned.onnx", "--ratio", 0.5)
    assert saved["bytes"] == pruned["bytes"] < 0.6 * dense["bytes"]
    assert pruned["max_relative_error"] < 1e-4
    assert Path("saved.onnx").is_file()


def test_what_an_onnx_file_says_of_itself(folder):
    Path("free.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def pair():\n"
        "    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 3)), torch.randn(2, 3, 8, 9)\n"
    )
    digest = as_json("prune", "free.py:pair", "--ratio", 0.5, "--out", "slim")["digest"]
    options = ("--dynamic", "input:2=height", "--dynamic", "input:3=width", "--opset", 20, "--tolerance", 1e-3)
    assert as_json("export", "free.py:pair", "slim.onnx", "--saved", "slim", *options)["opset"] == 20
    found = as_json("info", "slim.onnx")
    assert found["digests"] == [digest]
    assert found["opset"] == 20
    assert found["before"]["params"] > found["after"]["params"]
    assert found["inputs"] == {"input": ["batch", 3, "height", "width"]}
    shown = run("info", "slim.onnx").stdout
    assert digest in shown
    assert "batch x 3 x height x width" in shown
    run("export", "free.py:pair", "dense.onnx", "--dense")
    assert "of a model that was not pruned" in run("info", "dense.onnx").stdout


def test_report(folder):
    Path("points.json").write_text('[[100, 0.9, "dense"], [50, 0.8]]')
    run("sensitivity", "own:pair", "--metric", "own:metric", "--out", "s.json")
    found = as_json("report", "own:pair", "r.html", "-r", 0.5, "--points", "points.json", "--sensitivity", "s.json")
    assert found["verification"]["ok"]
    text = Path("r.html").read_text()
    assert len(text.encode()) == found["bytes"]
    for part in ("own:pair", "16 → 8", 'id="sensitivity"', 'id="curve"', "equal"):
        assert part in text
    run("benchmark", "own:pair", "-r", 0.5, "--runs", 3, "--no-explain", "--out", "b.json")
    Path("chain.json").write_text('[{"name": "dense", "accuracy": 0.9}, {"name": "int8", "accuracy": 0.8}]')
    measured = ["--benchmark", "b.json", "--times", "eager", "--chain", "chain.json"]
    run("report", "own:pair", "m.html", "-r", 0.5, *measured)
    assert 'id="measured"' in Path("m.html").read_text()
    assert 'id="chain"' in Path("m.html").read_text()
    assert "parameters and time" in Path("m.html").read_text()
    run("report", "own:pair", "as-is.html", "--title", "Mine")
    assert 'id="settings"' not in Path("as-is.html").read_text()


def test_info_of_the_machine():
    found = as_json("info")
    assert found["versions"]["torch"] == torch.__version__
    assert found["hardware"]["cores"] >= 1
    assert found["extras"]["onnx"]["missing"] == []
    assert "torch" in run("info").stdout


def test_info_of_a_model(folder):
    found = as_json("info", "own:pair", "--layer", "5")
    assert [group["name"] for group in found["groups"]] == ["0", "2"]
    assert found["pinned"]["5.weight, dim 0"] == "it is a dimension of the model's output"
    assert "pinned: it is a dimension of the model's output" in found["layers"]["5"]
    assert "group" in run("info", "own:pair").stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to", "tpu"], "known are onnx, openvino, executorch, litert, aotinductor, tensorrt, gguf"),
        (["--to", "litert", "--opset", 20], "--to litert takes no --opset"),
        (["--to", "executorch", "--no-dynamic-batch"], "takes no --no-dynamic-batch"),
        (["--to", "aotinductor", "--largest-batch", 8], "--to aotinductor takes no --largest-batch"),
        (["--to", "tensorrt", "--no-dynamic-batch"], "--to tensorrt takes no --no-dynamic-batch"),
        (["--largest-batch", 8], "--to onnx takes no --largest-batch"),
    ],
)
def test_formats_and_the_options_that_they_take(folder, arguments, message):
    done = run("export", "own:pair", "x.onnx", "--dense", *arguments, code=2)
    assert message in " ".join(done.stderr.replace("│", " ").split())
