"""Second moments of the windows of a convolution with a long kernel, and their inverse, by frequency.

Moments of 64 channels with 64 entries each are a matrix of 4,096 by 4,096. Those of two entries depend on how far they
are apart alone, but for the borders: the matrix is nearly block Toeplitz. The block circulant one that is nearest to it
falls apart into 33 matrices of 64 by 64, one for each frequency, and so does its inverse, by which conjugate gradients
are preconditioned (T. Chan, An Optimal Circulant Preconditioner for Toeplitz Systems, 1988).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import pi, prod

import torch
import torch.nn.functional as F
from torch import Tensor

from structprune.distributed import agreed, all_reduced
from structprune.equations.fourier import Spectra, fast_period
from structprune.equations.linear_maps import LinearMap

LEAST = 1e-3  # of the mean diagonal: no channel is penalised less, even one that is always zero
CHUNK = 1 << 24  # entries of the moments of the frequencies that are looked at together


@dataclass(slots=True)
class WindowMoments:
    """Moments of all windows of some inputs, of all ranks.

    Attributes:
        blocks: of the circulant matrix by frequency, shape ``(entries // 2 + 1, channels, channels)``, complex.
        sums: of the windows, shape ``(channels, entries)``.
        diagonal: sums of their squares, in the same shape.
        count: of windows.
    """

    blocks: Tensor
    sums: Tensor
    diagonal: Tensor
    count: float

    @classmethod
    def of(cls, layer: LinearMap, inputs: Sequence[Tensor]) -> WindowMoments:
        """The moments of a layer's windows.

        Args:
            layer: a convolution that has `LinearMap.spectra` for the inputs.
            inputs: of this rank.
        """
        entries, channels = prod(layer.kernel), layer.weight_shape[1]
        device = inputs[0].device
        blocks = torch.zeros(entries // 2 + 1, channels, channels, dtype=torch.complex128, device=device)
        totals = torch.zeros(2, channels, entries, dtype=torch.float64, device=device)
        count = torch.zeros((), dtype=torch.float64, device=device)
        for x in inputs:
            spectra = layer.spectra(x)
            assert spectra is not None
            _add_blocks(blocks, spectra, x)
            lines = spectra.lines(x)
            totals += torch.stack([_window_totals(spectra, lines), _window_totals(spectra, lines.square())])
            count += len(lines) * spectra.results
        all_reduced(torch.view_as_real(blocks))
        all_reduced(totals)
        return cls(blocks, totals[0], totals[1], float(all_reduced(count)))

    def plus(self, other: WindowMoments) -> WindowMoments:
        """Those of the windows of both."""
        return WindowMoments(
            self.blocks + other.blocks,
            self.sums + other.sums,
            self.diagonal + other.diagonal,
            self.count + other.count,
        )

    def penalty(self, ridge: float, free: bool) -> Tensor:
        """What `ridge` adds to the diagonal, in its shape; of all features, and the intercept where it is `free`."""
        mean = (self.diagonal.sum() + self.count * free) / (self.diagonal.numel() + free)
        return ridge * (self.diagonal + LEAST * mean.clamp_min(torch.finfo(mean.dtype).tiny ** 0.5))

    def inverse(self, penalty: Tensor, free: bool) -> WindowInverse:
        """The inverse of the circulant matrix with a penalty.

        Args:
            penalty: added to the diagonal, in its shape.
            free: whether there is an intercept too.
        """
        blocks = self.blocks
        if free:  # what a constant explains is taken out, as it is of the moments themselves
            means = torch.fft.rfft(self.sums) / (self.sums.shape[1] * self.count) ** 0.5
            blocks = blocks - torch.einsum("cf,df->fcd", means, means.conj())
        blocks = blocks + torch.diag_embed(penalty.mean(1)).to(blocks.dtype)
        return WindowInverse(torch.linalg.inv(blocks), self.sums, self.count, free)


def has_window_moments(layer: LinearMap, inputs: Sequence[Tensor]) -> bool:
    """Whether `WindowMoments` are known for inputs of a layer, those of other ranks too."""
    return not agreed("" if all(layer.spectra(x) is not None for x in inputs) else "an input has no spectra")


@dataclass(slots=True)
class WindowInverse:
    """The inverse of moments, as a product with what has features.

    Attributes:
        blocks: by frequency, shape ``(entries // 2 + 1, channels, channels)``.
        sums: of the windows, shape ``(channels, entries)``.
        count: of windows.
        free: whether the intercept is part of it.
    """

    blocks: Tensor
    sums: Tensor
    count: float
    free: bool

    def __call__(self, matrix: Tensor) -> Tensor:
        """The product with a matrix ``(features, outputs)``, without the intercept."""
        by_channel = matrix.reshape(*self.sums.shape, -1)
        spectra = torch.fft.rfft(by_channel.permute(0, 2, 1)).permute(2, 0, 1)  # (frequencies, channels, outputs)
        spectra = (self.blocks.to(spectra.dtype) @ spectra).permute(1, 2, 0)
        return torch.fft.irfft(spectra, self.sums.shape[1]).transpose(1, 2).reshape(matrix.shape)

    def with_intercept(self, matrix: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        """The product with a matrix and the row of the intercept behind it, shape ``(outputs,)``."""
        if not self.free:
            return self(matrix), shift
        sums = self.sums.flatten().to(matrix.dtype)
        solved = self(matrix - torch.outer(sums, shift) / self.count)
        return solved, (shift - sums @ solved) / self.count


def _add_blocks(blocks: Tensor, spectra: Spectra, x: Tensor) -> None:
    """Add the blocks of the circulant matrix that is nearest to the moments of all windows that meet the input.

    The matrix has the mean of the Toeplitz matrix along each of its periodic diagonals, which weights correlations at a
    distance of ``l`` entries by ``1 - l / entries``. So each block is a sum of the moments of all frequencies of a
    longer transform, weighted by Fejer's kernel.
    """
    entries = prod(spectra.kernel)
    longer = replace(spectra, period=fast_period(spectra.steps + (entries - 1) * spectra.dilation))
    lines, period = longer.of_lines(x), longer.period
    here = torch.arange(len(lines), dtype=torch.float64, device=x.device) / period * spectra.dilation
    there = torch.arange(len(blocks), dtype=torch.float64, device=x.device) / entries
    twice = torch.full_like(here, 1.0)
    twice[0] = twice[-1] = 0.0  # the others stand for the negative frequencies too
    positive, negative = (_fejer(here * sign + there[:, None], entries) / period for sign in (1, -1))
    negative = negative * twice
    for some in torch.arange(len(lines), device=x.device).split(max(1, CHUNK // blocks[0].numel())):
        moments = (lines[some].mH @ lines[some]).to(blocks.dtype).flatten(1)
        parts = positive[:, some].to(blocks.dtype) @ moments + negative[:, some].to(blocks.dtype) @ moments.conj()
        blocks += parts.view(blocks.shape)


def _fejer(at: Tensor, entries: int) -> Tensor:
    """The sum of ``(1 - |l| / entries) exp(2 pi i l at)`` over ``|l| < entries``."""
    distance = torch.arange(1, entries, dtype=at.dtype, device=at.device)
    waves = torch.cos(2 * pi * at[..., None] * distance)
    return 1 + 2 * waves @ (1 - distance / entries)


def _window_totals(spectra: Spectra, lines: Tensor) -> Tensor:
    """The sum of all windows of lines ``(lines, channels, steps)``, shape ``(channels, entries)``, in float64."""
    total = lines.sum(0, dtype=torch.float64)
    starts = torch.arange(prod(spectra.kernel), device=lines.device) * spectra.dilation
    behind = spectra.results + int(starts[-1]) - spectra.steps - spectra.before
    running = F.pad(F.pad(total, (spectra.before, behind)).cumsum(1), (1, 0))
    return running[:, starts + spectra.results] - running[:, starts]
