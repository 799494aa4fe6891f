"""Families of operations: which channels may go around each, and that what is left computes the same.

``Linear along a dimension -> operation -> Linear along a dimension of the result``: half of the channels go, and the
network computes what the original computes with them at zero; or all stay, for the reason that is told.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from support import oracle
from torch import Tensor, nn

import structprune

Function = Callable[..., Tensor]


class Along(nn.Module):
    """The operation between two linear layers; `held` are its other tensors, made of the model's own.

    Args:
        function: takes the channels' tensor and the others.
        shape: of what the first layer makes.
        dim: the dimension of it that is channels.
        out: the dimension of the result that the last layer reads; None where the result itself is returned.
        held: shapes of parameters that are passed along.
    """

    def __init__(
        self, function: Function, shape: tuple[int, ...], dim: int, out: int | None, held: tuple[Any, ...]
    ) -> None:
        super().__init__()
        self.function, self.dim, self.out = function, dim, out
        self.held = nn.ParameterList(nn.Parameter(torch.randn(size)) for size in held)
        self.before = nn.Linear(3, shape[dim])
        sample = function(torch.rand(shape) + 0.1, *[p.detach().abs() + 0.1 for p in self.held])
        self.after = nn.Identity() if out is None else nn.Linear(sample.shape[out], 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.function(self.before(x).movedim(-1, self.dim), *self.held)
        y = y.real.abs() if y.is_complex() else y
        return y if self.out is None else self.after(y.to(x.dtype).movedim(self.out, -1))


def network(function: Function, shape: tuple[int, ...], dim: int, out: int | None, held: tuple[Any, ...]) -> Any:
    """The network, with an input for it."""
    torch.manual_seed(0)
    model = Along(function, shape, dim, out, held).double().eval()
    rest = [size for at, size in enumerate(shape) if at != dim % len(shape)]
    return model, torch.randn(*rest, 3).double()


class Goes(NamedTuple):
    """An operation at which half of the channels go."""

    function: Function
    shape: tuple[int, ...] = (2, 6, 5)
    dim: int = 1
    out: int | None = 1
    held: tuple[Any, ...] = ()


def _first(result: Any) -> Tensor:
    return result[0]


def _square(x: Tensor) -> Tensor:
    """Well-conditioned symmetric matrices from the last dimension."""
    outer = x[..., :, None] * x[..., None, :]
    return outer + 2 * torch.eye(x.shape[-1], dtype=x.dtype)


def _turned(x: Tensor, angles: Tensor) -> Tensor:
    """Rotary position embedding by complex numbers: (batch, heads, length, size)."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(3)


GOES = {
    "fft over time": Goes(lambda x: torch.fft.fft(x)),
    "rfft2 over the last two": Goes(lambda x: torch.fft.rfft2(x), (2, 6, 4, 5)),
    "irfftn with sizes alone": Goes(lambda x: torch.fft.irfftn(x, (4, 4)), (2, 6, 4, 3)),
    "fftn over chosen ones": Goes(lambda x: torch.fft.fftn(x, dim=(0, 2))),
    "fftshift": Goes(lambda x: torch.fft.fftshift(x, dim=-1)),
    "inverse of a batch": Goes(lambda x: torch.linalg.inv(_square(x))),
    "cholesky of a batch": Goes(lambda x: torch.linalg.cholesky(_square(x))),
    "qr of a batch": Goes(lambda x: torch.linalg.qr(_square(x))[1]),
    "determinants of a batch": Goes(lambda x: torch.linalg.det(_square(x))),
    "eigenvalues of a batch": Goes(lambda x: torch.linalg.eigvalsh(_square(x))),
    "matrix_exp of a batch": Goes(lambda x: torch.matrix_exp(_square(x).contiguous())),
    "right-hand sides of solve": Goes(lambda x, a: torch.linalg.solve(_square(a), x), (2, 5, 6), 2, 2, (5,)),
    "batch of solve": Goes(lambda x: torch.linalg.solve(_square(x), x)),
    "right-hand sides of solve_triangular": Goes(
        lambda x, a: torch.linalg.solve_triangular(_square(a), x, upper=True), (2, 5, 6), 2, 2, (5,)
    ),
    "right-hand sides from the right": Goes(
        lambda x, a: torch.linalg.solve_triangular(_square(a), x, upper=True, left=False),
        (2, 5, 5), 1, 1, (5,),
    ),
    "right-hand sides of lstsq": Goes(lambda x, a: _first(torch.linalg.lstsq(a, x)), (2, 5, 6), 2, 2, ((2, 5, 3),)),
    "cross product": Goes(lambda x, y: torch.linalg.cross(x, y), (2, 6, 3), 1, 1, ((1, 6, 3),)),
    "vecdot, passed": Goes(lambda x, y: torch.linalg.vecdot(x, y), held=((6, 5),)),
    "vecdot, summed": Goes(lambda x, y: torch.linalg.vecdot(x, y, dim=1), out=None, held=((6, 5),)),
    "multi_dot": Goes(lambda x, y, z: torch.linalg.multi_dot([x, y, z]), (4, 6), 1, None, ((6, 5), (5, 3))),
    "matrix norms of zeros": Goes(lambda x: torch.linalg.matrix_norm(x, "nuc"), out=None),
    "largest column": Goes(lambda x: torch.linalg.matrix_norm(x, 1), out=None),
    "inner": Goes(lambda x, y: torch.inner(x, y), (4, 6), 1, None, ((3, 6),)),
    "outer": Goes(lambda x, y: torch.outer(x, y), (6,), 0, 0, ((4,),)),
    "addr": Goes(lambda x, y, b: torch.addr(b, x, y), (6,), 0, 0, ((4,), (6, 4))),
    "addbmm, its batch": Goes(lambda x, y, b: torch.addbmm(b, x, y), (6, 4, 5), 0, None, ((6, 5, 3), (4, 3))),
    "tensordot": Goes(lambda x, y: torch.tensordot(x, y, ([1], [0])), (4, 6), 1, None, ((6, 3),)),
    "kron": Goes(lambda x, y: torch.kron(x, y), (4, 6), 1, 1, ((2, 3),)),
    "trace": Goes(lambda x, y: torch.trace(x.mT @ (x * y)), (4, 6), 1, None, ((6,),)),
    "cosine_similarity": Goes(lambda x, y: F.cosine_similarity(x, y, dim=1), (4, 6), 1, None, ((6,),)),
    "dist": Goes(lambda x, y: torch.dist(x, y), (4, 6), 1, None, ((4, 6),)),
    "pdist": Goes(lambda x: F.pdist(x), (4, 6), 1, None),
    "renorm, the part": Goes(lambda x: torch.renorm(x, 2, 1, 0.5)),
    "renorm, what it sums over": Goes(lambda x: torch.renorm(x, 2, 0, 0.5)),
    "norm of order 0.5": Goes(lambda x: torch.linalg.vector_norm(x, 0.5, dim=1), out=None),
    "normalize": Goes(lambda x: F.normalize(x, dim=1)),
    "quantiles over time": Goes(lambda x: torch.quantile(x, torch.tensor([0.2, 0.7]).to(x), dim=2).movedim(0, -1)),
    "nanmedian over time": Goes(lambda x: torch.nanmedian(x, dim=2).values),
    "mode, dimension kept": Goes(lambda x: torch.mode(x, dim=2, keepdim=True).values),
    "kthvalue over time": Goes(lambda x: torch.kthvalue(x, 2, dim=2).values),
    "msort along the batch": Goes(lambda x: torch.msort(x)),
    "trapezoid": Goes(lambda x, t: torch.trapezoid(x, t), held=((5,),)),
    "cumulative_trapezoid": Goes(lambda x: torch.cumulative_trapezoid(x, dx=0.5)),
    "gradient": Goes(lambda x: _first(torch.gradient(x, dim=2))),
    "diff with neighbours": Goes(lambda x, p: torch.diff(x, prepend=p, dim=2), held=((2, 6, 1),)),
    "bucketize": Goes(lambda x: torch.bucketize(x.contiguous(), torch.tensor([-0.5, 0.0, 0.5]).to(x))),
    "complex": Goes(lambda x, y: torch.complex(x, y) * torch.complex(y, x), held=((2, 6, 5),)),
    "polar": Goes(lambda x, y: torch.polar(x, y), held=((2, 6, 5),)),
    "rotary embedding, heads": Goes(_turned, (2, 6, 3, 4), 1, 1, ((3, 2),)),
    "loss of each": Goes(lambda x, y: F.mse_loss(x, y, reduction="none"), held=((2, 6, 5),)),
    "sum of losses": Goes(lambda x, y: F.huber_loss(x, y, reduction="sum"), out=None, held=((2, 6, 5),)),
    "cross entropy of each": Goes(
        lambda x, y: F.cross_entropy(x.mT, y.softmax(2).mT, reduction="none"), (2, 6, 5), 1, 1, ((2, 6, 5),)
    ),
    "batch of attention": Goes(
        lambda x, q, k: F.scaled_dot_product_attention(q, k, x).sum(1), (2, 6, 5, 4), 1, None, ((2, 6, 3, 4), (5, 4))
    ),
    "einsum of one": Goes(lambda x: torch.einsum("bct->tcb", x)),
    "einsum, sum of one": Goes(lambda x: torch.einsum("bct->bt", x), out=None),
    "einsum with a diagonal": Goes(lambda x, y: torch.einsum("cc,bct->bct", y, x), held=((6, 6),)),
    "einsum by lists": Goes(lambda x, y: torch.einsum(x, [0, 1, 2], y, [1, 3], [0, 3, 2]), out=None, held=((6, 4),)),
    "einsum with an ellipsis": Goes(lambda x, y: torch.einsum("...ct,c->...t", x, y), out=None, held=((6,),)),
    "einsum with a single entry": Goes(lambda x, y: torch.einsum("bct,bct->bct", x, y), held=((2, 1, 5),)),
}  # fmt: skip


@pytest.mark.parametrize("name", GOES)
def test_half_of_the_channels_go_and_the_rest_computes_the_same(name: str) -> None:
    model, x = network(*GOES[name])
    plan = structprune.plan(model, x, ratio=0.5, round_to=1)

    assert len(plan.removed["before.weight"][0]) == model.before.out_features // 2
    ours, expected = plan.apply(model)(x), oracle.switch_off(model, plan.removed)(x)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


class Stays(NamedTuple):
    """An operation whose channels must stay."""

    reason: str
    function: Function
    shape: tuple[int, ...] = (2, 6, 5)
    dim: int = 1
    out: int | None = 1
    held: tuple[Any, ...] = ()


STAYS = {
    "least of the absolutes": Stays("compete", lambda x: torch.linalg.vector_norm(x, -math.inf, dim=1), out=None),
    "negative order": Stays("compete", lambda x: F.normalize(x, p=-1.0, dim=1)),
    "matrix norm of negative order": Stays("compete", lambda x: torch.linalg.matrix_norm(x, -2), out=None),
    "distance of negative order": Stays("compete", lambda x, y: torch.dist(x, y, -1), out=None, held=((2, 6, 5),)),
    "spread of channels": Stays("averaged over by std", lambda x: x.std(1), out=None),
    "variance that is read": Stays("averaged over by var", lambda x: x - x.var(1, keepdim=True)),
    "gate by a spread": Stays("averaged over by std", lambda x: x * torch.sigmoid(x.std(1, keepdim=True))),
    "nanmean": Stays("averaged over by nanmean", lambda x: x.nanmean(1), out=None),
    "mean of losses": Stays("averaged over", lambda x, y: F.mse_loss(x, y), out=None, held=((2, 6, 5),)),
    "sum of losses that are not zero": Stays(
        "not zero", lambda x, y: F.binary_cross_entropy_with_logits(x, y, reduction="sum"), out=None, held=((2, 6, 5),)
    ),
    "classes": Stays("compete", lambda x, y: F.cross_entropy(x, y.softmax(1), reduction="none"), out=1,
                     held=((2, 6, 5),)),
    "fft over channels": Stays("transformed", lambda x: torch.fft.fft(x, dim=1)),
    "fftn over all": Stays("transformed", lambda x: torch.fft.fftn(x)),
    "matrices": Stays("dimension of the matrices", lambda x: torch.linalg.pinv(x)),
    "powers of channels": Stays("number of its channels", lambda x: torch.linalg.vander(x), (2, 6), 1, 2),
    "median": Stays("compete", lambda x: torch.nanmedian(x, dim=1, keepdim=True).values, out=2),
    "quantile": Stays("compete", lambda x: torch.quantile(x, 0.3, dim=1), out=None),
    "distance with a constant": Stays("summed over", lambda x, y: F.pairwise_distance(x, y, keepdim=True), (2, 6), 1,
                                      None, ((2, 6),)),
    "differences": Stays("compete", lambda x: torch.diff(x, dim=1)),
    "summed by tensordot": Stays("not zero", lambda x, y: torch.tensordot(x.exp(), y.exp(), ([1], [0])), (4, 6), 1,
                                 None, ((6, 3),)),
    "summed by einsum": Stays("not zero", lambda x: torch.einsum("bct->bt", x.exp()), out=None),
    "factors by keyword": Stays("not zero", lambda x, y: torch.matmul(other=y.exp(), input=x.exp()), (4, 6), 1, None,
                                ((6, 3),)),
    "batch of queries, summed": Stays(
        "not zero", lambda x, k: F.scaled_dot_product_attention(x, k, k).sum(1), (2, 6, 5, 4), 1, None, ((2, 1, 5, 4),)
    ),
    "positions of group_norm": Stays("a position", lambda x: F.group_norm(x, 1), (2, 3, 6), 2, 2),
    "equation from the right": Stays(
        "matrices", lambda x, a: torch.linalg.solve_triangular(_square(a), x, upper=True, left=False), (2, 5, 5), 2, 2,
        (5,),
    ),
    "coordinates by default": Stays("coordinates", lambda x, y: torch.cross(x, y), (5, 3), 0, 0, ((5, 3),)),
    "compared": Stays("compared as a whole", lambda x: x if torch.allclose(x, x.abs()) else x * 2),
    "pairs": Stays("two parts", lambda x: torch.view_as_complex(x.mT.contiguous()).real, (2, 2, 6), 1, 1),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Using torch.cross without specifying the dim arg")
@pytest.mark.parametrize("name", STAYS)
def test_channels_that_must_stay_do_and_the_reason_is_told(name: str) -> None:
    reason, *rest = STAYS[name]
    model, x = network(*rest)

    assert "before.weight" not in structprune.plan(model, x, ratio=0.5, round_to=1).removed
    assert reason in structprune.DependencyGraph(model, x).pinned()["before.weight, dim 0"]


NORMS: dict[str, Function] = {
    "standardised": lambda x: (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True, unbiased=False) + 1e-5).sqrt(),
    "with both at once": lambda x: _standardised(x),
    "by its spread": lambda x: x / (x.std(1, keepdim=True) + 1e-5),
}


def _standardised(x: Tensor) -> Tensor:
    var, mean = torch.var_mean(x, dim=1, keepdim=True, correction=0)
    return (x - mean) * torch.rsqrt(var + 1e-5)


@pytest.mark.parametrize("name", NORMS)
def test_a_norm_written_by_hand_runs_over_the_survivors(name: str) -> None:
    model, x = network(NORMS[name], (2, 6, 5), 1, 1, ())
    plan = structprune.plan(model, x, ratio=0.5, round_to=1)
    slim = plan.apply(model)

    assert len(plan.removed["before.weight"][0]) == 3
    assert structprune.verify(model, slim, plan, x).ok


def test_complex_parameters_of_removed_channels_are_zero_to_verify() -> None:
    class Spectral(nn.Module):
        """Each frequency of each channel is mixed by complex weights."""

        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Parameter(torch.randn(6, 4, 3, dtype=torch.complex128))
            self.before, self.after = nn.Conv1d(2, 6, 1).double(), nn.Conv1d(4, 2, 1).double()

        def forward(self, x: Tensor) -> Tensor:
            modes = torch.fft.rfft(self.before(x))
            return self.after(torch.fft.irfft(torch.einsum("bif,iof->bof", modes, self.mix), n=4))

    torch.manual_seed(0)
    model, x = Spectral().eval(), torch.randn(3, 2, 4, dtype=torch.float64)
    plan = structprune.plan(model, x, ratio=0.5, round_to=1)

    assert set(plan.removed["mix"]) == {0, 1}
    assert structprune.verify(model, plan.apply(model), plan, x).ok
