"""Modules that the tracer does not look into: what users declare about their kernels.

Such a module becomes a single operation, named after its class, whose arguments are the tensors and ints that it holds,
followed by what it was called with. `structprune.ops.opaque` registers the rule that goes with it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.jit import ScriptModule

from structprune.tracing.provenance import SizeInt, plain
from structprune.tracing.state import held_tensors, join


@dataclass(frozen=True, slots=True)
class Opaque:
    """A class of modules that are taken as a whole.

    Attributes:
        name: the name of its operation.
        kind: the class.
        shape: gives, from the module and its arguments on the ``meta`` device, empty results of the right shape; None
            if the forward itself can do that.
    """

    name: str
    kind: type[nn.Module]
    shape: Callable[..., Any] | None


OPAQUE: dict[type[nn.Module], Opaque] = {}
# What scripted modules do is not seen, whatever they were made from.
SCRIPTED = Opaque("module.torchscript", ScriptModule, None)


def opaque_of(module: nn.Module) -> Opaque | None:
    """What was declared for the class of `module`, or for one whose forward it inherits."""
    if isinstance(module, ScriptModule):
        return SCRIPTED
    if not OPAQUE:
        return None
    kind = type(module)
    return next((OPAQUE[base] for base in kind.__mro__ if base in OPAQUE and kind.forward is base.forward), None)


def opaque_call(*args: Any, **kwargs: Any) -> Any:
    """Stands in graphs for the call of such a module; graphs call the module itself instead."""
    raise NotImplementedError("An opaque module is called through the module that holds it.")


def holdings(module: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the tracked ints of a module and its children, by dotted name."""
    tensors = {name: held.tensor for name, held in held_tensors(module).items()}
    numbers = {
        join(path, key): value
        for path, part in module.named_modules()
        for key, value in part.__dict__.items()
        if _tracked(value)
    }
    return tensors, numbers


def _tracked(value: Any) -> bool:
    if type(value) in (tuple, list):
        return any(_tracked(item) for item in value)
    return type(value) is SizeInt


@contextmanager
def untracked(module: nn.Module) -> Generator[None]:
    """While the block runs, the ints of a module are plain ones: what its forward does with them is not tracked."""
    before = [
        (part.__dict__, key, value)
        for part in module.modules()
        for key, value in part.__dict__.items()
        if _tracked(value)
    ]
    for state, key, value in before:
        state[key] = plain(value)
    try:
        yield
    finally:
        for state, key, value in before:
            state[key] = value
