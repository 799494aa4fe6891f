"""Equations of a layer over whole samples, in place of some positions, which for many features costs less."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from structprune.distributed import all_reduced
from structprune.equations.least_squares import NormalEquations
from structprune.equations.linear_maps import LinearMap
from structprune.equations.window_equations import WindowEquations
from structprune.equations.windows import window_sums
from structprune.recovery.candidates import A_FIFTH, HeldOut

# Inputs of one size, and what the results lack of the goal.
Pairs = list[tuple[Tensor, Tensor]]


def whole_samples(
    layer: LinearMap,
    rows: int,
    held_out: HeldOut,
    inputs: Sequence[Tensor],
    ours: Sequence[Tensor],
    goals: Sequence[Tensor],
) -> tuple[Pairs, Pairs, float]:
    """What to solve on, what to choose the ridge by, and the power of the goal on the latter, of all ranks.

    As many samples of each batch as hold `rows` positions: the first, and of those held out the last. Batches of like
    samples are joined.

    Args:
        layer: the layer.
        rows: positions of the batches of all ranks together.
        held_out: samples that are not solved on.
        inputs: of each batch.
        ours: the results.
        goals: what they are to be.
    """
    alike: tuple[dict[Any, Pairs], ...] = {}, {}
    power = torch.zeros((), dtype=torch.float64, device=ours[0].device)
    for number, (x, result, goal) in enumerate(zip(inputs, ours, goals, strict=True)):
        count = held_out.solved_on(number, len(result))
        wanted = -(-rows // (held_out.turns.count * layer.positions(result[:1])))
        used = min(count, max(2, wanted))
        held = max(1, used // A_FIFTH) if used > 1 else 0
        for part, at in zip(alike, (slice(0, used - held), slice(count - held, count)), strict=True):
            part.setdefault(x.shape[1:], []).append((x[at], goal[at] - result[at]))
        power += goal[count - held : count].double().square().sum()
    train, rest = (
        [(torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs])) for pairs in part.values()]
        for part in alike
    )
    return train, rest, float(all_reduced(power))


def iterative_equations(layer: LinearMap, pairs: Pairs, intercept: bool) -> WindowEquations:
    """Equations that are solved by conjugate gradients."""
    return WindowEquations.of(layer, [x for x, _ in pairs], [y for _, y in pairs], intercept)


def exact_equations(layer: LinearMap, pairs: Pairs, intercept: bool) -> NormalEquations:
    """Equations with all second moments, from `windows.window_sums`."""
    features = layer.features + intercept
    sums = NormalEquations.zeros(layer.groups, features, layer.outputs, pairs[0][0].device)
    for x, lacks in pairs:
        if len(x):
            xx, xy = window_sums(layer, x, lacks)
            yy = lacks.double().square().movedim(1, 0).flatten(1).sum(1)
            sums.add_products(xx[:features, :features], xy[:features], yy)
    sums.reduce()
    return sums
