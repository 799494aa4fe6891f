"""Random networks with random masks: the compacted one computes what the masked one computes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import oracle
from support.cases import normal
from support.random_network import SIZE, RandomNetwork, chains, heads
from torch import nn
from torch.nn.utils import prune

from structprune import masks

NETWORKS = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@NETWORKS
@given(chains(), heads(), st.integers(0, 999), st.sampled_from((0.3, 0.6, 0.9)), st.booleans())
def test_masked_networks(chain: Sequence[Any], head: str, seed: int, amount: float, structured: bool) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model = RandomNetwork(chain, head)
    oracle.jitter(model, seed)
    model = model.double().eval()
    for module in [m for m in model.modules() if isinstance(m, (nn.modules.conv._ConvNd, nn.Linear))]:
        if structured and len(module.weight) > 1:
            prune.random_structured(module, "weight", amount, dim=0)
        else:
            prune.random_unstructured(module, "weight", amount)
    slim = masks.compact(model, normal(2, 3, SIZE, SIZE, seed=seed).double())
    x = normal(2, 3, SIZE, SIZE, seed=seed + 1).double()
    with torch.no_grad():
        wanted, got = model(x), slim(x)
    assert torch.allclose(wanted, got, rtol=1e-10, atol=1e-10 * max(1.0, float(wanted.abs().max())))
