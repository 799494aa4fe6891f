"""Observers and fake quantization: what torch.ao.quantization puts into a model that is prepared for it.

Each is taken as a whole. What comes out are the channels that went in, zero where they were zero, since zero is always
represented exactly. Their statistics of single channels go with the channels.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from structprune.ops.context import Context, Operand
from structprune.ops.opaque import Leaf, register_module_rule
from structprune.ops.relations import Axes

_KINDS = (
    "MinMaxObserver", "MovingAverageMinMaxObserver", "PerChannelMinMaxObserver",
    "MovingAveragePerChannelMinMaxObserver", "HistogramObserver", "PlaceholderObserver", "NoopObserver",
    "FixedQParamsObserver", "ReuseInputObserver", "FakeQuantize", "FusedMovingAvgObsFakeQuantize",
    "FixedQParamsFakeQuantize",
)  # fmt: skip
_PER_CHANNEL = ("scale", "zero_point", "min_val", "max_val")


def _same(_: nn.Module, x: Any) -> Any:
    return torch.empty_like(x)


def _quantization(c: Context, m: Leaf, x: Operand) -> Axes:
    parts = [m, m.activation_post_process] if hasattr(m, "activation_post_process") else [m]
    dim: int = getattr(m, "ch_axis", -1)
    for part in parts:
        for name in _PER_CHANNEL:
            statistic = getattr(part, name, None)
            # A single number, or one a channel; before the first forward there may be none.
            if isinstance(statistic, Operand) and statistic.axes and statistic.axes[0].size > 1:
                c.same(x.axes[dim], statistic.axes[0])
    c.keeps_zeros(x)
    return x.axes


# torch means to give this package up: then there is nothing to register.
if find_spec("torch.ao.quantization") is not None:
    _package = import_module("torch.ao.quantization")
    for _kind in _KINDS:
        register_module_rule(getattr(_package, _kind), shape=_same)(_quantization)
