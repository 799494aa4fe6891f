"""Masks are put on and taken off bit for bit; what does not fit is refused and nothing changes."""

from __future__ import annotations

import re

import pytest
import torch
from support.saliency_nets import DATA, X, loss, net, of
from torch import nn
from torch.nn.utils import prune

from structprune import masks
from structprune.errors import PlanError
from structprune.importance import OBD
from structprune.masks import Mask, Saliency


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    return model


@pytest.mark.parametrize("build", [lambda: net().float(), tied, lambda: nn.LSTM(4, 6)], ids=["net", "tied", "lstm"])
def test_attached_and_taken_off_bit_for_bit(build):
    model = build()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    modules = [(list(m._parameters), list(m._buffers), len(m._forward_pre_hooks)) for m in model.modules()]
    mask = Saliency.magnitude(model).mask(0.5)
    undo = mask.attach(model)
    assert masks.sparsity(model).zeros == mask.entries - mask.kept
    assert all(buffer.dtype == torch.bool for name, buffer in model.named_buffers() if name.endswith("_mask"))
    undo()
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(before[n].view(torch.int32), after[n].view(torch.int32)) for n in before)
    assert all(p is parameters[name] for name, p in model.named_parameters(remove_duplicate=False))
    assert [(list(m._parameters), list(m._buffers), len(m._forward_pre_hooks)) for m in model.modules()] == modules
    assert all(not name.endswith(("_mask", "_orig")) for m in model.modules() for name in vars(m))


def test_attached_masks_hold_while_it_is_trained_and_are_cut_out():
    model = net()
    mask = Saliency.magnitude(model, ["0.weight"]).mask(0.5, dim=0)
    mask.attach(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        loss(model, X).backward()
        optimizer.step()
    assert bool((model(X) == masks.remove(model)(X)).all())
    assert bool((model[0].weight[~mask["0.weight"]] == 0).all())
    slim = masks.compact(model, X[:1])
    assert slim[0].out_channels == 6  # the grouped convolution keeps as many channels of each group
    assert torch.allclose(slim(X), model(X), rtol=1e-10)


def state(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [(name, tensor.clone()) for name, tensor in model.state_dict().items()]


def masked() -> nn.Module:
    model = net()
    prune.l1_unstructured(model[0], "weight", 0.5)
    return model


BAD_MASKS = [
    (net, {"4.bias": torch.ones(4).bool(), "9.weight": torch.ones(2).bool()}, "no parameter '9.weight'"),
    (net, {"4.bias": torch.zeros(4).bool(), "0.bias": torch.zeros(2).bool()}, "The mask of '0.bias' has the shape [2]"),
    (
        masked,
        {"4.bias": torch.zeros(4).bool(), "0.weight": torch.zeros(8, 4, 3, 3).bool()},
        "'0.weight' is masked already",
    ),
]


@pytest.mark.parametrize(("build", "bad", "message"), BAD_MASKS)
@pytest.mark.parametrize("how", ["apply", "attach"])
def test_a_mask_that_does_not_fit_changes_nothing(build, bad, message, how):
    model = build()
    before = state(model)
    with pytest.raises(PlanError, match=re.escape(message)):
        getattr(Mask(bad), how)(model)
    after = state(model)
    assert [name for name, _ in before] == [name for name, _ in after]
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(before, after, strict=True))


SCORES = Saliency({"w": torch.rand(4, 6)})


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda: SCORES.mask(0.5, dim=2), "'w' has no dimension 2"),
        (lambda: SCORES.mask(5, dim=0), "amount=5 is out of range for 'w'"),
        (lambda: SCORES.mask(7, "output"), "amount=7 is out of range for 'w'"),
        (lambda: SCORES.mask(0.5, "output", dim=0), "scope='output' is for single entries"),
        (lambda: SCORES.mask(0.5, dim=0, n=0), "order of a norm"),
        (lambda: SCORES.mask(0.5, default_mask=Mask({"v": torch.ones(2).bool()})), "'w' is in one of the two Mask and"),
        (lambda: SCORES.n_of_m(2, 4), "'w' of shape [4, 6] has no blocks of 4"),
        (lambda: SCORES.n_of_m(3, 3), "3:3 is no pattern for 'w'"),
        (lambda: SCORES.above({"v": 1.0}), "no threshold for 'w'"),
        (lambda: SCORES.above(float("nan")), "The threshold of 'w' is NaN"),
        (lambda: SCORES.only(["v"]), "no tensor 'v'"),
        (lambda: SCORES.ranks("world"), "no scope 'world'"),
        (lambda: masks.standard_deviations(net(), -1.0), "The quality of '0.weight' is -1.0"),
        (lambda: masks.standard_deviations(net(), 1.0, "output"), "no scope 'output'"),
        (lambda: masks.standard_deviations(net(), {"9.weight": 1.0}), "no parameter '9.weight'"),
        (lambda: of(net(), "apoz"), "APoZ scores channels"),
        (lambda: of(net(), OBD(variables="gates")), "OBD of gates scores channels"),
        (lambda: of(net(), "wanda", names=["0.bias"]), "Wanda has no scores for '0.bias'"),
        (lambda: of(net(), "wanda", names=["9.weight"]), "no parameter '9.weight'"),
        (lambda: Saliency.of(net(), X, "wanda"), "data"),
        (lambda: Saliency.of(net(), X, "snip", data=DATA), "loss"),
        (lambda: masks.semi_structured(masked()), "'0.weight' is still masked"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_by_name(bad, message):
    with pytest.raises(PlanError, match=re.escape(message)):
        bad()
