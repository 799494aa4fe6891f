"""Models that lose branches: copies, files, optimizers, compilers, language models; and which branches go."""

from __future__ import annotations

import copy
import io
from pathlib import Path

import pytest
import torch
from support.branch_nets import CHOSEN, Scaled, build, stack_of, x_of
from support.depth import error_without
from torch import nn

import structprune
from structprune.errors import PlanError

# -- around the model --------------------------------------------------------------------------------------------------


def test_in_place_is_the_same_and_keeps_the_parameters():
    model, x = build(), x_of()
    copied, kept = structprune.remove_branches(model, x, CHOSEN), model[3].layer.weight
    assert structprune.remove_branches(model, x, CHOSEN, inplace=True) is model
    assert torch.equal(model(x), copied(x))
    assert model[2].layer.weight is kept


def test_copies_pickles_and_saves_are_the_same_model(tmp_path: Path):
    x = x_of()
    slim = structprune.remove_branches(build(), x, CHOSEN)
    slim = structprune.prune(slim, x, ratio=0.5, round_to=1)
    slim = structprune.remove_branches(slim, x, ["2"])
    file = io.BytesIO()
    torch.save(slim, file)
    file.seek(0)
    loaded = structprune.load(build, structprune.save(slim, tmp_path))
    for again in (copy.deepcopy(slim), torch.load(file, weights_only=False), loaded):
        assert torch.equal(again(x), slim(x))
        assert again.state_dict().keys() == slim.state_dict().keys()


def test_a_model_is_pruned_before_and_afterwards_and_knows_what_is_kept():
    model, x = build(), x_of()
    thin = structprune.prune(model, x, ratio=0.5, round_to=1)
    slim, error = error_without(thin, x, ["1"])
    assert error < 1e-12
    assert structprune.kept(slim)["2.layer.weight" if "2.layer.weight" in structprune.kept(slim) else "0.weight"]
    again = structprune.prune(slim, x, ratio=0.34, round_to=1)
    assert again(x).shape == model(x).shape


def test_an_optimizer_goes_on_with_what_is_left():
    model, x = build(), x_of()
    optimizer = torch.optim.Adam(model.named_parameters())
    model(x).sum().backward()
    optimizer.step()
    momentum = optimizer.state[model[3].layer.weight]["exp_avg"]
    slim = structprune.remove_branches(model, x, CHOSEN)
    structprune.remap_optimizer(optimizer, structprune.Removal.of(slim), model, slim)
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in slim.parameters()}
    assert optimizer.state[slim[2].layer.weight]["exp_avg"] is momentum
    assert set(optimizer.param_groups[0]["param_names"]) == {name for name, _ in slim.named_parameters()}


def test_the_result_compiles_and_exports(tmp_path: Path):
    x = x_of().float()
    slim = structprune.remove_branches(build().float(), x, CHOSEN)
    compiled = torch.compile(slim, backend="eager")
    assert torch.equal(compiled(x), slim(x))
    assert torch.allclose(torch.export.export(slim, (x,)).module()(x), slim(x))
    pytest.importorskip("onnxruntime")
    assert structprune.export_onnx(slim, tmp_path / "slim.onnx", x).path.exists()


def test_the_model_given_is_left_as_it_was():
    model, x = build().train(), x_of()
    before, state = model(x * 0), copy.deepcopy(model.state_dict())
    random = torch.random.get_rng_state()
    structprune.remove_branches(model, x, CHOSEN)
    assert torch.equal(random, torch.random.get_rng_state())
    assert model.training
    assert before.shape == model(x * 0).shape
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


# -- language models ---------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:::transformers")
def test_a_language_model_without_layers_is_saved_loaded_and_generates(tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=99, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, pad_token_id=0, bos_token_id=1, eos_token_id=2, layer_types=[
            "full_attention", "sliding_attention", "full_attention", "sliding_attention",
        ], use_sliding_window=True, sliding_window=4,
    )  # fmt: skip
    model = transformers.Qwen2ForCausalLM(config).eval()
    ids = torch.randint(3, 99, (2, 9))
    slim, error = error_without(model, {"input_ids": ids}, ["model.layers.0", "model.layers.2"])
    assert error < 1e-6
    assert slim.config.num_hidden_layers == 2
    assert slim.config.layer_types == ["sliding_attention", "sliding_attention"]
    assert [layer.self_attn.layer_idx for layer in slim.model.layers] == [0, 1]
    assert model.config.num_hidden_layers == 4
    slim.save_pretrained(tmp_path)
    again = transformers.Qwen2ForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(again(input_ids=ids).logits, slim(input_ids=ids).logits)
    wanted = slim.generate(ids, max_new_tokens=6, do_sample=False, use_cache=False)
    assert torch.equal(slim.generate(ids, max_new_tokens=6, do_sample=False), wanted)
    # Attention alone: no configuration says it, so that a save of ours carries it.
    branch = next(b.name for b in structprune.branches(model, {"input_ids": ids}) if "layers.3 (input" in b.name)
    slim, error = error_without(model, {"input_ids": ids}, ["model.layers.1", branch])
    assert error < 1e-6
    assert "structprune.save" in structprune.Removal.of(slim).settings["config"]
    loaded = structprune.load(lambda: transformers.Qwen2ForCausalLM(config).eval(), structprune.save(slim, tmp_path))
    wanted = slim.generate(ids, max_new_tokens=6, do_sample=False, use_cache=False)
    assert torch.equal(loaded.generate(ids, max_new_tokens=6, do_sample=False), wanted)


# -- choice ------------------------------------------------------------------------------------------------------------


def graded() -> nn.Module:
    """Blocks whose branches matter more or less."""
    model = stack_of(*(Scaled(torch.add) for _ in range(4)))
    for number, gain in enumerate((1.0, 0.001, 0.5, 0.01), 1):
        model[number].gain.data.fill_(gain)
    return model


@pytest.mark.parametrize("score", ["influence", "kl", "loss"])
@pytest.mark.parametrize("greedy", [False, True])
def test_the_branches_that_matter_least_are_chosen(score, greedy):
    model, x = graded(), x_of(16, 6)
    wanted = model(x).detach()
    options = {"score": score, "greedy": greedy, "loss": lambda model, x: (model(x) - wanted).pow(2).mean()}
    assert structprune.choose_branches(model, x, [x], count=2, **options) == ("2", "4")
    total = sum(p.numel() for p in model.parameters())
    chosen = structprune.choose_branches(model, x, [x], target={"params": 0.7}, **options)
    left = sum(p.numel() for p in structprune.remove_branches(model, x, chosen).parameters())
    assert 0.4 * total < left <= 0.7 * total


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "one of them"),
        ({"count": 1, "target": {"params": 0.5}}, "one of them"),
        ({"count": 0}, "at least 1"),
        ({"target": {"latency": 0.5}}, "target is"),
        ({"target": {"params": -1}}, "give a fraction of what there is"),
        ({"count": 1, "score": "size"}, "score is 'size'"),
        ({"count": 1, "kind": "heads"}, "kind is 'heads'"),
        ({"count": 9}, "no more than 4"),
        ({"target": {"macs": 0.01}}, "which leaves"),
    ],
)
def test_a_choice_that_cannot_be_made_is_refused(options, message):
    with pytest.raises(PlanError, match=message):
        structprune.choose_branches(graded(), x_of(), [x_of()], **options)


class _Pooled(nn.Module):
    """Gives the size of its map beside it, as a plain number."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(8, 8, 3, stride=2, padding=1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, int]:
        y = self.conv(x)
        return y.relu(), y.shape[2]


class _Sized(nn.Module):
    """Uses the number that a child computed from a tensor which is the child's alone."""

    def __init__(self):
        super().__init__()
        self.pool, self.norm = _Pooled(), nn.BatchNorm1d(8)
        self.weight = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, int]:
        y, length = self.pool(x)
        flat = y.transpose(1, 2).reshape(-1, length, 8)
        return self.norm((flat + flat @ self.weight).transpose(1, 2)), length


class _Sizes(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = _Sized(), _Sized()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, _ = self.first(x)
        z, length = self.second(y)
        return z.reshape(-1, 8 * length)


def test_a_size_that_a_child_gives_as_a_number_serves_a_rewritten_forward():
    torch.manual_seed(0)
    model, x = _Sizes().double().eval(), torch.randn(2, 8, 16, dtype=torch.float64)
    names = [branch.name for branch in structprune.branches(model, x)]
    assert names, "each _Sized has a branch"
    for name in names:
        slim, error = error_without(model, x, [name])
        assert error < 1e-12
        assert slim(torch.randn(3, 8, 24, dtype=torch.float64)).shape == (3, 8 * 6)
