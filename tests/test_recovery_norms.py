"""Batch norms behind a layer that is solved: with new statistics it need not lose what it computed right."""

from __future__ import annotations

import itertools

import pytest
import torch
from support.recovery_nets import jittered, removal
from torch import nn

import structprune
from structprune.recovery.norms import NormsBehind
from structprune.tracing.replay import Replay
from structprune.tracing.state import held_tensors


def wide_net(norms=1, bias=False, samples=4096):
    """Layers of 96 features, and norms with the statistics of far more samples than the tests give."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        middle = [nn.Conv2d(96, 96, 1, bias=bias), *(nn.BatchNorm2d(96) for _ in range(norms)), nn.ReLU()]
        model = jittered(
            nn.Sequential(nn.Conv2d(12, 96, 1), nn.BatchNorm2d(96), nn.ReLU(), *middle, nn.Conv2d(96, 4, 1))
        )
        model.train()
        for norm in (module for module in model if isinstance(module, nn.BatchNorm2d)):
            norm.momentum = None
        with torch.no_grad():
            model(torch.randn(samples, 12, 1, 1, dtype=torch.float64))
    return model.eval()


def few(samples=32, channels=12):
    return torch.randn(samples, channels, 1, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def followed(model, given, x):
    """The norms behind the second layer of a model, followed on `x`; their statistics may be other than those given."""
    trace = structprune.DependencyGraph(model, x).trace
    nodes = [node for node in trace.nodes if node.meta["name"] == "batch_norm"][1:]
    behind = NormsBehind(nodes, {name: held.tensor for name, held in held_tensors(given).items()})

    def look(number):
        def hook(call):
            behind.observe(number, call)
            return call()

        return hook

    with torch.no_grad(), Replay(trace, {n.meta["index"]: look(n.meta["index"]) for n in nodes}).over(model):
        model(x)
    return behind


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("norms", [1, 2])
def test_the_change_gives_back_what_the_layer_was_with_the_statistics_as_given(norms, bias):
    given, x = wide_net(norms, bias), few()
    model = structprune.recalibrate(given, [x])
    behind = followed(model, given, x)
    layer, inputs = model[3], model[:3](x)
    matrix = layer.weight.detach().flatten(1).T[None]
    change = behind.back_to_given(matrix, None if layer.bias is None else layer.bias.detach())
    features = torch.cat([inputs, inputs.new_ones(len(inputs), 1, 1, 1)], 1).flatten(1)
    found = model[3 : 4 + norms](inputs).flatten(1) + features @ change[0]
    torch.testing.assert_close(found, given[3 : 4 + norms](inputs).flatten(1))
    assert not behind.refused
    assert behind.scale.shape == (96,)


def test_without_new_statistics_there_is_nothing_to_give_back():
    model, x = wide_net(), few()
    behind = followed(model, model, x)
    assert behind.scale is not None
    assert behind.back_to_given(torch.ones(1, 2, 96), None) is None


def error(model, original):
    x = torch.randn(512, original[0].in_channels, 1, 1, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    with torch.no_grad():
        return float((model(x) - original(x)).norm() / original(x).norm())


def shifted(add):
    """The same where all that is summed is positive: without some channels all sums are too small."""
    model, many = wide_net(), few(4096)
    with torch.no_grad():
        model[3].weight.add_(add)
        model[4].running_mean.copy_(model[:4](many).mean((0, 2, 3)))
        model[4].running_var.copy_(model[:4](many).var((0, 2, 3)))
    return model


def recovered_from(model, x):
    """A recovered model without a sixth of its channels, and the pruned one, which new statistics alone make better."""
    slim = structprune.prune(model, x, importance="l2", ratio={"0": 1 / 6}, round_to=1)
    recovered = structprune.recover(slim, model, [x], rounds=0)
    tried = {row.name: row.error for row in structprune.recovery_report(recovered).candidates}
    assert tried["layers solved"] < tried["norms recalibrated"] < tried["as given"]
    return recovered, slim


def test_norms_whose_input_is_as_it_was_keep_their_statistics():
    recovered, slim = recovered_from(shifted(0.2), few(64))
    assert torch.equal(recovered[1].running_mean, slim[1].running_mean)
    assert torch.equal(recovered[1].running_var, slim[1].running_var)
    assert not torch.equal(recovered[4].running_mean, slim[4].running_mean)


def twice_as_wide():
    """A network of which the second half of the first channels are doubles of the first half."""
    blocks = [[nn.Conv2d(a, b, 1), nn.BatchNorm2d(b), nn.ReLU()] for a, b in ((64, 32), (32, 96), (96, 96))]
    model = jittered(nn.Sequential(*itertools.chain(*blocks), nn.Conv2d(96, 4, 1)))
    with torch.no_grad():
        for tensor in (*model[0].parameters(), *model[1].parameters()):
            tensor[16:] = tensor[:16]
        for place in (1, 4, 7):
            inputs = model[:place](few(4096, 64))
            model[place].running_mean.copy_(inputs.mean((0, 2, 3)))
            model[place].running_var.copy_(inputs.var((0, 2, 3)))
    return model


def test_few_samples_do_not_cost_what_the_layers_knew(monkeypatch):
    """Half of the first channels are doubles, so the second layer can be solved exactly, and the third needs nothing.

    Before the second is solved, new statistics help the third; but 48 samples say too little of its 96 features to
    bring it back from there.
    """
    model, x = twice_as_wide(), few(48, 64)
    slim = removal(model, x, "0", range(16, 32)).apply(model)
    recovered = structprune.recover(slim, model, [x], rounds=0)
    tried = {row.name: row.error for row in structprune.recovery_report(recovered).candidates}
    assert tried["norms recalibrated"] < tried["as given"]
    assert error(recovered, model) < 2e-3
    monkeypatch.setattr(NormsBehind, "back_to_given", lambda *_: None)
    assert error(structprune.recover(slim, model, [x], rounds=0), model) > 0.02
