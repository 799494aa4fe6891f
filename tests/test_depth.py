"""Branches and blocks: found by their sums, taken out exactly, refused where they cannot go."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from support.depth import error_without
from torch import Tensor, nn

import structprune
from structprune.depth import steps
from structprune.errors import PlanError


class Residual(nn.Module):
    """``combine(x, f(x))``."""

    def __init__(self, combine: Callable[[Tensor, Tensor], Tensor], width: int = 6) -> None:
        super().__init__()
        self.norm, self.layer = nn.LayerNorm(width), nn.Linear(width, width)
        self.gain = nn.Parameter(torch.rand(width))
        self.combine = combine

    def forward(self, x: Tensor) -> Tensor:
        return self.combine(x, self.layer(self.norm(x)))


class Scaled(Residual):
    def forward(self, x: Tensor) -> Tensor:
        return x + F.dropout(self.gain * self.layer(self.norm(x)), 0.5, self.training)


class Parallel(nn.Module):
    """Attention-like and MLP-like branches of the same input, summed first."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + (self.left(x) + self.right(x).tanh())


class Convolved(nn.Module):
    """A residual block with the ReLU behind the sum, as in ResNets."""

    def __init__(self, channels: int = 4, stride: int = 1) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(channels, channels, 3, stride, 1), nn.BatchNorm2d(channels)
        self.shortcut = nn.Conv2d(channels, channels, 1, stride) if stride > 1 else None
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn(self.conv(x))
        out += x if self.shortcut is None else self.shortcut(x)
        return self.relu(out)


class Looped(nn.Module):
    """Layers in a list that the forward goes through, each of which knows its number."""

    def __init__(self, by_number: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Scaled(lambda x, f: x) for _ in range(3))
        for number, layer in enumerate(self.layers):
            layer.number = number
        self.by_number = by_number

    def forward(self, x: Tensor) -> Tensor:
        for i in range(3) if self.by_number else ():
            x = self.layers[i](x)
        for layer in () if self.by_number else self.layers:
            x = layer(x)
        return x


def stack_of(*blocks: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), *blocks, nn.Linear(6, 3)).double().eval()


def x_of(*shape: int) -> Tensor:
    return torch.randn(*(shape or (2, 6)), dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def names(model: nn.Module, inputs: Tensor) -> list[str]:
    return [branch.name for branch in structprune.branches(model, inputs)]


SUMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "x + f": lambda x, f: x + f,
    "f + x": lambda x, f: f + x,
    "add": lambda x, f: torch.add(x, f, alpha=2),
    "add_": lambda x, f: f.add_(x),
    "iadd": lambda x, f: x.clone().add_(f),
    "x - f": lambda x, f: x - f,
    "stack": lambda x, f: torch.stack([x, f]).sum(0),
    "sum": lambda x, f: sum([x, f]),
    "three": lambda x, f: x + f + x.tanh(),
    "gain on x": lambda x, f: 0.5 * x + f,
    "to": lambda x, f: x.to(torch.float64) + f,
}


@pytest.mark.parametrize("combine", SUMS.values(), ids=SUMS)
def test_a_term_of_a_sum_is_found_and_removed_exactly(combine):
    model, x = stack_of(Residual(combine), Residual(combine)), x_of()
    found = structprune.branches(model, x)
    assert len(found) == 2
    assert all(set(branch.layers) == {f"{i}.norm", f"{i}.layer"} for i, branch in zip((1, 2), found, strict=True))
    slim, error = error_without(model, x, [found[0].name])
    assert error < 1e-12
    left = sum(p.numel() for p in slim.parameters())
    assert left <= sum(p.numel() for p in model.parameters()) - found[0].params
    assert found[0].params == 6 * 6 + 6 + 2 * 6


def test_a_branch_scaled_by_a_gain_takes_it_along_and_leaves_its_stack():
    model, x = stack_of(Scaled(torch.add), Scaled(torch.add)), x_of()
    first = structprune.branches(model, x)[0]
    assert (first.name, first.identity, "1.gain" in first.tensors) == ("1", True, True)
    slim, error = error_without(model, x, ["1"])
    assert error < 1e-12
    assert len(slim) == 3
    assert torch.equal(slim[1].gain, model[2].gain)


def test_branches_of_one_input_go_alone_or_together():
    model, x = stack_of(Parallel()), x_of()
    assert names(model, x) == ["1 (left)", "1 (right)", "1"]
    for chosen in (["1 (left)"], ["1 (right)"], ["1 (left)", "1 (right)"], ["1"]):
        slim, error = error_without(model, x, chosen)
        assert error < 1e-12
    assert len(slim) == 2


def test_the_relu_behind_a_sum_goes_where_its_input_is_one_already():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.MaxPool2d(2), Convolved(), Convolved()).double().eval()
    x = x_of(2, 3, 8, 8)
    assert [(b.name, b.identity) for b in structprune.branches(model, x)] == [("3", True), ("4", True)]
    slim, error = error_without(model, x, ["3", "4"])
    assert error == 0
    assert len(slim) == 3


def test_the_relu_stays_where_its_input_is_none():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(3, 4, 1), Convolved()).double().eval(), x_of(2, 3, 8, 8)
    (branch,) = structprune.branches(model, x)
    assert (branch.name, branch.identity) == ("1 (conv ... bn)", False)
    slim, error = error_without(model, x, [branch.name])
    assert error < 1e-12
    assert isinstance(slim[1], Convolved)
    assert slim[1].conv is None


def test_either_side_of_a_block_that_strides_may_go_but_not_both():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(3, 4, 1), Convolved(stride=2)).double().eval(), x_of(2, 3, 8, 8)
    assert names(model, x) == ["1 (conv ... bn)", "1 (shortcut)"]
    for name in names(model, x):
        assert error_without(model, x, [name])[1] < 1e-12
    with pytest.raises(PlanError, match=r"nothing is left|Nothing would be left"):
        structprune.remove_branches(model, x, names(model, x))


def test_what_else_reads_inside_a_branch_stays():
    class Tapped(Residual):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            inner = self.norm(x)
            return x + self.layer(inner), inner

    torch.manual_seed(0)
    model, x = Tapped(torch.add).double().eval(), x_of()
    (branch,) = structprune.branches(model, x)
    assert branch.layers == ("layer",)
    slim, error = error_without(model, x, [branch.name])
    assert error < 1e-12
    assert slim.norm is not None
    assert slim.layer is None


def test_a_list_that_is_looped_over_gets_shorter_and_its_items_know_their_numbers():
    torch.manual_seed(0)
    model, x = Looped().double().eval(), x_of()
    slim, error = error_without(model, x, ["layers.1"])
    assert error < 1e-12
    assert [layer.number for layer in slim.layers] == [0, 1]
    assert [layer.number for layer in model.layers] == [0, 1, 2]
    assert sorted(slim.state_dict()) == sorted(n for n in model.state_dict() if not n.startswith("layers.2"))


def test_an_item_of_a_list_that_is_indexed_gives_back_what_it_gets():
    torch.manual_seed(0)
    model, x = Looped(by_number=True).double().eval(), x_of()
    slim, error = error_without(model, x, ["layers.1"])
    assert error < 1e-12
    assert len(slim.layers) == 3
    assert not list(slim.layers[1].parameters())
    assert [layer.number for layer in slim.layers] == [0, 1, 2]


def test_a_forward_with_a_flag_stays_as_it_is_written():
    class Flagged(Residual):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            inner = x + self.layer(self.norm(x))
            inner = inner * self.gain
            return inner if mask is None else inner * mask

    torch.manual_seed(0)
    model, x = Flagged(torch.add).double().eval(), x_of()
    slim, error = error_without(model, x, names(model, x))
    assert error < 1e-12
    assert torch.equal(slim(x, torch.zeros_like(x)), torch.zeros_like(x))
    assert sum(p.numel() for p in slim.parameters()) == 6


def test_a_forward_that_differs_in_training_stays_as_it_is_written():
    class Noisy(Residual):
        def forward(self, x: Tensor) -> Tensor:
            x = x + self.layer(self.norm(x))
            return x * 2 if self.training else x.tanh()

    torch.manual_seed(0)
    model, x = Noisy(torch.add).double().eval(), x_of()
    slim, error = error_without(model, x, names(model, x))
    assert error < 1e-12
    assert torch.equal(slim.train()(x), x * 2)


def test_a_sum_in_place_is_rewritten_where_the_model_cannot_run_in_training_without_labels():
    class Labelled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.head = Convolved(stride=2), nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                raise ValueError("labels are needed")
            return self.head(self.block(x))

    torch.manual_seed(0)
    model, x = Labelled().double().eval(), x_of(2, 4, 8, 8)
    slim, error = error_without(model, x, ["block (conv ... bn)"])
    assert error < 1e-12
    assert slim.block.conv is None
    # The block by itself can be trained.
    assert slim.block.train()(x).shape == (2, 4, 4, 4)


class Shared(nn.Module):
    """One block, run twice, and its weight once more."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Scaled(torch.add)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.block(self.block(x)), self.block.layer.weight)


def test_a_module_that_is_called_twice_loses_its_branch_in_both_and_keeps_what_lives():
    torch.manual_seed(0)
    model, x = Shared().double().eval(), x_of()
    (branch,) = structprune.branches(model, x)
    assert "block.layer.weight" not in branch.tensors
    slim, error = error_without(model, x, [branch.name])
    assert error < 1e-12
    assert sorted(slim.state_dict()) == ["block.layer.weight"]


def test_a_tied_weight_lives_on_under_its_other_name():
    torch.manual_seed(0)
    model, x = stack_of(Scaled(torch.add), Scaled(torch.add)), x_of()
    model[2].layer.weight = model[1].layer.weight
    slim, error = error_without(model, x, ["1"])
    assert error < 1e-12
    assert torch.equal(slim[1].layer.weight, model[1].layer.weight)


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_a_plain_network_has_no_branches():
    model, x = stack_of(nn.ReLU()), x_of()
    assert structprune.branches(model, x) == ()
    with pytest.raises(PlanError, match=r"no branch 'anything'.*It has none"):
        structprune.remove_branches(model, x, ["anything"])


def test_an_unknown_name_is_answered_with_those_that_are_there():
    with pytest.raises(PlanError, match=r"no branch '9'.*It has '1'"):
        structprune.remove_branches(stack_of(Scaled(torch.add)), x_of(), ["9"])


def test_a_hand_written_norm_and_an_embedding_are_no_branches():
    class Summed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.places = nn.Embedding(9, 6), nn.Embedding(5, 6)
            self.scale = nn.Parameter(torch.rand(6))

        def forward(self, ids: Tensor) -> Tensor:
            x = self.words(ids) + self.places(torch.arange(ids.shape[1]))
            return (x - x.mean(-1, keepdim=True)) * self.scale + self.scale

    assert structprune.branches(Summed().eval(), torch.randint(0, 9, (2, 5))) == ()


def test_memory_that_is_written_to_and_still_read_is_refused():
    class Written(Residual):
        def forward(self, x: Tensor) -> Tensor:
            x = x * 2
            y = x + self.layer(self.norm(x))
            y.mul_(self.gain)
            return y + x

    torch.manual_seed(0)
    model, x = Written(torch.add).double().eval(), x_of()
    name = next(b.name for b in structprune.branches(model, x) if "layer" in b.name)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(PlanError, match="write into a tensor"):
        structprune.remove_branches(model, x, [name], inplace=True)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert type(model) is Written


def test_a_branch_whose_size_others_use_is_refused_and_nothing_changes():
    class Measured(Residual):
        def forward(self, x: Tensor) -> Tensor:
            inner = self.layer(self.norm(x))
            flat = inner.flatten()
            return (x + inner).reshape(flat.shape[0] // 6, 6)

    torch.manual_seed(0)
    model, x = Measured(torch.add).double().eval(), x_of()
    (branch,) = structprune.branches(model, x)
    slim = None
    try:
        slim = structprune.remove_branches(model, x, [branch], inplace=True)
    except PlanError:
        assert type(model) is Measured
        assert model.layer is not None
    if slim is not None:
        assert torch.allclose(slim(x), x.reshape(2, 6))


def test_a_removal_that_does_not_do_what_was_meant_is_taken_back(monkeypatch: pytest.MonkeyPatch):
    model, x = build(), x_of()
    wanted, parts = model(x), [*model]

    def too_little(model, steps, undo):
        return {}

    monkeypatch.setattr("structprune.depth.removal.carry_out", too_little)
    with pytest.raises(PlanError, match=r"it (still )?runs"):
        structprune.remove_branches(model, x, ["1"], inplace=True)

    def too_much(model, steps, undo):
        moved = carry_out(model, steps, undo)
        del model._modules["1"]
        return moved

    carry_out = steps.carry_out
    monkeypatch.setattr("structprune.depth.removal.carry_out", too_much)
    with pytest.raises(PlanError, match=r"it (lacks|runs)"):
        structprune.remove_branches(model, x, ["1"], inplace=True)
    assert [*model] == parts
    assert torch.equal(model(x), wanted)


def test_wrappers_stay_around_the_model():
    model, x = nn.DataParallel(build()), x_of()
    slim = structprune.remove_branches(model, x, CHOSEN)
    assert isinstance(slim, nn.DataParallel)
    assert torch.equal(slim.module(x), structprune.remove_branches(model.module, x, CHOSEN)(x))


def test_a_rewritten_forward_refuses_flags_that_it_was_not_made_for():
    class Choosing(Convolved):
        def forward(self, x: Tensor, twice: bool = False) -> Tensor:
            out = self.bn(self.conv(x))
            out += self.shortcut(x)
            return out * 2 if twice else out

    torch.manual_seed(0)
    model, x = nn.Sequential(Choosing(3, 2)).double().eval(), x_of(2, 3, 8, 8)
    slim, error = error_without(model, x, ["0 (conv ... bn)"])
    assert error < 1e-12
    with pytest.raises(structprune.errors.TraceError, match="argument twice of 0 is True"):
        slim[0](x, twice=True)


# -- around the model --------------------------------------------------------------------------------------------------


def build() -> nn.Module:
    return stack_of(Scaled(torch.add), Parallel(), Scaled(torch.add))


CHOSEN = ["1", "2 (left)"]


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
