"""The script that prunes a Llama from a folder, on a tiny one with a tokenizer made here."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

EXAMPLES = Path(__file__).parent.parent / "examples"
WORDS = [f"word{number}" for number in range(18)]


@pytest.fixture(scope="module")
def script():
    sys.path.append(str(EXAMPLES))
    try:
        spec = importlib.util.spec_from_file_location("prune_llama", EXAMPLES / "prune_llama.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(EXAMPLES))
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Llama that has learnt which word comes next, its tokenizer, and a text."""
    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("llama")
    config = LlamaConfig(
        vocab_size=len(WORDS) + 1, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    ids = torch.randint(1, len(WORDS), (1, 1)) + torch.arange(16) * torch.randint(1, 4, (64, 1))
    ids = 1 + ids % len(WORDS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(60):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    model.save_pretrained(place)
    vocabulary = {"<s>": 0} | {word: 1 + number for number, word in enumerate(WORDS)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<s>"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<s>").save_pretrained(place)
    (place / "text.txt").write_text(" ".join(WORDS[number - 1] for number in ids.flatten().tolist()))
    return place


def call(script, folder, out, *more):
    script.main(
        [str(folder), str(out), "--text", str(folder / "text.txt"), "--length", "16", "--windows", "16",
         "--json", f"{out}.json", *more]
    )  # fmt: skip
    return json.loads(Path(f"{out}.json").read_text())


@pytest.mark.parametrize("importance", ["flap", "taylor"])
def test_a_share(script, folder, tmp_path, capsys, importance):
    found = call(script, folder, tmp_path / "slim", "--share", "0.6", "--importance", importance)
    assert found["pruned"]["params"] == found["recovered"]["params"] <= 0.6 * found["dense"]["params"]
    assert found["dense"]["perplexity"] < found["recovered"]["perplexity"] < found["pruned"]["perplexity"]
    again = LlamaForCausalLM.from_pretrained(tmp_path / "slim").eval()
    assert sum(p.numel() for p in again.parameters()) == found["recovered"]["params"]
    text = capsys.readouterr().out
    assert f"is loaded again: perplexity {found['recovered']['perplexity']:.2f}" in text
    assert (tmp_path / "slim" / "tokenizer.json").is_file()


def test_sizes_in_the_words_of_the_configuration(script, folder, tmp_path):
    found = call(
        script, folder, tmp_path / "slim", "--sizes", "intermediate_size=24", "num_hidden_layers=1", "--no-recover"
    )
    assert set(found) == {"dense", "pruned"}
    config = LlamaConfig.from_pretrained(tmp_path / "slim")
    assert (config.intermediate_size, config.num_hidden_layers, config.num_attention_heads) == (24, 1, 4)


def test_another_text_calibrates(script, folder, tmp_path):
    args = script.parsed([str(folder), "out", "--text", str(folder / "text.txt"), "--length", "16"])
    tokenizer = script.AutoTokenizer.from_pretrained(folder)
    first, second = script.texts(args, tokenizer)
    whole = script.windows(tokenizer, args.text.read_text(), 16)
    assert torch.equal(second, whole[32:])
    assert sorted(first.tolist()) == sorted(whole[:32].tolist())
    (tmp_path / "other.txt").write_text(" ".join(WORDS))
    args.calibration = tmp_path / "other.txt"
    first, second = script.texts(args, tokenizer)
    assert first.tolist() == [list(range(1, 17))]
    assert torch.equal(second, whole)


def test_perplexity_of_chance(script):
    config = LlamaConfig(vocab_size=7, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    model = LlamaForCausalLM(config).eval()
    torch.nn.init.zeros_(model.lm_head.weight)
    assert script.perplexity(model, torch.randint(7, (5, 9))) == pytest.approx(7)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--length", "4096"], "too short for windows of 4096 tokens"),
        (["--sizes", "intermediate_size"], "takes NAME=NUMBER, as intermediate_size=4096, not 'intermediate_size'"),
    ],
)
def test_what_is_refused(script, folder, tmp_path, more, message):
    with pytest.raises(SystemExit, match=message):
        call(script, folder, tmp_path / "slim", *more)
    with pytest.raises(SystemExit, match="exists already"):
        call(script, folder, tmp_path)


def test_lm_eval_is_asked_for_before_the_work(script, folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setattr(script, "run", lambda args: pytest.fail("it began to prune"))
    with pytest.raises(SystemExit, match=r"pip install 'lm-eval\[hf\]'"):
        call(script, folder, tmp_path / "slim", "--lm-eval", "arc_easy")


def test_lm_eval_gets_both_folders(script, folder, tmp_path, monkeypatch):
    asked = []

    def simple_evaluate(model, model_args, tasks, device):
        asked.append((model, model_args["pretrained"], tasks))
        return {"results": {"arc_easy": {"acc,none": 0.25, "alias": "arc_easy"}}}

    monkeypatch.setitem(sys.modules, "lm_eval", SimpleNamespace(simple_evaluate=simple_evaluate))
    found = call(script, folder, tmp_path / "slim", "--no-recover", "--lm-eval", "arc_easy")
    out = str(tmp_path / "slim")
    assert asked == [("hf", str(folder), ["arc_easy"]), ("hf", out, ["arc_easy"])]
    assert found["lm_eval"] == {name: {"arc_easy": {"acc,none": 0.25}} for name in (str(folder), out)}
