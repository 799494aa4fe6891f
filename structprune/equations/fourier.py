"""Convolutions with a long kernel as products of spectra, and their adjoints.

Along one dimension a convolution of ``C`` by ``O`` channels with ``K`` entries of the kernel takes ``K C O`` products a
step. Between Fourier transforms it is a matrix product for each frequency, which is two products for each of ``C O``.
For many entries that is far less, for all that the transforms themselves take (Mathieu et al., Fast Training
of Convolutional Networks through FFTs, 2013).

An input of 131 steps with 32 zeros on either side is transformed as 168 steps, the last 37 of them zero: those behind
the input are also those in front of it, as the transform is periodic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import log2, prod

import torch
from torch import Tensor

# What a transform takes for each entry and halving, beside a product of the convolution itself; and how much cheaper
# the way over the spectra has to be.
PER_ENTRY, MARGIN = 8.0, 1.5
TYPES = (torch.float32, torch.float64)


@dataclass(frozen=True, slots=True)
class Spectra:
    """A convolution along one dimension, for inputs of one size, as products of spectra.

    Attributes:
        dim: the spatial dimension.
        steps: of the input along it.
        results: of the result.
        period: of the transforms.
        before: zeros in front of the input.
        dilation: how far one entry of the kernel is from the next.
        kernel: size of the kernel in all spatial dimensions; 1 in all but `dim`.
    """

    dim: int
    steps: int
    results: int
    period: int
    before: int
    dilation: int
    kernel: tuple[int, ...]

    @classmethod
    def of(
        cls,
        sizes: Sequence[int],
        weight_shape: Sequence[int],
        strides: Sequence[int],
        dilations: Sequence[int],
        before: Sequence[int],
        after: Sequence[int],
    ) -> Spectra | None:
        """The spectra of a convolution with one group; None where they do not apply, or save no time.

        Args:
            sizes: of the input, in the spatial dimensions; as all others.
            weight_shape: ``(outputs, channels, *kernel)``.
            strides: of the kernel.
            dilations: of the kernel.
            before: zeros in front of the input.
            after: zeros behind it.
        """
        outputs, channels, *kernel = weight_shape
        dim = max(range(len(kernel)), key=kernel.__getitem__)
        others = [n for n in range(len(kernel)) if n != dim]
        if any(kernel[n] != 1 or strides[n] != 1 or before[n] or after[n] for n in others) or strides[dim] != 1:
            return None
        reach = (kernel[dim] - 1) * dilations[dim]
        results = sizes[dim] + before[dim] + after[dim] - reach
        period = fast_period(max(sizes[dim] + max(before[dim], after[dim], 0), reach + 1, results))
        direct = kernel[dim] * channels * outputs * results
        transforms = PER_ENTRY * (channels + outputs) * period * log2(period)
        if results < 1 or direct < MARGIN * (2 * period * channels * outputs + transforms):
            return None
        return cls(dim, sizes[dim], results, period, before[dim], dilations[dim], tuple(kernel))

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        """The convolution."""
        return self.shaped(self.of_lines(x) @ self.of_kernel(weight), x.shape, self.results)

    def to_input(self, grad: Tensor, weight: Tensor) -> Tensor:
        """The adjoint in the input: from something shaped like the result to something shaped like the input."""
        return self.shaped(self.of_lines(grad) @ self.of_kernel(weight).mH, grad.shape, self.steps)

    def to_weight(self, grad: Tensor, x: Tensor) -> Tensor:
        """The adjoint in the weight: from something shaped like the result to something shaped like the weight."""
        return self.as_weight(self.of_lines(x).mH @ self.of_lines(grad))

    # -- to spectra and back ---------------------------------------------------------------------------------------

    def of_lines(self, x: Tensor) -> Tensor:
        """Spectra along the dimension, shape ``(frequencies, lines, channels)``, of ``(batch, channels, *sizes)``.

        The other dimensions count as lines: an input (2, 3, 10, 5) has 10 lines of 10 steps along the first.
        """
        return self.of_steps(self.lines(x))

    def lines(self, x: Tensor) -> Tensor:
        """The lines of ``(batch, channels, *sizes)``, shape ``(lines, channels, steps)``."""
        return x.movedim(2 + self.dim, -1).movedim(1, -2).flatten(0, -3)

    def of_steps(self, lines: Tensor) -> Tensor:
        """Spectra ``(frequencies, lines, channels)`` of lines ``(lines, channels, steps)``."""
        if not len(lines):
            kind = torch.complex64 if lines.dtype == torch.float32 else torch.complex128
            return lines.new_zeros(self.period // 2 + 1, *lines.shape[:2], dtype=kind)
        return torch.fft.rfft(lines, self.period).permute(2, 0, 1).contiguous()

    def steps_of(self, spectra: Tensor, steps: int) -> Tensor:
        """So many steps of lines with these spectra, shape ``(lines, channels, steps)``."""
        if not spectra.shape[1]:
            return spectra.real.new_zeros(0, spectra.shape[2], steps)
        return torch.fft.irfft(spectra.permute(1, 2, 0), self.period)[..., :steps].contiguous()

    def of_kernel(self, weight: Tensor) -> Tensor:
        """Spectra of the kernel, shape ``(frequencies, channels, outputs)``."""
        spread = weight.new_zeros(*weight.shape[:2], self.period)
        spread[..., self._places(weight.device)] = weight.flatten(2)
        return torch.fft.rfft(spread).permute(2, 1, 0).contiguous()

    def shaped(self, spectra: Tensor, shape: Sequence[int], steps: int) -> Tensor:
        """So many steps with these spectra, in a shape like `shape`, that of input or result."""
        lines = self.steps_of(spectra, steps)
        others = [size for number, size in enumerate(shape[2:]) if number != self.dim]
        return lines.view(shape[0], *others, *lines.shape[1:]).movedim(-2, 1).movedim(-1, 2 + self.dim)

    def as_weight(self, spectra: Tensor) -> Tensor:
        """The weight ``(outputs, channels, *kernel)`` from spectra ``(frequencies, channels, outputs)``."""
        spread = torch.fft.irfft(spectra.permute(2, 1, 0), self.period)
        return spread[..., self._places(spread.device)].unflatten(-1, self.kernel)

    def _places(self, device: torch.device) -> Tensor:
        """Where the entries of the kernel are in a period: 4 of them, with 2 zeros in front, at 2, 1, 0 and -1."""
        entries = torch.arange(prod(self.kernel), device=device)
        return (self.before - entries * self.dilation) % self.period


def fast_period(least: int) -> int:
    """The first even number from `least` on with no prime factor above 7: others take several times as long.

    Example:
        >>> fast_period(163), fast_period(1)
        (168, 2)
    """
    number = least + least % 2
    while not _is_smooth(number):
        number += 2
    return number


def _is_smooth(number: int) -> bool:
    for factor in (2, 3, 5, 7):
        while number % factor == 0:
            number //= factor
    return number == 1
