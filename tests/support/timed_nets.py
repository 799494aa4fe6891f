"""Networks that write down how they are called, or take a known time."""

from __future__ import annotations

import gc
import time

import torch
from torch import nn

# Timing alone: nothing is measured or explained beside it.
ALONE = {"memory": False, "explanations": False}


class Recorder(nn.Module):
    """Writes down each call and the conditions under which it came."""

    def __init__(self, name="model", log=None):
        super().__init__()
        self.name = name
        self.log = [] if log is None else log
        self.drop = nn.Dropout()

    def forward(self, x, **more):
        self.log.append(
            {
                "name": self.name,
                "training": self.training or self.drop.training,
                "gradients": torch.is_grad_enabled(),
                "threads": torch.get_num_threads(),
                "shape": tuple(x.shape),
                "collector": gc.isenabled(),
                "more": {name: tuple(value.shape) for name, value in more.items()},
            }
        )
        return self.drop(x)


class Sleeper(nn.Module):
    """Takes a known time."""

    def __init__(self, seconds):
        super().__init__()
        self.seconds = seconds

    def forward(self, x):
        time.sleep(self.seconds)
        return x
