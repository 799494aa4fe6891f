"""`Saliency` and `Mask` as plain values."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from structprune.errors import LoadError, PlanError
from structprune.masks import Mask, Saliency


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))


A = Saliency({"w": torch.tensor([1.0, 4.0, 2.0, 2.0])})
B = Saliency({"w": torch.tensor([3.0, 0.5, 2.0, 1.0])})
KEPT = Mask({"w": torch.tensor([True, True, False, False])})
OTHER = Mask({"w": torch.tensor([True, False, True, False])})


@pytest.mark.parametrize("amount", [0.25, 7, 0.0, 1.0])
def test_global_magnitude_is_that_of_torch(amount):
    model = net()
    mask = Saliency.magnitude(model).mask(amount)
    pairs = [(model[0], "weight"), (model[2], "weight")]
    prune.global_unstructured(pairs, pruning_method=prune.L1Unstructured, amount=amount)
    assert all(torch.equal(mask[f"{i}.weight"], model[i].weight_mask.bool()) for i in (0, 2))


@pytest.mark.parametrize(("scope", "gone"), [("tensor", [2, 2, 2]), ("layer", [4, 0, 2])])
def test_amounts_by_tensor_and_by_layer(scope, gone):
    scores = Saliency({"a.weight": torch.rand(4), "a.bias": torch.rand(4) + 1, "b.weight": torch.rand(4)})
    mask = scores.mask(0.5, scope)
    assert [int((~mask[name]).sum()) for name in ("a.weight", "a.bias", "b.weight")] == gone


def test_of_equal_scores_the_later_go():
    assert A.mask(2)["w"].tolist() == [False, True, True, False]


def test_gradient_times_weight():
    model = net()
    model(torch.ones(2, 4)).sum().backward()
    scores = Saliency.gradient_times_weight(model, ["2.weight"])
    assert torch.equal(scores["2.weight"], (model[2].weight * model[2].weight.grad).abs())


def test_scores_are_combined_entry_by_entry():
    assert (A + B)["w"].tolist() == [4.0, 4.5, 4.0, 3.0]
    assert (A * B)["w"].tolist() == [3.0, 2.0, 4.0, 2.0]
    assert (A * 2)["w"].tolist() == [2.0, 8.0, 4.0, 4.0]
    assert A.min(B)["w"].tolist() == [1.0, 0.5, 2.0, 1.0]
    assert A.max(B)["w"].tolist() == [3.0, 4.0, 2.0, 2.0]


def test_masks_are_compared_and_combined():
    assert KEPT.overlap(OTHER) == 1 / 3
    assert KEPT.hamming(OTHER) == 2
    assert (KEPT & OTHER)["w"].tolist() == [True, False, False, False]
    assert (KEPT | OTHER).kept == 3
    assert (~KEPT)["w"].tolist() == [False, False, True, True]


def test_values_do_not_change():
    given = torch.tensor([1.0, 2.0])
    scores = Saliency({"w": given})
    given[0] = 9.0
    scores["w"][1] = 9.0
    assert scores["w"].tolist() == [1.0, 2.0]
    with pytest.raises(TypeError):
        scores["w"] = given


def test_applied_and_undone_bit_for_bit():
    model = net()
    with torch.no_grad():
        model[0].weight[0, 0] = -0.0
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    undo = Saliency.magnitude(model).mask(0.5).apply(model)
    assert int((model[0].weight == 0).sum() + (model[2].weight == 0).sum()) == 21
    undo()
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(before[n].view(torch.int32), after[n].view(torch.int32)) for n in before)


def test_saved_packed_and_loaded(tmp_path):
    mask = Mask({"w": torch.rand(100, 80) > 0.5, "scalar": torch.tensor(True), "empty": torch.zeros(0, 3).bool()})
    path = tmp_path / "mask.safetensors"
    mask.save(path)
    assert path.stat().st_size < 100 * 80 / 8 + 1000
    loaded = Mask.load(path)
    assert set(loaded) == set(mask)
    assert all(torch.equal(loaded[name], mask[name]) for name in mask)


def test_other_files_are_refused(tmp_path):
    from safetensors.torch import save_file

    (tmp_path / "text").write_text("no tensors")
    save_file({"w": torch.zeros(2)}, tmp_path / "weights")
    for name in ("text", "weights", "missing"):
        with pytest.raises(LoadError, match=name):
            Mask.load(tmp_path / name)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda: Saliency({"w": torch.tensor([1.0, float("nan")])}), "The saliency of 'w' holds NaN"),
        (lambda: Saliency({"w": torch.tensor([1])}), "'w' is of torch.int64"),
        (lambda: Mask({"w": torch.ones(2)}), "The mask of 'w' is of torch.float32"),
        (lambda: A.mask(1.5), "amount=1.5 is out of range for 'w'"),
        (lambda: A.mask(-1), "amount=-1 is out of range for 'w'"),
        (lambda: A.mask(5), "amount=5 is out of range for 'w'"),
        (lambda: A.mask(float("nan")), "amount=nan is out of range for 'w'"),
        (lambda: A.mask(0.5, "world"), "no scope 'world'"),
        (lambda: A + Saliency({"v": torch.ones(4)}), "'w' is in one of the two"),
        (lambda: A + Saliency({"w": torch.ones(3)}), "'w' has the shapes [4] and [3]"),
        (lambda: Saliency.magnitude(net(), ["9.weight"]), "no parameter '9.weight'"),
        (lambda: Saliency.gradient_times_weight(net()), "'0.weight' has no gradient"),
        (lambda: KEPT.apply(net()), "no parameter 'w'"),
        (lambda: Mask({"0.bias": torch.ones(2).bool()}).apply(net()), "The mask of '0.bias' has the shape [2]"),
    ],
)
def test_bad_input_is_refused_by_name(bad, message):
    with pytest.raises(PlanError, match=re.escape(message)):
        bad()
