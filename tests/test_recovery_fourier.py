"""Convolutions as products of spectra, and their adjoints, against torch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from structprune.equations import fourier
from structprune.equations.fourier import Spectra
from structprune.equations.linear_maps import linear_map

# Shapes of the input and of the weight, and further arguments.
CASES = {
    "one dimension": ((3, 4, 20), (2, 4, 7), {"padding": 3}),
    "without padding": ((2, 3, 12), (2, 3, 12), {}),
    "longer than the input": ((2, 3, 5), (2, 3, 8), {"padding": 4}),
    "two dimensions": ((3, 2, 16, 5), (4, 2, 9, 1), {"padding": (4, 0)}),
    "dilated along the last": ((2, 3, 2, 4, 17), (2, 3, 1, 1, 4), {"dilation": (1, 1, 3), "padding": (0, 0, 2)}),
    "more padding than kernel": ((2, 3, 5), (2, 3, 2), {"padding": 4}),
    "uneven padding": ((2, 3, 12), (2, 3, 4), {"padding": "same"}),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _always(monkeypatch):
    monkeypatch.setattr(fourier, "MARGIN", 0.0)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CASES)
def test_they_give_what_torch_gives(name, dtype):
    size, weight_size, options = CASES[name]
    torch.manual_seed(0)
    x, weight = torch.randn(size, dtype=dtype, requires_grad=True), torch.randn(weight_size, dtype=dtype)
    weight.requires_grad_()
    shift = torch.randn(weight_size[0], dtype=dtype)
    layer = linear_map(f"conv{len(size) - 2}d", (x, weight), options)
    assert layer.spectra(x) is not None
    wanted = getattr(F, layer.name)(x, weight, shift, **options)
    grad = torch.randn_like(wanted)
    of_x, of_weight = torch.autograd.grad(wanted, (x, weight), grad)
    with torch.no_grad():
        torch.testing.assert_close(layer(x, weight, shift), wanted)
        torch.testing.assert_close(layer.to_input(grad, x, weight), of_x)
        torch.testing.assert_close(layer.to_weight(grad, x, weight), of_weight)


def test_no_samples_give_zeros():
    x, weight = torch.zeros(0, 4, 20), torch.zeros(2, 4, 7)
    layer = linear_map("conv1d", (x, weight), {})
    assert layer.spectra(x) is not None
    assert layer(x, weight).shape == (0, 2, 14)
    assert torch.equal(layer.to_weight(torch.zeros(0, 2, 14), x, weight), torch.zeros(2, 4, 7))


def test_other_convolutions_are_left_to_torch():
    def spectra(size, weight_size, dtype=torch.float32, **options):
        x = torch.zeros(size, dtype=dtype)
        return linear_map(f"conv{len(size) - 2}d", (x, torch.zeros(weight_size, dtype=dtype)), options).spectra(x)

    assert spectra((2, 4, 30), (4, 4, 9)) is not None
    assert spectra((2, 4, 30), (4, 4, 9), torch.float16) is None
    assert spectra((2, 4, 30), (4, 4, 9), stride=2) is None
    assert spectra((2, 4, 30), (4, 2, 9), groups=2) is None
    assert spectra((2, 4, 30, 9), (4, 4, 9, 3)) is None
    assert spectra((2, 4, 30, 9), (4, 4, 9, 1), stride=(1, 2)) is None
    assert spectra((2, 4, 30, 9), (4, 4, 9, 1), padding=(4, 1)) is None
    x = torch.zeros(2, 4, 30)
    assert linear_map("conv_transpose1d", (x, torch.zeros(4, 4, 9)), {}).spectra(x) is None
    assert linear_map("linear", (x, torch.zeros(9, 30)), {}).spectra(x) is None


def test_only_long_kernels_over_several_channels_save_time(monkeypatch):
    monkeypatch.undo()

    def of(outputs, channels, taps, steps):
        return Spectra.of((steps,), (outputs, channels, taps), (1,), (1,), (taps // 2,), (taps // 2,))

    assert of(12, 64, 64, 130) is not None
    assert of(64, 1, 64, 130) is None
    assert of(512, 512, 3, 130) is None
