"""Biases alone take up what removed channels gave on average, as FLAP does; and `recover` does no worse with them."""

from __future__ import annotations

import pytest
import torch
from support.recovery_nets import GONE, TOKENS, conv_net, error, jittered, linear_net, removal
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import structprune
from structprune.errors import RecoveryError

# Of four samples none is held out.
FEW = torch.randn(4, 30, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_the_bias_takes_the_mean_of_what_went():
    model = linear_net(nn.Linear(8, 4))
    slim = removal(model, FEW, "0").apply(model)
    recovered = structprune.recover(slim, model, [FEW], weights=False)
    mean = model[1](model[0](FEW)).flatten(0, 1).mean(0)[GONE]
    expected = model[2].bias + model[2].weight[:, GONE] @ mean
    torch.testing.assert_close(recovered[2].bias, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(recovered[2].weight, slim[2].weight)
    assert torch.equal(recovered[0].weight, slim[0].weight)
    assert error(recovered, model, [FEW]) < error(slim, model, [FEW])


@pytest.mark.parametrize("weights", [False, True])
def test_a_channel_that_does_not_vary_is_made_up_for(weights):
    model = linear_net(nn.Linear(8, 4))
    with torch.no_grad():
        model[0].weight[GONE] = 0
        model[0].bias[GONE] = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)
    x = torch.randn(TOKENS, dtype=torch.float64)
    slim = removal(model, x, "0").apply(model)
    assert error(slim, model, [x]) > 1e-2
    assert error(structprune.recover(slim, model, [x], rounds=0, weights=weights), model, [x]) < 1e-5


def test_flap_removes_what_does_not_vary():
    model = linear_net(nn.Linear(8, 4))
    with torch.no_grad():
        model[0].weight[GONE] = 0
        model[0].bias[GONE] = 3.0
    x = torch.randn(TOKENS, dtype=torch.float64)
    slim = structprune.prune(model, x, importance="flap", data=[x], ratio=3 / 8, round_to=1)
    assert error(structprune.recover(slim, model, [x], weights=False), model, [x]) < 1e-5


def test_a_batch_norm_behind_takes_it():
    torch.manual_seed(0)  # with one draw of a hundred the mean of three samples is wrong for the fourth
    model = conv_net(nn.Sequential(nn.Conv2d(8, 4, 3, bias=False), nn.BatchNorm2d(4)))
    x = torch.randn(4, 3, 9, 8, dtype=torch.float64)
    slim = removal(model, x, "0").apply(model)
    recovered = structprune.recover(slim, model, [x], weights=False)
    lacks = (model(x) - slim(x)).mean((0, 2, 3))
    torch.testing.assert_close(recovered[-1][1].bias, slim[-1][1].bias + lacks, rtol=1e-3, atol=1e-4)
    assert torch.equal(recovered[-1][0].weight, slim[-1][0].weight)
    (row,) = structprune.recovery_report(recovered).layers
    assert row.changed
    assert row.after < row.before


def test_layers_without_a_bias_are_left():
    model = linear_net(nn.Linear(8, 4, bias=False))
    slim = removal(model, FEW, "0").apply(model)
    recovered = structprune.recover(slim, model, [FEW], weights=False)
    assert torch.equal(recovered[2].weight, slim[2].weight)
    report = structprune.recovery_report(recovered)
    assert report.layers == ()
    assert report.skipped == {"2": "it has no bias, and its weight is to stay"}


def test_recurrent_layers_are_left():
    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.head = nn.GRU(6, 8, batch_first=True), nn.Linear(8, 3)

        def forward(self, x):
            return self.head(self.rnn(x)[0])

    model = jittered(Tagger())
    slim = structprune.prune(model, FEW, ratio=0.25, round_to=1)
    recovered = structprune.recover(slim, model, [FEW], weights=False)
    assert structprune.recovery_report(recovered).skipped == {"rnn": "its weights are to stay"}
    assert torch.equal(recovered.rnn.weight_hh_l0, slim.rnn.weight_hh_l0)
    assert not torch.equal(recovered.head.bias, slim.head.bias)
    assert torch.equal(recovered.head.weight, slim.head.weight)


def test_a_llama_without_biases_is_loaded_with_some(tmp_path):
    """What `attention_bias` and `mlp_bias` of the configuration are for."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    first = LlamaForCausalLM(config).eval()
    first.save_pretrained(tmp_path / "dense")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "dense", attention_bias=True, mlp_bias=True).eval()
    ids = torch.randint(50, (8, 16))
    batch = {"input_ids": ids, "use_cache": False}
    assert torch.equal(model(ids).logits, first(ids).logits)
    slim = structprune.prune(model, batch, ratio=0.25, axes=("mlp", "heads"), importance="flap", data=[batch])
    recovered = structprune.recover(slim, model, [batch], weights=False)
    assert any(bool(p.any()) for name, p in recovered.named_parameters() if name.endswith("down_proj.bias"))
    recovered.save_pretrained(tmp_path / "slim")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "slim").eval()
    assert torch.equal(again(ids).logits, recovered(ids).logits)


def test_weights_is_yes_or_no():
    model = linear_net(nn.Linear(8, 4))
    with pytest.raises(RecoveryError, match="weights"):
        structprune.recover(model, model, [FEW], weights="none")
