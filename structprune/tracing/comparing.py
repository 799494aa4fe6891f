"""What a rehearsal looks at: arguments that must be the same again, and layers that need no look."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal
from fractions import Fraction
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks

from structprune.tracing.provenance import OWN_DIRECTORY, TORCH_DIRECTORY


def known_layer(module: nn.Module) -> bool:
    """Whether `module` is a layer of torch as torch made it, without others in it and without hooks."""
    state = module.__dict__
    return (
        type(module).__module__.startswith("torch.nn.modules.")
        and not state["_modules"]
        and "forward" not in state
        and not (state["_forward_hooks"] or state["_forward_pre_hooks"])
        and not (hooks._global_forward_hooks or hooks._global_forward_pre_hooks)
    )


def items(value: Any) -> Sequence[Any]:
    """What a container in the arguments of a call holds."""
    if isinstance(value, slice):
        return value.start, value.stop, value.step
    if isinstance(value, dict):
        return [*value, *value.values()]
    return value if isinstance(value, (tuple, list)) else ()


def alike(recorded: Any, now: Any) -> bool:
    """Whether an argument that is no tensor, number or container is the same; what cannot be compared is."""
    if isinstance(recorded, np.ndarray):
        return np.array_equal(recorded, now)
    return recorded == now if isinstance(recorded, (bool, np.bool_, complex, str, torch.dtype, type(None))) else True


def is_number(value: Any) -> TypeGuard[float]:
    """Whether an argument is a real number, of Python, its ``fractions`` and ``decimal``, or NumPy."""
    return isinstance(value, (int, float, Fraction, Decimal, np.integer, np.floating)) and not isinstance(value, bool)


def raised_at(error: BaseException) -> str:
    """The innermost line outside torch and this library that `error` came through."""
    line, step = "unknown line", error.__traceback__
    while step is not None:
        name = step.tb_frame.f_code.co_filename
        if not name.startswith((TORCH_DIRECTORY, OWN_DIRECTORY, "<")):
            line = f"{name}:{step.tb_lineno}"
        step = step.tb_next
    return line


def equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same, NaN being the same as 0 here."""
    return a.shape == b.shape and bool(torch.equal(torch.nan_to_num(a), torch.nan_to_num(b)))
