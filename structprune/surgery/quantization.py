"""Fake quantization held still, while the functions of two models are compared."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from structprune.wrapping import class_names

_FAKE = "torch.ao.quantization.fake_quantize.FakeQuantizeBase"


@contextmanager
def fake_quantization_off(*models: nn.Module) -> Generator[None]:
    """While the block runs, modules of fake quantization pass on what they get, and observe nothing.

    They round: the last bit of a sum, which depends on how many terms it has, would become a whole step.
    """
    switches: list[tuple[Tensor, Tensor]] = []
    for model in models:
        for module in model.modules():
            if _FAKE in class_names(module):
                found = (module.get_buffer("fake_quant_enabled"), module.get_buffer("observer_enabled"))
                switches += [(switch, switch.clone()) for switch in found]
    try:
        with torch.no_grad():
            for switch, _ in switches:
                switch.zero_()
        yield
    finally:
        with torch.no_grad():
            for switch, before in switches:
                switch.copy_(before)
