"""torch-pruning's ``save``, ``load``, ``state_dict`` and ``load_state_dict``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from structprune.planning.plan import Plan, plans_of, replay

save, load = torch.save, torch.load


def state_dict(model: nn.Module) -> dict[str, Any]:
    """Tensors and plans of a pruned model: enough to make it again from the model as it was built; no pickled code."""
    return {"tensors": model.state_dict(), "plans": [plan.to_json() for plan in plans_of(model)]}


def load_state_dict(model: nn.Module, state_dict: Mapping[str, Any]) -> nn.Module:
    """Prune `model`, as it was built, like the model that `state_dict` came from, and load the tensors, in place."""
    replay(model, map(Plan.from_json, state_dict["plans"]))
    model.load_state_dict(state_dict["tensors"])
    return model
