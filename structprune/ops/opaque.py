"""Rules for modules that the tracer does not look into."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from structprune.errors import RuleError
from structprune.ops.context import Context, Operand, call_watched, operands_in
from structprune.ops.op import OPS, Coupling, Result, register_op
from structprune.ops.relations import Axes
from structprune.tracing.opaque import OPAQUE, SCRIPTED, Opaque


@register_op(SCRIPTED.name)
def scripted(c: Context, *args: Any, **kwargs: Any) -> Result:
    """Nobody sees which channels a scripted module relates: those of its tensors and arguments stay."""
    return c.pin_all(list(operands_in(args, kwargs)), f"it belongs to compiled TorchScript, called in {c.where()}")


class Leaf:
    """An opaque module as its rule sees it.

    Attributes are those of the module, children included (``m.proj.weight``), but tensors are operands with axes, and
    ints are tracked: what ``c.expect`` ties to an axis is repaired in the pruned model.
    """

    def __init__(
        self, module: nn.Module, tensors: dict[str, Operand], numbers: dict[str, Any], prefix: str = ""
    ) -> None:
        self._module, self._tensors, self._numbers, self._prefix = module, tensors, numbers, prefix

    def __getattr__(self, name: str) -> Any:
        """A tensor's operand, a tracked int, a child's view, or whatever else the module has under this name."""
        full = self._prefix + name
        if full in self._tensors:
            return self._tensors[full]
        if full in self._numbers:
            return self._numbers[full]
        value = getattr(self._module, name)
        return Leaf(value, self._tensors, self._numbers, f"{full}.") if isinstance(value, nn.Module) else value


def register_module_rule(
    kind: type[nn.Module], shape: Callable[..., Any] | None = None
) -> Callable[[Coupling], Coupling]:
    """Declare that modules of class `kind` are taken as a whole, by the decorated rule.

    Use it for a module whose forward the tracer cannot see: a Triton or CUDA kernel, NumPy, another library.

    Args:
        kind: the class; subclasses that inherit its forward are meant too.
        shape: ``shape(module, *args, **kwargs)`` gives empty results of the right shapes, from arguments and parameters
            on the ``meta`` device. Without it the forward itself runs, on ``meta`` if it can, else on real values.

    Returns:
        A decorator for ``rule(c, m, *args, **kwargs)``. `m` is the module with operands for tensors; tensor arguments
        are operands too. It returns the axes of the result (a list of axes for a tuple of results). Dimensions of the
        module's tensors and of its arguments that it never asks for stay whole. What the module sums, sorts or
        normalises over without weights of its own must be pinned: ``c.pin(axis, reason)``.

    Raises:
        RuleError: `kind` is no class of modules, or has a rule already.

    Example:
        >>> import torch, structprune
        >>> class Kernel(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.weight = torch.nn.Parameter(torch.randn(8, 4))
        ...
        ...     def forward(self, x):
        ...         return torch.from_numpy(x.numpy() @ self.weight.detach().numpy().T)
        >>> @structprune.register_module_rule(Kernel, shape=lambda m, x: x.new_empty(len(x), m.weight.shape[0]))
        ... def kernel(c, m, x):
        ...     c.same(x.axes[1], m.weight.axes[1])
        ...     return (x.axes[0], m.weight.axes[0])
        >>> model = torch.nn.Sequential(Kernel(), torch.nn.Linear(8, 2))
        >>> slim = structprune.prune(model, torch.randn(1, 4), ratio=0.5)
        >>> slim[0].weight.shape
        torch.Size([4, 4])
    """
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise RuleError(f"kind is {kind!r}, not a class of modules. Give the class itself.")
    if kind in OPAQUE:
        raise RuleError(f"{kind.__name__} has a rule already. A class has one rule: change that one.")
    name = f"module.{kind.__module__}.{kind.__qualname__}"
    # Local classes, and those of a notebook's cell that runs twice, share their name.
    opaque = Opaque(name if name not in OPS else f"{name} {len(OPAQUE)}", kind, shape)

    def register(function: Coupling) -> Coupling:
        def whole(c: Context, tensors: Any, numbers: Any, *args: Any, **kwargs: Any) -> Result:
            def seen(c: Context, tensors: Any, *args: Any, **kwargs: Any) -> Result:
                return function(c, Leaf(c.node.meta["module"], tensors, numbers), *args, **kwargs)

            return call_watched(c, seen, (tensors, *args), kwargs, kind.__name__)

        whole.__module__, whole.__qualname__ = function.__module__, function.__qualname__
        register_op(opaque.name)(whole)
        OPAQUE[kind] = opaque
        return function

    return register


# -- observers and fake quantization: what torch.ao.quantization puts into a model that is prepared for it -----------
# Each is taken as a whole. What comes out are the channels that went in, zero where they were zero, since zero is
# always represented exactly. Their statistics of single channels go with the channels.

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
