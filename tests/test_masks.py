"""Plans as masks, masks made permanent, and the report of zeros."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import structprune
from structprune import masks
from structprune.errors import PlanError, SurgeryError


def net() -> nn.Module:
    torch.manual_seed(0)
    return (
        nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3, padding=1), nn.Flatten(),
            nn.Linear(12 * 36, 5),
        )
        .double()
        .eval()
    )  # fmt: skip


X = torch.randn(2, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def test_a_plan_as_masks_is_the_plan():
    model = net()
    plan = structprune.plan(model, X, ratio=0.5, round_to=1)
    cut = plan.apply(model)
    masked = masks.from_plan(plan, model)
    assert masked is model
    assert torch.allclose(masked(X), cut(X), rtol=1e-10, atol=1e-10)
    slim = masks.compact(masked, X)
    assert shapes(slim) == shapes(cut)
    assert torch.allclose(slim(X), cut(X), rtol=1e-10, atol=1e-10)


def test_masks_train_softly():
    model = net()
    masks.from_plan(structprune.plan(model, X, ratio=0.5, round_to=1), model)
    model(X).sum().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad
    assert float((model[0].weight_mask == 0).double().mean()) == 0.5
    assert bool((model(X) == masks.remove(model)(X)).all())


def test_masks_that_are_there_already_are_joined():
    model = net()
    prune.random_unstructured(model[3], "weight", 0.3)
    before = model[3].weight_mask.clone()
    plan = structprune.plan(model, X, ratio=0.5, round_to=1)
    masks.from_plan(plan, model)
    after = model[3].weight_mask
    assert bool((after <= before).all())
    assert int(after.sum()) < int(before.sum())


@pytest.mark.parametrize("other", [nn.Linear(3, 2), nn.Sequential(nn.Conv2d(3, 4, 3))], ids=["names", "sizes"])
def test_a_plan_of_another_model_is_refused_and_nothing_changes(other):
    plan = structprune.plan(net(), X, ratio=0.5, round_to=1)
    with pytest.raises(SurgeryError, match=r"0\.weight"):
        masks.from_plan(plan, other)
    assert not prune.is_pruned(other)


def test_removing_keeps_order_and_values():
    model = net()
    names = list(model.state_dict())
    for layer in (model[0], model[3]):
        prune.l1_unstructured(layer, "weight", 0.5)
        prune.ln_structured(layer, "weight", 0.25, n=1, dim=0)
        prune.random_unstructured(layer, "bias", 1)
    used = {name: tensor.clone() for name, tensor in (("0", model[0].weight), ("3", model[3].weight))}
    masks.remove(model)
    assert list(model.state_dict()) == names
    assert not prune.is_pruned(model)
    assert all(torch.equal(used[path], model[int(path)].weight) for path in used)


def test_sparsity_is_printed_as_the_field_prints_it():
    model = nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 2, bias=False))
    prune.l1_unstructured(model[0], "weight", 6)
    assert str(masks.sparsity(model)) == (
        "Sparsity in 0.bias: 0.00%\nSparsity in 0.weight: 75.00%\nSparsity in 1.weight: 0.00%\nGlobal sparsity: 42.86%"
    )


def test_sparsity_as_json_and_in_a_notebook():
    model = nn.Sequential(nn.Linear(4, 2, bias=False))
    prune.l1_unstructured(model[0], "weight", 6)
    found = masks.sparsity(model)
    data = json.loads(found.to_json())
    assert data["tensors"] == [{"tensor": "0.weight", "zeros": 6, "entries": 8, "sparsity": 0.75}]
    assert data["global"] == {"zeros": 6, "entries": 8, "sparsity": 0.75}
    assert "compact" in data["note"]
    assert "<td>75.00%</td>" in found._repr_html_()
    masks.remove(model)
    assert masks.sparsity(model) == found


def test_a_tied_tensor_counts_once():
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    assert masks.sparsity(model).entries == 9


def test_zeros_on_meta_cannot_be_counted():
    with pytest.raises(PlanError, match="'weight' is on the meta device"):
        masks.sparsity(nn.Linear(2, 2, device="meta"))
