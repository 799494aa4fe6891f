"""Channels and 2:4 together: what sparse tensor cores take is told on any machine, and is what they read."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.sparse import _semi_structured_conversions as conversions

import structprune
from structprune import masks
from structprune.errors import PlanError, UnsupportedModelError
from structprune.masks import Saliency
from structprune.masks.two_of_four import MULTIPLES


def wide():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 192), nn.ReLU(), nn.Linear(192, 10))


@pytest.fixture
def thin():
    """Channels first, to widths that the kernels take."""
    return structprune.prune(wide(), torch.randn(2, 128), ratio=0.3, round_to=64)


def test_a_pruned_network_fits_but_for_its_outputs(thin):
    Saliency.magnitude(thin).n_of_m(2, 4).apply(thin)
    first, second, last = masks.two_of_four_layers(thin)
    assert [first.shape, second.shape, last.shape] == [(192, 128), (128, 192), (10, 128)]
    for layer in (first, second, last):
        assert layer.blocks == layer.exact == layer.shape[0] * layer.shape[1] // 4
        assert layer.over == 0
    assert first.reasons == second.reasons == ()
    assert last.reasons == ("its 10 outputs are no multiple of 32",)
    with pytest.raises(UnsupportedModelError, match="two_of_four_layers checks what the kernels would take"):
        masks.semi_structured(thin)


def test_what_fits_is_what_the_kernels_would_read(thin):
    """Compressed as torch compresses it for CUTLASS, which runs on the CPU too, it is the same weight again."""
    thin = thin.half()
    Saliency.magnitude(thin).n_of_m(2, 4).apply(thin)
    fitting = [layer for layer in masks.two_of_four_layers(thin, dtype=torch.float16) if not layer.reasons]
    assert [layer.name for layer in fitting] == ["0.weight", "2.weight"]
    for layer in fitting:
        weight = thin.get_parameter(layer.name).detach()
        kept, places = conversions.sparse_semi_structured_from_dense_cutlass(weight)
        assert kept.numel() * 2 == weight.numel()
        assert torch.equal(conversions.sparse_semi_structured_to_dense_cutlass(kept, places), weight)


def test_without_a_mask_the_blocks_that_hold_more_are_counted(thin):
    layer, *_ = masks.two_of_four_layers(thin)
    assert layer.over == layer.blocks > 0 == layer.exact
    assert layer.reasons == (
        f"{layer.blocks} of its {layer.blocks} blocks of four hold more than two weights; apply Saliency.n_of_m(2, 4)",
    )
    Saliency.magnitude(thin).n_of_m(2, 4).apply(thin)
    with torch.no_grad():
        thin[0].weight[3, :4] = 1  # four of one block
        thin[0].weight[5, 4:8] = 0
    again, *_ = masks.two_of_four_layers(thin)
    assert (again.blocks - again.exact, again.over) == (2, 1)
    assert len(again.reasons) == 1


def test_masks_that_are_attached_count_as_their_layers_use_them(thin):
    before = [layer.over for layer in masks.two_of_four_layers(thin)]
    undo = Saliency.magnitude(thin).n_of_m(2, 4).attach(thin)
    assert [layer.over for layer in masks.two_of_four_layers(thin)] == [0, 0, 0]
    undo()
    assert [layer.over for layer in masks.two_of_four_layers(thin)] == before


@pytest.mark.parametrize("dtype", MULTIPLES)
def test_multiples_are_those_of_the_dtype(dtype):
    rows, columns = MULTIPLES[dtype]
    for outputs, inputs in ((rows, columns), (rows, columns + 4), (rows + 1, columns), (rows + 1, columns + 4)):
        model = nn.Linear(inputs, outputs)
        Saliency.magnitude(model).n_of_m(2, 4).apply(model)
        (layer,) = masks.two_of_four_layers(model, dtype=dtype)
        assert layer.name == "weight"
        assert len(layer.reasons) == (outputs != rows) + (inputs != columns)


def test_layers_without_blocks_and_other_kinds():
    model = nn.Sequential(nn.Conv2d(8, 64, 1), nn.Flatten(), nn.Linear(66, 64))
    (layer,) = masks.two_of_four_layers(model)
    assert (layer.name, layer.blocks, layer.exact, layer.over) == ("2.weight", 0, 0, 0)
    assert layer.reasons == ("its 66 inputs are no multiple of 64",)
    with pytest.raises(PlanError, match=r"dtype is torch\.float64; sparse tensor cores take torch\.float16"):
        masks.two_of_four_layers(model, dtype=torch.float64)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="semi-structured tensors are of CUDA alone")
def test_the_layers_that_fit_are_converted(thin):
    thin = thin.half().cuda().eval()
    Saliency.magnitude(thin).n_of_m(2, 4).apply(thin)
    fitting = [layer.name for layer in masks.two_of_four_layers(thin) if not layer.reasons]
    x = torch.randn(64, 128, dtype=torch.float16, device="cuda")
    with torch.no_grad():
        before = thin(x)
        assert masks.semi_structured(thin) == fitting
        assert torch.allclose(thin(x), before, atol=1e-2)
