"""Residual streams on their principal axes: the same function, axes in order, and refusals of what would not be."""

from __future__ import annotations

import pytest
import torch
from support.ranks import needs_distributed, on_two_ranks
from torch import nn

import structprune
from structprune.errors import PlanError, VerificationError
from structprune.surgery import rotation

WIDTH = 12


class RootMeanSquare(nn.Module):
    """As transformers writes it: powers, a mean, a gain."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class Divided(RootMeanSquare):
    """By a product with itself, a sum and a division."""

    def forward(self, x):
        return (x / ((x * x).sum(-1, keepdim=True) + 1e-6).sqrt()) * self.weight


def fused(width):
    norm = nn.RMSNorm(width)
    nn.init.uniform_(norm.weight, 0.5, 2)
    return norm


class Block(nn.Module):
    def __init__(self, norm, act=torch.relu, scale=1.0):
        super().__init__()
        self.norm, self.up, self.down = norm(WIDTH), nn.Linear(WIDTH, 20), nn.Linear(20, WIDTH)
        self.drop, self.scale = nn.Dropout(0.1), scale

    def forward(self, x):
        return x + self.drop(self.down(torch.relu(self.up(self.norm(x))))) * self.scale


class Model(nn.Module):
    """Embeddings, a table of positions, blocks, a last norm and layer."""

    def __init__(self, norm=fused, *blocks):
        super().__init__()
        self.tokens, self.places = nn.Embedding(30, WIDTH), nn.Parameter(torch.randn(7, WIDTH))
        self.blocks = nn.Sequential(*(blocks or (Block(norm), Block(norm, scale=0.5))))
        self.norm, self.head = norm(WIDTH), nn.Linear(WIDTH, 30)

    def forward(self, ids):
        return self.head(self.norm(self.blocks(self.tokens(ids) + self.places))[:, 1:])


IDS = torch.randint(30, (16, 7), generator=torch.Generator().manual_seed(0))


def built(*args):
    torch.manual_seed(0)
    return Model(*args).double().eval()


def distance(one, other, x=IDS):
    with torch.no_grad():
        return float((one(x) - other(x)).norm() / other(x).norm())


@pytest.mark.parametrize("norm", [fused, RootMeanSquare, Divided])
def test_the_same_function_on_other_axes(norm):
    model = built(norm)
    rotated = structprune.rotate_residual(model, IDS[:2], [IDS[:8], IDS[8:]])
    assert distance(rotated, model, IDS.flip(1)) < 1e-12
    assert not torch.allclose(rotated.head.weight, model.head.weight, atol=1e-2)
    for block in (*rotated.blocks, rotated):
        assert torch.equal(block.norm.weight, torch.ones(WIDTH, dtype=torch.float64))
    with torch.no_grad():
        seen = [rotated.tokens(IDS) + rotated.places]
        for block in rotated.blocks:
            seen.append(block(seen[-1]))
    rows = torch.cat([x.flatten(0, 1) for x in seen])
    rows = rows / rows.square().mean(1, keepdim=True).sqrt()
    moments = rows.T @ rows
    spread = moments.diagonal()
    assert torch.all(spread[:-1] >= spread[1:])
    torch.testing.assert_close(moments, torch.diag(spread), rtol=0, atol=1e-8 * float(spread[0]))


def test_less_is_lost_by_channels_of_the_rotated_stream():
    model = built()
    with torch.no_grad():  # a stream of 8 directions that no channel is alone in
        mixed = torch.linalg.qr(torch.randn(WIDTH, WIDTH, dtype=torch.float64)).Q[:, :8]
        model.tokens.weight.copy_(model.tokens.weight @ mixed @ mixed.T)
        model.places.copy_(model.places @ mixed @ mixed.T)
        for block in model.blocks:
            block.down.weight.copy_(mixed @ mixed.T @ block.down.weight)
            block.down.bias.copy_(mixed @ mixed.T @ block.down.bias)
    rotated = structprune.rotate_residual(model, IDS, [IDS])
    options = {"axes": ("hidden",), "ratio": 1 / 3, "round_to": 1, "importance": "activation_l2", "data": [IDS]}
    plain, turned = (structprune.prune(each, IDS, **options) for each in (model, rotated))
    assert turned.tokens.embedding_dim == 8
    assert structprune.kept(turned)["tokens.weight"][1] == tuple(range(8))
    # Norms run over 8 channels in place of 12, which is a factor alone.
    with torch.no_grad():
        for block in (*turned.blocks, turned):
            block.norm.weight.mul_((12 / 8) ** 0.5)
    assert distance(turned, model) < 1e-6 < 1e-2 < distance(plain, model)


def test_a_llama_is_loaded_as_before(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM  # not in the processes of ranks

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    for name, tensor in model.named_parameters():
        if "norm" in name:
            nn.init.uniform_(tensor, 0.5, 2)
    batch = {"input_ids": torch.randint(50, (4, 17)), "use_cache": False}
    rotated = structprune.rotate_residual(model, batch, [batch])
    with torch.no_grad():
        torch.testing.assert_close(rotated(**batch).logits, model(**batch).logits, rtol=1e-3, atol=1e-4)
    slim = structprune.prune(rotated, batch, axes=("hidden",), ratio=0.25, importance="activation_l2", data=[batch])
    slim.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert again.config.hidden_size == 24
    assert torch.equal(again(**batch).logits, slim(**batch).logits)


def test_half_precision():
    model = built().bfloat16()
    assert distance(structprune.rotate_residual(model, IDS, [IDS]), model) < 3e-2


def test_an_embedding_that_is_the_last_layer_too():
    model = built()
    model.head.bias = None
    model.head.weight = model.tokens.weight
    with pytest.raises(PlanError, match=r"'tokens.weight' writes it, and reads it behind the gain 'norm.weight'"):
        structprune.rotate_residual(model, IDS, [IDS])
    model.norm = nn.RMSNorm(WIDTH, elementwise_affine=False)
    assert distance(structprune.rotate_residual(model, IDS, [IDS]), model) < 1e-12


class Changed(nn.Module):
    def __init__(self, change):
        super().__init__()
        self.change, self.table = change, nn.Parameter(torch.rand(WIDTH))

    def forward(self, x):
        return self.change(self, x)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m, x: x + x.relu(), "relu in blocks.1 .* needs its channels one by one"),
        (lambda m, x: x * m.table, "squares its channels behind a gain|adds something else|normalises"),
        (lambda m, x: x + m.table.sin(), "sin in blocks.1 .* needs its channels one by one"),
        (lambda m, x: x + x.pow(3), "pow in blocks.1 .* another power than two"),
        (lambda m, x: x + 1.0, "add in blocks.1 .* adds something else to it"),
        (lambda m, x: x + x / m.table, "div in blocks.1 .* divides by it, or by what differs"),
        (lambda m, x: x * x.sum(1, keepdim=True), "sum in blocks.1 .* other than as squares"),
        (lambda m, x: torch.cat([x, m.table.expand(x.shape)], 1)[:, :7], "one by one|joins it with something else"),
    ],
)
def test_what_looks_at_single_channels_is_refused(change, message):
    model = built(fused, Block(fused), Changed(change), Block(fused))
    with pytest.raises(PlanError, match=rf"The residual stream of .* cannot be rotated: .*({message})"):
        structprune.rotate_residual(model, IDS, [IDS])


@pytest.mark.parametrize(
    "change",
    [
        lambda m, x: x + x.mean(-1, keepdim=True),
        lambda m, x: x + x[..., torch.arange(WIDTH - 1, -1, -1)],
        lambda m, x: x * x.square().mean((0, 2), keepdim=True),
        lambda m, x: x.softmax(-1) + x,
    ],
)
def test_streams_whose_channels_are_not_free_are_left(change):
    model = built(fused, Block(fused), Changed(change), Block(fused))
    with pytest.raises(PlanError, match=r"no residual stream that could be rotated|cannot be rotated"):
        structprune.rotate_residual(model, IDS, [IDS])


def test_layer_norms_and_outputs_are_refused():
    with pytest.raises(PlanError, match=r"layer_norm in blocks.0.norm .* needs its channels one by one"):
        structprune.rotate_residual(built(nn.LayerNorm), IDS, [IDS])
    with pytest.raises(PlanError, match="no residual stream"):
        structprune.rotate_residual(nn.Linear(3, 3), torch.randn(2, 3), [torch.randn(2, 3)])


def test_a_weight_that_reads_behind_two_norms_is_refused():
    model = built()
    model.blocks[1].up.weight = model.blocks[0].up.weight
    with pytest.raises(PlanError, match="also reads it behind another norm"):
        structprune.rotate_residual(model, IDS, [IDS])


def test_a_rotation_that_is_wrong_is_seen(monkeypatch):
    rotate = rotation._rotate

    def forgetting(model, stream, axes):
        rotate(model, stream, axes)
        with torch.no_grad():
            model.norm.weight.mul_(1.1)

    monkeypatch.setattr(rotation, "_rotate", forgetting)
    with pytest.raises(VerificationError, match="The rotated model differs by"):
        structprune.rotate_residual(built(), IDS, [IDS])


def test_the_model_stays_as_it_was():
    model = built().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rotated = structprune.rotate_residual(model, IDS, [IDS])
    assert model.training
    assert rotated.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def rotated_head(rank):
    """Of a model that sees half of the data on each of two ranks."""
    return structprune.rotate_residual(built(), IDS, [IDS[rank::2]]).head.weight.detach().abs()


@needs_distributed
def test_ranks_see_all_of_the_data(tmp_path):
    both = structprune.rotate_residual(built(), IDS, [IDS]).head.weight.detach().abs()  # axes have no sign
    for weight in on_two_ranks(rotated_head, tmp_path):
        torch.testing.assert_close(weight, both, rtol=1e-6, atol=1e-8)
