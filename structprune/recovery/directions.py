"""A layer with a large kernel in few directions of each input channel, to choose channels by.

A convolution of 128 channels with 64 entries each has 8,192 features. To eliminate channels among them takes the
inverse of their moments, which costs more than all forwards of the network. But a channel acts through its weight
alone, a matrix of 64 entries by, say, 12 outputs: 12 directions hold all of it. In these the layer has 1,536 features,
and is what it was; once channels are removed, it is solved among what the others contribute so. Where there are more
outputs, the principal components of what a channel adds to them are taken.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from structprune.equations.elimination import ConsumerMoments
from structprune.equations.linear_maps import LinearMap

MAX_FEATURES = 1536  # up to here all features are taken


@dataclass(frozen=True, slots=True)
class Directions:
    """What takes the place of the entries of each channel's kernel.

    Attributes:
        entries: shape ``(channels, entries, directions)``.
        weight: what the layer makes of a unit along each direction, shape ``(channels, directions, outputs)``.
    """

    entries: Tensor
    weight: Tensor

    @classmethod
    def of(cls, weight: Tensor, moments: Tensor) -> Directions:
        """The principal components of what each channel adds to the outputs, as many as `MAX_FEATURES` allows.

        Args:
            weight: shape ``(channels, entries, outputs)``.
            moments: second moments of the entries of each channel, shape ``(channels, entries, entries)``.

        Example:
            >>> weight = torch.randn(64, 32, 3)
            >>> directions = Directions.of(weight, torch.eye(32).expand(64, 32, 32))
            >>> directions.entries.shape, directions.count  # 2,048 features become 192
            (torch.Size([64, 32, 3]), 192)
        """
        count = min(*weight.shape[1:], max(1, MAX_FEATURES // len(weight)))
        _, components = torch.linalg.eigh(weight.transpose(1, 2) @ moments @ weight)
        components = components[..., -count:]
        return cls(weight @ components, components.transpose(1, 2))

    @property
    def count(self) -> int:
        """Features in these directions."""
        return self.entries.shape[0] * self.entries.shape[2]

    def of_features(self, features: Tensor) -> Tensor:
        """Features ``(rows, channels * entries)`` as ``(rows, channels * directions)``."""
        channels, entries, _ = self.entries.shape
        by_channel = features.view(-1, channels, entries).transpose(0, 1)
        return (by_channel @ self.entries.to(features.dtype)).transpose(0, 1).flatten(1)


def has_many_features(layer: LinearMap) -> bool:
    """Whether channels are chosen in few directions: there are entries of a kernel, and too many features."""
    return layer.features > MAX_FEATURES and prod(layer.kernel) > 1


def entry_moments(layer: LinearMap, features: Tensor) -> Tensor:
    """Second moments of the entries of each channel, ``(channels, entries, entries)``, from ``(rows, features)``."""
    by_channel = features.view(len(features), -1, prod(layer.kernel)).transpose(0, 1)
    return (by_channel.transpose(1, 2) @ by_channel).double()


@dataclass(slots=True)
class DirectedMoments(ConsumerMoments):
    """What elimination needs of a layer in few directions; what it changes is told in all features.

    Attributes:
        directions: of its channels.
        whole: its weight with a last row of zeros for the intercept, shape ``(features + 1, outputs)``.
        whole_places: the features that each channel of the group makes.
    """

    directions: Directions
    whole: Tensor
    whole_places: Tensor

    @classmethod
    def of(cls, xx: Tensor, whole: Tensor, places: Tensor, directions: Directions) -> DirectedMoments:
        """From moments in few directions, with the intercept last.

        Args:
            xx: shape ``(directions.count + 1, directions.count + 1)``.
            whole: as the attribute.
            places: the features that each channel of the group makes; the entries of a kernel follow each other.
            directions: as the attribute.
        """
        _, entries, count = directions.entries.shape
        inputs = places[:, ::entries] // entries
        few = (inputs[..., None] * count + torch.arange(count, device=places.device)).flatten(1)
        return cls(xx, torch.cat([directions.weight.flatten(0, 1), whole[-1:]]), few, directions, whole, places)

    def change(self, removed: Tensor) -> Tensor:
        """What to add to `whole`, in its shape, so that the layer does best in its directions without `removed`."""
        few = super(DirectedMoments, self).change(removed)
        channels, _, count = self.directions.entries.shape
        change = torch.cat([(self.directions.entries @ few[:-1].view(channels, count, -1)).flatten(0, 1), few[-1:]])
        gone = self.whole_places[removed].flatten()
        change[gone] = -self.whole[gone]
        return change


def moments_of(xx: Tensor, matrix: Tensor, places: Tensor, directions: Directions | None) -> ConsumerMoments:
    """The moments of a layer in all its features, or in few directions where there are some."""
    if directions is None:
        return ConsumerMoments(xx, matrix, places)
    return DirectedMoments.of(xx, matrix, places, directions)
