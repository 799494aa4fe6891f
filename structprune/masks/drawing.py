"""Pictures of masks, saliencies and zeros with Matplotlib."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from structprune.extras import matplotlib_figure, save_figure

# Matrices of more rows or columns are drawn as means over blocks.
MOST = 512
ACROSS = 4


def draw_matrices(tensors: Mapping[str, Tensor], path: str | os.PathLike[str]) -> Path:
    """Draw each tensor as a matrix, its first dimension down and the others, one after the other, across.

    Args:
        tensors: floating, by name.
        path: the file to write.

    Raises:
        MissingExtraError: Matplotlib is not installed.
    """
    across = max(1, min(ACROSS, len(tensors)))
    down = max(1, math.ceil(len(tensors) / across))
    figure = matplotlib_figure((2.6 * across, 2.4 * down))
    panels = figure.subplots(down, across, squeeze=False).reshape(-1)
    for panel in panels[len(tensors) :]:
        panel.set_axis_off()
    for panel, (name, tensor) in zip(panels, tensors.items(), strict=False):
        panel.imshow(_small(tensor), cmap="Blues", aspect="auto", interpolation="nearest", vmin=0)
        panel.set_title(f"{name} {list(tensor.shape)}", fontsize=7)
        panel.tick_params(labelsize=6)
    return save_figure(figure, path, 150)


def draw_shares(shares: Sequence[tuple[str, float]], label: str, path: str | os.PathLike[str]) -> Path:
    """Draw a bar from 0 to 100% for each name.

    Raises:
        MissingExtraError: Matplotlib is not installed.
    """
    figure = matplotlib_figure((5.0, 0.8 + 0.22 * len(shares)))
    panel = figure.subplots()
    names = [name for name, _ in shares]
    panel.barh(names, [100 * share for _, share in shares], color="#2a62c9", height=0.7)
    panel.invert_yaxis()
    panel.set_xlim(0, 100)
    panel.set_xlabel(label, fontsize=8)
    panel.tick_params(labelsize=7)
    panel.spines[["top", "right"]].set_visible(False)
    return save_figure(figure, path, 150)


def _small(tensor: Tensor) -> object:
    matrix = tensor.detach().float().cpu()
    matrix = matrix.flatten(1) if matrix.dim() > 1 else matrix.reshape(1, -1)
    if matrix.numel() and max(matrix.shape) > MOST:
        matrix = adaptive_avg_pool2d(matrix[None, None], [min(size, MOST) for size in matrix.shape])[0, 0]
    return matrix.numpy()
