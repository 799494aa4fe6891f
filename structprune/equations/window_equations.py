"""Least squares over all windows of a convolution with a long kernel, without a matrix of their second moments.

A layer with 8,192 features has 67 million second moments, and to factor them takes 180 billion products; that for each
ridge that is tried. Conjugate gradients need their product with a solution alone, which is a convolution and its
adjoint: by `fourier` these take a few hundredths of what a pass over the data takes. With the inverse of
`window_moments` in front some ten steps are enough. Every output is solved by itself, with steps of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from structprune.distributed import all_reduced
from structprune.equations.fourier import Spectra
from structprune.equations.linear_maps import LinearMap
from structprune.equations.window_moments import WindowMoments

# Conjugate gradients end after so many steps, one behind the other, that lower the error by less than this share of it.
SMALL_STEPS, ENOUGH, MOST_STEPS = 2, 3e-3, 64


@dataclass(frozen=True, slots=True)
class WindowSamples:
    """Samples of like size: the input of a layer, and what its result lacks.

    Attributes:
        spectra: how the layer is computed on them.
        lines: spectra of the input, shape ``(frequencies, lines, channels)``.
        targets: what is lacking along each line, shape ``(lines, outputs, results)``.
    """

    spectra: Spectra
    lines: Tensor
    targets: Tensor

    @classmethod
    def of(cls, layer: LinearMap, x: Tensor, lacks: Tensor) -> WindowSamples:
        """From the input ``(batch, channels, *sizes)`` and what is lacking, in the shape of the result."""
        spectra = layer.spectra(x)
        assert spectra is not None
        return cls(spectra, spectra.of_lines(x), spectra.lines(lacks))

    def results(self, weight: Tensor) -> Tensor:
        """What the layer makes of them, in the shape of the targets."""
        return self.spectra.steps_of(self.lines @ self.spectra.of_kernel(weight), self.spectra.results)

    def to_weight(self, grad: Tensor) -> Tensor:
        """The adjoint: from the shape of the targets to that of the weight."""
        return self.spectra.as_weight(self.lines.mH @ self.spectra.of_steps(grad))


@dataclass(slots=True)
class WindowEquations:
    """What `least_squares.fit` needs of the windows of some samples: see `least_squares.NormalEquations`.

    Attributes:
        layer: the convolution.
        samples: of this rank.
        moments: of their windows, of all ranks; and so are the others.
        xy: sum of ``x y^T``, with the intercept last where there is one; shape ``(1, features, outputs)``.
        yy: sum of ``y ** 2``, shape ``(1, outputs)``.
        near: a solution that is not far from the one to come, in the shape of `xy`.
    """

    layer: LinearMap
    samples: list[WindowSamples]
    moments: WindowMoments
    xy: Tensor
    yy: Tensor
    near: Tensor

    @classmethod
    def of(
        cls, layer: LinearMap, inputs: Sequence[Tensor], lacks: Sequence[Tensor], intercept: bool
    ) -> WindowEquations:
        """From inputs of a layer of this rank and what its results lack.

        Args:
            layer: a convolution that has `LinearMap.spectra` for the inputs.
            inputs: each of shape ``(batch, channels, *sizes)``.
            lacks: in the shapes of the results.
            intercept: whether a constant is solved for, too.
        """
        samples = [WindowSamples.of(layer, x, y) for x, y in zip(inputs, lacks, strict=True)]
        xy = torch.zeros(1, layer.features + intercept, layer.outputs, dtype=torch.float64, device=inputs[0].device)
        return cls(layer, samples, WindowMoments.of(layer, inputs), xy, xy[:, 0], xy)._summed()

    def _summed(self) -> WindowEquations:
        """The same with the sums of the targets that its samples have, all else as it is."""
        features = self.layer.features
        xy, yy = torch.zeros_like(self.xy), torch.zeros_like(self.yy)
        for each in self.samples:
            xy[:, :features] += self.layer.matrix_of(each.to_weight(each.targets))
            if xy.shape[1] > features:
                xy[:, -1] += each.targets.sum((0, 2), dtype=torch.float64)
            yy += each.targets.square().sum((0, 2), dtype=torch.float64)
        return replace(self, xy=all_reduced(xy), yy=all_reduced(yy), near=torch.zeros_like(xy))

    def plus(self, other: WindowEquations) -> WindowEquations:
        """The equations of the windows of both."""
        samples, moments = [*self.samples, *other.samples], self.moments.plus(other.moments)
        return WindowEquations(self.layer, samples, moments, self.xy + other.xy, self.yy + other.yy, self.near)

    def of_outputs(self, number: int) -> WindowEquations:
        """The same for so many of the outputs, evenly spaced: 0, 3, 6, 9 for 4 of 12."""
        outputs = self.xy.shape[2]
        if outputs <= number:
            return self
        chosen = torch.arange(number, device=self.xy.device) * outputs // number
        shape = (number, *self.layer.weight_shape[1:])
        samples = [replace(each, targets=each.targets[:, chosen]) for each in self.samples]
        layer = replace(self.layer, weight_shape=shape)
        of_xy = self.xy[..., chosen]
        return WindowEquations(layer, samples, self.moments, of_xy, self.yy[..., chosen], self.near[..., chosen])

    def about(self, center: Tensor) -> WindowEquations:
        """The same with ``y - center^T x`` in place of `y`; `center` has the shape of `xy`."""
        samples = [replace(each, targets=self._missing(each, center)) for each in self.samples]
        return replace(self, samples=samples)._summed()

    def error(self, solution: Tensor) -> Tensor:
        """Sum of ``(y - solution^T x) ** 2`` by group and output, shape ``(1, outputs)``."""
        total = torch.zeros_like(self.yy)
        for each in self.samples:
            total += self._missing(each, solution).square_().sum((0, 2), dtype=torch.float64)
        return all_reduced(total)

    def solve(self, ridge: float, free: int) -> Tensor | None:
        """About the minimiser that `least_squares.NormalEquations.solve` gives.

        The constant follows from the rest: it is what the mean lacks. None where there are no windows, or it is not
        finite.
        """
        if not self.moments.count:
            return None
        dtype = self.samples[0].targets.dtype
        penalty = self.moments.penalty(ridge, bool(free))
        inverse = self.moments.inverse(penalty, bool(free))
        penalties = penalty.to(dtype).view(-1, 1)
        sums, count = self.moments.sums.flatten(), self.moments.count
        constants = self.xy[0, -1] / count if free else torch.zeros_like(self.yy[0])
        right = self._parts(self.xy)[0] - torch.outer(sums, constants)
        size = self.yy.sum() - count * constants.square().sum()

        def product(matrix: Tensor) -> Tensor:
            means = sums.to(dtype) @ matrix / count if free else None
            result = torch.zeros_like(matrix)
            for each in self.samples:
                moved = self._results(each, matrix)
                moved = moved if means is None else moved.sub_(means[:, None])
                result += self.layer.matrix_of(each.to_weight(moved))[0]
            return all_reduced(result) + penalties * matrix

        start = self._parts(self.near)[0].to(dtype)
        matrix = _conjugate_gradients(product, inverse, right.to(dtype), start, float(size)).double()
        if not bool(torch.isfinite(matrix).all()):
            return None
        last = (constants - sums @ matrix / count)[None]
        self.near = torch.cat([matrix, last])[None] if free else matrix[None]
        return self.near

    def _parts(self, solution: Tensor) -> tuple[Tensor, Tensor]:
        """The matrix of a solution, and its last row, or zeros where there is no intercept."""
        features = self.layer.features
        matrix = solution[0, :features]
        return matrix, solution[0, -1] if solution.shape[1] > features else torch.zeros_like(self.yy[0])

    def _missing(self, samples: WindowSamples, solution: Tensor) -> Tensor:
        """What a solution leaves of the targets of some samples, in their shape."""
        matrix, shift = self._parts(solution)
        return samples.targets - self._results(samples, matrix) - shift.to(samples.targets.dtype)[:, None]

    def _results(self, samples: WindowSamples, matrix: Tensor) -> Tensor:
        return samples.results(self.layer.weight_of(matrix[None].to(samples.targets.dtype)))


def _conjugate_gradients(
    product: Callable[[Tensor], Tensor],
    inverse: Callable[[Tensor], Tensor],
    right: Tensor,
    start: Tensor,
    size: float,
) -> Tensor:
    """About the solution of ``product(x) = right``, every column by itself; inner products in float64.

    Args:
        product: a symmetric positive definite matrix times a matrix.
        inverse: the preconditioner, times a matrix.
        right: shape ``(unknowns, columns)``.
        start: in the same shape.
        size: the squared error where `x` is zero. It falls to ``size - 2 (x right) + (x product(x))``.
    """
    x, residual = start, right - product(start)
    left = size - float(_dots(x, right + residual).sum())
    direction = preconditioned = inverse(residual)
    sizes = _dots(residual, preconditioned)
    small = 0
    for _ in range(MOST_STEPS):
        image = product(direction)
        curvatures = _dots(direction, image)
        going = (curvatures > 0) & (sizes > 0)
        lengths = torch.where(going, sizes / curvatures, 0.0)
        gain = float((lengths * sizes).sum())
        left -= gain
        x = x + lengths.to(x.dtype) * direction
        residual = residual - lengths.to(x.dtype) * image
        small = small + 1 if gain <= ENOUGH * left else 0
        if small == SMALL_STEPS or not bool(going.any()):
            break
        preconditioned = inverse(residual)
        new_sizes = _dots(residual, preconditioned)
        direction = preconditioned + torch.where(going, new_sizes / sizes, 0.0).to(x.dtype) * direction
        sizes = new_sizes
    return x


def _dots(one: Tensor, other: Tensor) -> Tensor:
    """Inner products of columns."""
    return (one.double() * other.double()).sum(0)
