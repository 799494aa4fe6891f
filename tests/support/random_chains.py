"""Random networks: a linear layer, two to four operations drawn from a table, a linear layer; and judging one.

Each operation takes and gives a tensor of three dimensions, of which the last holds channels. Many are odd on purpose:
negative bounds, sizes used as numbers, literals, writes into slices, writes over what a view shares.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import structprune
from structprune.errors import PinnedError, StructpruneError
from support import chain_operations, oracle

Operation = Callable[[Tensor, nn.Module], Tensor]


def _written(x: Tensor, value: Any, *index: Any) -> Tensor:
    y = x.clone()
    y[(..., *index)] = value
    return y


def _heads(x: Tensor, size: int) -> Tensor:
    b, n, c = x.shape
    q = x.reshape(b, n, c // size, size).transpose(1, 2)
    return F.scaled_dot_product_attention(q, q, q).transpose(1, 2).reshape(b, n, c)


# Operations on x: (3, 4, c) with c a multiple of 4; `m` holds what `Chain` made for the step.
PLAIN: dict[str, Operation] = {
    "relu": lambda x, m: F.relu(x), "sigmoid": lambda x, m: torch.sigmoid(x), "gelu": lambda x, m: F.gelu(x),
    "silu": lambda x, m: x * torch.sigmoid(x), "square": lambda x, m: x**2, "add one": lambda x, m: x + 1,
    "double": lambda x, m: 2 * x - x / 3, "clamp_min": lambda x, m: x.clamp_min(0), "abs": lambda x, m: x.abs(),
    "softplus": lambda x, m: F.softplus(x), "where": lambda x, m: torch.where(x > 0, x, 0.1 * x),
    "float": lambda x, m: x.float().double(), "type": lambda x, m: x.type(torch.float32).to(x),
    "threshold": lambda x, m: F.threshold(x, 0.1, 0.0), "log1p": lambda x, m: torch.log1p(x.abs()),
    "exp": lambda x, m: torch.exp(-x), "addcmul": lambda x, m: torch.addcmul(x, x, x, value=0.5),
    "flip": lambda x, m: x.flip(-1), "roll tokens": lambda x, m: x.roll(1, 1), "transposed": lambda x, m: x.mT.mT,
    "ravel": lambda x, m: x.ravel().view(3, 4, -1), "view": lambda x, m: x.view(3, 2, 2, -1).reshape(3, 4, -1),
    "two halves": lambda x, m: torch.cat(x.chunk(2, -1)[::-1], -1), "glu": lambda x, m: F.glu(torch.cat([x, x], -1)),
    "unbound": lambda x, m: sum(x.view(3, 4, 2, -1).unbind(2)) + x[..., : x.shape[-1] // 2],
    "stacked": lambda x, m: torch.stack([x, -x], -1).flatten(-2), "repeat": lambda x, m: x.repeat(1, 1, 2),
    "interleave": lambda x, m: x.repeat_interleave(2, -1), "tile": lambda x, m: torch.tile(x, (2,)),
    "pad": lambda x, m: F.pad(x, (1, 3)), "narrow": lambda x, m: x.narrow(-1, 0, x.shape[-1] // 2).repeat(1, 1, 2),
    "last two": lambda x, m: torch.cat([x, x[..., -2:]], -1), "last but one": lambda x, m: x + x[..., -2:-1],
    "every second": lambda x, m: torch.cat([x[..., ::2], x[..., 1::2]], -1),
    "write": lambda x, m: _written(x, 0.0, slice(0, 2)), "write last": lambda x, m: _written(x, 1.0, -1),
    "fill a view": lambda x, m: (lambda y: (y[..., 2:4].fill_(0.5), y)[1])(x.clone()),
    "add in place": lambda x, m: (lambda y: (y[..., :2].add_(1.0), y)[1])(x.clone()),
    "softmax tokens": lambda x, m: x.softmax(1), "softmax": lambda x, m: x.softmax(-1),
    "cumsum": lambda x, m: x.cumsum(-1), "cumsum tokens": lambda x, m: x.cumsum(1), "sort": lambda x, m: x.sort(1)[0],
    "sum": lambda x, m: x + x.sum(-1, keepdim=True), "mean": lambda x, m: x + x.mean(-1, keepdim=True),
    "mean by hand": lambda x, m: x + x.sum(-1, keepdim=True) / x.shape[-1], "amax": lambda x, m: x * x.amax(-1, True),
    "norm": lambda x, m: x / (x.norm(dim=1, keepdim=True) + 1), "normalize": lambda x, m: F.normalize(x, dim=1),
    "centred": lambda x, m: x - x.mean(-1, keepdim=True), "var": lambda x, m: x * x.var(1, keepdim=True),
    "rms": lambda x, m: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5),
    "gram": lambda x, m: (x @ x.mT) @ x, "einsum": lambda x, m: torch.einsum("bnc,bmc->bnm", x, x) @ x,
    "einsum sum": lambda x, m: x * torch.einsum("bnc->bc", x)[:, None], "cosine": lambda x, m: x * F.cosine_similarity(
        x, x.flip(1), dim=1)[:, None], "outer": lambda x, m: (x[..., :2, None] * x[:, :, None]).flatten(2),
    "size as scale": lambda x, m: x * x.shape[-1] ** -0.5, "int of size": lambda x, m: x / math.sqrt(int(x.shape[-1])),
    "size as bound": lambda x, m: x[..., : int(x.shape[-1] * 0.5)].repeat(1, 1, 2),
    "len": lambda x, m: x * len(x[0, 0]), "range": lambda x, m: torch.stack(
        [x[..., i] for i in range(x.shape[-1])], -1),
    "branch": lambda x, m: x if x.shape[-1] > 4 else -x, "heads of 4": lambda x, m: _heads(x, 4),
    "two heads": lambda x, m: _heads(x, x.shape[-1] // 2), "tensor_split": lambda x, m: torch.cat(
        x.tensor_split([2], dim=-1)[::-1], -1), "split": lambda x, m: torch.cat(x.split([2, x.shape[-1] - 2], -1), -1),
    "tril": lambda x, m: x.tril(), "diagonal": lambda x, m: x + torch.diag_embed(x.diagonal(dim1=1, dim2=2)).sum(-1)[
        :, :, None], "meshed": lambda x, m: x + torch.arange(x.shape[-1]), "masked_fill": lambda x, m: x.masked_fill(
        x < 0, 0.0), "complex": lambda x, m: torch.view_as_real(torch.view_as_complex(
        x.reshape(3, 4, -1, 2).contiguous()) * (0.6 + 0.8j)).flatten(2),
    "topk": lambda x, m: x * x.topk(2, -1)[0].sum(-1, keepdim=True),
    "dropout": lambda x, m: F.dropout(x, 0.5, training=m.training), "inner": lambda x, m: x * torch.inner(x, x[0, 0])[
        ..., None], "cdist": lambda x, m: torch.cdist(x, x) @ x, "logsumexp": lambda x, m: x + x.logsumexp(1, True),
    "gather tokens": lambda x, m: x.gather(1, x.argsort(1)), "rotate": lambda x, m: torch.cat(
        [-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]], -1) + x,
    "maximum": lambda x, m: torch.maximum(x, x.flip(1)),
}  # fmt: skip
# Operations with tensors of the model's own, made for a width.
HELD: dict[str, tuple[Callable[[int], dict[str, Any]], Operation]] = {
    "linear": (lambda c: {"a": nn.Linear(c, 12)}, lambda x, m: m.a(x)),
    "residual": (lambda c: {"a": nn.Linear(c, 8), "b": nn.Linear(8, c)}, lambda x, m: x + m.b(F.relu(m.a(x)))),
    "batch norm": (lambda c: {"a": nn.BatchNorm1d(c)}, lambda x, m: m.a(x.mT).mT),
    "layer norm": (lambda c: {"a": nn.LayerNorm(c)}, lambda x, m: m.a(x)),
    "group norm": (lambda c: {"a": nn.GroupNorm(2, c)}, lambda x, m: m.a(x.mT).mT),
    "conv": (lambda c: {"a": nn.Conv1d(c, 8, 3, padding=1)}, lambda x, m: m.a(x.mT).mT),
    "grouped": (lambda c: {"a": nn.Conv1d(c, 8, 1, groups=2)}, lambda x, m: m.a(x.mT).mT),
    "depthwise": (lambda c: {"a": nn.Conv1d(c, c, 3, padding=1, groups=c)}, lambda x, m: m.a(x.mT).mT),
    "lstm": (lambda c: {"a": nn.LSTM(c, 8, batch_first=True)}, lambda x, m: m.a(x)[0]),
    "gain": (lambda c: {"a": nn.Parameter(torch.rand(c))}, lambda x, m: x * m.a),
    "shift": (lambda c: {"a": nn.Parameter(torch.rand(c))}, lambda x, m: x + m.a),
    "prelu": (lambda c: {"a": nn.PReLU(c)}, lambda x, m: m.a(x.mT).mT),
    "mask": (lambda c: {"a": torch.arange(c) % 3 > 0}, lambda x, m: F.pad(x[..., m.a], (0, 8 - int(m.a.sum()) % 4))),
    "masked": (lambda c: {"a": torch.arange(c) % 3 > 0}, lambda x, m: torch.where(m.a, x, 0.0)),
    "permuted": (lambda c: {"a": torch.randperm(c)}, lambda x, m: x[..., m.a]),
    "index_add": (lambda c: {"a": torch.randperm(c)}, lambda x, m: x.index_add(-1, m.a, x)),
    "scaled": (lambda c: {"a": nn.Linear(c, c)}, lambda x, m: m.a(x) * m.a.out_features**-0.5),
    "matrix": (lambda c: {"a": nn.Parameter(torch.rand(c, 8))}, lambda x, m: torch.einsum("bnc,cd->bnd", x, m.a)),
    "self gate": (lambda c: {"a": nn.Linear(c, c)}, lambda x, m: x * torch.sigmoid(m.a(x))),
}  # fmt: skip


PLAIN |= chain_operations.PLAIN
HELD |= chain_operations.HELD


class Step(nn.Module):
    """One operation, with the tensors that it holds."""

    def __init__(self, name: str, width: int) -> None:
        super().__init__()
        self.name = name
        for key, value in (HELD[name][0](width) if name in HELD else {}).items():
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                self.register_buffer(key, value)
            else:
                setattr(self, key, value)

    def forward(self, x: Tensor) -> Tensor:
        return (HELD[self.name][1] if self.name in HELD else PLAIN[self.name])(x, self)


class Chain(nn.Module):
    """A linear layer, operations, a linear layer."""

    def __init__(self, names: tuple[str, ...]) -> None:
        super().__init__()
        self.up, steps, x = nn.Linear(5, 8), [], torch.randn(3, 4, 8).double()
        for name in names:
            steps.append(Step(name, x.shape[-1]).double())
            x = steps[-1](x)
        self.steps, self.down = nn.Sequential(*steps), nn.Linear(x.shape[-1], 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.steps(self.up(x)))


def draw(seed: int) -> tuple[str, ...]:
    """The operations of network number `seed`."""
    generator = random.Random(seed)
    return tuple(generator.choice([*PLAIN, *HELD]) for _ in range(generator.randint(2, 4)))


FINE = ("right", "whole", "nothing to see", "no network")


@dataclass(frozen=True)
class Judgement:
    """What became of one network: one of `FINE`, or what is wrong, with a reason."""

    names: tuple[str, ...]
    verdict: str
    reason: str = ""

    @property
    def fault(self) -> bool:
        return self.verdict not in FINE


def judge(names: tuple[str, ...], seed: int) -> Judgement:
    """Prune a chain by half at random, and compare it with the original whose removed channels are zero."""
    torch.manual_seed(seed)
    try:
        chain = Chain(names)
    except (RuntimeError, ValueError) as error:  # heads of four channels, say, for a width of ten
        return Judgement(names, "no network", str(error)[:200])
    model = oracle.jitter(chain, seed=seed)
    inputs = torch.randn(3, 4, 5, dtype=torch.float64)
    try:
        plan = structprune.plan(model, inputs, ratio=0.5, importance=structprune.Random(seed), round_to=1)
        if not plan.removed:
            return Judgement(names, "whole")
        slim = plan.apply(model)
    except PinnedError:
        return Judgement(names, "whole")
    except StructpruneError as error:
        return Judgement(names, "refused", str(error)[:200])
    except Exception as error:  # what must never reach a user
        return Judgement(names, "raw exception", f"{type(error).__name__}: {error}"[:200])
    try:
        slim(inputs)
    except Exception as error:  # of the pruned network: the fault that is looked for
        return Judgement(names, "broken forward", f"{type(error).__name__}: {error}"[:200])
    try:
        oracle.check(model, slim, plan, inputs)
    except AssertionError as error:
        # Behind a constant (``x.sum() * 0``, a saturated gate) nothing that is removed can be seen.
        verdict = "nothing to see" if "proves nothing" in str(error) else "wrong numbers"
        return Judgement(names, verdict, str(error)[:200])
    return Judgement(names, "right")
