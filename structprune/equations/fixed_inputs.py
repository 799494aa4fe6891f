"""A linear map on an input that stays, while weights and gradients change: what it takes of the input is kept."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from structprune.equations.fourier import Spectra
from structprune.equations.linear_maps import LinearMap


@dataclass(frozen=True, slots=True)
class FixedInput:
    """A linear map on one input.

    Attributes:
        map: the map.
        x: the input.
        spectra: how it is computed by Fourier transforms; None where it is not.
        lines: spectra of the input then.
    """

    map: LinearMap
    x: Tensor
    spectra: Spectra | None
    lines: Tensor | None

    @classmethod
    def of(cls, layer: LinearMap, x: Tensor) -> FixedInput:
        """The map on an input."""
        spectra = layer.spectra(x)
        return cls(layer, x, spectra, None if spectra is None else spectra.of_lines(x))

    def __call__(self, weight: Tensor, shift: Tensor | None = None) -> Tensor:
        """The result, as of `LinearMap`."""
        if self.spectra is None or self.lines is None:
            return self.map(self.x, weight, shift)
        result = self.spectra.shaped(self.lines @ self.spectra.of_kernel(weight), self.x.shape, self.spectra.results)
        return result if shift is None else result.add_(self.map.along_channels(shift))

    def to_weight(self, grad: Tensor, weight: Tensor) -> Tensor:
        """The adjoint in the weight, as of `LinearMap`."""
        if self.spectra is None or self.lines is None:
            return self.map.to_weight(grad, self.x, weight)
        return self.spectra.as_weight(self.lines.mH @ self.spectra.of_lines(grad))
