"""Layers as matrix products over sampled positions, and their adjoints, against torch's own operations."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from structprune.equations.linear_maps import linear_map

# Shapes of the input and of the weight, and further arguments.
CALLS = {
    "conv1d": ((2, 4, 9), (6, 4, 3), {"padding": "same"}),
    "conv2d": ((2, 4, 7, 6), (6, 2, 3, 2), {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2), "groups": 2}),
    "conv3d": ((2, 2, 4, 5, 3), (3, 2, 2, 2, 2), {"padding": "valid"}),
    "conv_transpose1d": ((2, 4, 5), (4, 3, 4), {"stride": 3, "dilation": 2}),
    "conv_transpose2d": (
        (2, 4, 5, 4), (4, 3, 3, 3), {"stride": 2, "padding": 1, "output_padding": 1, "groups": 2}
    ),
    "linear": ((2, 3, 5), (7, 5), {}),
    "matmul": ((2, 3, 5), (5, 7), {}),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_a_linear_map_is_features_times_a_matrix(name):
    shape, weight_shape, options = CALLS[name]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    weight = torch.randn(weight_shape, generator=generator, dtype=torch.float64)
    function = torch.matmul if name == "matmul" else getattr(F, name)
    result = function(x, weight, **options)
    layer = linear_map(name, (x, weight), options)
    everywhere = torch.arange(layer.positions(result))
    matrix = layer.matrix_of(weight)
    features = layer.features_at(x, everywhere)
    assert features.shape == (layer.groups, len(everywhere), layer.features)
    torch.testing.assert_close(layer.weight_of(matrix), weight)
    torch.testing.assert_close(features @ matrix, layer.outputs_at(result, everywhere))
    torch.testing.assert_close(layer(x, layer.weight_of(matrix)), result)


@pytest.mark.parametrize("name", CALLS)
def test_a_batch_without_samples_has_features_of_no_positions(name):
    shape, weight_shape, options = CALLS[name]
    x, weight, nowhere = torch.zeros(0, *shape[1:]), torch.zeros(weight_shape), torch.zeros(0, dtype=torch.long)
    layer = linear_map(name, (torch.zeros(shape), weight), options)
    function = torch.matmul if name == "matmul" else getattr(F, name)
    result = function(x, weight, **options)
    assert layer.features_at(x, nowhere).shape == (layer.groups, 0, layer.features)
    assert layer.outputs_at(result, nowhere).shape == (layer.groups, 0, layer.outputs)


@pytest.mark.parametrize("name", CALLS)
def test_adjoints_are_adjoint(name):
    shape, weight_shape, options = CALLS[name]
    generator = torch.Generator().manual_seed(0)
    x, other = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    weight, change = (torch.randn(weight_shape, generator=generator, dtype=torch.float64) for _ in range(2))
    layer = linear_map(name, (x, weight), options)
    result = layer(x, weight)
    function = torch.matmul if name == "matmul" else getattr(F, name)
    torch.testing.assert_close(result, function(x, weight, **options))
    grad = torch.randn(result.shape, generator=generator, dtype=torch.float64)
    torch.testing.assert_close((layer(x, change) * grad).sum(), (change * layer.to_weight(grad, x, weight)).sum())
    torch.testing.assert_close((layer(other, weight) * grad).sum(), (other * layer.to_input(grad, x, weight)).sum())
    shift = torch.randn(layer.channels, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(((layer(x, weight, shift) - result) * grad).sum(), (shift * layer.to_shift(grad)).sum())


def test_an_uneven_padding_has_no_adjoints():
    x = torch.randn(2, 4, 9)
    assert not linear_map("conv1d", (x, torch.randn(6, 4, 4)), {"padding": "same"}).has_adjoints
    assert linear_map("conv1d", (x, torch.randn(6, 4, 3)), {"padding": "same"}).has_adjoints


def test_what_has_no_batch_is_no_map():
    assert linear_map("conv2d", (torch.randn(4, 7, 7), torch.randn(6, 4, 3, 3)), {}) is None
    assert linear_map("linear", (torch.randn(4), torch.randn(6, 4)), {}) is None
