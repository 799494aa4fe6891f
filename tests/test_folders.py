"""A folder of sharded weights pruned into another, without the model in memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from support.transformers_models import MODELS, made, outputs

import structprune
from structprune.errors import LoadError, PlanError

OPTIONS = [
    {"ratio": 0.5},
    {"target": {"params": 0.6}, "scope": "global"},
    {"target": {"intermediate_size": 50}},
    {"ratio": 0.25, "importance": "l1", "axes": ["mlp"]},
]


def saved(name: str, folder: Path, size: str = "40KB") -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    network, inputs = made(MODELS[name])
    network.save_pretrained(folder, max_shard_size=size)
    (folder / "tokenizer.json").write_text("{}")
    return network, inputs


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_it_is_what_prune_makes(options: dict[str, object], tmp_path: Path) -> None:
    network, inputs = saved("llama", tmp_path / "whole")
    assert len(list((tmp_path / "whole").glob("*.safetensors"))) > 3
    plan = structprune.prune_folder(tmp_path / "whole", tmp_path / "small", inputs, **options)
    again = type(network).from_pretrained(tmp_path / "small").eval()
    wanted = structprune.prune(network, inputs, **options)
    assert plan.slices
    assert again.config.intermediate_size == wanted.config.intermediate_size
    assert torch.equal(outputs(again, inputs), outputs(wanted, inputs))
    assert (tmp_path / "small" / "tokenizer.json").read_text() == "{}"
    index = json.loads((tmp_path / "small" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * sum(p.numel() for p in again.parameters())


@pytest.mark.parametrize("name", ["gpt2", "bart", "bert"])
def test_tied_weights_and_single_files(name: str, tmp_path: Path) -> None:
    network, inputs = saved(name, tmp_path / "whole", "1GB")
    assert (tmp_path / "whole" / "model.safetensors").is_file()
    options = {"ratio": 0.5, **MODELS[name].options}
    structprune.prune_folder(tmp_path / "whole", tmp_path / "small", inputs, **options)
    again = type(network).from_pretrained(tmp_path / "small").eval()
    wanted = structprune.prune(network, inputs, **options)
    torch.testing.assert_close(outputs(again, inputs), outputs(wanted, inputs), rtol=0, atol=0)


def test_without_inputs_some_tokens_go_in(tmp_path: Path) -> None:
    network, inputs = saved("llama", tmp_path / "whole")
    structprune.prune_folder(tmp_path / "whole", tmp_path / "small", ratio=0.5)
    again = type(network).from_pretrained(tmp_path / "small").eval()
    assert torch.equal(outputs(again, inputs), outputs(structprune.prune(network, inputs, ratio=0.5), inputs))


def test_what_is_wrong_leaves_nothing_behind(tmp_path: Path) -> None:
    whole, small = tmp_path / "whole", tmp_path / "small"
    saved("llama", whole)
    before = sorted(tmp_path.rglob("*"))

    def refused(error: type[Exception], message: str, **options: object) -> None:
        with pytest.raises(error, match=message):
            structprune.prune_folder(whole, small, **options)
        assert sorted(tmp_path.rglob("*")) == before

    refused(PlanError, "ratio is 2", ratio=2)
    refused(PlanError, "importance must look at weights alone", importance="taylor")
    refused(PlanError, "importance must look at weights alone", data=[1])
    refused(PlanError, "No configuration says what comes of it .*inv_freq", axes=["head_size"])
    refused(PlanError, "example_inputs is 3", example_inputs=3)
    shard = max(whole.glob("*.safetensors"))
    content = shard.read_bytes()
    shard.write_bytes(content[:100])
    refused(LoadError, "cannot be read")
    shard.unlink()
    before.remove(shard)
    refused(LoadError, "cannot be read .*No such file")
    shard.write_bytes(content)
    before = sorted([*before, shard])
    small.mkdir()
    with pytest.raises(LoadError, match="exists already"):
        structprune.prune_folder(whole, small)


def test_shards_of_another_model_are_told(tmp_path: Path) -> None:
    saved("llama", tmp_path / "whole", "1GB")
    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    for layers, message in ((3, r"lacks 'model.layers.2"), (1, r"holds 'model.layers.1")):
        (tmp_path / "whole" / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}))
        with pytest.raises(LoadError, match=message):
            structprune.prune_folder(tmp_path / "whole", tmp_path / "small")


def test_classes_that_rename_tensors_as_they_load_them_are_refused(tmp_path: Path) -> None:
    saved("qwen3-moe", tmp_path / "whole")
    with pytest.raises(LoadError, match=r"lacks 'model.layers.0.mlp.experts.gate_up_proj'.* use structprune.prune"):
        structprune.prune_folder(tmp_path / "whole", tmp_path / "small")


CHILD = """
import resource, sys
import conftest, torch
import structprune
whole, small, limit = sys.argv[1], sys.argv[2], int(sys.argv[3])
from support.transformers_models import MODELS, made
structprune.prune(*made(MODELS["llama"]), ratio=0.5)  # what is imported and compiled is there
held = int(next(line for line in open("/proc/self/status") if line.startswith("VmData")).split()[1]) << 10
resource.setrlimit(resource.RLIMIT_DATA, (held + limit, held + limit))
if small == "whole":
    import transformers
    model = transformers.LlamaForCausalLM.from_pretrained(whole).eval()
    structprune.prune(model, {"input_ids": torch.ones(1, 8, dtype=torch.long)}, ratio=0.5, verify=False)
else:
    structprune.prune_folder(whole, small, ratio=0.5)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux to limit the data of a process")
def test_no_more_than_one_shard_and_one_tensor_in_memory(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        vocab_size=2000, hidden_size=512, intermediate_size=2048, num_hidden_layers=16, num_attention_heads=8
    )
    network = transformers.LlamaForCausalLM(config)
    size = sum(p.numel() * p.element_size() for p in network.parameters())
    network.save_pretrained(tmp_path / "whole", max_shard_size="10MB")
    shards = list((tmp_path / "whole").glob("*.safetensors"))
    assert len(shards) > 20
    del network

    def run(small: str, limit: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", CHILD, str(tmp_path / "whole"), small, str(limit)]
        return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=240)

    limit = size // 4
    done = run(str(tmp_path / "small"), limit)
    assert done.returncode == 0, done.stderr
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "small")
    assert again.config.hidden_size == 256
    assert run("whole", limit).returncode != 0, "the limit would let the whole model in"
