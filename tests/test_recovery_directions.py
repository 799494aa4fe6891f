"""Layers with large kernels in few directions of each channel, to choose channels by."""

from __future__ import annotations

import pytest
import torch

from structprune.equations.elimination import ConsumerMoments, eliminate
from structprune.equations.least_squares import second_moments
from structprune.equations.linear_maps import linear_map, with_intercept
from structprune.recovery import directions as module
from structprune.recovery.directions import DirectedMoments, Directions, entry_moments, has_many_features

CHANNELS, ENTRIES, OUTPUTS = 6, 8, 3


def problem():
    torch.manual_seed(0)
    # Walks of three sources, that six channels are mixed of.
    sources = torch.randn(20, 3, 30, dtype=torch.float64).cumsum(2)
    x = torch.randn(CHANNELS, 3, dtype=torch.float64) @ sources
    x += 0.1 * torch.randn_like(x)
    weight = torch.randn(OUTPUTS, CHANNELS, ENTRIES, dtype=torch.float64) * torch.rand(CHANNELS, 1).double()
    layer = linear_map("conv1d", (x, weight), {})
    matrix = layer.matrix_of(weight)[0]
    features = layer.features_at(x, torch.arange(20 * (30 - ENTRIES + 1)))[0]
    return layer, matrix, features


def found(layer, matrix, features):
    return Directions.of(matrix.view(CHANNELS, ENTRIES, OUTPUTS), entry_moments(layer, features))


def whole_of(matrix):
    return torch.cat([matrix, matrix.new_zeros(1, OUTPUTS)])


PLACES = torch.arange(CHANNELS * ENTRIES).view(CHANNELS, ENTRIES)


def test_a_layer_of_few_features_is_left():
    layer, _, _ = problem()
    assert not has_many_features(layer)


def test_the_layer_is_what_it_was_in_as_many_directions_as_outputs(monkeypatch):
    monkeypatch.setattr(module, "MAX_FEATURES", CHANNELS * OUTPUTS)
    layer, matrix, features = problem()
    directions = found(layer, matrix, features)
    assert directions.entries.shape == (CHANNELS, ENTRIES, OUTPUTS)
    few = directions.of_features(features)
    xx = second_moments(with_intercept(few[None]))[0]
    moments = DirectedMoments.of(xx, whole_of(matrix), PLACES, directions)
    torch.testing.assert_close(few @ moments.matrix[:-1], features @ matrix)
    assert moments.places[1].tolist() == [3, 4, 5]


@pytest.mark.parametrize("most", [CHANNELS * 2, CHANNELS * OUTPUTS])
def test_what_is_removed_is_gone_and_the_others_make_up_for_it(monkeypatch, most):
    monkeypatch.setattr(module, "MAX_FEATURES", most)
    layer, matrix, features = problem()
    directions = found(layer, matrix, features)
    rows = with_intercept(directions.of_features(features)[None])
    moments = DirectedMoments.of(second_moments(rows)[0], whole_of(matrix), PLACES, directions)
    order, _ = eliminate([moments])
    removed = order[:2]
    change = moments.change(removed)
    gone = PLACES[removed].flatten()
    assert torch.equal(change[gone], -matrix[gone])
    cut = torch.zeros_like(change)
    cut[gone] = -matrix[gone]
    wide = with_intercept(features[None])[0]
    assert (wide @ change).square().sum() < 0.5 * (wide @ cut).square().sum()


def test_with_all_directions_it_is_the_elimination_of_all_features():
    """Where there are as many outputs as entries, the directions span all features."""
    torch.manual_seed(1)
    x = torch.randn(30, 4, 12, dtype=torch.float64)
    weight = torch.randn(5, 4, 3, dtype=torch.float64)
    layer = linear_map("conv1d", (x, weight), {})
    matrix = layer.matrix_of(weight)[0]
    features = layer.features_at(x, torch.arange(300))[0]
    places = torch.arange(12).view(4, 3)
    whole = torch.cat([matrix, matrix.new_zeros(1, 5)])
    plain = ConsumerMoments(second_moments(with_intercept(features[None]))[0], whole, places)
    directions = Directions.of(matrix.view(4, 3, 5), entry_moments(layer, features))
    xx = second_moments(with_intercept(directions.of_features(features)[None]))[0]
    directed = DirectedMoments.of(xx, whole, places, directions)
    (order, error), (wanted, wanted_error) = eliminate([directed]), eliminate([plain])
    assert order.tolist() == wanted.tolist()
    torch.testing.assert_close(error, wanted_error, rtol=1e-2, atol=0)  # the ridge is another in other coordinates
    torch.testing.assert_close(directed.change(order[:2]), plain.change(order[:2]), rtol=1e-2, atol=1e-3)
