"""Batch norms behind a layer: what they do to each channel, and did with the statistics that they were given with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from structprune.forwards.parallel_forward import Pause
from structprune.ops.arguments import arguments, bind

# What is done to each channel, in float64: a factor and a shift, each of shape ``(channels,)``.
Affine = tuple[Tensor, Tensor]


def uses_batch_statistics(training: Any, variance: Any) -> bool:
    """Whether a batch norm with these arguments takes its statistics from the batch."""
    return variance is None or bool(training)


def norm_scale(variance: Tensor, eps: float | None, weight: Tensor | None) -> Tensor:
    """What a batch norm multiplies each channel by, in float64: 3 / 2 with variance 4, weight 3 and no `eps`."""
    scale = (variance.double() + (1e-5 if eps is None else float(eps))).rsqrt()
    return scale if weight is None else scale * weight.double()


def names_of_statistics(norm: fx.Node) -> tuple[str, ...]:
    """The names of mean and variance of a batch norm; empty for one that holds none."""
    known = [arguments(norm).get(key) for key in ("running_mean", "running_var")]
    return tuple(str(node.target) for node in known if isinstance(node, fx.Node))


class NormsBehind:
    """The batch norms between a layer and its target, followed while the batches pass.

    Args:
        nodes: the norms, in the order of the forward.
        given: the tensors that the pruned model was given with, by name; norms may have new statistics since.

    Attributes:
        refused: why the layer cannot be solved; empty if it can.
    """

    def __init__(self, nodes: Sequence[fx.Node], given: Mapping[str, Tensor]) -> None:
        self._names = {node.meta["index"]: names_of_statistics(node) for node in nodes}
        self._given = given
        self._at_hand: Affine | None = None
        self._as_given: Affine | None = None
        self.refused = ""

    def observe(self, number: int, pause: Pause) -> None:
        """Follow the norm of this number, which is about to run."""
        norm = bind("batch_norm", None, pause.args, pause.kwargs)
        assert norm is not None
        if uses_batch_statistics(norm["training"], norm["running_var"]):
            self.refused = "the batch norm behind it takes its statistics from the batch"
            return
        at_hand: list[Tensor] = [norm["running_mean"], norm["running_var"]]
        as_given = [self._given.get(name, known) for name, known in zip(self._names[number], at_hand, strict=True)]
        self._at_hand = _behind(self._at_hand, at_hand, norm)
        self._as_given = _behind(self._as_given, as_given, norm)

    @property
    def scale(self) -> Tensor | None:
        """What all of them multiply each channel by, shape ``(channels,)``; None where there are none."""
        return None if self._at_hand is None else self._at_hand[0]

    def back_to_given(self, matrix: Tensor, bias: Tensor | None) -> Tensor | None:
        """The change of the result behind the norms that gives them back the statistics that they were given with.

        With new statistics a layer loses what it computes right already, and where data are few only a part of that is
        solved for again. Where a norm takes ``x`` to ``3 x + 2`` and took it to ``2 x``, the change is minus the layer,
        and minus 2.

        Args:
            matrix: of the layer, shape ``(groups, features, outputs)``.
            bias: of the layer, shape ``(channels,)``.

        Returns:
            Shape ``(groups, features + 1, outputs)``, the constant last; None where no statistics are new.
        """
        if self._at_hand is None or self._as_given is None:
            return None
        if all(torch.equal(new, old) for new, old in zip(self._at_hand, self._as_given, strict=True)):
            return None
        factor, shift = (old - new for new, old in zip(self._at_hand, self._as_given, strict=True))
        shift = shift if bias is None else shift + factor * bias.double()
        groups, _, outputs = matrix.shape
        factor, shift = (each.reshape(groups, 1, outputs) for each in (factor, shift))
        return torch.cat([matrix.double() * factor, shift], 1)


def _behind(before: Affine | None, statistics: Sequence[Tensor], norm: Mapping[str, Any]) -> Affine:
    """What a batch norm with these statistics makes of what was done before it.

    With mean 1, variance 4, weight 6, bias 5 and no epsilon it takes ``x`` to ``3 x + 2``.
    """
    mean, variance = statistics
    factor = norm_scale(variance, norm["eps"], norm["weight"])
    shift = -mean.double() * factor
    shift = shift if norm["bias"] is None else shift + norm["bias"].double()
    return (factor, shift) if before is None else (factor * before[0], factor * before[1] + shift)
