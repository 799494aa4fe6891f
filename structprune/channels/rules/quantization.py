"""Observers and fake quantization: what torch.ao.quantization puts into a model that is prepared for it.

Each is taken as a whole. What comes out are the channels that went in, zero where they were zero, since zero is always
represented exactly. Their statistics of single channels go with the channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.ao.quantization import fake_quantize, observer

from structprune.channels.relations import Rows
from structprune.channels.rules.opaque import Leaf, register_module_rule
from structprune.channels.rules.table import Context, Operand

_KINDS: tuple[type[nn.Module], ...] = (
    observer.MinMaxObserver, observer.MovingAverageMinMaxObserver, observer.PerChannelMinMaxObserver,
    observer.MovingAveragePerChannelMinMaxObserver, observer.HistogramObserver, observer.PlaceholderObserver,
    observer.NoopObserver, observer.FixedQParamsObserver, observer.ReuseInputObserver, fake_quantize.FakeQuantize,
    fake_quantize.FusedMovingAvgObsFakeQuantize, fake_quantize.FixedQParamsFakeQuantize,
)  # fmt: skip
_PER_CHANNEL = ("scale", "zero_point", "min_val", "max_val")


def _same(_: nn.Module, x: Any) -> Any:
    return torch.empty_like(x)


def _quantization(c: Context, m: Leaf, x: Operand) -> Rows:
    parts = [m, m.activation_post_process] if hasattr(m, "activation_post_process") else [m]
    axis: int = getattr(m, "ch_axis", -1)
    for part in parts:
        for name in _PER_CHANNEL:
            statistic = getattr(part, name, None)
            # A single number, or one a channel; before the first forward there may be none.
            if isinstance(statistic, Operand) and statistic.rows and statistic.rows[0].size > 1:
                c.same(x.rows[axis], statistic.rows[0])
    c.keeps_zeros(x)
    return x.rows


for _kind in _KINDS:
    register_module_rule(_kind, shape=_same)(_quantization)
