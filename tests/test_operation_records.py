"""The records of operations: each can be reached, each says what it must, and equal spellings prune alike."""

from __future__ import annotations

import operator
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import oracle
from support.cases import normal
from torch import Tensor, nn
from torch.overrides import get_overridable_functions

import structprune
from structprune.errors import RuleError
from structprune.ops import OPS, op_of, register_op
from structprune.ops.arguments import bind
from structprune.tracing.vocabulary import call_of, canonical

# What torch hands to a mode but lists nowhere: a function of autograd's, and the setter of a property.
UNLISTED = {"_set_grad_enabled", "set_requires_grad", "set_data"}
OWN = sorted(name for name in OPS if "::" not in name and not name.startswith("module."))


def reachable() -> set[str]:
    """The canonical names of all functions that torch hands to a mode."""
    listed = [function for functions in get_overridable_functions().values() for function in functions]
    names = {call_of(function, op_of).name for function in listed}
    for space in (torch, torch.Tensor, torch._C._nn, torch._VF, torch._C._special, torch._C._fft, torch._C._linalg):
        for name in dir(space):
            function = getattr(space, name, None)
            if isinstance(function, (types.BuiltinFunctionType, types.MethodDescriptorType, types.FunctionType)):
                names.add(canonical(function.__name__)[0])
                names.add(f"python.{function.__name__}")
    names |= {f"python.{name}" for name in dir(F)} | {"getitem", "setitem"}
    return names | UNLISTED


def test_every_name_can_match() -> None:
    names = reachable()
    assert [name for name in OWN if name not in names and not hasattr(torch.ops.aten, name)] == []


@pytest.mark.parametrize("name", ["relu_", "__add__", "divide", "special_expit", "swapaxes"])
def test_a_name_that_is_never_called_is_refused(name: str) -> None:
    with pytest.raises(RuleError, match="No operation is ever called"):
        register_op(name)(lambda c, x: x.axes)


def test_a_fact_that_does_not_exist_is_refused() -> None:
    with pytest.raises(RuleError, match="An operation has no field 'zeroes'"):
        register_op("mylib::gate", zeroes=None)


@pytest.mark.parametrize("name", OWN)
def test_a_record_says_what_its_kind_must(name: str) -> None:
    op = OPS[name]
    assert op.own
    assert op.name == name
    if op.contraction is not None and op.contraction.kind not in ("embedding", "grouped"):
        assert op.macs is not None, "an operation that sums products costs something"
    if op.contraction is not None and op.contraction.input:
        schema = bind(name, None, *_example(op.contraction))
        assert schema is not None
        assert {op.contraction.input, op.contraction.weight} <= schema.keys()
    if op.views:
        assert not op.random or op.elementwise
    if op.moves:
        assert op.macs is None
        assert not op.random


def _example(contraction: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A call of a layer's operation with tensors alone."""
    named = [key for key in (contraction.input, contraction.weight, contraction.bias) if key]
    return (), {key: torch.zeros(2, 2) for key in named}


# -- equal spellings ---------------------------------------------------------------------------------------------------

Spelling = Callable[[Tensor], Tensor]
# Results of x: (3, 4, 8), whose last dimension are channels; each list is one function in several spellings.
SPELLINGS: dict[str, list[Spelling]] = {
    "clamp at zero": [
        lambda x: x.clamp(min=0), lambda x: x.clamp_min(0), lambda x: torch.clamp(x, 0), lambda x: F.relu(x),
        lambda x: x.clip(0), lambda x: x.clone().clamp_(0), lambda x: torch.clamp_min(x, min=0), torch.relu,
        lambda x: torch.where(x > 0, x, 0.0), lambda x: torch.threshold(x, 0, 0), lambda x: F.hardtanh(x, 0.0, 1e9),
    ],
    "flattened": [
        lambda x: x.reshape(-1).view(12, 8), lambda x: x.ravel().view(12, 8), lambda x: x.flatten().view(12, 8),
        lambda x: torch.flatten(x, 0, 1), lambda x: x.reshape(12, 8), lambda x: x.view(-1, 8),
        lambda x: x.reshape(shape=(12, 8)), lambda x: x.view(torch.Size([12, 8])), lambda x: x.flatten(end_dim=1),
        lambda x: torch.reshape(x, [12, -1]), lambda x: x.view(size=(12, 8)),
    ],
    "another type and back": [
        lambda x: x.to(torch.float32).to(torch.float64), lambda x: x.type(torch.float32).type(torch.float64),
        lambda x: x.float().double(), lambda x: x.type("torch.FloatTensor").to(dtype=torch.float64),
        lambda x: x.float().type_as(x), lambda x: x.to(torch.float32).to(x),
    ],
    "sigmoid": [torch.sigmoid, F.sigmoid, lambda x: x.sigmoid(), torch.special.expit, lambda x: x.clone().sigmoid_()],
    "transposed twice": [
        lambda x: x.transpose(1, 2).transpose(1, 2), lambda x: x.swapaxes(1, 2).swapdims(2, 1), lambda x: x.mT.mT,
        lambda x: x.permute(0, 2, 1).permute((0, 2, 1)), lambda x: x.movedim(1, 2).moveaxis(2, 1),
        lambda x: torch.permute(x, dims=(0, 2, 1)).adjoint(), lambda x: torch.transpose(x, dim0=2, dim1=1).mH,
    ],
    "a sum": [
        lambda x: x + 2 * x, lambda x: x.add(x, alpha=2), lambda x: torch.add(x, other=x, alpha=2),
        lambda x: x.clone().add_(x, alpha=2), lambda x: operator.iadd(x.clone(), 2 * x), lambda x: 2 * x - -x,
        lambda x: torch.rsub(-x, 2 * x), lambda x: x.multiply(2).subtract(-x), lambda x: x.mul(2).sub(x.neg()),
    ],
    "a quotient": [
        lambda x: x / 3, lambda x: x.div(3), lambda x: torch.true_divide(x, 3), lambda x: x.divide(3),
        lambda x: x.clone().div_(3), lambda x: x * (1 / 3),
    ],
    "a sum over tokens": [
        lambda x: x.sum(1), lambda x: x.sum(dim=1), lambda x: torch.sum(x, axis=1), lambda x: x.sum((1,)),
        lambda x: x.sum(1, keepdims=True).squeeze(1), lambda x: torch.einsum("btc->bc", x),
        lambda x: x.cumsum(1)[:, -1] * 1.0,
    ],
    "an index": [lambda x: x[:, 0], lambda x: x.select(1, 0), lambda x: x.narrow(1, 0, 1).squeeze(1)],
    "joined": [
        lambda x: torch.cat([x, -x], -1), lambda x: torch.cat([x, -x], dim=2), lambda x: torch.concat((x, -x), axis=2),
        lambda x: torch.concatenate([x, -x], 2), lambda x: torch.cat(tensors=[x, -x], dim=-1),
    ],
    "windows of tokens": [
        lambda x: x.unfold(1, 2, 1).sum(-1), lambda x: x.unfold(dimension=1, size=2, step=1).sum(-1),
    ],
    "a new dimension": [
        lambda x: x.unsqueeze(1).squeeze(1), lambda x: x[:, None].squeeze(dim=1), lambda x: x.view(3, 1, 4, 8)[:, 0],
    ],
}  # fmt: skip


class Between(nn.Module):
    """Linear, a function, Linear."""

    def __init__(self, function: Spelling) -> None:
        super().__init__()
        self.up, self.function = nn.Linear(5, 8), function
        width = function(torch.zeros(3, 4, 8, dtype=torch.float64)).shape[-1]
        self.down = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.function(self.up(x)))


def removed(function: Spelling) -> dict[str, int]:
    """How many slices of each tensor go; what is left is compared with the oracle."""
    model = oracle.jitter(Between(function), seed=0)
    inputs = normal(3, 4, 5).double()
    plan = structprune.plan(model, inputs, ratio=0.5, importance=structprune.Random(1))
    oracle.check(model, plan.apply(model), plan, inputs)
    return {name: sum(len(indices) for indices in dims.values()) for name, dims in plan.removed.items()}


@pytest.mark.parametrize("what", SPELLINGS)
def test_equal_spellings_prune_alike(what: str) -> None:
    found = [removed(function) for function in SPELLINGS[what]]
    assert found[0], "the first spelling loses channels"
    assert found == [found[0]] * len(found)
