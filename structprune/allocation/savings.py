"""What removing a single channel saves, as a share of the whole model: the divisor of the scope ``"per_cost"``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from torch import Tensor, nn

from structprune.graph import ChannelGraph
from structprune.groups import Group
from structprune.importance.compose import macs_of_channels


def savings(graph: ChannelGraph, kinds: Iterable[str], tensors: Mapping[str, Tensor]) -> dict[Group, float]:
    """For each group, what one of its channels saves alone, on average over its channels and over `kinds`.

    Args:
        graph: the coupled channels.
        kinds: of ``"macs"``, ``"params"``, ``"memory"`` (that of the weights) and ``"channels"``; shares of the
            model's amounts, so that several kinds can be added.
        tensors: the tensors of the model by name.
    """
    groups = graph.groups()
    found = np.zeros(len(groups))
    for kind in kinds:
        if kind == "macs":
            macs = macs_of_channels(graph).numpy()
            found += [macs[group.components].mean() for group in groups]
        elif kind == "channels":
            found += 1 / sum(group.channels for group in groups)
        else:
            total = sum(tensor.numel() for tensor in tensors.values() if isinstance(tensor, nn.Parameter))
            found += [_entries(group, tensors) / max(1, total) for group in groups]
    return dict(zip(groups, found.tolist(), strict=True))


def _entries(group: Group, tensors: Mapping[str, Tensor]) -> float:
    """Entries of parameters that go with one channel; those in several dimensions of the group count once for each."""
    held = [(m, tensors[m.tensor]) for m in group.members if isinstance(tensors[m.tensor], nn.Parameter)]
    return sum(len(m.positions) * t.numel() / max(1, t.shape[m.dim]) for m, t in held) / max(1, group.channels)
