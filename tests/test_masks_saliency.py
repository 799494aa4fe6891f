"""Scores of criteria for single weights, thresholds, patterns, slices, and masks that are put on and taken off."""

from __future__ import annotations

import pytest
import torch
from support.saliency_nets import F64, NAMES, X, loss, net, of
from torch import nn
from torch.nn.utils import prune

import structprune
from structprune import masks
from structprune.errors import LoadError, PlanError, UnsupportedModelError
from structprune.importance import OBD, OBS, SNIP, Wanda, WeightTaylor
from structprune.masks import Mask, Saliency

# -- criteria --------------------------------------------------------------------------------------------------------


def test_magnitude_is_that_of_the_norms():
    model = net()
    for name in ("l1", "l2", "linf"):
        scores = of(model, name)
        assert list(scores) == NAMES
        assert all(torch.equal(scores[n], model.get_parameter(n).abs()) for n in NAMES)


@pytest.mark.parametrize("importance", ["weight_taylor", "snip"])
def test_gradient_times_weight_over_the_data(importance):
    model = net()
    scores = of(model, importance)
    loss(model, X).backward()
    wanted = {n: (p * p.grad).abs() for n, p in model.named_parameters()}
    whole = sum(float(w.sum().detach()) for w in wanted.values()) if importance == "snip" else 1.0
    assert all(torch.allclose(scores[n], wanted[n] / whole, rtol=1e-10) for n in NAMES)


def test_optimal_brain_damage():
    model = net()
    scores = of(model, OBD())
    squares = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for sample in X.split(1):
        model.zero_grad()
        loss(model, sample).backward()
        for n, p in model.named_parameters():
            squares[n] += p.grad.square() / len(X)
    assert all(torch.allclose(scores[n], squares[n] * model.get_parameter(n).square() / 2, rtol=1e-9) for n in NAMES)


def inputs_of_layers(model: nn.Module) -> dict[str, torch.Tensor]:
    hidden = torch.relu(model[0](X))
    return {"0.weight": X, "2.weight": hidden, "4.weight": model[2](hidden).flatten(1)}


def test_wanda_is_weight_times_norm_of_its_input():
    model = net()
    scores = of(model, "wanda")
    with torch.no_grad():
        seen = inputs_of_layers(model)
    for name, x in seen.items():
        weight = model.get_parameter(name)
        rms = x.movedim(1, 0).flatten(1).square().mean(1).sqrt()
        for out in range(len(weight)):
            first = (out // 4) * 4 if name == "2.weight" else 0  # the second group of the grouped convolution
            inside = rms[first : first + weight.shape[1]].view(-1, *[1] * (weight.dim() - 2))
            assert torch.allclose(scores[name][out], weight[out].abs() * inside, rtol=1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_optimal_brain_surgeon_is_the_least_change_that_any_other_weights_can_reach(name):
    model = net()
    scores = of(model, OBS(damping=1e-12))
    with torch.no_grad():
        x = inputs_of_layers(model)[name]
    weight = model.get_parameter(name).detach()
    kernel = weight.shape[2:]
    rows = nn.functional.unfold(x, kernel).transpose(1, 2).flatten(0, 1) if kernel else x
    rows = rows[:, : rows.shape[1] // 2] if name == "2.weight" else rows  # its first group makes output 0
    wanted = rows @ weight[0].reshape(-1)
    for q in (0, rows.shape[1] - 1):
        others = [i for i in range(rows.shape[1]) if i != q]
        best = torch.linalg.lstsq(rows[:, others], wanted).solution
        error = (rows[:, others] @ best - wanted).square().mean()
        # With fewer samples than inputs the others make up for one wholly.
        assert torch.allclose(scores[name][0].reshape(-1)[q], error, rtol=1e-5, atol=1e-9)


def test_transposed_convolutions_and_weights_on_the_right():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.ConvTranspose2d(4, 6, 2, bias=False)
            self.w = nn.Parameter(torch.randn(6, 3))

        def forward(self, x):
            return self.up(x).mean((2, 3)) @ self.w

    torch.manual_seed(0)
    model = Net().double().eval()
    scores = of(model, "wanda")
    rms = X.movedim(1, 0).flatten(1).square().mean(1).sqrt()
    assert torch.allclose(scores["up.weight"], model.up.weight.abs() * rms.view(4, 1, 1, 1), rtol=1e-10)
    with torch.no_grad():
        rms = model.up(X).mean((2, 3)).square().mean(0).sqrt()
    assert torch.allclose(scores["w"], model.w.abs() * rms.view(6, 1), rtol=1e-10)
    assert of(model, OBS())["up.weight"].shape == model.up.weight.shape


def test_a_tied_weight_sees_the_inputs_of_all_its_uses():
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.ReLU(), nn.Linear(3, 3, bias=False)).double()
    model[2].weight = model[0].weight
    x = torch.randn(8, 3, dtype=F64)
    scores = Saliency.of(model, x, Wanda(), data=[x])
    both = torch.cat([x, torch.relu(model[0](x)).detach()])
    assert torch.allclose(scores["0.weight"], model[0].weight.abs() * both.square().mean(0).sqrt(), rtol=1e-10)


def test_a_masked_model_is_scored_with_its_zeros_and_left_as_it_was():
    model = net()
    plain = of(model, WeightTaylor())
    prune.l1_unstructured(model[0], "weight", 0.5)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for importance in (WeightTaylor(), SNIP(), "wanda", "l1"):
        scores = of(model, importance)
        assert list(scores) == list(plain)
        assert bool((scores["0.weight"][model[0].weight_mask == 0] == 0).all())
    after = model.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_random_scores_do_not_touch_the_random_state():
    first, second, other = (Saliency.random(net(), seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first["0.weight"], second["0.weight"])
    assert not torch.equal(first["0.weight"], other["0.weight"])
    model, state = net(), torch.get_rng_state()
    Saliency.random(model)
    assert torch.equal(torch.get_rng_state(), state)


# -- choosing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("amount", [3, 0.41479])
def test_slices_are_those_of_torch(n, amount):
    model = net()
    mask = Saliency.magnitude(model).mask(amount, "tensor", dim=0, n=n)
    for layer in (model[0], model[2]):
        prune.ln_structured(layer, "weight", amount, n=n, dim=0)
    assert torch.equal(mask["0.weight"], model[0].weight_mask.bool())
    assert torch.equal(mask["2.weight"], model[2].weight_mask.bool())


@pytest.mark.parametrize("dim", [None, 0])
def test_a_second_round_is_that_of_torch(dim):
    model = net()
    first = Saliency.magnitude(model).mask(0.5, "tensor", dim=dim)
    second = Saliency.magnitude(model).mask(0.5, "tensor", dim=dim, default_mask=first)
    for _ in range(2):
        if dim is None:
            prune.l1_unstructured(model[0], "weight", 0.5)
        else:
            prune.ln_structured(model[0], "weight", 0.5, n=2, dim=0)
    assert torch.equal(second["0.weight"], model[0].weight_mask.bool())
    assert (second & ~first).kept == 0


def test_scores_of_ones_own_decide():
    scores = Saliency({"w": torch.tensor([[5.0, 1.0], [float("inf"), 2.0]])})
    first = scores.mask(2)
    assert first["w"].tolist() == [[True, False], [True, False]]
    assert scores.mask(1, default_mask=first)["w"].tolist() == [[False, False], [True, False]]
    assert scores.mask(2, default_mask=first).kept == 0


def test_by_output_each_row_loses_the_same():
    scores = Saliency({"w": torch.tensor([[1.0, 2.0, 3.0, 4.0], [40.0, 30.0, 20.0, 10.0]])})
    first = scores.mask(0.5, "output")
    assert first["w"].tolist() == [[False, False, True, True], [True, True, False, False]]
    assert scores.mask(1, "output", default_mask=first)["w"].sum(1).tolist() == [1, 1]


def test_han_thresholds_by_layer_and_over_the_model():
    model = net()
    weights = dict(model.named_parameters())
    by_layer = masks.standard_deviations(model, 0.8)
    assert all(by_layer[n] == pytest.approx(0.8 * float(weights[n].detach().std(correction=0))) for n in NAMES)
    mask = Saliency.magnitude(model).above(by_layer)
    assert all(torch.equal(mask[n], weights[n].abs() >= by_layer[n]) for n in NAMES)
    over_model = masks.standard_deviations(model, 0.8, "model")
    together = torch.cat([weights[n].detach().reshape(-1) for n in NAMES])
    assert over_model == pytest.approx(dict.fromkeys(NAMES, 0.8 * float(together.std(correction=0))))
    only = masks.standard_deviations(model, {"4.weight": 2.0})
    assert list(only) == ["4.weight"]
    assert only["4.weight"] == pytest.approx(by_layer["4.weight"] * 2.0 / 0.8)


def test_two_of_four_along_the_inputs():
    scores = Saliency({"w": torch.tensor([[1.0, 4.0, 3.0, 2.0, 1.0, 1.0, 1.0, 1.0]])})
    assert scores.n_of_m()["w"].tolist() == [[False, True, True, False, True, True, False, False]]
    model = net()
    mask = Saliency.magnitude(model).n_of_m(2, 4)
    undo = mask.apply(model)
    assert mask.kept * 2 == mask.entries
    assert all(masks.fits_blocks(model.get_parameter(name)) for name in NAMES)
    with pytest.raises(UnsupportedModelError, match=r"'4\.weight' is on cpu"):
        masks.semi_structured(model)
    undo()
    with pytest.raises(PlanError, match="No weight of a linear layer is 2:4 sparse"):
        masks.semi_structured(model)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="semi-structured tensors are of CUDA alone")
def test_two_of_four_on_the_tensor_cores():
    model = nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)).half().cuda().eval()
    Saliency.magnitude(model).n_of_m().apply(model)
    x = torch.randn(64, 128, dtype=torch.float16, device="cuda")
    with torch.no_grad():
        before = model(x)
        assert masks.semi_structured(model) == ["0.weight"]
        assert torch.allclose(model(x), before, atol=1e-2)


# -- as values -------------------------------------------------------------------------------------------------------


def test_ranks_make_scores_of_other_units_comparable():
    scores = Saliency({"a.w": torch.tensor([5.0, 1.0]), "b.w": torch.tensor([100.0, 300.0])})
    assert scores.ranks()["a.w"].tolist() == [0.5, 0.25]
    assert scores.ranks("tensor")["b.w"].tolist() == [0.5, 1.0]
    assert scores.correlation(scores * -1.0) == {"a.w": pytest.approx(-1.0), "b.w": pytest.approx(-1.0)}


def test_masks_are_compared_tensor_by_tensor():
    first = Mask({"a": torch.tensor([True, True, False]), "b": torch.tensor([False, False])})
    second = Mask({"a": torch.tensor([True, False, True]), "b": torch.tensor([False, False])})
    rows = first.compared(second).tensors
    assert [(r.tensor, r.entries, r.kept, r.overlap, r.hamming) for r in rows] == [
        ("a", 3, (2, 2), 1 / 3, 2),
        ("b", 2, (0, 0), 1.0, 0),
    ]
    assert "0.333" in str(first.compared(second))


def test_values_follow_a_plan():
    model = net()
    plan = structprune.plan(model, X[:1], ratio=0.5, round_to=1)
    slim = plan.apply(model)
    magnitude = Saliency.magnitude(model)
    sliced = magnitude.slice(plan)
    assert all(torch.equal(sliced[n], slim.get_parameter(n).abs()) for n in NAMES)
    assert magnitude.mask(0.5).slice(plan).apply(slim) is not None


def test_a_saliency_is_saved_and_loaded(tmp_path):
    scores = Saliency.magnitude(net())
    scores.save(tmp_path / "scores")
    loaded = Saliency.load(tmp_path / "scores")
    assert all(torch.equal(scores[n], loaded[n]) for n in NAMES)
    with pytest.raises(LoadError, match="holds no mask"):
        Mask.load(tmp_path / "scores")


def test_pictures_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    scores = Saliency.magnitude(nn.Sequential(nn.Linear(600, 3), nn.Linear(3, 2)), ["0.weight", "1.weight", "1.bias"])
    for draw, name in ((scores.draw, "a.png"), (scores.mask(0.5).draw, "b.svg")):
        assert draw(tmp_path / name).stat().st_size > 1000
    assert masks.sparsity(net()).draw(tmp_path / "c.pdf").stat().st_size > 1000


def test_the_report_says_what_compact_would_gain():
    model = net()
    scores = Saliency.magnitude(model, ["0.weight"])
    scores.mask(0.5, dim=0).apply(model)
    with torch.no_grad():
        model[0].bias.zero_()
    found = masks.sparsity(model, X[:1])
    assert found.gain is not None
    assert found.gain.before.params == sum(p.numel() for p in model.parameters())
    slim = masks.compact(model, X[:1])
    assert found.gain.after.params == sum(p.numel() for p in slim.parameters()) < found.gain.before.params
    assert "Zeros alone make nothing faster; compact: parameters" in str(found)
    assert '"compact"' in found.to_json()
